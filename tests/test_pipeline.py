"""`compress`, from a trained model and a budget to one file, on a perceptron of a thousand weights."""

import copy
import json
import math
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from featherweight import job
from featherweight.artifact import load
from featherweight.budget import Budget
from featherweight.candidates import Candidates
from featherweight.data import Data, complete, forward
from featherweight.edits import to_json
from featherweight.errors import BudgetError, DataError, RecipeError
from featherweight.pipeline import compress
from featherweight.portable import export_graph
from featherweight.preflight import Request
from featherweight.recipe_files import recipe_from_json
from featherweight.scoping import only
from featherweight.scoring import evaluate
from featherweight.tasks.training import tensor_loader
from featherweight.techniques import Distill, FoldBatchNorm, PruneChannels, PruneWeights, QuantizeWeights


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(job, "_MOST_EPOCHS", 6)


RECIPE = PruneWeights(ratio=0.5) + QuantizeWeights(bits=8) + Distill(epochs=1)


@pytest.fixture(scope="module")
def default(clusters, tmp_path_factory):
    """The default recipe by a short search."""
    path = tmp_path_factory.mktemp("default") / "model.fw"
    said = []
    budget = "size<=40%, drop<=3pt"
    artifact = compress(
        clusters.model, clusters.data, budget, trials=2, out=path, progress=lambda *told: said.append(told)
    )
    return artifact, path, said


@pytest.fixture(scope="module")
def explicit(clusters, tmp_path_factory):
    """A recipe of three steps, one of them training, on a model in an unusual state."""
    model = copy.deepcopy(clusters.model).train()
    model.inner[1].eval()
    model.head.bias.requires_grad_(False)
    model.inner[0].weight.grad = torch.ones_like(model.inner[0].weight)
    model.head.register_forward_hook(lambda *given: None)
    before = copy.deepcopy(model)
    before.inner[0].weight.grad = model.inner[0].weight.grad.clone()  # a copy leaves it behind
    path = tmp_path_factory.mktemp("explicit") / "model.fw"
    return compress(model, clusters.data, "size<=50%, drop<=5pt", RECIPE, out=path, seed=3), path, model, before


def test_the_default_recipe_keeps_a_budget(default, clusters):
    artifact, path, said = default
    made = artifact.report
    assert made.verdict["met"]
    assert artifact.path == path
    assert path.stat().st_size <= 0.4 * made.before["size_bytes"]
    assert made.before["score"] - made.after["score"] <= 0.03 + 1e-9
    assert made.before["score"] == evaluate(clusters.model, clusters.data, "test").value > 0.8
    assert 1 <= len(made.trials) <= 2
    assert all(set(trial) == {"recipe", "size_bytes", "score", "drop", "met", "seconds"} for trial in made.trials)
    assert all(0.0 <= share <= 1.0 for _, share in said)
    assert any("epoch" in message for message, _ in said)


@pytest.mark.parametrize("most", [2, 5])
def test_a_candidate_trains_no_longer_than_asked(clusters, most):
    made = compress(clusters.model, clusters.data, "size<=60%", epochs=most, trials=1).report
    steps = recipe_from_json(yaml.safe_load(made.recipe)).steps
    assert (
        most - 1 <= sum(getattr(step, "epochs", 0) for step in steps) <= most
    )  # a third, and two thirds, of whole numbers


def test_a_single_epoch_is_refused(clusters):
    with pytest.raises(RecipeError, match="epochs=1 must be at least 2"):
        compress(clusters.model, clusters.data, "size<=60%", epochs=1)


def test_the_recipe_in_the_report_is_the_one_that_was_run(default):
    made = default[0].report
    recipe = recipe_from_json(yaml.safe_load(made.recipe))
    assert recipe.to_json() == default[0].facts["recipe"]
    assert [row["step"] for row in made.steps] == ["original", *map(str, recipe.steps)]


def test_nothing_is_left_beside_the_file(default):
    assert [item.name for item in default[1].parent.iterdir()] == ["model.fw"]


