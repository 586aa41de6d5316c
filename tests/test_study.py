"""The search over recipes: what it draws depends on its seed and its results alone."""

import json
import math

import pytest

pytest.importorskip("optuna")

from featherweight.budget import Budget
from featherweight.errors import RecipeError
from featherweight.journal import Journal, read_rows
from featherweight.study import SAMPLERS, Plan, Study, _Trial, dominates, promoted, ranks, stand
from featherweight.techniques import PruneWeights, QuantizeWeights
from featherweight.workers import InProcess, attempt

BUDGET = Budget.parse("size<=10%, drop<=40pt")


def space(trial):
    ratio = trial.suggest_float("ratio", 0.0, 0.9)
    return PruneWeights(ratio=round(ratio, 4)) + QuantizeWeights(bits=trial.suggest_int("bits", 2, 8))


def plan(**changes):
    settings = {"sampler": "nsga2", "trials": 12, "generation": 4, "rungs": (0.25, 1.0), **changes}
    return Plan(BUDGET, {"size": 1000.0, "score": 1.0}, ("size", "drop"), **settings)


def measure(assignment):
    """A model whose size and accuracy are known: the one falls and the other rises with the strength."""
    sparse, coded = (next(iter(step.values())) if isinstance(step, dict) else {} for step in assignment.recipe["steps"])
    ratio, bits = sparse.get("ratio", 0.9), coded.get("bits", 4)
    if bits in (5, 6):
        raise ValueError("such bits do not work")
    drop = (ratio**4 + 2.0**-bits) * assignment.share**-0.2
    return {"values": {"size": 1000 * (1 - ratio) * bits / 32, "drop": drop, "drop_bound": drop}, "idle": []}


class Shuffled:
    """Several workers that end in another order than they started in, and the search is killed after some results."""

    count = 3

    def __init__(self, killed_after=math.inf):
        self.left, self.made = killed_after, []

    def run(self, assignments, done):
        for assignment in sorted(assignments, key=lambda given: (given.number * 7) % 5):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.made.append((assignment.number, assignment.rung))
            done(assignment, attempt(measure, assignment))


def facts(study):
    """Everything that later draws depend on."""
    return [(t.number, t.params, t.values, t.state) for t in study.optuna.get_trials()]


def searched(path, workers, **changes):
    with Journal(path) as journal:
        study = Study(space, plan(**changes), journal)
        return facts(study), study.run(workers), facts(study)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_workers_and_kills_change_nothing(tmp_path, sampler):
    if sampler == "gp":
        pytest.importorskip("scipy")
    changes = {"sampler": sampler, **({"trials": 5, "generation": 3} if sampler == "gp" else {})}
    _, standing, expected = searched(tmp_path / "straight", InProcess(measure), **changes)
    assert standing.done == standing.total
    assert standing.seconds_left == 0
    made, ended = [], False
    while not ended:
        workers = Shuffled(killed_after=3)
        try:
            _, last, found = searched(tmp_path / "killed", workers, **changes)
            ended = True
        except KeyboardInterrupt:
            assert len(workers.made) == 3
        made += workers.made
    assert found == expected
    assert last.best["recipe"] == standing.best["recipe"]
    assert len(made) == len(set(made)) == standing.done  # none lost, none twice
    if sampler == "nsga2":  # one of its recipes fails, and that is a result too
        assert any("failed" in row for row in rows(tmp_path))
        assert any(values is None for _, _, values, _ in expected)


def rows(folder):
    return read_rows(folder / "straight")[0]


def test_a_search_goes_on_with_more_trials_as_if_it_had_had_them_from_the_start(tmp_path):
    whole = searched(tmp_path / "whole", InProcess(measure), trials=12)[2]
    searched(tmp_path / "parts", InProcess(measure), trials=8)
    assert searched(tmp_path / "parts", InProcess(measure), trials=12)[2] == whole


