"""Training: it heals, never harms, needs no labels, respects scope, and a killed run ends with the same bits."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data
from featherweight.edits import named_tensors
from featherweight.errors import DataError, ModelError, RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.scoring import evaluate, lower
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneWeights, QuantizeStatic, QuantizeWeights, autocasting
from featherweight.techniques.guidance import Guidance
from featherweight.techniques.imitation import imitation
from featherweight.techniques.train import Training, fit
from featherweight.zoo import Plain, randomise, small_models


def teacher_data(teacher, labels=True):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(96, 3, 8, 8, generator=generator).split(16)
    with torch.no_grad():
        batches = [(image, teacher(image).argmax(1)) for image in images]
    train = batches[:4] if labels else [image for image, _ in batches[:4]]
    return Data(example=images[0], train=train, calibrate=train, validate=batches[4:])


@pytest.fixture(scope="module")
def teacher():
    return randomise(Plain(), 0).eval()


def same(first, second):
    tensors = named_tensors(second)
    return all(torch.equal(value, tensors[name]) for name, value in named_tensors(first).items())


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("damage", [PruneWeights(ratio=0.8), QuantizeWeights(bits=2, per_channel=False)], ids=str)
def test_heals_a_damaged_model(teacher, labels, damage):
    data = dataclasses.replace(teacher_data(teacher, labels), score=lower(F.cross_entropy))
    context = Context(data=data, teacher=teacher)
    damaged, _ = run(damage, teacher, context)
    healed, _ = run(Distill(epochs=6, learning_rate=0.01), damaged, context)
    before, after = (evaluate(model, data, "validate").value for model in (damaged, healed))
    assert after < before


def test_in_bfloat16_it_heals_as_well_and_gives_floats_back(teacher, monkeypatch):
    data = dataclasses.replace(teacher_data(teacher), score=lower(F.cross_entropy))
    context = Context(data=data, teacher=teacher)
    damaged, _ = run(PruneWeights(ratio=0.8), teacher, context)
    plain, _ = run(Distill(epochs=6, learning_rate=0.01), damaged, context)
    monkeypatch.setenv("FEATHERWEIGHT_TRAINING", "bfloat16")
    mixed, _ = run(Distill(epochs=6, learning_rate=0.01), damaged, context)
    scores = [evaluate(model, data, "validate").value for model in (damaged, plain, mixed)]
    assert scores[0] - scores[2] > 0.8 * (scores[0] - scores[1]) > 0
    assert not same(plain, mixed), "it was rounded somewhere"
    assert {value.dtype for value in mixed.parameters()} == {torch.float32}
    monkeypatch.setenv("FEATHERWEIGHT_TRAINING", "half")
    with pytest.raises(RecipeError, match="FEATHERWEIGHT_TRAINING is 'half'; it may be auto, float32 or bfloat16"):
        run(Distill(epochs=1), damaged, context)


class Mixing(nn.Module):
    """A bilinear layer: it refuses the bfloat16 that the layers before it give beside its own float32."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.both = nn.Linear(4, 8), nn.Linear(4, 8), nn.Bilinear(8, 8, 3)

    def forward(self, x):
        return self.both(self.one(x).relu(), self.other(x).relu())


def test_a_forward_that_bfloat16_breaks_trains_in_float32_unless_it_was_asked_for(monkeypatch):
    torch.manual_seed(0)
    model = Mixing().eval()
    batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(128, 4).split(32)]
    context = Context(
        data=Data(example=batches[0][0], train=batches, calibrate=batches, validate=batches), teacher=model
    )
    plain, _ = run(Distill(epochs=2, learning_rate=0.01), model, context)
    assert not same(plain, model)
    monkeypatch.setattr(autocasting, "_pays", lambda model, device: True)
    monkeypatch.setenv("FEATHERWEIGHT_TRAINING", "auto")
    assert same(run(Distill(epochs=2, learning_rate=0.01), model, context).model, plain)
    monkeypatch.setenv("FEATHERWEIGHT_TRAINING", "bfloat16")
    with pytest.raises(RuntimeError, match="dtype"):
        run(Distill(epochs=2, learning_rate=0.01), model, context)


@pytest.mark.parametrize("quantize", [None, QuantizeWeights(bits=3), QuantizeStatic()], ids=str)
@pytest.mark.parametrize("rate", [1e-5, 1.0])
def test_never_worse_than_the_start_on_validation(teacher, quantize, rate):
    data = dataclasses.replace(teacher_data(teacher), score=lower(F.cross_entropy))
    context = Context(data=data, teacher=teacher)
    start = run(quantize, teacher, context).model if quantize else teacher
    output, _ = run(Distill(epochs=2, learning_rate=rate), start, context)
    assert evaluate(output, data, "validate").value <= evaluate(start, data, "validate").value


def test_distillation_loss_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert imitation(student, teacher, "classes", 1.0).item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert imitation(student, teacher, "classes", 2.0).item() == pytest.approx(4 * torch.log(torch.tensor(2.0)).item())
    assert imitation(student, teacher, "values", 1.0).item() == pytest.approx(2.0)