def test_the_users_model_is_untouched(explicit):
    _, _, model, before = explicit
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad, name
        assert (now.grad is None and then.grad is None) or torch.equal(now.grad, then.grad), name
    assert set(model.state_dict()) == set(before.state_dict())
    assert [len(module._forward_hooks) for module in model.modules()] == [
        len(module._forward_hooks) for module in before.modules()
    ]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in before.modules()]


def test_the_facts_of_a_report_agree_with_each_other(explicit, clusters):
    artifact, path, _, _ = explicit
    made, size = artifact.report, os.path.getsize(path)
    before, after = made.before, made.after
    assert after["size_bytes"] == size == sum(made.parts.values())
    assert sum(row["bytes"] for row in made.layers) + sum(
        made.parts[name] for name in ("manifest", "graph", "container")
    ) == pytest.approx(size)
    assert [row["step"] for row in made.steps] == ["original", *map(str, RECIPE.steps)]
    assert made.steps[0]["score"] == evaluate(clusters.model, clusters.data, "validate").value
    rows = {row["metric"]: row for row in made.verdict["rows"]}
    assert rows["size"]["after"] == size
    assert rows["size"]["allowed"] == before["size_bytes"] / 2
    assert rows["drop"]["after"] == pytest.approx(before["score"] - after["score"])
    assert made.verdict["met"] == all(row["met"] for row in rows.values())
    assert artifact.facts["score_after"] == after["score"]
    assert artifact.facts["score_before"] == before["score"]
    assert (artifact.facts["parameters"], artifact.facts["nonzero"]) == (after["params"], after["nonzero"])
    assert after["nonzero"] < 0.6 * before["params"]
    assert before["latency"].keys() == {"pytorch", "onnxruntime"}
    assert after["latency"].keys() == {"onnxruntime", "pytorch"}
    assert before["peak_bytes"] > 0
    assert made.agreement["sqnr_db"] > 25
    assert made.seed == 3
    assert made.seconds > 0
    assert any("calibrate" in note for note in made.notes)
    json.dumps(made.to_dict(), allow_nan=False)


def test_the_file_scores_what_the_report_says(explicit, clusters):
    artifact, path, model, _ = explicit
    inputs = torch.cat([values for values, _ in clusters.data.test])
    labels = torch.cat([labels for _, labels in clusters.data.test])
    right = load(path).run(inputs)[0].argmax(1) == labels.numpy()
    assert float(np.mean(right)) == pytest.approx(artifact.report.after["score"])
    module = load(path, into=model)
    assert float((module.eval()(inputs).argmax(1) == labels).float().mean()) == pytest.approx(
        artifact.report.after["score"], abs=0.01
    )


def test_one_seed_gives_one_file_and_another_seed_another(explicit, clusters, tmp_path):
    _, path, _, _ = explicit
    for seed, name in ((3, "same"), (4, "other")):
        compress(clusters.model, clusters.data, "size<=50%, drop<=5pt", RECIPE, out=tmp_path / name, seed=seed)
    assert (tmp_path / "same").read_bytes() == path.read_bytes()
    assert (tmp_path / "other").read_bytes() != path.read_bytes()


def test_the_caller_keeps_the_random_state(clusters):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(RecipeError):
        compress(clusters.model, clusters.data, "size<=90%", Distill(epochs=1) + FoldBatchNorm())
    assert torch.equal(torch.rand(1), wanted)


def test_a_missed_budget_says_by_how_much_and_strict_raises_it(clusters, tmp_path):
    path = tmp_path / "model.fw"
    with pytest.raises(BudgetError, match=r"missed.*size .* B > .* allowed") as caught:
        compress(clusters.model, clusters.data, "size<=1500B", QuantizeWeights(bits=8), out=path, strict=True)
    artifact = caught.value.artifact
    assert artifact.report.verdict["met"] is False
    assert artifact.report.verdict["rows"][0]["gap"] > 0
    assert path.stat().st_size == artifact.report.after["size_bytes"] > 1500
    assert artifact.run(torch.zeros(3, 10))[0].shape == (3, 4)


