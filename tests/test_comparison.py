"""One comparison, small and whole: the same rules for all, cells on disk, tables, ranking, and commands that repeat a row."""

import copy
import csv
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import compare, measurement
from featherweight.artifact import load
from featherweight.comparison.cells import Cell
from featherweight.comparison.contenders import BASELINES, CONTENDERS, chosen
from featherweight.comparison.energy import joules
from featherweight.comparison.judging import answers, beside
from featherweight.comparison.ranking import answered, ranked
from featherweight.comparison.scaling import MARGIN, Scale, has_strength, scaled, untrained, with_epochs, with_rate
from featherweight.data import Data, Task
from featherweight.errors import ArtifactError, BudgetError, FeatherweightError, RecipeError
from featherweight.pipeline import compress
from featherweight.recipe_files import load_recipe
from featherweight.report.compared import Comparison
from featherweight.scoping import only
from featherweight.technique import Recipe
from featherweight.techniques import (
    Distill,
    LowRank,
    PenalizeEntropy,
    PruneChannels,
    PruneMovement,
    PruneWeights,
    QuantizeRateDistortion,
    QuantizeWeights,
)
from featherweight.workers.hiring import Crew

RULES = {"budgets": "4x,300B", "seeds": 1, "epochs": 2}


class First(nn.Module):
    """The last step of what an LSTM gives first."""

    def forward(self, given):
        return given[0][:, -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A recipe of the user's own."""
    path = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    path.write_text("steps: [prune_weights: {ratio: 0.5}, quantize_weights: {bits: 6}]")
    return path


@pytest.fixture(scope="module")
def compared(clusters, task_file, folder, own):
    """Baselines and a file, at a quarter of the bytes."""
    return compare(clusters, str(own), out=folder, name=f"{task_file}:task", **RULES)


# --- one strength a recipe


def test_a_strength_is_a_power_of_what_is_kept():
    """Half the channels twice is a quarter; 0.9 of the energy at half strength is its root; a bit a doubling."""
    recipe = PruneChannels(ratio=0.5) + LowRank(energy=0.81) + QuantizeWeights(bits=5)
    assert scaled(recipe, 2.0) == PruneChannels(ratio=0.75) + LowRank(energy=0.6561) + QuantizeWeights(bits=4)
    assert scaled(recipe, 0.5) == PruneChannels(ratio=0.2929) + LowRank(energy=0.9) + QuantizeWeights(bits=6)
    assert scaled(recipe, 1.0) == recipe
    assert scaled(LowRank(rank="spread", ratio=0.5), 2.0) == LowRank(rank="spread", ratio=0.75)
    assert scaled(QuantizeRateDistortion(step=0.5), 3.0).step == 1.5
    assert scaled(QuantizeWeights(bits=3), 100.0).bits == 2
    assert scaled(only("a", PruneChannels(ratio=0.5)), 2.0) == only("a", PruneChannels(ratio=0.75))


def test_a_pattern_says_its_own_ratio():
    assert scaled(PruneWeights(ratio=0.5, pattern="2:4"), 2.0) == PruneWeights(ratio=0.5, pattern="2:4")
    assert not has_strength(Recipe((PruneWeights(ratio=0.5, pattern="2:4"), Distill())))
    assert has_strength(QuantizeWeights())


def test_epochs_are_shared_out_in_proportion_and_exactly():
    recipe = PruneWeights(epochs=6) + QuantizeWeights() + only("a", Distill(epochs=3))
    shared = with_epochs(recipe, 8)
    assert [getattr(step, "epochs", getattr(getattr(step, "inner", 0), "epochs", 0)) for step in shared.steps] == [
        5,
        0,
        3,
    ]
    assert with_epochs(Recipe((QuantizeWeights(),)), 4).steps[-1] == Distill(epochs=4)
    with pytest.raises(RecipeError, match="2 steps and may take 1"):
        with_epochs(recipe, 1)


def test_learning_rates_change_together():
    recipe = with_rate(PruneWeights(epochs=1, learning_rate=0.3) + Distill(learning_rate=0.6) + PruneWeights(), 3.0)
    assert [step.learning_rate for step in recipe.steps] == [pytest.approx(0.9), 1.0, 1e-3]


def test_untrained_recipes_have_the_same_form():
    recipe = PruneMovement(ratio=0.4) + PruneWeights(ratio=0.5, epochs=3) + PenalizeEntropy(bits=3) + Distill()
    assert untrained(recipe) == PruneWeights(ratio=0.4, ranking="layer") + PruneWeights(ratio=0.5) + QuantizeWeights(
        bits=3, per_channel=False
    )


def test_the_mildest_strength_that_fits(compared, clusters, own):
    """A sixteenth of a doubling milder, and the untrained file is too large."""
    scale = Scale(clusters.model, clusters.data, seed=0)
    row = next(row for row in compared.rows if row["recipe"] == "mine" and row["budget"] == "4x")
    recipe = load_recipe(own)
    scale.weigh(scaled(recipe, 2**-6))  # where the halving began, and took the length of the graph
    weights = [scale.weigh(scaled(recipe, row["strength"] * 2**octaves)) for octaves in (0, -1 / 16)]
    assert weights[0] <= MARGIN * row["allowed"] < weights[1]


# --- who competes


def test_baselines_are_always_there():
    assert [one.name for one in chosen("bits")] == ["dense", "scratch", "random", "magnitude", "bits"]
    assert chosen("all") == [*BASELINES, *CONTENDERS]
    assert len(CONTENDERS) >= 8
    assert [one.name for one in chosen("all") if not one.scales] == ["dense"]


def test_factors_make_a_recurrent_network_three_times_smaller():
    """Hidden matrices count too: half of the weights of a layer as wide as its inputs are theirs."""
    model = nn.Sequential(nn.LSTM(32, 32, batch_first=True), First(), nn.Linear(32, 4)).eval()
    sounds = torch.randn(8, 5, 32)
    data = Data(example=sounds[:1], calibrate=[sounds])
    (low_rank,) = (one for one in CONTENDERS if one.name == "low_rank")
    original = sum(4 * value.numel() for value in model.parameters())
    assert Scale(model, data, seed=0).strength(low_rank.recipe, original / 3) is not None


def test_an_unknown_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"'bit' is unknown\. Did you mean 'bits'"):
        chosen("bit")
    (tmp_path / "bits.yaml").write_text("steps: [distill]")
    with pytest.raises(RecipeError, match="rename"):
        chosen(["all", str(tmp_path / "bits.yaml")])