class Raising:
    """A loader that is killed at the start of its fourth training epoch; a peek at the first batch is no epoch."""

    def __init__(self, batches):
        self.batches, self.epochs, self.armed = batches, 0, True

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.armed and self.epochs == 3:
            raise KeyboardInterrupt
        yield from self.batches
        self.epochs += 1


def test_bare_techniques_of_one_workspace_do_not_meet(teacher, tmp_path):
    data = teacher_data(teacher)
    for ratio in (0.3, 0.6):
        context = Context(data=data, teacher=teacher, workspace=tmp_path)
        small, _ = run(PruneWeights(ratio=ratio, epochs=2), teacher, context)
        weights = torch.cat([small.get_parameter(name).flatten() for name in context.sparse])
        assert abs(float((weights == 0).float().mean()) - ratio) < 0.01


FITTED = {"loss": "dkd + hint features.2 -> features.4", "mixing": "learnt"}
RISING = {"loss": "dist", "mixing": "rising"}


@pytest.mark.parametrize(
    ("before", "settings"),
    [(None, {}), (QuantizeWeights(bits=4), {}), (QuantizeStatic(), {}), (None, FITTED), (None, RISING)],
    ids=str,
)
def test_a_killed_run_ends_with_the_same_bits(teacher, tmp_path, before, settings):
    data = teacher_data(teacher)
    distill = Distill(epochs=6, learning_rate=0.003, **settings)
    steps = Recipe((*((before,) if before else (PruneWeights(ratio=0.5),)), distill))
    wanted, _ = run(steps, teacher, Context(data=data, teacher=teacher, seed=4))
    loader = Raising(data.train)
    killed = dataclasses.replace(data, train=loader)
    with pytest.raises(KeyboardInterrupt):
        run(steps, teacher, Context(data=killed, teacher=teacher, seed=4, workspace=tmp_path))
    assert list(tmp_path.glob("train-*.safetensors"))
    loader.armed = False
    resumed, _ = run(steps, teacher, Context(data=killed, teacher=teacher, seed=4, workspace=tmp_path))
    assert loader.epochs == 6, "three epochs before, three after"
    assert same(wanted, resumed)
    again, _ = run(steps, teacher, Context(data=killed, teacher=teacher, seed=4, workspace=tmp_path))
    assert loader.epochs == 6, "nothing is left to do"
    assert same(wanted, again)


def test_gradual_pruning_resumes_too(teacher, tmp_path):
    data = teacher_data(teacher)
    step = PruneWeights(ratio=0.7, epochs=6, learning_rate=0.003)
    wanted, _ = run(step, teacher, Context(data=data, teacher=teacher))
    loader = Raising(data.train)
    killed = dataclasses.replace(data, train=loader)
    with pytest.raises(KeyboardInterrupt):
        run(step, teacher, Context(data=killed, teacher=teacher, workspace=tmp_path))
    loader.armed = False
    resumed, _ = run(step, teacher, Context(data=killed, teacher=teacher, workspace=tmp_path))
    assert same(wanted, resumed)


def test_a_checkpoint_serves_no_other_run(teacher, tmp_path):
    data = teacher_data(teacher)
    other = dataclasses.replace(data, train=[(image + 1, label) for image, label in data.train])
    runs = (
        (Context(data=data, teacher=teacher, workspace=tmp_path), Distill(epochs=1)),
        (Context(data=data, teacher=teacher, workspace=tmp_path, seed=1), Distill(epochs=1)),
        (Context(data=data, teacher=teacher, workspace=tmp_path), Distill(epochs=1, learning_rate=0.01)),
        (Context(data=data, teacher=teacher, workspace=tmp_path), Distill(epochs=1, loss="dist")),
        (Context(data=data, teacher=teacher, workspace=tmp_path), Distill(epochs=1, mixing="learnt")),
        (Context(data=other, teacher=teacher, workspace=tmp_path), Distill(epochs=1)),
        (Context(data=data, teacher=randomise(Plain(), 7).eval(), workspace=tmp_path), Distill(epochs=1)),
    )
    for count, (context, step) in enumerate(runs, 1):
        run(step, teacher, context)
        assert len(list(tmp_path.iterdir())) == count


