"""The command line: every command, what it prints where, and its exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from featherweight.artifact import load, package
from featherweight.data import Data
from featherweight.portable import export_graph
from featherweight.recipe_files import describe_techniques, load_recipe
from featherweight.techniques import TECHNIQUES

COMMANDS = ("compress", "compare", "measure", "analyze", "plan", "inspect", "run", "export", "verify", "list")
COMPRESS_KEYS = {
    "file_bytes",
    "original_bytes",
    "parameters",
    "nonzero",
    "macs",
    "score_before",
    "score_after",
    "latency",
    "agreement",
    "verdict",
    "recipe",
    "untouched",
}
RECIPE = "steps: [prune_weights: {ratio: 0.5}, quantize_weights: {bits: 8}]"


def one_object(text):
    """The one JSON object that a text is, strictly: no NaN, nothing around it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def compressed(task_file, tmp_path_factory):
    """`compress --json` in a process of its own: the folder with its files, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "featherweight", "compress", f"{task_file}:task", "--budget"]
    options = ["--recipe", "recipe.yaml", "--out", "model.fw", "--json", "--latency-table", "latency.json"]
    done = subprocess.run(
        [*command, "size<=60%, drop<=2pt", *options], cwd=folder, capture_output=True, text=True, check=False
    )
    return folder, done


@pytest.fixture(scope="module")
def samples(clusters):
    return torch.cat([values for values, _ in clusters.data.test])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(command, name):
    done = command(name, "--help")
    assert done.code == 0
    assert done.err == ""
    assert "Usage: featherweight" in done.out
    assert "--json" in done.out
    options = {
        "compress": ("--budget", "--recipe", "--out", "--report", "--seed", "--resume", "--device", "drop<=1pt"),
        "measure": ("--task",),
        "run": ("--input", "--output", "--batch", ".npz"),
        "export": ("--to", "--out"),
        "list": ("techniques|tasks|runtimes",),
    }
    for word in options.get(name, ()):
        assert word in done.out


def test_help_lists_every_command_and_the_exit_codes(command):
    for arguments in ((), ("--help",)):
        done = command(*arguments)
        assert done.code == 0
        for word in (*COMMANDS, "budget", "Exit codes: 0"):
            assert word in done.out


def test_compress_prints_one_object_and_exits_0(compressed):
    folder, done = compressed
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts = one_object(done.stdout)
    assert set(facts) >= COMPRESS_KEYS
    assert facts["file_bytes"] == os.path.getsize(folder / "model.fw") <= 0.6 * facts["original_bytes"]
    assert facts["verdict"]["met"] is True
    assert facts["nonzero"] < facts["parameters"]
    assert facts["latency"]["after"]["onnxruntime"]["median"] > 0
    assert facts["agreement"]["sqnr_db"] > 25
    (folder / "again.yaml").write_text(facts["recipe"])
    assert load_recipe(folder / "again.yaml").to_json() == load_recipe(folder / "recipe.yaml").to_json()
    assert not (folder / "model.fw.run").exists()


def test_a_missed_budget_exits_2_and_names_the_gap(command, task_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: [quantize_weights: {bits: 8}]")
    out = tmp_path / "model.fw"
    options = ("--budget", "size<=1500B", "--recipe", tmp_path / "recipe.yaml", "--out", out)
    done = command("compress", f"{task_file}:task", *options)
    assert done.code == 2
    assert out.exists()  # the closest
    assert "Budget missed (size)" in " ".join(done.out.split())
    assert "1,500" in done.out
    assert "Traceback" not in done.err
    assert "quantize_weights" in done.out


def test_the_report_is_written_beside_the_file(command, task_file, tmp_path):
    pytest.importorskip("altair")
    (tmp_path / "recipe.yaml").write_text("steps: [quantize_weights: {bits: 8}]")
    options = ("--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "m.fw", "--report", tmp_path / "r.html")
    done = command("compress", f"{task_file}:task", "--budget", "size<=90%", *options, "--json")
    assert done.code == 0
    assert one_object(done.out)["verdict"]["met"]
    page = (tmp_path / "r.html").read_text()
    assert "featherweight compress" in page  # the command that reproduces it
    assert "quantize_weights" in page


def test_measure_a_task(command, task_file):
    done = command("measure", f"{task_file}:task", "--json")
    facts = one_object(done.out)
    assert (facts["parameters"], facts["original_bytes"], facts["macs"]) == (1244, 4976, 1184)
    assert facts["score"] > 0.8
    assert set(facts["latency"]) == {"pytorch", "onnxruntime"}
    assert done.code == 0
    assert done.err == ""


def test_analyze_prints_damage_and_cost(command, task_file):
    facts = one_object(command("analyze", f"{task_file}:task", "--json").out)
    assert {row["name"] for row in facts["rows"]} >= {"head.weight"}
    ways = facts["rows"][0]["treatments"]
    assert ways[0]["removal"] == 0 < max(one["removal"] for one in ways)
    shown = command("analyze", f"{task_file}:task")
    assert shown.code == 0
    for words in ("head.weight", "4 bits", "nats"):
        assert words in shown.out


def test_plan_says_what_is_within_reach_and_how_long_it_takes(command, task_file):
    done = command("plan", f"{task_file}:task", "--budget", "size<=50%, drop<=5pt", "--json")
    facts = one_object(done.out)
    assert done.code == 0
    assert facts["feasible"]
    size, drop = facts["limits"]
    assert size["untrained"] <= size["allowed"] == 2488
    assert drop["met"] is None  # training alone can tell
    seconds = facts["seconds"]
    assert 0 < seconds["least"] <= seconds["most"]
    assert 0 < seconds["trial"] <= seconds["most"]
    assert facts["memory_bytes"] >= 4 * 4976
    missed = command("plan", f"{task_file}:task", "--budget", "size<=1.1KB, params<=1%", "--json")
    assert missed.code == 2
    assert not one_object(missed.out)["feasible"]


def test_measure_a_file(command, compressed, task_file):
    folder, done = compressed
    made = one_object(done.stdout)
    facts = one_object(command("measure", folder / "model.fw", "--json").out)
    for key in ("file_bytes", "original_bytes", "parameters", "nonzero", "macs"):
        assert facts[key] == made[key]
    assert facts["latency"]["onnxruntime"]["median"] > 0
    assert "score" not in facts
    scored = one_object(command("measure", folder / "model.fw", "--task", f"{task_file}:task", "--json").out)
    assert scored["score"] == made["score_after"]
    assert "file_bytes" in command("measure", folder / "model.fw").out


def test_inspect(command, compressed):
    folder, done = compressed
    made = one_object(done.stdout)
    facts = one_object(command("inspect", folder / "model.fw", "--json").out)
    for key in ("file_bytes", "original_bytes", "parameters", "nonzero", "macs", "score_before", "score_after"):
        assert facts[key] == made[key]
    assert sum(facts["bytes_by_part"].values()) == facts["file_bytes"]
    assert facts["recipe"]["steps"] == [{"prune_weights": {"ratio": 0.5}}, {"quantize_weights": {"bits": 8}}]
    assert facts["class"] == "Perceptron"
    assert "latency" not in json.dumps(facts)  # nothing in the file that another run would not repeat
    table = command("inspect", folder / "model.fw")
    assert table.code == 0
    assert "bytes_by_part" in table.out


def test_verify(command, refused, compressed, tmp_path):
    folder, _ = compressed
    facts = one_object(command("verify", folder / "model.fw", "--json").out)
    assert facts["verified"] is True
    assert facts["outputs"]
    content = bytearray((folder / "model.fw").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.fw").write_bytes(content)
    refused("verify", tmp_path / "flipped.fw", words=["flipped.fw"])


@pytest.mark.parametrize("count", [1, 3, 160])
def test_run_with_any_number_of_samples(command, compressed, samples, tmp_path, count):
    folder, _ = compressed
    np.save(tmp_path / "x.npy", samples[:count].numpy())
    options = ("--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", "--batch", 64, "--json")
    facts = one_object(command("run", folder / "model.fw", *options).out)
    assert facts["shapes"] == [[count, 4]]
    given = np.load(tmp_path / "y.npy")
    assert np.allclose(given, load(folder / "model.fw").run(samples[:count])[0], atol=1e-5)


def test_run_needs_neither_the_class_nor_its_code(compressed, samples, tmp_path):
    folder, _ = compressed
    np.save(tmp_path / "x.npy", samples.numpy())
    program = """
