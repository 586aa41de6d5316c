"""What must be refused: each with one clear error of ours, before any work where that can be known."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from featherweight.artifact import load
from featherweight.budget import Budget
from featherweight.data import Data
from featherweight.errors import (
    ArtifactError,
    BudgetError,
    DataError,
    ExportError,
    FeatherweightError,
    ModelError,
    RecipeError,
)
from featherweight.pipeline import compress
from featherweight.scoping import only
from featherweight.tasks import find_task
from featherweight.techniques import Distill, QuantizeWeights

STEP = QuantizeWeights(bits=8)
BUDGET = "size<=90%, drop<=1pt"


def spoiled(loader, index, value):
    """The loader with a number of one batch replaced."""
    changed = [(inputs.clone(), target) for inputs, target in loader]
    changed[index][0][0, 0] = value
    return changed


def mislabelled(loader, index, label):
    changed = [(inputs, target.clone()) for inputs, target in loader]
    changed[index][1][0] = label
    return changed


def refusal(kind, model, data, recipe=STEP, budget=BUDGET, **options):
    with pytest.raises(FeatherweightError) as caught:
        compress(model, data, budget, recipe, **options)
    assert type(caught.value) is kind, caught.value
    return " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(10, 4)

    def forward(self, values):
        return self.body(values), values


def test_a_tuple_that_neither_loss_nor_score_can_take(clusters):
    message = refusal(DataError, Both(), clusters.data)
    for word in ("tuple(Tensor[2, 4], Tensor[2, 10])", "Data(output=0)"):
        assert word in message


def test_an_output_that_is_not_there(clusters):
    message = refusal(DataError, Both(), replace(clusters.data, output=5))
    assert "Data(output=5)" in message
    message = refusal(DataError, Both(), replace(clusters.data, output="logits"))
    assert "'logits'" in message


@pytest.mark.parametrize("split", ["train", "validate", "test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_in_the_first_batch(clusters, split, value):
    data = replace(clusters.data, **{split: spoiled(getattr(clusters.data, split), 0, value)})
    message = refusal(DataError, clusters.model, data)
    assert f"Data.{split}: batch 0 has NaN or infinity" in message


@pytest.mark.parametrize(("split", "recipe"), [("train", Distill(epochs=1)), ("validate", STEP), ("calibrate", None)])
def test_nan_in_a_later_batch(clusters, split, recipe):
    from featherweight.techniques import QuantizeStatic

    loader = getattr(clusters.data, split) or clusters.data.train
    data = replace(clusters.data, **{split: spoiled(loader, 3, float("nan"))})
    message = refusal(DataError, clusters.model, data, recipe or QuantizeStatic())
    assert f"Data.{split}: batch 3 has NaN or infinity" in message


@pytest.mark.parametrize("label", [4, 99, -1])
@pytest.mark.parametrize("split", ["train", "validate", "test"])
def test_labels_out_of_range(clusters, split, label):
    data = replace(clusters.data, **{split: mislabelled(getattr(clusters.data, split), 0, label)})
    message = refusal(DataError, clusters.model, data)
    for word in (f"label {label} is out of range", "classes 0 to 3", f"Data.{split}"):
        assert word in message


def test_labels_out_of_range_in_a_later_batch(clusters):
    data = replace(clusters.data, train=mislabelled(clusters.data.train, 5, 7))
    message = refusal(DataError, clusters.model, data, Distill(epochs=1))
    assert "label 7 is out of range" in message


@pytest.mark.parametrize("split", ["train", "validate", "test"])
def test_an_empty_loader(clusters, split):
    message = refusal(DataError, clusters.model, replace(clusters.data, **{split: []}))
    assert f"Data.{split} is empty" in message


def test_a_loader_that_can_be_read_only_once(clusters):
    data = replace(clusters.data, train=iter(clusters.data.train))
    message = refusal(DataError, clusters.model, data, Distill(epochs=1))
    assert "Data.train" in message
    assert "each time" in message


def test_no_loader_at_all(clusters):
    message = refusal(DataError, clusters.model, Data(example=clusters.data.example))
    assert "at least one of train, validate or test" in message


@pytest.mark.parametrize(("setting", "value"), [("loss", "cross_entropi"), ("score", "acuracy")])
def test_an_unknown_loss_or_score(clusters, setting, value):
    message = refusal(DataError, clusters.model, replace(clusters.data, **{setting: value}))
    assert f"Data({setting}={value!r}) is not known. Did you mean" in message


def test_a_model_that_does_not_take_the_example(clusters):
    message = refusal(ModelError, nn.Linear(7, 4), clusters.data)
    assert "Linear does not run on Data.example" in message


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (torch.compile, "OptimizedModule wraps the model whose layers are meant: give that, model._orig_mod"),
        (nn.DataParallel, "DataParallel wraps the model whose layers are meant: give that, model.module"),
        (torch.jit.script, "give the nn.Module it was made from"),
    ],
)
def test_a_wrapper_around_the_model(wrap, words):
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(4, 4)
    batches = [(inputs, torch.zeros(4, dtype=torch.long))]
    assert words in refusal(ModelError, wrap(model), Data(inputs[:1], batches, validate=batches, test=batches))


def test_what_cannot_be_traced_names_the_users_line():
    class Choosy(nn.Linear):
        def forward(self, value):
            if value.sum() > 0:
                value = 2 * value
            return super().forward(value)

    inputs = torch.ones(4, 4)
    batches = [(inputs, torch.zeros(4, dtype=torch.long))]
    message = refusal(ExportError, Choosy(4, 2), Data(inputs[:1], batches, validate=batches, test=batches))
    assert "Choosy cannot be traced" in message
    assert "test_bad_input.py" in message
    assert "if value.sum() > 0:" in message


@pytest.mark.parametrize("halved", [nn.Module.half, nn.Module.bfloat16])
def test_weights_of_sixteen_bits(clusters, halved):
    message = refusal(ModelError, halved(copy.deepcopy(clusters.model)), clusters.data)
    assert "float16" in message
    assert "model.float()" in message


def test_a_loss_that_the_targets_do_not_fit(clusters):
    data = replace(clusters.data, loss="mse", score="mse")
    message = refusal(DataError, clusters.model, data)
    assert "Data.train" in message


@pytest.mark.parametrize("text", ["", "size", "size<=", "size<=2", "size>=2%", "bytes<=2%", "size<=-1KB", "drop<=2x"])
def test_a_budget_that_cannot_be_read(clusters, text):
    message = refusal(BudgetError, clusters.model, clusters.data, budget=text)
    assert "write for example" in message or "Known: " in message


def test_an_impossible_budget(clusters):
    message = refusal(BudgetError, clusters.model, clusters.data, budget="size<=10B")
    for word in ("size<=10B is impossible", "ask for at least"):
        assert word in message


def test_paths_that_match_nothing(clusters):
    message = refusal(RecipeError, clusters.model, clusters.data, only("heed", STEP))
    for word in ("only('heed') matches no layer of Perceptron", "Did you mean 'head'?"):
        assert word in message


def test_a_missing_device(clusters):
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    message = refusal(ModelError, clusters.model, clusters.data, device="cuda")
    for word in ("'cuda' is not there", "use cpu"):
        assert word in message


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "cuda:99"])
def test_a_device_that_is_none(clusters, name):
    message = refusal(ModelError, clusters.model, clusters.data, device=name)
    assert repr(name) in message


def test_an_output_that_cannot_be_written(clusters, tmp_path):
    missing = refusal(ArtifactError, clusters.model, clusters.data, out=tmp_path / "no" / "model.fw")
    assert str(tmp_path / "no" / "model.fw") in missing
    folder = refusal(ArtifactError, clusters.model, clusters.data, out=tmp_path)
    assert f"{tmp_path} is a folder" in folder
    (tmp_path / "file").write_text("")
    below = refusal(ArtifactError, clusters.model, clusters.data, out=tmp_path / "file" / "model.fw")
    assert "cannot be written" in below
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(clusters, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(ArtifactError, clusters.model, clusters.data, out=tmp_path / "model.fw")


@pytest.fixture(scope="module")
def file(clusters, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "model.fw"
    compress(clusters.model, clusters.data, BUDGET, STEP, out=path)
    return path


@pytest.mark.parametrize("length", [0, 1, 3, 4, 20, 500, -1])
def test_a_truncated_file(file, tmp_path, refused, length):
    path = tmp_path / "cut.fw"
    path.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ArtifactError, match=r"cut\.fw"):
        load(path)
    for name in ("verify", "inspect"):
        refused(name, path, words=["cut.fw"])


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(200), b"\x80\x02}q\x00.", b"#!/bin/sh\nexit 0\n", b"\x08\x07" * 99]
)
def test_a_foreign_file_renamed(tmp_path, refused, content):
    path = tmp_path / "foreign.fw"
    path.write_bytes(content)
    refused("run", path, "--input", "x.npy", "--output", "y.npy", words=["foreign.fw"])
    refused("export", path, "--out", tmp_path / "out", words=["foreign.fw"])
    refused("measure", path, words=["foreign.fw"])
    assert not (tmp_path / "out").exists()


def test_a_missing_file(tmp_path, refused):
    refused("inspect", tmp_path / "none.fw", words=["none.fw", "cannot be read"])
    refused("inspect", tmp_path, words=[tmp_path, "cannot be read"])


# Through the command line: exit code 1, one line, nothing on standard output.


def recipe_file(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


RECIPES = {
    "an unknown technique": ("steps: [prune_wights]", ["unknown technique 'prune_wights'", "'prune_weights'"]),
    "an unknown setting": ("steps: [prune_weights: {ration: 0.5}]", ["no setting 'ration'", "'ratio'"]),
    "a setting out of range": ("steps: [prune_weights: {ratio: 1.5}]", ["ratio=1.5", "out of range"]),
    "a setting of another type": ("steps: [quantize_weights: {bits: four}]", ["bits='four'"]),
    "a wrong order": ("steps: [quantize_weights, fold_batch_norm]", ["cannot follow", "any_order"]),
    "no YAML": ("steps: [a, {b", ["cannot be read as a recipe"]),
    "no recipe": ("just a sentence", ["a recipe is a list of steps"]),
    "nothing": ("", ["a recipe is a list of steps"]),
    "a path that matches nothing": (
        "steps: [only: {patterns: ['layer9.*'], step: quantize_weights}]",
        ["only('layer9.*') matches no layer of Perceptron"],
    ),
    "bytes": ("\x00\x01", ["cannot be read as a recipe"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe(refused, task_file, tmp_path, case):
    text, words = RECIPES[case]
    path = recipe_file(tmp_path, text)
    task = f"{task_file}:task"
    refused("compress", task, "--budget", BUDGET, "--recipe", path, "--out", tmp_path / "m.fw", "--json", words=words)
    assert not (tmp_path / "m.fw").exists()


TASKS = {
    "boom": ("def boom(): raise KeyError('data')", ["boom failed", "KeyError", "data"]),
    "number": ("def number(): return 3", ["returned int", "featherweight.Task"]),
    "none": ("def none(): pass", ["returned NoneType"]),
    "taks": ("def task(): pass", ["no function 'taks'", "Did you mean 'task'?"]),
    "syntax": ("def syntax(:", ["syntax failed", "SyntaxError"]),
    "absent": ("import no_such_module_anywhere", ["no_such_module_anywhere"]),
    "needs": ("def needs(argument): pass", ["needs failed", "TypeError"]),
    "exits": ("raise SystemExit(0)", ["exits failed", "SystemExit"]),
}


@pytest.mark.parametrize("function", TASKS)
def test_a_bad_task(refused, tmp_path, function):
    text, words = TASKS[function]
    path = tmp_path / "mine.py"
    path.write_text(text)
    refused("measure", f"{path}:{function}", "--json", words=[*words, "mine.py"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digts", ["unknown task 'digts'", "'digits'", "path/to/file.py:function"]),
        ("nowhere.py:task", ["there is no file", "nowhere.py"]),
        ("nowhere.py", ["unknown task 'nowhere.py'"]),
        (".:task", ["there is no file"]),
    ],
)
def test_an_unknown_task(refused, name, words):
    refused("compress", name, "--budget", BUDGET, "--json", words=words)
    with pytest.raises(RecipeError):
        find_task(name)


def test_a_file_that_is_no_python(refused, tmp_path):
    (tmp_path / "task.txt").write_text("def task(): pass")
    refused("measure", f"{tmp_path / 'task.txt'}:task", words=["is not a Python file"])


OPTIONS = {
    "a budget that cannot be read": (["--budget", "size<=2q"], ["size<=2q"]),
    "no budget": ([], ["--budget"]),
    "a device": (["--budget", BUDGET, "--device", "tpu9"], ["'tpu9'"]),
    "trials": (["--budget", BUDGET, "--trials", "0"], ["--trials"]),
    "a seed": (["--budget", BUDGET, "--seed", "x"], ["--seed"]),
    "an option": (["--budget", BUDGET, "--sed", "1"], ["--sed"]),
    "out": (["--budget", BUDGET, "--out", "no/folder/model.fw"], ["no/folder/model.fw"]),
    "report": (["--budget", BUDGET, "--report", "no/folder/report.html"], ["no/folder/report.html"]),
    "a report that is a folder": (["--budget", BUDGET, "--report", "."], [". is a folder", "report.html"]),
    "a recipe": (["--budget", BUDGET, "--recipe", "none.yaml"], ["none.yaml"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused_before_the_task_is_loaded(refused, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text("raise RuntimeError('the task was loaded')")
    options, words = OPTIONS[case]
    line = refused("compress", "task.py:task", *options, words=words)
    assert "the task was loaded" not in line
    assert {item.name for item in tmp_path.iterdir()} == {"task.py"}


def test_an_impossible_budget_on_the_command_line(refused, task_file, tmp_path):
    out = tmp_path / "model.fw"
    words = ["size<=10B is impossible"]
    refused("compress", f"{task_file}:task", "--budget", "size<=10B", "--out", out, "--json", words=words)
    assert not out.exists()


def test_bad_arrays(refused, file, tmp_path):
    import numpy as np

    def array(name, value):
        np.save(tmp_path / name, value, allow_pickle=True)
        return tmp_path / name

    given = {
        "none.npy": (tmp_path / "none.npy", ["none.npy", "cannot be read"]),
        "shape.npy": (array("shape.npy", np.zeros((3, 7), np.float32)), ["float32[3, 7]", "values"]),
        "type.npy": (array("type.npy", np.zeros((3, 10), np.int64)), ["int64[3, 10]"]),
        "empty.npy": (array("empty.npy", np.zeros((0, 10), np.float32)), ["at least 1"]),
        "object.npy": (array("object.npy", np.array([{}], dtype=object)), ["object.npy", "cannot be read"]),
        "task.py": (tmp_path / "task.py", ["cannot be read"]),
    }
    (tmp_path / "task.py").write_text("x")
    for path, words in given.values():
        refused("run", file, "--input", path, "--output", tmp_path / "y.npy", words=words)
    np.savez(tmp_path / "named.npz", other=np.zeros((1, 10), np.float32))
    refused("run", file, "--input", tmp_path / "named.npz", "--output", tmp_path / "y.npy", words=["values", "other"])
    good = array("good.npy", np.zeros((3, 10), np.float32))
    refused("run", file, "--input", good, "--output", tmp_path / "y.txt", words=["y.txt", ".npy or .npz"])
    refused("run", file, "--input", good, "--output", tmp_path / "no" / "y.npy", words=["cannot be written"])
    assert not (tmp_path / "y.npy").exists()


def test_bad_words(refused, file, tmp_path):
    refused("list", "tecniques", words=["'tecniques'"])
    refused("export", file, "--to", "onx", "--out", tmp_path, words=["'onx'", "'onnx'"])
    refused("export", file, "--out", file, words=["cannot be written"])
    refused("compres", words=["compres"])
    refused("measure", file, "--task", "digts", words=["'digts'"])


def test_the_budget_is_parsed_as_the_function_does():
    assert str(Budget.parse(BUDGET)) == BUDGET