def test_missing_loaders_are_split_off_and_said(clusters):
    data = Data(example=clusters.data.example, train=clusters.data.train)
    artifact = compress(clusters.model, data, "size<=90%", QuantizeWeights(bits=8))
    notes = " ".join(artifact.report.notes)
    assert "validate" in notes
    assert "test" in notes
    assert "calibrate" in notes
    assert artifact.path is None
    assert artifact.report.after["score"] > 0.8


def test_what_is_split_off_is_batched_like_the_loader_it_comes_from():
    inputs, labels = torch.randn(100, 3), torch.arange(100)
    for shuffle in (False, True):
        data, _ = complete(Data(example=inputs[:1], train=tensor_loader(inputs, labels, 16, shuffle=shuffle)))
        read = {split: list(getattr(data, split)) for split in ("train", "validate", "test")}
        assert [len(batch[1]) for batch in read["train"]] == [16, 16, 16, 16, 16]
        assert [len(batch[1]) for batch in read["validate"]] == [10]
        seen = torch.cat([target for batches in read.values() for _, target in batches])
        assert sorted(seen.tolist()) == list(range(100))
    alone = DataLoader(TensorDataset(inputs, labels), batch_size=None)
    with pytest.raises(DataError, match="cannot be split"):
        complete(Data(example=inputs[:1], train=alone))


def test_training_data_without_labels_follows_the_teacher(clusters):
    data = replace(clusters.data, train=[values for values, _ in clusters.data.train])
    artifact = compress(clusters.model, data, "size<=90%", QuantizeWeights(bits=3) + Distill(epochs=2))
    assert artifact.report.after["score"] >= artifact.report.steps[1]["score"] - 0.1
    assert artifact.report.verdict["met"]


class Pair(nn.Module):
    """Takes two named inputs, gives logits and a side output."""

    def __init__(self):
        super().__init__()
        self.near, self.far, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, near, far):
        hidden = torch.relu(self.near(near) + self.far(far))
        return self.head(hidden), hidden


def test_dict_inputs_and_a_tuple_of_outputs(clusters, tmp_path):
    def named(split):
        return [({"far": values[:, 6:], "near": values[:, :6]}, labels) for values, labels in split]

    torch.manual_seed(0)
    model, given = Pair().eval(), clusters.data
    data = Data(
        example={"near": torch.zeros(1, 6), "far": torch.zeros(1, 4)},
        train=named(given.train),
        validate=named(given.validate),
        test=named(given.test),
        output=0,
    )
    artifact = compress(model, data, "drop<=100pt", PruneWeights(ratio=0.25) + QuantizeWeights(bits=8))
    assert set(artifact.session().inputs) == {"near", "far"}
    batch, _ = data.test[0]
    module = artifact.into(model)
    with torch.no_grad():
        wanted = forward(module, batch)
    for expected, found in zip(wanted, artifact.run(batch), strict=True):
        assert torch.allclose(expected, torch.from_numpy(found), atol=1e-4)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_that_are_computed_anew_are_baked_and_the_file_fits_the_class(clusters, tmp_path, norm):
    def normed():
        torch.manual_seed(0)
        model = copy.deepcopy(clusters.model)
        norm(model.inner[0])
        return model.eval()

    model, path = normed(), tmp_path / "model.fw"
    artifact = compress(model, clusters.data, "size<=60%", trials=1, epochs=2, out=path)
    assert hasattr(model.inner[0], "parametrizations"), "the user's own is as it was"
    assert any("inner.0.weight was computed from other tensors" in note for note in artifact.report.notes)
    with torch.no_grad():
        again = load(path, into=normed())(*clusters.data.example)
    assert np.allclose(load(path).run(clusters.data.example)[0], again, atol=1e-4)


def test_a_regression_where_less_is_better(clusters):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1)).eval()

    def labelled(split):
        return [(values, values.sum(1)) for values, _ in split]

    given = clusters.data
    data = Data(
        example=given.example,
        train=labelled(given.train),
        validate=labelled(given.validate),
        test=labelled(given.test),
        loss="mse",
        score="mse",
    )
    artifact = compress(model, data, "size<=80%, drop<=0.5%", QuantizeWeights(bits=8) + Distill(epochs=2))
    made = artifact.report
    assert made.before["higher_is_better"] is False
    assert made.after["score"] < made.before["score"]  # an untrained model gets better by training
    assert {row["metric"]: row["met"] for row in made.verdict["rows"]}["drop"]