import importlib.util, sys
assert importlib.util.find_spec("clusters") is None
sys.argv = ["featherweight", "run", *sys.argv[1:]]
from featherweight.cli import main
try:
    main()
finally:
    assert "clusters" not in sys.modules
"""
    options = ["--input", "x.npy", "--output", "y.npy"]
    command = [sys.executable, "-I", "-c", program, str(folder / "model.fw"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.allclose(np.load(tmp_path / "y.npy"), load(folder / "model.fw").run(samples)[0], atol=1e-6)


class Named(nn.Module):
    """Two named inputs and two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, near, far):
        return self.left(near) - self.right(far), self.left(near)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    torch.manual_seed(0)
    model = Named().eval()
    data = Data(example=(torch.ones(1, 3), torch.ones(1, 5)))
    path = tmp_path_factory.mktemp("named") / "model.fw"
    package(model, [], {}, export_graph(model, data)).save(path)
    near, far = torch.randn(7, 3), torch.randn(7, 5)
    with torch.no_grad():
        return path, near.numpy(), far.numpy(), [value.numpy() for value in model(near, far)]


@pytest.mark.parametrize("unnamed", [False, True])
def test_run_takes_several_arrays_by_the_names_of_the_forward_or_in_its_order(command, named, tmp_path, unnamed):
    path, near, far, wanted = named
    if unnamed:
        np.savez(tmp_path / "x.npz", near, far)
    else:
        np.savez(tmp_path / "x.npz", far=far, near=near)
    options = ("--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz", "--batch", 3)
    done = command("run", path, *options, "--json")
    assert done.code == 0, done.err
    with np.load(tmp_path / "y.npz") as given:
        for name, value in zip(one_object(done.out)["outputs"], wanted, strict=True):
            assert np.allclose(given[name], value, atol=1e-6)