# --- the whole


def test_every_cell_kept_the_rules(compared):
    names = ["scratch", "random", "magnitude", "mine"]
    told = [(row["recipe"], row["budget"]) for row in compared.rows]
    assert told == [("dense", "1x"), *((name, budget) for name in names for budget in ("4x", "300B"))]
    assert [row["recipe"] for row in compared.done()] == ["dense", *names]
    assert {row["epochs"] for row in compared.done()} == {2}
    original = compared.originals[0]
    for row in compared.done():
        assert row["ratio"] == original["bytes"] / row["bytes"]
        assert row["met"] == (row["bytes"] <= row["allowed"] or row["recipe"] == "dense")
        assert row["score_before"] == original["score"]
        assert row["drop"] == pytest.approx(row["score_before"] - row["score"])
        assert len(row["classes"]) == 4
        assert 0 <= row["calibration_error"] <= 1
        assert {"milliseconds", "speedup", "macs", "peak_bytes", "seconds", "millijoules", "p_value"} <= set(row)
        assert [layer["path"] for layer in row["layers"]] == ["inner.0", "inner.2", "head"]
    quantized = next(row for row in compared.rows if row["recipe"] == "mine")
    assert all(layer["bits"] < 20 for layer in quantized["layers"])
    assert compared.protocol["splits"] == {"train": 320, "calibrate": 320, "validate": 160, "test": 160}
    assert set(original["sensitivity"]) == {"inner.0", "inner.2", "head"}