def test_a_score_that_is_one_number_a_loader_can_be_searched_over(clusters):
    def mean_accuracy(output, target):
        return (output.argmax(1) == target).float().mean()

    whole = [tuple(map(torch.cat, zip(*clusters.data.validate, strict=True)))]
    data = replace(clusters.data, validate=whole, score=mean_accuracy)
    artifact = compress(clusters.model, data, "size<=60%, drop<=10pt", trials=1)
    assert artifact.report.trials[0]["met"]


class Chosen(Exception):  # noqa: N818 - no error
    """Carries what the first trial would have trained."""


@pytest.fixture
def first_strength(clusters, monkeypatch):
    """The first strength that a search would train for a budget."""

    def stop(candidates, strength):
        raise Chosen(strength)

    monkeypatch.setattr(Candidates, "full", stop)

    def chosen(budget, **options):
        with pytest.raises(Chosen) as caught:
            compress(clusters.model, clusters.data, budget, **options)
        return caught.value.args[0]

    return chosen


@pytest.mark.parametrize("limit", ["macs<=50%", "params<=50%", "memory<=100GB"])
def test_limits_steer_the_cut(first_strength, limit):
    strength = first_strength(f"{limit}, drop<=5pt")
    assert strength.share == 1.0 if "memory" in limit else 0.4 <= strength.share <= 0.5
    assert strength.metric == ("params" if "params" in limit else "macs")


def test_a_latency_budget_reads_the_table_it_is_given(first_strength, tmp_path):
    table = tmp_path / "latency.json"
    for seconds, fits in ((1e-9, True), (1e9, False)):
        table.write_text(json.dumps({"original": seconds}))
        strength = first_strength("latency<=1s, drop<=5pt", latency_table=table)
        assert (strength.seconds == 0.94) == fits
        stored = json.loads(table.read_text())
        assert stored["original"] == seconds
        assert len(stored) > 1  # candidates were added


def test_one_table_gives_one_file_and_its_digest_is_in_it(clusters, tmp_path):
    table = tmp_path / "latency.json"
    table.write_text('{"original": 1.0}')
    for name in ("one", "two"):
        compress(
            clusters.model,
            clusters.data,
            "latency<=100s",
            trials=1,
            latency_table=table,
            out=tmp_path / name,
        )
    assert len(load(tmp_path / "one").facts["latency_table"]) == 16
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (FoldBatchNorm(), ["fold_batch_norm() found nothing to do", "Linear, ReLU"]),
        (QuantizeWeights(bits=8) + only("head", QuantizeWeights(bits=4)), ["found nothing to do"]),
    ],
)
def test_a_step_with_nothing_to_do_says_what_it_found_instead(clusters, recipe, words):
    with pytest.raises(RecipeError) as caught:
        compress(clusters.model, clusters.data, "size<=90%", recipe)
    for word in words:
        assert word in str(caught.value)


def test_another_teacher_is_followed_and_untouched(clusters):
    teacher = copy.deepcopy(clusters.model).train()
    before = copy.deepcopy(teacher.state_dict())
    compress(clusters.model, clusters.data, "size<=90%", Distill(epochs=1), teacher=teacher)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_an_impossible_budget_is_refused_at_once_with_what_is_possible(clusters):
    with pytest.raises(BudgetError, match=r"size<=10B is impossible.*ask for at least size<=\d+KB"):
        compress(clusters.model, clusters.data, "size<=10B, drop<=1pt")


def test_what_folding_makes_possible_is_not_refused():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    model = nn.Sequential(*layers).eval()
    batches = [(torch.randn(8, 4), torch.randint(0, 4, (8,))) for _ in range(3)]
    data = Data(example=torch.ones(1, 4), train=batches, validate=batches, test=batches)
    floor = job.file_floor(model, [], export_graph(model, data))
    with pytest.raises(RecipeError, match="matches no layer"):  # so it was not the budget
        compress(model, data, f"size<={floor - 1}B", only("nowhere", FoldBatchNorm()))
    with pytest.raises(BudgetError, match="impossible"):
        compress(model, data, "size<=100B", only("nowhere", FoldBatchNorm()))