def test_several_outputs_do_not_fit_one_npy(refused, named, tmp_path):
    path, near, far, _ = named
    np.savez(tmp_path / "x.npz", near=near, far=far)
    words = ["2 outputs", ".npz"]
    refused("run", path, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npy", words=words)
    np.savez(tmp_path / "x.npz", near=near, far=far[:3])
    refused("run", path, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz", words=["the same for all"])


def test_export_gives_a_model_that_onnxruntime_runs_alike(command, compressed, samples, tmp_path):
    folder, _ = compressed
    facts = one_object(
        command("export", folder / "model.fw", "--to", "onnx", "--out", tmp_path / "new" / "folder", "--json").out
    )
    path = tmp_path / "new" / "folder" / "model.onnx"
    assert (facts["file"], facts["file_bytes"]) == (str(path), path.stat().st_size)
    assert facts["agreement"] == {"max_abs": 0.0, "sqnr_db": 200.0, "top1": 1.0}
    assert facts["compared_with"] == "the file's own graph on noise"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: samples.numpy()})[0]
    assert np.allclose(given, load(folder / "model.fw").run(samples)[0], atol=1e-6)


def test_auto_measures_every_runtime_and_names_the_fastest(command, compressed, task_file):
    path = compressed[0] / "model.fw"
    facts = one_object(command("measure", path, "--task", f"{task_file}:task", "--runtime", "auto", "--json").out)
    timed = {row["runtime"]: row["latency"]["median"] for row in facts["runtimes"] if "latency" in row}
    assert set(timed) >= {"onnxruntime", "torch"}
    assert facts["fastest"] == min(timed, key=timed.get)
    assert facts["machine"]["features"] is not None
    alone = one_object(command("measure", path, "--runtime", "onnxruntime", "--json").out)
    assert [row["runtime"] for row in alone["runtimes"]] == ["onnxruntime"]


def test_export_compares_with_pytorch_where_the_task_is_given(command, refused, compressed, task_file, tmp_path):
    path = compressed[0] / "model.fw"
    facts = one_object(command("export", path, "--out", tmp_path, "--task", f"{task_file}:task", "--json").out)
    assert facts["compared_with"] == "PyTorch on calibration data"
    assert facts["agreement"]["top1"] == 1.0
    refused("export", path, "--to", "torch", "--out", tmp_path, words=["--task"])


@pytest.mark.parametrize("what", ["techniques", "tasks", "runtimes"])
def test_list(command, what):
    rows = one_object(command("list", what, "--json").out)[what]
    table = command("list", what)
    assert table.code == 0
    for row in rows:
        assert row["name"] in table.out
    if what == "techniques":
        assert rows == describe_techniques()
        assert len(rows) >= len(TECHNIQUES)
    if what == "tasks":
        assert {row["name"] for row in rows} >= {"digits", "lenet300", "lenet5"}
    if what == "runtimes":
        assert next(row for row in rows if row["name"] == "onnxruntime")["version"] == onnxruntime.__version__


def test_list_without_a_word_lists_techniques(command):
    assert "prune_weights" in command("list").out


def test_a_relative_task_beside_its_own_module(command, tmp_path, monkeypatch):
    """The user's file imports a module that lies beside it."""
    (tmp_path / "beside_it.py").write_text("WIDTH = 5")
    (tmp_path / "mine.py").write_text(
        "import torch, featherweight, beside_it\n"
        "def task():\n"
        "    batch = (torch.ones(4, 3), torch.zeros(4, dtype=torch.long))\n"
        "    data = featherweight.Data(example=torch.ones(1, 3), test=[batch])\n"
        "    return featherweight.Task(model=torch.nn.Linear(3, beside_it.WIDTH), data=data)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert one_object(command("measure", "mine.py:task", "--json").out)["parameters"] == 20
    assert sys.path == path


def test_an_interruption_is_one_line(command, monkeypatch):
    def interrupt(what):
        raise KeyboardInterrupt

    monkeypatch.setattr("featherweight.commands.listing._rows", interrupt)
    done = command("list")
    assert done.code == 1
    assert "--resume" in done.err
    assert "Traceback" not in done.err