def test_the_bytes_are_those_of_the_file(compared, folder):
    for row in compared.done():
        path = folder / "cells" / f"{row['recipe']}-{row['budget']}-0.fw"
        assert path.stat().st_size == row["bytes"]


def test_the_command_of_a_row_repeats_it(compared, folder, clusters):
    row = next(row for row in compared.rows if row["recipe"] == "mine")
    recipe = re.search(r"--recipe (\S+)", row["command"])[1]
    again = compress(clusters.model, clusters.data, f"size<={row['budget']}", load_recipe(recipe), seed=row["seed"])
    stored = load(folder / "cells" / "mine-4x-0.fw")
    assert all(torch.equal(again.state[name], value) for name, value in stored.state.items())


def test_nothing_is_run_twice_and_what_is_missing_is(compared, folder, clusters, own, monkeypatch, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "cells" / "mine-4x-0.json").write_text("{ damaged")
    began = []
    run = Cell._carried_out
    monkeypatch.setattr(Cell, "_carried_out", lambda self, *rest: began.append(self.name) or run(self, *rest))
    again = compare(clusters, str(own), out=copied, name=compared.task, **RULES)
    assert began == ["mine-4x-0"]
    same = ("bytes", "score", "steps", "strength", "drop_interval")
    assert [[row.get(key) for key in same] for row in again.rows] == [
        [row.get(key) for key in same] for row in compared.rows
    ]


def test_a_machine_of_another_kind_goes_on_with_new_seeds(compared, folder, clusters, own, monkeypatch, tmp_path):
    """The original of a finished seed, which comes to other weights there, is not opened; that of a seed with a cell missing is."""
    copied, machine, opened = shutil.copytree(folder, tmp_path / "copied"), measurement.machine(), []
    monkeypatch.setattr(measurement, "machine", lambda: {**machine, "cpu": "another"})

    def originals(seed):
        opened.append(seed)
        model = copy.deepcopy(clusters.model)
        with torch.no_grad():
            model.head.bias += 0.01
        return Task(model, clusters.data)

    rules = {**RULES, "seeds": 2, "name": compared.task, "budgets": "4x"}
    both = compare(originals, str(own), out=copied, **rules)
    assert opened == [1]
    assert [row["seed"] for row in both.rows] == [0] * 5 + [1] * 5
    assert both.rows[:5] == [row for row in compared.rows if row["budget"] != "300B"]
    assert both.machine == {**machine, "cpu": [machine["cpu"], "another"]}
    with (copied / "results.csv").open() as file:
        assert [row["protocol_cpu"] for row in csv.DictReader(file)] == [machine["cpu"]] * 5 + ["another"] * 5
    (copied / "cells" / "mine-4x-0.json").unlink()
    with pytest.raises(ArtifactError, match="compares another model"):
        compare(originals, str(own), out=copied, **rules)
    for row in both.rows[:5]:
        (copied / "cells" / f"{row['recipe']}-{row['budget']}-0.json").unlink(missing_ok=True)
    monkeypatch.setattr(Cell, "_carried_out", lambda *given: 1 / 0)
    with pytest.raises(FeatherweightError, match="5 of 10 cells failed"):
        compare(originals, str(own), out=copied, **rules)
    anew = json.loads((copied / "cells" / "original-0.json").read_text())
    assert anew["machine"]["cpu"] == "another", "of the first machine's seed nothing was left but its original"


