"""Timing: in turn, on one thread, and from a table; no test asserts a time."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import featherweight.latency
from featherweight.data import Data
from featherweight.errors import ArtifactError
from featherweight.latency import Latency, interleaved, latencies, one_thread
from featherweight.latency_table import LatencyTable, form
from featherweight.portable import assemble, export_graph


@pytest.fixture(scope="module")
def linear():
    data, model = Data(example=torch.ones(1, 3)), nn.Linear(3, 2).eval()
    graph = export_graph(model, data)
    return model, assemble(graph, model.state_dict()), data


def test_calls_alternate():
    order = []
    timed = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, least=7)
    last = ["".join(order[place : place + 4]) for place in range(len(order) - 28, len(order), 4)]
    assert set(last) == {"aabb", "bbaa"}, "each round has an order of its own"
    assert {name: item.runs for name, item in timed.items()} == {"a": 7, "b": 7}
    assert all(0 <= item.low <= item.median <= item.high for item in timed.values())


def test_the_first_calls_of_a_turn_are_not_timed(monkeypatch):
    """What another program left in the caches is not the model's; the clock here goes on by what calls say they take."""
    clock, last = [0.0], []
    monkeypatch.setattr(featherweight.latency, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow_after_another():
        clock[0] += 1.0 if last[-1:] == ["slow"] else 9.0
        last.append("slow")

    def other():
        clock[0] += 2.0
        last.append("other")

    timed = interleaved({"slow": slow_after_another, "other": other}, seconds=0.0, least=7)
    assert (timed["slow"].high, timed["other"].median) == (1.0, 2.0)
    assert last.count("slow") == 1 + 2 * 7


def test_rounds_are_limited():
    assert interleaved({"a": lambda: None}, seconds=60.0, least=3, most=5)["a"].runs == 5


def test_one_thread_is_put_back_after_an_error():
    def fails():
        with one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError("inside")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="inside"):
            fails()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_modules_and_serialized_models_are_timed_side_by_side(linear):
    model, whole, data = linear
    model.train()
    timed = latencies({"pytorch": model, "onnxruntime": whole}, data)
    assert set(timed) == {"pytorch", "onnxruntime"}
    assert all(isinstance(item, Latency) for item in timed.values())
    assert model.training
    model.eval()


def test_a_table_is_measured_once_then_read(linear, tmp_path, monkeypatch):
    whole, data = linear[1:]
    table = LatencyTable(tmp_path / "new" / "latency.json")
    first = table.candidate(whole, whole, data)
    monkeypatch.setattr("featherweight.latency_table.latencies", lambda *given, **named: pytest.fail("measured again"))
    assert table.candidate(whole, whole, data) == first
    again = LatencyTable(tmp_path / "new" / "latency.json")
    assert again.seconds == table.seconds
    assert again.digest() == table.digest()
    assert again.candidate(whole, whole, data) == first
    assert again.original(whole, data) == table.seconds["original"]


def test_a_table_says_what_it_is_told(linear, tmp_path):
    whole, data = linear[1:]
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"original": 3.0, form(whole): 2.0}))
    table = LatencyTable(path)
    assert (table.original(whole, data), table.candidate(whole, whole, data)) == (3.0, 2.0)


def test_the_digest_follows_the_seconds_and_not_their_order(tmp_path):
    one, other, third = (tmp_path / name for name in "abc")
    one.write_text('{"x": 1.0, "y": 2.0}')
    other.write_text('{"y": 2.0, "x": 1.0}')
    third.write_text('{"x": 1.0, "y": 2.5}')
    assert LatencyTable(one).digest() == LatencyTable(other).digest() != LatencyTable(third).digest()


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "b"}', '{"a": null}', "\x80"])
def test_a_foreign_table_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ArtifactError, match=r"latency\.json is no latency table"):
        LatencyTable(path)


def test_without_a_path_the_table_stays_in_memory(linear):
    whole, data = linear[1:]
    table = LatencyTable(None)
    table.candidate(whole, whole, data)
    assert len(table.seconds) == 2


def test_widths_are_told_apart_and_values_are_not(linear):
    """Graphs without weights are alike at any width, so weights' shapes count, and what training changes does not."""
    _, whole, data = linear

    def exported(model):
        return assemble(export_graph(model, data), model.state_dict())

    torch.manual_seed(1)
    assert form(exported(nn.Linear(3, 2))) == form(whole)
    assert form(exported(nn.Linear(3, 4))) != form(whole)


def test_interrupted_calls_do_not_count(linear, monkeypatch):
    """Half the calls of the original wait for another process: the candidate is half as slow all the same."""
    _, whole, data = linear
    timed = {"original": Latency(10.0, 2.0, 12.0, 20), "candidate": Latency(1.0, 1.0, 1.5, 20)}
    monkeypatch.setattr("featherweight.latency_table.latencies", lambda *given, **named: timed)
    table = LatencyTable(None)
    assert table.candidate(whole, whole, data) / table.original(whole, data) == 0.5


def test_a_table_holds_several_runtimes(linear, tmp_path):
    _, whole, data = linear
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"original": 3.0, "openvino original": 2.0}))
    assert LatencyTable(path).original(whole, data) == 3.0
    assert LatencyTable(path, "openvino").original(whole, data) == 2.0


def test_operators_are_timed_once_and_relative_to_the_original(linear, tmp_path, monkeypatch):
    _, whole, data = linear
    table = LatencyTable(tmp_path / "latency.json")
    graphs = {"one": (whole, data.example), "other": (whole, data.example)}
    found = table.operators(graphs, whole, data)
    assert found["one"] == found["other"] > 0
    assert len(table.seconds) == 2
    monkeypatch.setattr("featherweight.latency_table.find_runtime", lambda name: pytest.fail("measured again"))
    assert LatencyTable(tmp_path / "latency.json").operators(graphs, whole, data) == found
