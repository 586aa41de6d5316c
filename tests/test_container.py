"""The container and its compressed sections come back whole or are refused with the reason."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.coding import Sections, deflate, inflate, pack, unpack
from featherweight.coding.container import LONG, MAGIC, MOST_SECTIONS, VERSION
from featherweight.coding.varint import Reader, signed_varint, varint
from featherweight.errors import ArtifactError

SECTIONS = [b"", b"manifest", bytes(range(256)), b"\0" * 300]
FILE = pack(SECTIONS)


def section(data, place):
    return Sections(io.BytesIO(data), "model.fw")[place]


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_sections_come_back(sections):
    data = pack(sections)
    assert unpack(data, "model.fw") == sections
    assert len(data) <= 8 + sum(len(section) + 2 for section in sections)


@pytest.mark.parametrize("length", range(len(FILE)))
def test_cut_files_are_refused(length):
    with pytest.raises(ArtifactError, match=r"model\.fw: (cut short|not a Featherweight)"):
        unpack(FILE[:length], "model.fw")


@pytest.mark.parametrize("position", range(len(FILE)))
def test_flipped_bytes_are_refused(position):
    for flip in (1, 128, 255):
        damaged = bytearray(FILE)
        damaged[position] ^= flip
        with pytest.raises(ArtifactError, match=r"model\.fw"):
            unpack(bytes(damaged), "model.fw")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04 a zip file", "not a Featherweight file"),
        (b"", "not a Featherweight file"),
        (MAGIC + b"\x09" + FILE[3:], "version 9"),
        (FILE + b"x", "too many at the end"),
        (FILE[:-1] + bytes([FILE[-1] ^ 1]), "checksum"),
        (MAGIC + bytes([VERSION]) + varint(MOST_SECTIONS + 1) + bytes(20), "exceeds its bound, 100000"),
        (MAGIC + bytes([VERSION]) + varint(1) + varint(1 << 39) + bytes(20), "cut short"),
        (MAGIC + bytes([VERSION]) + b"\xff" * 30, "exceeds its bound"),
    ],
)
def test_the_reason_is_named(data, reason):
    with pytest.raises(ArtifactError, match=reason) as caught:
        unpack(data, "model.fw")
    assert "model.fw" in str(caught.value)


LONG_PARTS = [b"short", bytes(range(256)) * 4, b"", b"y" * LONG, b"z" * (LONG - 1)]


def test_long_sections_have_their_own_checksum():
    data = pack(LONG_PARTS)
    assert unpack(data, "model.fw") == LONG_PARTS
    assert [section(data, place) for place in range(5)] == LONG_PARTS
    assert len(data) == 8 + sum(len(part) for part in LONG_PARTS) + 1 + 3 * 2 + 1 + 2 * 2
    for place in (-1, 5):
        with pytest.raises(ArtifactError, match="there are 5"):
            section(data, place)


def test_damage_is_found_in_the_section_that_has_it():
    data = bytearray(pack(LONG_PARTS))
    data[-4 - (LONG - 1) - 2 - 10] ^= 4  # in the fourth section
    with pytest.raises(ArtifactError, match="damaged in section 3"):
        unpack(bytes(data), "model.fw")
    with pytest.raises(ArtifactError, match="section 3"):
        section(bytes(data), 3)
    assert section(bytes(data), 1) == LONG_PARTS[1]


def test_too_many_sections_are_not_written():
    with pytest.raises(ArtifactError, match="at most 100000"):
        pack([b""] * (MOST_SECTIONS + 1))


@given(st.binary(max_size=200))
def test_hostile_files_are_refused(data):
    for start in (b"", FILE[:3]):
        with pytest.raises(ArtifactError):
            unpack(start + data, "model.fw")


@given(st.binary(max_size=2000), st.sampled_from([b"", b"the quick brown fox" * 5]))
def test_compressed_bytes_come_back(data, dictionary):
    stream = deflate(data, dictionary)
    assert len(stream) <= len(data) + 1
    assert inflate(stream, len(data), dictionary) == data


def test_a_dictionary_saves_bytes():
    text = b'{"technique":"quantize_weights","bits":4,"group":64}'
    assert len(deflate(text, text)) < 10 < len(deflate(text))


@pytest.mark.parametrize("size", [10_000, 5_000_000])
def test_bombs_stop_at_the_limit(size):
    with pytest.raises(ArtifactError, match="more than the 1000 bytes"):
        inflate(deflate(bytes(size)), 1000)


@pytest.mark.parametrize("data", [b"ab" * 60, b"abcdefghij" * 1000, b"x"])
def test_cut_compressed_sections_are_refused(data):
    stream = deflate(data)
    for length in range(len(stream)):
        try:
            assert inflate(stream[:length], 10_000) != data
        except ArtifactError:
            continue


@settings(max_examples=300)
@given(st.integers(0, 3), st.binary(max_size=60))
def test_hostile_compressed_sections_raise_only_artifact_errors(way, data):
    try:
        assert len(inflate(bytes([way]) + data, 500)) <= 500
    except ArtifactError:
        return


@given(st.integers(0, 2**70 - 1), st.integers(-(2**60), 2**60))
def test_varints_come_back(number, signed):
    reader = Reader(varint(number) + signed_varint(signed), "numbers")
    assert reader.varint(2**70) == number
    assert reader.signed_varint(2**60) == signed
    reader.end()


@pytest.mark.parametrize("number", [-1, 2**70])
def test_varints_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=str(number)):
        varint(number)