@pytest.mark.parametrize("crew", [Crew(workers=2), Crew(ray="local")], ids=["processes", "cluster"])
def test_others_find_the_same(compared, folder, task_file, own, tmp_path, monkeypatch, crew):
    """Two processes of this machine, and a cluster whose nodes have no folder of it."""
    if crew.ray:
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the nodes
    said = []
    rules = {**RULES, "budgets": "4x"}
    found = compare(
        f"{task_file}:task",
        str(own),
        out=tmp_path,
        crew=crew,
        progress=lambda message, done: said.append(done),
        **rules,
    )
    same = ("recipe", "status", "bytes", "score", "steps", "strength", "drop_interval")
    wanted = [row for row in compared.rows if row["budget"] != "300B"]
    assert [[row.get(key) for key in same] for row in found.rows] == [[row.get(key) for key in same] for row in wanted]
    here, there = (place / "cells" / "mine-4x-0.fw" for place in (folder, tmp_path))
    assert here.read_bytes() == there.read_bytes()
    command = next(row["command"] for row in found.rows if row["recipe"] == "mine")
    assert str(tmp_path / "cells" / "mine-4x-0.yaml") in command
    assert (tmp_path / "cells" / "mine-4x-0.yaml").exists()
    assert said[-1] == 1.0
    assert {path.suffix for path in (tmp_path / "cells").iterdir()} == {".json", ".npz", ".npy", ".fw", ".yaml"}
    assert not (tmp_path / "results").exists()


def test_a_cell_that_breaks_costs_no_other(clusters, own, monkeypatch, tmp_path):
    run = Cell._carried_out

    def broken(self, *rest):
        if self.contender.name == "random":
            raise ZeroDivisionError("of the user's own")
        return run(self, *rest)

    monkeypatch.setattr(Cell, "_carried_out", broken)
    rules = {**RULES, "budgets": "4x"}
    with pytest.raises(
        FeatherweightError, match=r"1 of 5 cells failed.*random-4x-0: ZeroDivisionError: of the user's own"
    ):
        compare(clusters, str(own), out=tmp_path, **rules)
    monkeypatch.setattr(Cell, "_carried_out", lambda self, *rest: began.append(self.name) or run(self, *rest))
    began = []
    assert len(compare(clusters, str(own), out=tmp_path, **rules).rows) == 5
    assert began == ["random-4x-0"]


def test_another_rule_or_model_wants_another_folder(compared, folder, clusters):
    with pytest.raises(ArtifactError, match="epochs=2, not 3"):
        compare(clusters, "bits", out=folder, name=compared.task, **{**RULES, "epochs": 3})
    other = Task(nn.Sequential(nn.Linear(10, 4)).eval(), clusters.data)
    with pytest.raises(ArtifactError, match="another model"):
        compare(other, "bits", out=folder, name=compared.task, **RULES)


def test_tables_hold_every_row_and_the_protocol(compared, folder):
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == [row["recipe"] for row in compared.rows]
    assert {row["protocol_epochs"] for row in rows} == {"2"}
    assert json.loads(rows[0]["protocol_versions"])["torch"] == torch.__version__
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(folder / "results.parquet").to_pylist()
    assert [row["bytes"] for row in table] == [row.get("bytes") for row in compared.rows]


def test_facts_go_through_json(compared, folder):
    read = Comparison.from_dict(json.loads((folder / "comparison.json").read_text()))
    assert read.to_dict() == compared.to_dict()
    with pytest.raises(ArtifactError, match="rowz"):
        Comparison.from_dict({**compared.to_dict(), "rowz": []})