class Counted:
    """A loader that notes how many batches each pass over it read."""

    def __init__(self, loader):
        self.loader, self.passes = loader, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.passes.append(0)
        for batch in self.loader:
            self.passes[-1] += 1
            yield batch


def searched(clusters, budget="size<=60%", **options):
    """Search on 80 training batches; gives the artifact, and how many of them each pass of a training read."""
    split = [part for batch in clusters.data.train for part in zip(*(half.split(4) for half in batch), strict=True)]
    loader = Counted(split)
    data = replace(clusters.data, train=loader, calibrate=clusters.data.train)
    artifact = compress(clusters.model, data, budget, **options)
    return artifact, [count for count in loader.passes if count > 1]  # one is read where a checkpoint is named


def test_mixes_are_compared_on_a_part_of_an_epoch_and_the_trial_reads_all_of_it(clusters):
    """One epoch and one after quantization, of 80 batches: a sixteenth is 5.

    Recipes of the short and the whole training are the same, so a checkpoint taken for the other's would train too little.
    """
    artifact, passes = searched(clusters, epochs=2, trials=2)
    assert passes[-2:] == [80, 80]
    assert set(passes[:-2]) == {5}
    assert len(artifact.report.trials) == 1


def test_where_trials_are_quick_the_better_half_of_the_mixes_trains_longer_and_the_best_is_the_trial(clusters):
    said = []
    artifact, passes = searched(clusters, epochs=24, trials=4, progress=lambda message, done: said.append(message))
    trained = [(words[1], int(words[-2])) for words in map(str.split, said) if words[0] == "mix"]
    rounds = [[name for name, epochs in trained if epochs == length] for length in (2, 12, 24)]
    assert any(name.startswith("drawn") for name in rounds[0])  # beside the named ones, of which some come to the same
    assert set(rounds[1]) == set(rounds[0])
    assert len(rounds[2]) == math.ceil(len(rounds[1]) / 2)
    assert set(rounds[2]) < set(rounds[1])
    assert trained == sorted(trained, key=lambda one: one[1])
    rates = sum(message.startswith("learning rate") for message in said)
    # slower trainings of the first mix; the trial is the last of all, read from its checkpoints unless its file had to change
    assert rates in (2, 3)
    assert len(passes) - sum(epochs for _, epochs in trained) - 2 * (rates - 1) in {
        24 * count for count in range(len(artifact.report.trials) + 1)
    }
    assert artifact.report.after["size_bytes"] <= 0.6 * artifact.report.before["size_bytes"]


@pytest.mark.parametrize("budget", ["size<=60%, drop<=90pt", "size<=60%, latency<=100s"])
def test_mixes_are_compared_once_where_more_than_the_size_is_limited(clusters, budget):
    said = []
    searched(clusters, budget, epochs=24, trials=2, progress=lambda message, done: said.append(message))
    assert {words[-2] for words in map(str.split, said) if words[0] == "mix"} == {"2"}


def test_of_many_mixes_two_are_trained_for_a_part_of_an_epoch(clusters):
    said = []
    _, passes = searched(clusters, epochs=2, trials=5, progress=lambda message, done: said.append(message))
    assert sum(message.startswith("mix ") for message in said) == 2
    rates = sum(message.startswith("learning rate") for message in said)
    # an epoch before quantization and one after it: the first mix at some learning rates, then the other
    assert passes[:-2] == [5] * 2 * (rates + 1)