def test_another_search_is_refused(tmp_path):
    searched(tmp_path / "journal", InProcess(measure), trials=4)
    with pytest.raises(RecipeError, match="belongs to a search with seed=0, not 1"):
        searched(tmp_path / "journal", InProcess(measure), trials=4, seed=1)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_the_sampler_learns(tmp_path, sampler):
    """The last trials exceed the limits less than the first, which are random."""
    searched(tmp_path / "straight", InProcess(measure), sampler=sampler, trials=64, generation=8, rungs=(1.0,))
    over = [
        sum(max(0.0, value) for value in plan().excess(row["values"]).values())
        for row in rows(tmp_path)
        if "values" in row
    ]
    assert sum(over[-16:]) < 0.5 * sum(over[:16])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "nsga"}, "Did you mean 'nsga2'"),
        ({"rungs": (0.5, 0.5, 1.0)}, "must be shares that rise"),
        ({"rungs": (0.5,)}, "must be shares that rise"),
        ({"trials": 0}, "trials=0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(RecipeError, match=words):
        plan(**changes)


def test_fronts_by_hand():
    """(1, 4), (2, 2) and (4, 1) beat (3, 3), which beats (5, 5); (2, 2) lies 3/3 + 3/3 from its neighbours."""
    assert dominates((2, 2), (3, 3))
    assert not dominates((2, 2), (2, 2))
    found = ranks([(1, 4), (5, 5), (2, 2), (3, 3), (4, 1)])
    assert [front for front, _ in found] == [0, 2, 0, 1, 0]
    assert [gap for _, gap in found] == [-math.inf, -math.inf, -2.0, -math.inf, -math.inf]


def trial(number, size, drop):
    return _Trial(number, None, None, {"values": {"size": size, "drop": drop, "drop_bound": drop}})


def test_the_promising_are_promoted_by_hand():
    """100 bytes are allowed. 160 is hopeless; 120 comes after all that fit, however accurate; (90, 0.5) is dominated."""
    trials = [trial(0, 160, 0.0), trial(1, 120, 0.0), trial(2, 90, 0.5), trial(3, 80, 0.4), trial(4, 60, 0.6)]
    assert [t.number for t in promoted(plan(), trials)] == [3, 4]
    assert [t.number for t in promoted(plan(), trials[:3])] == [2]
    assert promoted(plan(), trials[:1]) == []


def test_the_best_keeps_the_limits_and_is_the_smallest_by_hand():
    sizes_and_drops = [(99, 0.1), (70, 0.41), (80, 0.39), (101, 0.0)]
    journal = [{"plan": plan(rungs=(1.0,), trials=4).to_json()}]
    for number, (size, drop) in enumerate(sizes_and_drops):
        values = {"size": size, "drop": drop, "drop_bound": drop}
        journal.append({"trial": number, "rung": 0, "recipe": {"steps": [number]}, "values": values, "seconds": 2.0})
    standing = stand(journal)
    assert standing.best["trial"] == 2
    assert [row["trial"] for row in standing.front] == [1, 2, 0, 3]
    journal[2]["values"]["drop_bound"] = 0.45
    assert stand([journal[0], journal[2], journal[4]]).best["trial"] == 3  # 0.01 over, against 0.05


def test_time_left_by_hand():
    """Six trials in generations of three: 3 short ones and 1 whole a generation, at 2 s and 10 s on two workers."""
    journal = [
        {"plan": plan(trials=6, generation=3).to_json()},
        {"session": {"workers": 2, "time": 0.0, "trials": 6}},
        *(
            {"trial": n, "rung": 0, "recipe": {"steps": [n]}, "failed": "so", "seconds": 2.0, "worker": "w"}
            for n in range(3)
        ),
    ]
    assert stand(journal).seconds_left == pytest.approx((3 * 2 + 2 * 2 / 0.25) / 2)
    assert (stand(journal).done, stand(journal).total, stand(journal).failed) == (3, 8, 3)
    assert stand(journal).best is None


def test_a_plan_survives_json():
    assert Plan.from_json(json.loads(json.dumps(plan().to_json()))) == plan()


def test_no_search_in_a_journal():
    with pytest.raises(RecipeError, match="no search"):
        stand([{"something": "else"}])
