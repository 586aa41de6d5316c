"""Whatever goes into the coders comes back bit for bit, in few bytes, and hostile bytes only raise `ArtifactError`."""

import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.coding import Reader, decode_symbols, decode_tensor, encode_symbols, encode_tensor, fixed, neighbours
from featherweight.coding.fits import plans
from featherweight.coding.machine import has_compiler
from featherweight.coding.neighbours import MOST_COLUMNS, Plan, decode_neighbours, encode_neighbours
from featherweight.errors import ArtifactError

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
CURVE, LOGARITHMS, SLOPES, BELLS = (
    3792747197,
    3964995938,
    3410454994,
    1004059665,
)  # checksums of the tables: a change makes older files unreadable
UNUSUAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 5e-324, 1.0, -2.5]


def entropy_bytes(values):
    """Return the order-0 entropy of the values, in bytes."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def laplace(rng, shape, scale=1.6):
    return np.rint(rng.laplace(0, scale, shape)).clip(-7, 7).astype(np.int64)


def survivors(rng, shape):
    values = laplace(rng, shape, 2.0)
    return np.where(values == 0, rng.choice([-1, 1], shape), values)


def uneven(rng, rows, columns, share):
    """Return a sparse 4-bit matrix, `[rows, columns]`, whose columns and rows differ in density, some empty."""
    column = np.exp(rng.normal(size=columns)) * (rng.random(columns) > 0.4)
    row = np.exp(0.7 * rng.normal(size=rows)) * (rng.random(rows) > 0.3)
    chance = np.outer(row, column)
    return survivors(rng, chance.shape) * (rng.random(chance.shape) < share * chance / max(chance.mean(), 1e-9))


def kernels(rng, rows, channels, low, high):
    """Return codes of smooth 3 x 3 kernels, `[rows, channels * 9]`."""
    field = rng.normal(size=(rows, channels, 5, 5))
    smooth = sum(field[:, :, a : a + 3, b : b + 3] for a in range(3) for b in range(3))
    return np.rint(smooth).clip(low, high).astype(np.int64).reshape(rows, -1)


def same(symbols, period=1):
    stream = encode_symbols(symbols, period)
    assert np.array_equal(decode_symbols(stream, symbols.shape, symbols.dtype), symbols)
    return len(stream)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.sampled_from([0, 1, 3, 7, 127, 300, 5000, 2**15 - 1, 2**31 - 1]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0, 1, -3, 900]),
)
def test_symbols_come_back(seed, shape, largest, filled, common):
    rng = np.random.default_rng(seed)
    values = rng.integers(-largest - 1, largest + 1, shape, dtype=np.int64)
    same(np.where(rng.random(shape) < filled, values, min(common, largest)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 300), st.sampled_from([0.02, 0.1, 0.4]))
def test_uneven_sparse_symbols_come_back(seed, rows, columns, share):
    same(uneven(np.random.default_rng(seed), rows, columns, share))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 50), st.integers(2, 200))
def test_symbols_of_uneven_scale_come_back(seed, rows, columns):
    rng = np.random.default_rng(seed)
    same(laplace(rng, (rows, columns), 3 * np.exp(rng.normal(size=columns))))


KINDS = {
    "four bits": lambda rng, shape: laplace(rng, shape),
    "eight bits": lambda rng, shape: np.rint(rng.normal(0, 30, shape)).clip(-127, 127).astype(np.int64),
    "ternary": lambda rng, shape: laplace(rng, shape, 0.7).clip(-1, 1),
    "flags": lambda rng, shape: (rng.random(shape) < 0.3).astype(np.int64),
    "sparse": lambda rng, shape: uneven(rng, *shape, 0.08),
    "sparse eight bits": lambda rng, shape: uneven(rng, *shape, 0.08) * 18,
    "indices": lambda rng, shape: rng.binomial(31, 0.5, shape).astype(np.int64),
    "one-sided": lambda rng, shape: rng.geometric(0.4, shape).clip(0, 200),
    "kernels": lambda rng, shape: kernels(rng, shape[0], -(-shape[1] // 9), -7, 7)[:, : shape[1]],
}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.integers(1, 60),
    st.sampled_from(list(KINDS)),
    st.sampled_from([1, 4, 9, 25, 49]),
)
def test_neighbours_come_back(seed, rows, columns, kind, period):
    places, size, usual = alphabet(KINDS[kind](np.random.default_rng(seed), (rows, columns)))
    for plan in plans(places, size, usual, period, True):
        stream = encode_neighbours(plan, places, usual)
        assert np.array_equal(decode_neighbours(Reader(stream, "stream"), rows, columns, size, usual), places)


@pytest.mark.skipif(not has_compiler(), reason="the extra speed is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_plain_agree_to_the_last_byte(kind):
    places, size, usual = alphabet(KINDS[kind](np.random.default_rng(7), (20, 81)))
    for plan in plans(places, size, usual, 9, True):
        streams = [encode_neighbours(plan, places, usual, fast) for fast in (False, True)]
        assert streams[0] == streams[1]
        for data in (streams[0], streams[0][: len(streams[0]) // 2], streams[0][:-6] + b"damage"):
            read = [decode_neighbours(Reader(data, "s"), 20, 81, size, usual, fast) for fast in (False, True)]
            assert np.array_equal(read[0], read[1])


def test_counts_are_halved_before_they_overflow():
    constant = np.zeros((400, 60), np.int64)
    constant[::50, 7] = 3
    assert same(constant) < 60


def alphabet(symbols):
    """Return values from 0, their number, and the place of zero."""
    least = int(symbols.min())
    size = max(2, int(symbols.max()) - least + 1)
    return (symbols - least).astype(np.int32), size, min(max(0, -least), size - 1)


def test_kernels_go_far_below_entropy():
    rng = np.random.default_rng(8)
    weights = kernels(rng, 64, 64, -7, 7)
    assert same(weights, 9) < 0.88 * entropy_bytes(weights)
    wide = kernels(rng, 64, 64, -7, 7) * 9 + rng.integers(-4, 5, (64, 576))
    assert same(wide, 9) < 0.95 * entropy_bytes(wide)
    assert len(encode_tensor(torch.from_numpy(weights.reshape(64, 64, 3, 3)))) == 1 + len(encode_symbols(weights, 9))


def test_no_more_columns_than_memory_was_promised_for():
    plan = Plan(3, 1, False, 60, 0, 1, np.zeros((1, 5), np.int64), np.zeros(6, np.int64))
    stream = b"\x04" + b"\x03" + plan.pack(1) + bytes(8)
    with pytest.raises(ArtifactError, match="columns"):
        decode_symbols(stream, (1, MOST_COLUMNS + 1))
    assert decode_symbols(stream, (1, 5)).shape == (1, 5)


def test_few_bytes_do_not_claim_hours_of_work():
    plan = Plan(3, 1, False, 60, 0, 1, np.zeros((1, 5), np.int64), np.zeros(6, np.int64))
    stream = b"\x04" + b"\x03" + plan.pack(1) + bytes(8)
    with pytest.raises(ArtifactError, match="cannot hold 16384 × 16384"):
        decode_symbols(stream, (1 << 14, 1 << 14))


def test_a_matrix_of_almost_nothing_takes_another_way():
    almost = np.zeros((1100, 1000), np.int64)
    almost[3, 5] = 1
    assert same(almost) < 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x40\x20\x80", "unknown plan"),
        (b"\x00\xc1\x80", "unknown plan"),
        (b"\x04\x20\x80\x00", "no columns"),
        (b"\x10\x20\x80\x00", "period of 0"),
        (b"\x10\x20\x80\x21", "period of 33"),
        (b"\x20\x20\x80\x01\x02", "cut short"),
        (b"\x08\x20\x80\x0f", "exceeds its bound"),
    ],
)
def test_plans_that_are_not_to_be_believed(data, reason):
    with pytest.raises(ArtifactError, match=reason):
        decode_neighbours(Reader(data, "stream"), 3, 4, 15, 7)


@pytest.mark.parametrize("value", [0, -1, 7, 2**31 - 1, -(2**31)])
def test_constants_take_a_few_bytes(value):
    assert same(np.full((300, 784), value)) <= 6


@pytest.mark.parametrize(("dtype", "width"), [(np.int8, 1), (np.uint8, 1), (np.int16, 2), (np.int32, 4)])
def test_noise_hardly_grows(dtype, width):
    bounds = np.iinfo(dtype)
    noise = np.random.default_rng(0).integers(bounds.min, bounds.max, (50, 60), dtype, endpoint=True)
    assert same(noise) <= width * noise.size + 7


@pytest.mark.parametrize("bad", [np.zeros(3, np.int64), np.zeros((2, 2)), np.full((1, 1), 2**31)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(ArtifactError):
        encode_symbols(bad)


@pytest.mark.parametrize("density", [0.03, 0.1])
def test_evenly_sparse_weights_stay_within_one_percent_of_entropy(density):
    rng = np.random.default_rng(1)
    weights = survivors(rng, (300, 784)) * (rng.random((300, 784)) < density)
    assert same(weights) <= 1.01 * entropy_bytes(weights)


def test_unevenly_sparse_weights_go_well_below_entropy():
    weights = uneven(np.random.default_rng(2), 300, 784, 0.03)
    assert same(weights) < 0.85 * entropy_bytes(weights)


def test_dense_weights_stay_at_entropy_and_tables_are_small():
    rng = np.random.default_rng(3)
    dense, eight, tiny = laplace(rng, (300, 784)), np.rint(rng.normal(0, 30, (64, 288))), laplace(rng, (10, 50))
    assert same(dense) <= 1.001 * entropy_bytes(dense)
    assert same(eight.astype(np.int64)) <= 1.01 * entropy_bytes(eight)
    assert same(tiny) <= entropy_bytes(tiny) + 12


def test_uneven_scales_go_below_entropy():
    rng = np.random.default_rng(4)
    weights = laplace(rng, (300, 784), 1.6 * np.exp(0.6 * rng.normal(size=784)))
    assert same(weights) < 0.97 * entropy_bytes(weights)


def test_a_layer_codes_within_seconds():
    weights = uneven(np.random.default_rng(5), 512, 2304, 0.05)
    started = time.perf_counter()
    same(weights)
    assert time.perf_counter() - started < 10  # 1 s on one core; the rest is for busy machines


def test_the_tables_are_those_of_every_machine():
    assert zlib.crc32(np.rint(fixed._CURVE * fixed.ONE).astype("<i8").tobytes()) == CURVE
    assert zlib.crc32(fixed.logarithm(np.arange(1, 100_000)).astype("<i8").tobytes()) == LOGARITHMS
    assert zlib.crc32(neighbours._SLOPE_SPREAD.weights().astype("<i8").tobytes()) == SLOPES
    plan = Plan(255, 127, False, 32, -8, 3, neighbours.usual_slopes(False, 3), neighbours.usual_weights(False))
    tables = (*plan._bells(), plan._classes())
    assert zlib.crc32(b"".join(table.astype("<i4").tobytes() for table in tables)) == BELLS


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(FLOATS),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([0.0, 0.3, 0.95]),
)
def test_floats_come_back_bit_for_bit(seed, dtype, shape, zeros):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    odd = torch.tensor(UNUSUAL, dtype=torch.float64)[torch.randint(len(UNUSUAL), shape, generator=generator)]
    tensor = torch.where(torch.rand(shape, generator=generator) < 0.2, odd, tensor)
    tensor = torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, tensor).to(dtype)
    check(tensor)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(INTEGERS),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([1, 7, 2**31, 2**62]),
)
def test_integers_come_back(seed, dtype, shape, largest):
    generator = torch.Generator().manual_seed(seed)
    check(torch.randint(-largest, largest, shape, generator=generator).to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=8, max_size=400), st.sampled_from(FLOATS))
def test_any_bit_pattern_comes_back(data, dtype):
    check(torch.frombuffer(bytearray(data[: len(data) // 8 * 8]), dtype=dtype))


def check(tensor):
    decoded = decode_tensor(encode_tensor(tensor), tensor.dtype, tuple(tensor.shape))
    assert decoded.dtype == tensor.dtype
    assert decoded.shape == tensor.shape
    assert bits(decoded) == bits(tensor)


def bits(tensor):
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_rounded_floats_cost_what_they_hold():
    values = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    assert len(encode_tensor(values.bfloat16().float())) <= 1.45 * values.numel()
    assert len(encode_tensor(values)) <= 3.6 * values.numel()
    sparse = torch.where(values.abs() > 2, values, 0.0)
    assert len(encode_tensor(sparse)) <= (3.6 * 0.046 + 0.28 / 8) * values.numel()


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse()])
def test_other_tensors_are_refused(tensor):
    with pytest.raises(ArtifactError, match="cannot be written"):
        encode_tensor(tensor)


@pytest.mark.parametrize("shape", [(2**20, 2**20), (-1, 3), (-1, -3)])
def test_shapes_beyond_the_limit_are_refused(shape):
    with pytest.raises(ArtifactError, match="exceeds"):
        decode_symbols(b"\1\0", shape)
    with pytest.raises(ArtifactError, match="exceeds"):
        decode_tensor(b"\0\1\0", torch.int8, shape)
    with pytest.raises(ArtifactError, match="exceeds 10 elements"):
        decode_tensor(b"\0\1\0", torch.int8, (11,), limit=10)


def test_values_beyond_the_type_are_refused():
    stream = encode_symbols(np.array([[300, -5]]))
    with pytest.raises(ArtifactError, match="does not fit"):
        decode_symbols(stream, (1, 2), np.int8)
    with pytest.raises(ArtifactError, match="does not fit"):
        decode_tensor(b"\0" + stream, torch.bool, (1, 2))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([*range(8), *range(16, 24)]), st.binary(max_size=80), st.sampled_from([(0, 3), (7, 9), (30, 40)])
)
def test_hostile_symbol_streams_raise_only_artifact_errors(head, data, shape):
    try:
        assert decode_symbols(bytes([head]) + data, shape).shape == shape
    except ArtifactError:
        return


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.binary(max_size=80), st.sampled_from(FLOATS + INTEGERS))
def test_hostile_tensor_streams_raise_only_artifact_errors(way, data, dtype):
    try:
        assert decode_tensor(bytes([way]) + data, dtype, (6, 7)).shape == (6, 7)
    except ArtifactError:
        return


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3))
def test_damaged_streams_raise_only_artifact_errors(seed, kind):
    rng = np.random.default_rng(seed)
    scales = 3 * np.exp(rng.normal(size=50))
    wide = rng.integers(-(2**30), 2**30, (20, 50))
    symbols = [laplace(rng, (20, 50)), uneven(rng, 20, 50, 0.1), laplace(rng, (20, 50), scales), wide][kind]
    stream = bytearray(encode_symbols(symbols))
    stream[int(rng.integers(min(12, len(stream))))] ^= int(rng.integers(1, 256))
    for data in (bytes(stream), bytes(stream[: len(stream) // 2])):
        try:
            assert decode_symbols(data, symbols.shape).shape == symbols.shape
        except ArtifactError:
            continue


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(FLOATS),
    st.sampled_from([(), (1,), (7,), (300,), (12, 3, 3)]),
    st.integers(-8, 6),
    st.sampled_from([3, 60, 120]),
)
def test_multiples_of_a_power_of_two_are_coded_as_such(seed, dtype, shape, octave, largest):
    multiples = np.random.default_rng(seed).integers(-largest, largest + 1, shape)
    values = torch.from_numpy(np.asarray(multiples * 2.0**octave)).to(dtype)
    stream = encode_tensor(values)
    assert torch.equal(decode_tensor(stream, dtype, shape), values)
    assert len(stream) <= 4 + len(encode_symbols(np.asarray(multiples).reshape(1, -1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2**17), st.integers(-20, 6), st.sampled_from([1, 7, 127]))
def test_multiples_of_any_step_take_the_bytes_of_whole_numbers(seed, step, octave, largest):
    multiples = np.random.default_rng(seed).integers(-largest, largest + 1, (40, 10))
    values = torch.from_numpy(multiples * step * 2.0**octave).float()
    stream = encode_tensor(values)
    assert torch.equal(decode_tensor(stream, torch.float32, (40, 10)), values)
    assert len(stream) <= 8 + len(encode_symbols(multiples))


def test_rounded_scales_and_biases_take_few_bytes():
    generator = torch.Generator().manual_seed(0)
    assert len(encode_tensor(torch.tensor([13 / 1024]))) <= 5
    biases = torch.randint(-60, 61, (200,), generator=generator) / 512
    assert len(encode_tensor(biases)) < 1.08 * 200 * np.log2(121) / 8