def test_a_network_that_the_usual_learning_rate_would_ruin_is_trained_more_slowly(clusters):
    """Inputs a hundred times as large, such as pixels of 0 to 255, and weights of the first layer a hundredth."""

    def larger(loader):
        return [(100 * values, labels) for values, labels in loader]

    model, data, said = copy.deepcopy(clusters.model), clusters.data, []
    with torch.no_grad():
        model.inner[0].weight /= 100
    own = {part: larger(getattr(data, part)) for part in ("train", "validate", "test")}
    data = replace(data, example=(100 * data.example[0],), **own)
    made = compress(model, data, "size<=30%", epochs=24, trials=2, progress=lambda message, done: said.append(message))
    tried = {words[2]: float(words[3]) for words in map(str.split, said) if words[:2] == ["learning", "rate"]}
    assert list(tried) == ["0.002:", "0.0005:", "0.000125:"]
    assert tried["0.000125:"] == min(tried.values()) < 0.4 * tried["0.002:"]
    steps = recipe_from_json(yaml.safe_load(made.report.recipe)).steps
    rates = {rate for step in steps if (rate := getattr(step, "learning_rate", None)) is not None}
    assert rates == {0.000125, 0.0000625}
    assert made.report.after["score"] >= made.report.before["score"] - 0.05


def test_parts_of_an_epoch_are_not_trained_again_after_a_kill(clusters, tmp_path):
    said = []

    def stop(message, done):
        said.append(message)
        if message.startswith("mix "):
            raise Chosen

    options = {"epochs": 2, "trials": 3, "out": tmp_path / "model.fw"}
    whole, passes = searched(clusters, **options)
    with pytest.raises(Chosen):
        searched(clusters, **options, progress=stop)
    resumed, left = searched(clusters, **options, resume=True)
    assert resumed.to_bytes() == whole.to_bytes()
    rates = sum(message.startswith("learning rate") for message in said)
    assert left == passes[2 * rates :]  # but the first mix at some learning rates


def test_a_trial_that_holds_after_a_short_training_is_not_trained_longer(clusters):
    artifact, passes = searched(clusters, "size<=60%, drop<=30pt", epochs=12, trials=1)
    # up to three learning rates, which the mix and the trial are among: an epoch before quantization and one after it
    assert len(passes) <= 2 * 3
    assert artifact.report.trials[0]["met"]
    artifact, passes = searched(clusters, "size<=60%, drop<=0pt", epochs=12, trials=1)
    assert len(passes) >= 12
    assert "epochs=8" in artifact.report.trials[0]["recipe"]


@pytest.mark.parametrize("epochs", [2, 8])  # seen by the trial, and by the first short training
def test_a_learning_rate_at_which_the_loss_is_not_finite_is_not_taken(clusters, epochs):
    before = weakref.WeakKeyDictionary()

    def step(model, batch):
        inputs, labels = batch
        bias, known = model.head.bias.detach().clone(), before.get(model)
        before[model] = bias
        leapt = known is not None and float((bias - known).abs().max()) > 1e-3
        return F.cross_entropy(model(inputs), labels) * (math.inf if leapt else 1)

    artifact = compress(clusters.model, replace(clusters.data, step=step), "size<=60%", trials=1, epochs=epochs)
    recipe = recipe_from_json(artifact.facts["recipe"])
    assert {trained.learning_rate for trained in recipe.steps if hasattr(trained, "learning_rate")} == {5e-4, 2.5e-4}
    assert artifact.report.verdict["met"]


def test_candidates_of_one_structure_are_cut_once_and_are_what_they_would_be_alone(clusters, monkeypatch):
    cut = only("inner.*", PruneChannels(ratio=0.5, importance="obs", reconstruct=True))
    plain = cut + QuantizeWeights(bits=4)
    healed = cut + PruneWeights(ratio=0.5, epochs=1) + QuantizeWeights(bits=4)
    wanted, taken, edits = Budget.parse("size<=60%"), [], PruneChannels.edits
    request = Request(wanted, None, 1, 0, torch.device("cpu"), None, False, None)

    def started():
        return job.Job.start(clusters.model, clusters.data, None, request, lambda message, done: None)

    monkeypatch.setattr(PruneChannels, "edits", lambda *given: taken.append(given) or edits(*given))
    alone = started().execute(healed, by_user=False, measure=False)
    assert len(taken) == 1
    shared = started()
    shared.execute(plain, by_user=False, measure=False)
    second = shared.execute(healed, by_user=False, measure=False)
    assert len(taken) == 2
    assert json.dumps(to_json(second.edits)) == json.dumps(to_json(alone.edits))
    assert second.untouched == alone.untouched
    pairs = zip(second.model.state_dict().items(), alone.model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)
