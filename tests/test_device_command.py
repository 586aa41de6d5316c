"""A target that is not this machine: commands that time a file, or do not; no test asserts a measured time."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from featherweight import device_command, job
from featherweight.artifact import load
from featherweight.data import Data
from featherweight.device_command import DeviceCommand
from featherweight.errors import ExportError, RecipeError
from featherweight.latency_table import LatencyTable, form
from featherweight.pipeline import compress
from featherweight.planning import plan
from featherweight.portable import assemble, export_graph
from featherweight.report.figures import headline
from featherweight.runtimes.onnxruntime import OnnxRuntime

MEASURING = Path(__file__).parent.parent / "docs" / "measuring.md"
SLOWER = 1e6  # times slower than this machine, so that its seconds are not taken for ours
COUNTING = """
import json, pathlib, sys, onnx
log = pathlib.Path({log!r})
calls = log.read_text() if log.exists() else ""
log.write_text(calls + "x")
if len(calls) == {fails_at}:
    sys.exit("board is off")
tensors = [one for one in onnx.load(sys.argv[1]).graph.initializer if len(one.dims) == 2]
took = [one.dims[0] * one.dims[1] * ({code} if one.data_type == onnx.TensorProto.INT8 else 1) for one in tensors]
print("warming up")
print(json.dumps({{"seconds": sum(took)}}))
"""
WEIGHTS = 10 * 32 + 32 * 24 + 24 * 4


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(job, "_MOST_EPOCHS", 4)


@pytest.fixture
def even(monkeypatch):
    """This machine takes a second a weight too: where each call takes microseconds, a narrower layer is not faster."""

    def operators(runtime, model, inputs, calls=30):
        tensors = onnx.load_model_from_string(model).graph.initializer
        return {one.name: float(math.prod(one.dims)) for one in tensors if len(one.dims) == 2}

    monkeypatch.setattr(OnnxRuntime, "operators", operators)
    monkeypatch.setattr("featherweight.latency_table._look", lambda call: [float(WEIGHTS)] * 8)


class Board:
    """A device whose calls take a second a weight, and which counts them; the one that `fails_at` says, from 0, fails.

    A weight of 8 bits takes `code` seconds.
    """

    def __init__(self, folder, name="board", fails_at=-1, code=1):
        self.log, script = folder / f"{name}.log", folder / f"{name}.py"
        script.write_text(COUNTING.format(log=str(self.log), fails_at=fails_at, code=code))
        self.command = f"{sys.executable} {script} {{model}}"

    @property
    def calls(self):
        return len(self.log.read_text()) if self.log.exists() else 0


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


@pytest.fixture
def script(tmp_path):
    """A command that runs some Python, without any placeholder but those given."""

    def made(code, places="{model}"):
        path = tmp_path / "a device" / "script.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        return f"{sys.executable} '{path}' {places}"

    return made


@pytest.fixture(scope="module")
def linear():
    data, model = Data(example=torch.ones(1, 3)), nn.Linear(3, 2).eval()
    return assemble(export_graph(model, data), model.state_dict()), data


def whole(task):
    return assemble(export_graph(task.model, task.data), task.model.state_dict())


def timed(table):
    """What a table file says of whole models."""
    stored = json.loads(table.read_text())
    return {key: value for key, value in stored.items() if not re.match(r"(\d+ )?operators? ", key)}


def test_the_script_of_the_documents_times_candidates(clusters, tmp_path):
    """As the documents have it, but slower by a constant, and noting the inputs that it got."""
    (code,) = re.findall(r"```python\n(.*?)```", MEASURING.read_text(), re.DOTALL)
    code = code.replace("statistics.median(", f"{SLOWER} * statistics.median(")
    assert str(SLOWER) in code
    noted, path, table = tmp_path / "inputs.json", tmp_path / "time_model.py", tmp_path / "table.json"
    path.write_text(code + f"open({str(noted)!r}, 'a').write(json.dumps([list(v.shape) for v in inputs.values()]))\n")
    command = f"{sys.executable} {path} {{model}} {{inputs}}"
    artifact = compress(
        clusters.model, clusters.data, "latency<=1e12s", trials=1, latency_table=table, device_command=command
    )
    made, found = artifact.report, timed(table)
    assert made.verdict["met"]
    assert made.before["runtime"] == made.after["runtime"] == "device"
    assert set(made.before["latency"]) == set(made.after["latency"]) == {"device", "onnxruntime", "pytorch"}
    # a million times this machine's is no matter of noise
    for side in (made.before, made.after):
        assert side["latency"]["device"]["median"] > 1000 * side["latency"]["onnxruntime"]["median"]
    assert set(re.findall(r"\[\[.*?\]\]", noted.read_text())) == {"[[1, 10]]"}  # one sample
    assert noted.read_text().count("[[") == len(found) + 2  # the verdict times both anew
    assert all(key.endswith(f" by {command}") for key in json.loads(table.read_text()))
    assert f"{form(whole(clusters))} by {command}" in found


def test_verdict_report_and_search_go_by_the_device(clusters, board, even):
    """A second a weight: seconds that are right to the last digit, and a limit that only a cut keeps."""
    artifact = compress(clusters.model, clusters.data, "latency<=70%", trials=1, device_command=board.command)
    made = artifact.report
    (row,) = made.verdict["rows"]
    assert row["before"] == WEIGHTS
    assert row["allowed"] == pytest.approx(0.7 * WEIGHTS)
    assert 0 < row["after"] <= row["allowed"]
    assert made.after["latency"]["device"]["median"] == row["after"]
    first, last = made.steps[0], made.steps[-1]
    assert (first["latency_seconds"], first["speedup"]) == (WEIGHTS, 1.0)
    assert (last["latency_seconds"], last["speedup"]) == (row["after"], WEIGHTS / row["after"])
    assert any(board.command in note for note in made.notes)
    (figure,) = [figure for figure in headline(made) if "faster" in figure.label]
    assert figure.label == "faster on the device"


@pytest.mark.parametrize(("code", "integers"), [(0.85, True), (0.95, False)])
def test_activations_are_rounded_only_where_integers_are_faster(clusters, tmp_path, even, code, integers):
    told, board = [], Board(tmp_path, code=code)
    options = {"device_command": board.command, "progress": lambda message, share: told.append(message)}
    facts = plan(clusters.model, clusters.data, "latency<=70%", **options)
    assert facts["feasible"]
    assert ("quantize_static" in facts["recipe"]) == integers
    assert ("quantize_weights" in facts["recipe"]) != integers
    assert (f"integers take {code:.0%} of the time of floats: activations stay floats" in told) != integers


def test_a_device_that_goes_away_loses_nothing_and_no_graph_is_timed_twice(clusters, tmp_path, even):
    """The second call fails; the same command goes on, and a later run with the same table times the verdict alone."""
    table, board = tmp_path / "table.json", Board(tmp_path, fails_at=1)
    options = {"trials": 1, "latency_table": table, "out": tmp_path / "model.fw"}
    asked, given = (clusters.model, clusters.data, "latency<=70%"), {**options, "device_command": board.command}
    with pytest.raises(ExportError, match="board is off"):
        compress(*asked, **given)
    assert timed(table) == {f"{form(whole(clusters))} by {board.command}": WEIGHTS}
    with pytest.raises(RecipeError, match=r"belongs to a run with device_command=.*not None"):
        compress(*asked, **options, resume=True)
    first = compress(*asked, **given, resume=True)
    calls = board.calls
    assert calls == 1 + len(timed(table)) + 2  # what failed, each graph once, and the verdict
    assert len(timed(table)) > 2
    assert compress(*asked, **given).to_bytes() == first.to_bytes()
    assert board.calls == calls + 2


def test_a_table_tells_commands_runtimes_and_this_machine_apart(linear, board, tmp_path):
    model, data = linear
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"original": 3.0, form(model): 2.0}))
    table, other = LatencyTable(path, clock=DeviceCommand(board.command)), Board(tmp_path, "other")
    for _ in range(2):
        assert table.original(model, data) == table.candidate(model, model, data) == 6
        assert board.calls == 1
    assert LatencyTable(path, clock=DeviceCommand(other.command)).original(model, data) == 6
    assert other.calls == 1
    here = LatencyTable(path)
    assert (here.original(model, data), here.candidate(model, model, data)) == (3.0, 2.0)
    assert len(here.seconds) == 4


def test_operators_are_scaled_to_the_original_there(linear, board, monkeypatch):
    """Of made-up seconds here: an operator takes a quarter of the original, there as here."""
    model, data = linear
    monkeypatch.setattr("featherweight.latency_table._look", lambda call: [4.0] * 8)
    monkeypatch.setattr(OnnxRuntime, "operators", lambda runtime, graph, inputs, calls=30: {"one": 1.0})
    table = LatencyTable(None, clock=DeviceCommand(board.command))
    assert table.operators({"a": (model, data.example)}, model, data) == {"a": 6 / 4}


def test_the_exported_file_is_that_of_the_runtime(linear, script):
    pytest.importorskip("openvino")
    model, data = linear
    command = script("import pathlib, sys; print(len(list(pathlib.Path(sys.argv[1]).parent.glob('model.*'))))")
    assert DeviceCommand(command, "openvino")(model, data.example) == 2  # model.xml and model.bin


def test_inputs_go_by_the_names_of_the_graph(clusters, script, tmp_path):
    """Words are split before paths are put in, each as often as it is asked for, and stdin is empty."""
    code = f"""