def test_a_budget_too_small_is_a_row_with_its_reason(compared):
    row = next(row for row in compared.rows if row["recipe"] == "mine" and row["budget"] == "300B")
    assert row["status"] == "not applicable"
    assert "size<=300B" in row["reason"]
    assert compared.answers[1]["text"] == "For at most 300 B nothing was small enough."


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"epochs": 0}, {"tries": 4}])
def test_numbers_out_of_range_are_refused(clusters, tmp_path, changes):
    with pytest.raises(RecipeError, match=next(iter(changes))):
        compare(clusters, "bits", out=tmp_path / "out", **changes)
    with pytest.raises(BudgetError, match="size<=soon"):
        compare(clusters, "bits", "soon", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("compared")
def test_the_command_line_says_the_answer(command, task_file, folder, own):
    rules = ("--budgets", "4x,300B", "--seeds", 1, "--epochs", 2, "--out", folder)
    done = command("compare", f"{task_file}:task", "--recipes", own, *rules)
    assert done.code == 0
    assert done.out.startswith("For at most 1,244 B take ")
    refused = command("compare", f"{task_file}:task", "--recipes", "bit", *rules)
    assert (refused.code, refused.out) == (1, "")


# --- judging and ranking


def test_answers_beside_the_original():
    """Two of four flip from right to wrong: a drop of a half."""
    data = Data(example=torch.zeros(1, 2), test=[(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))])
    first = answers(lambda inputs: [10 * inputs], nn.Identity(), data)
    last = answers(lambda inputs: [10 * torch.eye(2)[[0, 0, 0, 0]]], nn.Identity(), data)
    found = beside(first, last)
    assert (found["score"], found["drop"], found["agreement"], found["classes"]) == (0.5, 0.5, 0.5, [0.0, 1.0])
    assert (found["test"], found["p_value"]) == ("McNemar", 0.5)
    assert found["calibration_error"] == pytest.approx(0.5, abs=1e-3)


def test_a_regression_has_no_classes():
    data = Data(example=torch.zeros(1, 1), test=[(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None])], score="mse")
    first = answers(lambda inputs: [inputs], nn.Identity(), data)
    last = answers(lambda inputs: [inputs + 2], nn.Identity(), data)
    found = beside(first, last)
    assert (found["drop"], found["test"], "classes" in found) == (4.0, "paired z", False)


def cell(recipe, samples, size, met=True, seed=0, speedup=2.0):
    value = float(np.mean(samples))
    return {
        "recipe": recipe, "kind": "technique", "budget": "4x", "seed": seed, "status": "done", "allowed": 100, "bytes": size,
        "score": value, "score_before": 1.0, "drop": 1 - value, "met": met, "higher_is_better": True, "speedup": speedup,
        "classes": [0.0, 2 * (1 - value)],
    }  # fmt: skip


def test_the_ranking_tells_equal_from_worse():
    right, few, many = np.ones(100), np.ones(100), np.ones(100)
    few[:1], many[:30] = 0, 0
    cells = [cell("a", right, 90), cell("b", few, 80), cell("c", many, 70), cell("d", right, 120, met=False)]
    scores = {(row["recipe"], "4x", 0): samples for row, samples in zip(cells, (right, few, many, right), strict=True)}
    ranking = ranked(cells, scores, {0: right})
    assert [(row["recipe"], row["as_good_as_best"]) for row in ranking] == [
        ("a", True),
        ("b", True),
        ("c", False),
        ("d", None),
    ]
    assert ranking[2]["drop_low"] > 0.15
    assert ranking[2]["worst_class"] == pytest.approx(0.6)
    (answer,) = answered(ranking, {"4x": 100}, 3)
    assert answer["text"] == (
        "For at most 100 B take a: 90 B, it loses 0 points (0 to 0) and runs 2.0x as fast. Not to be told from it: b. "
        "Only 1 of 3 seeds are done."
    )


def test_energy_is_read_where_there_is_a_counter_and_estimated_elsewhere(tmp_path):
    assert joules(lambda: None, 0.002, 15.0, tmp_path) == (0.03, "estimate")
    counter = tmp_path / "intel-rapl:0"
    counter.mkdir()
    (counter / "energy_uj").write_text("1000")
    spent = iter(range(10**9))

    def call():
        (counter / "energy_uj").write_text(str(1000 + 50 * (next(spent) + 1)))

    value, how = joules(call, 0.002, 15.0, tmp_path)
    assert how == "RAPL"
    assert value == pytest.approx(50e-6)
