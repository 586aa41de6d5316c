"""The journal of a search: whatever a kill leaves behind, complete rows stay and a torn one goes."""

import json

import pytest

from featherweight.errors import ArtifactError
from featherweight.journal import Journal, read_rows


def test_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        journal.append({"b": [0.1, None, "é\n"]})
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}, {"b": [0.1, None, "é\n"]}]


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
    path, rows = tmp_path / "journal.jsonl", [{"first": 1}, {"second": 2}]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = rows[: whole[:length].count(b"\n")]
        assert read_rows(path)[0] == kept
        with Journal(path) as journal:
            assert journal.rows == kept
            journal.append({"third": 3})
        assert read_rows(path)[0] == [*kept, {"third": 3}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff"])
def test_damage_elsewhere_is_refused(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(ArtifactError, match=r"journal\.jsonl is damaged: line 2"):
        Journal(path)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(ArtifactError, match="in use by another search"):
        Journal(path)
    Journal(path).close()


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="cannot be written"):
        Journal(tmp_path)
