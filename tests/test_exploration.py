"""`featherweight search` from end to end on a small task, and what the default space draws."""

import json

import pytest

pytest.importorskip("optuna")

import optuna

from featherweight import load, load_recipe
from featherweight.data import complete
from featherweight.exploration import JOURNAL, best_recipe, status
from featherweight.recipe_files import recipe_from_json
from featherweight.spaces import DefaultSpace, families
from featherweight.technique import name_of
from featherweight.techniques import Distill, PruneChannels, PruneWeights
from featherweight.trials import Assignment, Bench, shortened, without

BUDGET = "size<=60%, drop<=20pt"
SPACE = """
from featherweight.techniques import Distill, PruneBlocks, PruneWeights, QuantizeWeights

def weights(trial):
    ratio, bits = round(trial.suggest_float("ratio", 0.3, 0.8), 3), trial.suggest_int("bits", 4, 8)
    return PruneBlocks() + PruneWeights(ratio=ratio) + QuantizeWeights(bits=bits) + Distill(epochs=2)

def space():
    return weights
"""
EVERYTHING = frozenset(
    {
        "fold_batch_norm",
        "prune_blocks",
        "prune_channels",
        "separate_convolutions",
        "low_rank",
        "factor_recurrent",
        "quantize_static",
        "reestimate_norms",
    }
)


def test_a_search_from_end_to_end(command, refused, task_file, tmp_path):
    (tmp_path / "space.py").write_text(SPACE)
    out = tmp_path / "out"
    words = ("search", f"{task_file}:task", "--budget", BUDGET, "--out", out, "--space", f"{tmp_path}/space.py:space")
    more = ("--trials", 2, "--generation", 2, "--rungs", "0.5,1")
    done = command(*words, *more, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["done"] == facts["total"] == 3  # 2 short ones, and a whole one
    assert facts["verdict"]["met"]
    best = best_recipe(facts["best"])
    assert best == load_recipe(out / "best.yaml")
    assert [type(step).__name__ for step in best.steps] == [
        "PruneWeights",
        "QuantizeWeights",
        "Distill",
    ]  # no blocks there
    file = (out / "model.fw").stat().st_size
    assert file <= facts["best"]["values"]["size"] <= 1.1 * file + 100
    assert load(out / "model.fw").facts["recipe"] == best.to_json()
    assert json.loads((out / "front.json").read_text()) == facts["front"]
    assert not (out / "checkpoints").exists()

    shown = command("search", "--status", out)
    assert shown.code == 0
    assert "3 of 3 results" in shown.out
    assert "within drop<=20pt: least size" in shown.out
    assert status(out).best == facts["best"]
    refused(*words, *more, words=["has a search already", "--resume"])
    refused(*words, *more, "--resume", "--seed", 1, "--json", words=["belongs to a search with seed=0, not 1"])
    again = command(*words, *more, "--resume", "--json")  # nothing is left to do
    assert json.loads(again.out)["done"] == 3
    assert len([row for row in (out / JOURNAL).read_text().splitlines() if '"values"' in row]) == 3


def test_what_cannot_be_searched_is_refused(refused, task_file, tmp_path):
    words = ("search", f"{task_file}:task", "--budget", BUDGET, "--out", tmp_path / "none")
    refused(*words, "--resume", words=["no search to resume"])
    refused(*words, "--rungs", "a", words=["--rungs 'a'"])
    refused("search", words=["TASK", "--budget", "--status"])
    refused("search", "--status", tmp_path / "none", words=["none/journal.jsonl", "cannot be read"])
    assert not (tmp_path / "none").exists()


def test_families_of_a_perceptron(clusters):
    assert families(clusters.model, complete(clusters.data)[0]) == {"prune_channels", "low_rank", "quantize_static"}


def test_the_default_space_draws_recipes_that_can_be_written_down():
    """Of 200 random draws each is a recipe in an order that is allowed, and together they show all families in both orders."""
    study, names, orders = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)), set(), set()
    space, expected = DefaultSpace(EVERYTHING, 2, speed=True), set()
    for _ in range(200):
        trial = study.ask()
        recipe = space(trial)
        assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        expected = expected or set(trial.params)
        assert set(trial.params) == expected  # all drawn, whatever is used
        kinds = [name_of(type(step)) for step in recipe.steps]
        names |= set(kinds)
        if "prune_channels" in kinds and "low_rank" in kinds:
            orders.add(kinds.index("prune_channels") < kinds.index("low_rank"))
    others = {"prune_weights", "quantize_weights", "quantize_rate_distortion", "penalize_entropy", "distill"}
    assert names == EVERYTHING | others
    assert orders == {True, False}


def test_a_trial_is_measured_on_validation_data_and_its_training_shortened(clusters, tmp_path):
    recipe = PruneChannels(ratio=0.5) + PruneWeights(ratio=0.5, epochs=5) + Distill(epochs=2)
    short = shortened(recipe, 0.4)
    assert [getattr(step, "epochs", None) for step in short.steps] == [None, 2, 1]
    assert without(recipe, [1]).steps == (recipe.steps[0], recipe.steps[2])
    bench = Bench(clusters, ["latency"], workspace=tmp_path)
    values = bench(Assignment(0, 0, 1.0, {"steps": ["fold_batch_norm"]}))
    assert values["idle"] == [0]
    same = values["values"]
    assert same["score"] == bench.original["score"]
    assert same["drop"] == 0.0
    assert same["drop_bound"] == pytest.approx(
        2 * (1 / 159 / 160) ** 0.5
    )  # of 160 samples none changed, and one might have
    assert same["macs"] == bench.original["macs"] == 10 * 32 + 32 * 24 + 24 * 4
    assert same["latency"] > 0
    assert not list(tmp_path.iterdir())