def test_a_damaged_checkpoint_costs_its_run_only(teacher, tmp_path):
    data = teacher_data(teacher)
    wanted, _ = run(Distill(epochs=2), teacher, Context(data=data, teacher=teacher, workspace=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again, _ = run(Distill(epochs=2), teacher, Context(data=data, teacher=teacher, workspace=tmp_path))
    assert same(wanted, again)


def test_scope_keeps_other_layers_and_their_statistics(teacher):
    data = dataclasses.replace(teacher_data(teacher), score=lower(F.cross_entropy))
    context = Context(data=data, teacher=None)
    output, _ = run(only("classifier", Distill(epochs=3, learning_rate=0.01)), teacher, context)
    changed = {
        name for name, value in named_tensors(output).items() if not torch.equal(value, named_tensors(teacher)[name])
    }
    assert changed == {"classifier.weight", "classifier.bias"}


def test_nothing_to_train_is_said(teacher):
    frozen = randomise(Plain(), 0).requires_grad_(False)
    context = Context(data=teacher_data(teacher), teacher=teacher)
    output, _ = run(Distill(epochs=1), frozen, context)
    assert same(frozen, output)
    assert "no parameter" in context.untouched[0].reason
    assert not any(p.requires_grad for p in output.parameters())


def test_patience_stops_early(teacher):
    data = teacher_data(teacher)
    loader = Raising(data.train)
    loader.armed = False
    context = Context(data=dataclasses.replace(data, train=loader), teacher=teacher)
    run(Distill(epochs=50, learning_rate=0.0, patience=2), teacher, context)
    assert loader.epochs == 2


def test_a_step_of_your_own(teacher):
    seen = []

    def step(model, batch):
        seen.append(model)
        return model(batch[0]).square().mean()

    data = dataclasses.replace(teacher_data(teacher), step=step)
    run(Distill(epochs=1), teacher, Context(data=data, teacher=teacher))
    assert seen
    assert seen[0] is not teacher


def test_global_generators_and_the_loaders_own_are_put_back(teacher):
    data = teacher_data(teacher)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run(Distill(epochs=1), teacher, Context(data=data, teacher=teacher))
    assert torch.equal(torch.rand(3), wanted)


def test_what_is_refused(teacher):
    data = teacher_data(teacher)
    labels = [(image, label + 9) for image, label in data.train]
    cases = (
        (dataclasses.replace(data, train=None), RecipeError, "train"),
        (dataclasses.replace(data, train=[]), DataError, "empty"),
        (dataclasses.replace(data, train=labels), DataError, "out of range"),
        (dataclasses.replace(data, train=[(data.train[0][0] * torch.nan, data.train[0][1])]), DataError, "NaN"),
        (dataclasses.replace(data, step=lambda m, b: m(b[0]).sum() * torch.inf), ModelError, "learning rate"),
        (dataclasses.replace(data, loss="crossentropy"), DataError, "cross_entropy"),
    )
    before = {name: value.clone() for name, value in named_tensors(teacher).items()}
    for bad, kind, words in cases:
        with pytest.raises(kind, match=words):
            run(Distill(epochs=1), teacher, Context(data=bad, teacher=teacher))
    assert all(torch.equal(value, before[name]) for name, value in named_tensors(teacher).items())


def test_dropout_and_shuffling_draw_from_the_seed():
    task = small_models()["perceptron"]
    model = nn.Sequential(task.model, nn.Dropout(0.5)).eval()
    loader = torch.utils.data.DataLoader(task.data.train, batch_size=None, shuffle=True)
    data = dataclasses.replace(task.data, train=loader, score=lower(F.cross_entropy), validate=task.data.train)
    step = Distill(epochs=3, learning_rate=0.01)
    outputs = [run(step, model, Context(data=data, seed=seed)).model for seed in (1, 1, 2)]
    assert same(outputs[0], outputs[1])
    assert not same(outputs[0], outputs[2])


def shares(mixing, share, rate=0.0):
    """The teacher's share at each of five steps: the gradient of a task's loss of slope 1 where the teacher's slope is 0."""
    model, ones, seen = nn.Linear(1, 1), torch.ones(4, 1), []
    data = Data(
        example=ones,
        train=[(ones, ones)] * 5,
        validate=[(ones, ones)],
        loss=lambda output, _: output.mean() - output.mean().detach() + 1.0,
        score="mse",
    )
    fit(
        model,
        Context(data=data, teacher=copy.deepcopy(model)),
        Training(1, rate, share),
        after_backward=lambda parameters: seen.append(1 - parameters["bias"].grad.item()),
        guidance=Guidance("none", mixing),
    )
    return seen


def test_mixing_with_the_tasks_loss():
    assert shares("fixed", 0.6) == pytest.approx([0.6] * 5)
    assert shares("falling", 0.6) == pytest.approx([1.0, 0.92, 0.84, 0.76, 0.68])
    assert shares("rising", 0.5) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert shares("learnt", 0.6) == pytest.approx([0.6] * 5)
    learnt = shares("learnt", 0.6, rate=0.1)
    assert learnt == sorted(learnt), "the teacher's part is the smaller one here"
    assert learnt[-1] > learnt[0] == pytest.approx(0.6)


def test_a_loss_of_torch_is_known_for_what_it_is(teacher):
    """Cross entropy under its function follows the teacher by soft targets, as under its name."""
    data = dataclasses.replace(teacher_data(teacher), score=lower(F.cross_entropy))
    start = run(PruneWeights(ratio=0.5), teacher, Context(data=data)).model
    first, second = (
        run(
            Distill(epochs=2, learning_rate=0.01),
            start,
            Context(data=dataclasses.replace(data, loss=loss), teacher=teacher),
        ).model
        for loss in ("cross_entropy", F.cross_entropy)
    )
    assert same(first, second)
    assert not same(first, start)