import json, sys, numpy
with numpy.load(sys.argv[1].removeprefix("--inputs=")) as given:
    numpy.savez({str(tmp_path / "given.npz")!r}, **given)
assert sys.argv[2] == sys.argv[3] and not sys.stdin.read()
print(0.25)
print()
"""
    model = whole(clusters)
    example = torch.arange(10.0)[None]
    assert DeviceCommand(script(code, "--inputs={inputs} {model} {model}"))(model, example) == 0.25
    (wanted,) = [item.name for item in onnx.load_model_from_string(model).graph.input]
    with np.load(tmp_path / "given.npz") as given:
        assert list(given) == [wanted]
        assert np.array_equal(given[wanted], example.numpy())


@pytest.mark.parametrize(
    ("printed", "seconds"), [("0.5", 0.5), ("2", 2.0), ("1e-3", 1e-3), ('{"seconds": 3, "runs": 9}', 3.0)]
)
def test_what_a_command_may_print(linear, script, printed, seconds):
    model, data = linear
    assert DeviceCommand(script(f"print('12'); print({printed!r})"))(model, data.example) == seconds


@pytest.mark.parametrize(
    "printed", ["", "fast", "0", "-1", "nan", "inf", "{}", '{"seconds": true}', '{"seconds": null}', "{", "[1]", "1 ms"]
)
def test_what_is_no_number_of_seconds_is_refused(linear, script, printed):
    model, data = linear
    command = script(f"import sys; print({printed!r}); sys.stderr.write('first\\nlast words\\n\\n')")
    with pytest.raises(ExportError) as caught:
        DeviceCommand(command)(model, data.example)
    words = repr(printed) + ", which is no positive number" if printed else "printed nothing"
    for word in (repr(command), "exit status 0", words, "stderr: last words.", '{"seconds": 0.0042}'):
        assert word in str(caught.value)
    assert "first" not in str(caught.value)


def test_a_command_that_fails_says_how(linear, script):
    model, data = linear
    command = script("import sys; print(0.5); sys.exit('no route to board')")
    with pytest.raises(ExportError) as caught:
        DeviceCommand(command)(model, data.example)
    for word in (repr(command), "exit status 1", "no route to board", "--resume"):
        assert word in str(caught.value)


def test_a_command_that_hangs_is_ended(linear, script, monkeypatch):
    model, data = linear
    monkeypatch.setattr(device_command, "_PATIENCE", 0.5)
    command = script("import sys, time; sys.stderr.write('waiting for board\\n'); sys.stderr.flush(); time.sleep(60)")
    with pytest.raises(ExportError, match=r"was not done after 0\.5 seconds"):
        DeviceCommand(command)(model, data.example)


def test_a_file_that_is_no_program_does_not_start(linear, tmp_path):
    model, data = linear
    path = tmp_path / "tool"
    path.write_bytes(b"\x7fELF nothing")
    path.chmod(0o755)
    with pytest.raises(ExportError, match=r"does not start \(.*stderr is empty"):
        DeviceCommand(f"{path} {{model}}")(model, data.example)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python time.py", "has no {model}"),
        ("", "has no {model}"),
        ("python time.py {model} {input}", "unknown placeholder {input}. Did you mean 'inputs'?"),
        ("python 'time.py {model}", "cannot be split into words: No closing quotation"),
        ("no-such-program {model}", "there is no program 'no-such-program' here"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(clusters, tmp_path, command, words):
    with pytest.raises(RecipeError) as caught:
        compress(clusters.model, clusters.data, "latency<=50%", device_command=command, out=tmp_path / "m.fw")
    assert words in str(caught.value)
    assert repr(command) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_a_latency_limit_a_command_makes_no_sense(clusters, board):
    for call in (compress, plan):
        with pytest.raises(RecipeError, match=r"size<=60%, drop<=5pt has none: add one such as latency<=50%"):
            call(clusters.model, clusters.data, "size<=60%, drop<=5pt", device_command=board.command)
    assert board.calls == 0


def test_a_plan_asks_the_device(clusters, board, even):
    facts = plan(clusters.model, clusters.data, "latency<=70%", trials=1, device_command=board.command)
    (row,) = facts["limits"]
    assert row["allowed"] == pytest.approx(0.7 * WEIGHTS)
    assert row["untrained"] == int(row["untrained"]) < WEIGHTS
    assert facts["feasible"]


def test_the_command_line_takes_it(command, refused, task_file, board, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: [quantize_weights: {bits: 8}]")
    told = ("--device-command", board.command)
    options = (f"{task_file}:task", *told, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "model.fw")
    done = command("compress", *options, "--budget", "latency<=1e12s", "--json")
    facts = json.loads(done.out)
    assert done.code == 0
    assert facts["verdict"]["rows"][0]["before"] == facts["latency"]["before"]["device"]["median"] == WEIGHTS
    assert "latency_table" not in load(tmp_path / "model.fw").facts  # no choice was made by time
    assert any(board.command in note for note in facts["notes"])
    refused("compress", *options, "--budget", "size<=90%", words=("has none", "latency<=50%"))
    refused("plan", f"{task_file}:task", *told, "--budget", "size<=90%", words=("has none",))
    for name in ("compress", "plan"):
        assert "--device-command" in command(name, "--help").out
