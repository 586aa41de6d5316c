"""run, only, Recipe and settings."""

import copy
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import Cut, Keep, Swap, Write
from featherweight.errors import ModelError, RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe, Technique, matches, name_of
from featherweight.techniques import Distill, LowRank, PruneWeights, QuantizeStatic, QuantizeWeights
from featherweight.zoo import small_models


@final
@dataclass(frozen=True)
class Yields(Technique):
    """Yields what it is given, and remembers what it was told."""

    given: tuple = ()
    told: tuple = ()

    def edits(self, model, context):
        for edit in self.given:
            self.told[0].append((yield edit))


def try_edits(model, example, *edits):
    told, context = [], Context(data=Data(example=example))
    output, kept = run(Yields(edits, (told,)), model, context)
    return output, kept, told, context


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).reshape(-1, 8))


def test_a_refused_edit_is_undone_said_and_told():
    model = Fixed()
    half = tuple(range(4))
    cut = Keep((Cut("a.weight", 0, half), Cut("a.bias", 0, half), Cut("b.weight", 1, half)))
    output, kept, told, context = try_edits(model, torch.ones(1, 3), cut, Write({"b.bias": torch.zeros(2)}))
    assert told == [False, True]
    assert len(kept) == 1
    assert "undone" in context.untouched[0].reason
    assert output.a.weight.shape == (8, 3)
    assert torch.equal(output.a.weight, model.a.weight)


def test_of_edits_that_come_together_only_the_wrong_one_is_refused():
    def linear(path, width):
        options = {"in_features": width, "out_features": width}
        return Swap(path, "linear", options, {"weight": torch.eye(width), "bias": torch.zeros(width)})

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    right, wrong = [linear(str(place), 4) for place in (0, 1, 3, 4)], linear("2", 5)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    _, kept, told, context = try_edits(model, torch.ones(1, 4), tuple(right))
    assert (kept, told, context.untouched) == (right, [True], [])
    few = len(calls)
    output, kept, told, context = try_edits(model, torch.ones(1, 4), (*right[:2], wrong, *right[2:]))
    assert [edit.path for edit in kept] == ["0", "1", "3", "4"]
    assert told == [False]
    assert [left.path for left in context.untouched] == ["2"]
    assert torch.equal(output[2].weight, model[2].weight)
    assert torch.equal(output[3].weight, torch.eye(4))
    assert 0 < few < 5  # before, after, and with hooks: not once for each


def test_a_cut_that_is_not_sound_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2))  # a softmax mixes the channels
    cut = Keep((Cut("0.weight", 0, (0, 1)), Cut("0.bias", 0, (0, 1)), Cut("2.weight", 1, (0, 1))))
    _, kept, told, context = try_edits(model, torch.ones(1, 3), cut)
    assert (kept, told) == ([], [False])
    assert "zeroed" in context.untouched[0].reason
    keeps = (Write({"2.bias": torch.zeros(2)}), cut)
    output, kept, told, _ = try_edits(model, torch.ones(1, 3), keeps)
    assert (kept, told) == ([keeps[0]], [False])
    assert output[0].weight.shape == (4, 3)


class Varies(nn.Module):
    """A variational bottleneck: the variances are read in training alone."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        code = self.mean(x)
        if self.training:
            code = code + torch.randn_like(code) * self.variance(x).exp()
        return self.out(code)


def test_a_cut_that_fails_in_training_is_refused():
    model, drawn = Varies(), torch.get_rng_state()
    half = (0, 1)
    cut = Keep((Cut("mean.weight", 0, half), Cut("mean.bias", 0, half), Cut("out.weight", 1, half)))
    output, kept, told, context = try_edits(model, torch.ones(1, 3), cut)
    assert (kept, told) == ([], [False])
    assert "in training" in context.untouched[0].reason
    assert output.mean.weight.shape == (4, 3)
    assert output.training
    assert torch.equal(torch.get_rng_state(), drawn)
    whole = Keep((*cut.cuts, Cut("variance.weight", 0, half), Cut("variance.bias", 0, half)))
    output, kept, _, _ = try_edits(model, torch.ones(1, 3), whole)
    assert kept == [whole]
    assert output.train()(torch.ones(5, 3)).shape == (5, 2)


def test_a_model_that_runs_only_in_evaluation_can_be_cut():
    class Asks(Fixed):
        def forward(self, x):
            if self.training:
                raise ValueError("targets are needed")
            return self.b(self.a(x))

    half = tuple(range(4))
    cut = Keep((Cut("a.weight", 0, half), Cut("a.bias", 0, half), Cut("b.weight", 1, half)))
    assert try_edits(Asks(), torch.ones(1, 3), cut)[1] == [cut]


def test_another_output_shape_is_refused():
    swap = Swap("0", "linear", {"in_features": 3, "out_features": 5})
    _, _, told, context = try_edits(nn.Sequential(nn.Linear(3, 4)), torch.ones(1, 3), swap)
    assert told == [False]
    assert "[2, 5]" in context.untouched[0].reason
    assert "[2, 4]" in context.untouched[0].reason


def test_attention_reads_the_weight_of_its_output_layer():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    swap = Swap("attention.out_proj", "linear", {"in_features": 8, "out_features": 8})
    _, _, told, context = try_edits(Reads(), torch.ones(1, 3, 8), swap)
    assert told == [False]
    assert context.untouched[0].path == "attention.out_proj"
    assert "bypassed" in context.untouched[0].reason


@pytest.mark.parametrize("step", [QuantizeWeights(), QuantizeStatic(), LowRank(0.3)], ids=str)
def test_the_fused_encoder_layer_still_runs(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)).eval()
    inputs = torch.randn(4, 5, 16)
    context = Context(data=Data(example=inputs, calibrate=[inputs]))
    output, _ = run(step, model, context)
    with torch.no_grad():
        assert output(inputs).shape == (4, 5, 4)  # hooks switch the fused kernel off, and it reads linear1.weight
    # all of them take the attention apart first, and without it the layer has no fused kernel that would bypass the others
    assert type(output[0].linear1) is not nn.Linear


def test_the_model_is_untouched_by_errors():
    task = small_models()["plain"]
    before = copy.deepcopy(task.model.state_dict())

    class Breaks(Technique):
        def edits(self, model, context):
            next(model.parameters()).data.zero_()
            yield Write(None)
            raise ModelError("on purpose")

    with pytest.raises(ModelError, match="on purpose") as caught:
        run(Breaks(), task.model, Context(data=task.data))
    assert "Plain" in caught.value.__notes__[0]
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_a_model_that_does_not_run_is_refused_first():
    with pytest.raises(ModelError, match=r"Linear does not run .*Tensor\[2, 4\].* before any change"):
        run(PruneWeights(), nn.Linear(3, 2), Context(data=Data(example=torch.ones(1, 4))))


def test_needs_are_checked_first():
    with pytest.raises(RecipeError, match=r"Data\(calibrate=\.\.\.\)"):
        run(QuantizeStatic(), nn.Linear(3, 2), Context(data=Data(example=torch.ones(1, 3))))
    assert (only("a", Distill()) + QuantizeStatic()).needs == {"train", "validate", "calibrate"}


def test_modes_and_hooks_of_a_run():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    output, *_ = try_edits(model, torch.ones(1, 3), Swap("1", "linear", {"in_features": 3, "out_features": 2}))
    assert output[1].training
    assert model.training
    assert not output[1]._forward_hooks


@pytest.mark.parametrize(
    ("path", "patterns", "inside"),
    [
        ("a.b.c", ("a",), True),
        ("a.b.c", ("a.*",), True),
        ("ab", ("a",), False),
        ("a.b", ("!a.b",), False),
        ("a.b.c", ("!a.b",), False),
        ("a.c", ("!a.b",), True),
        ("a.b", ("a", "!a.b"), False),
        ("layer3.0", ("layer[34]*",), True),
        ("", ("a",), False),
        ("", ("!a",), True),
    ],
)
def test_matches(path, patterns, inside):
    assert matches(path, patterns) is inside


def test_only_nests_and_flattens():
    step = only("a.*, !a.b", only("*.c", PruneWeights() + QuantizeWeights()))
    assert len(step.steps) == 2 or len(step.inner.steps) == 2
    recipe = Recipe((only("first", PruneWeights() + QuantizeWeights()),))
    assert [str(s) for s in recipe.steps] == ["only(first: prune_weights())", "only(first: quantize_weights())"]
    task = small_models()["perceptron"]
    output, _ = run(only("!0", only("*", QuantizeWeights())), task.model, Context(data=task.data))
    assert [type(layer).__name__ for layer in output] == [
        "Linear",
        "ReLU",
        "QuantizedLinear",
        "ReLU",
        "QuantizedLinear",
    ]


def test_only_that_matches_nothing_suggests():
    task = small_models()["plain"]
    with pytest.raises(RecipeError) as caught:
        run(only("clasifier", PruneWeights()), task.model, Context(data=task.data))
    assert "'clasifier'" in str(caught.value)
    assert "Did you mean 'classifier'" in str(caught.value)
    with pytest.raises(RecipeError, match="no pattern"):
        only(" , ", PruneWeights())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PruneWeights(ratio=1.5), "ratio=1.5"),
        (lambda: PruneWeights(ratio="a"), "ratio='a'"),
        (lambda: PruneWeights(ratio=True), "ratio=True"),
        (lambda: PruneWeights(ratio=float("nan")), "ratio=nan"),
        (lambda: PruneWeights(ranking="lmap"), "ranking='lmap'.*'lamp'"),
        (lambda: QuantizeWeights(bits=4.0), "bits=4.0 must be a whole number"),
        (lambda: QuantizeWeights(bits=9), "bits=9.*2 to 8"),
        (lambda: QuantizeWeights(per_channel=1), "per_channel=1 must be true or false"),
        (lambda: Recipe(("fold_batch_norm",)), "'fold_batch_norm' is none"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_settings_are_values():
    assert PruneWeights(ratio=0) == PruneWeights(ratio=0.0)
    assert isinstance(PruneWeights(ratio=0).ratio, float)
    assert hash(PruneWeights()) == hash(PruneWeights())
    assert name_of(PruneWeights) == "prune_weights"
    assert str(Recipe((PruneWeights(ratio=0.5), QuantizeWeights()))) == "prune_weights(ratio=0.5) -> quantize_weights()"


def test_draws_depend_on_seed_and_step_alone():
    data = Data(example=torch.ones(1, 1))
    first, second = Context(data=data, seed=1), Context(data=data, seed=1)
    assert first.draw("a") == second.draw("a") != first.draw("b")
    second.position = 1
    assert first.draw("a") != second.draw("a")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2, generator=first.rng("x")), torch.rand(2, generator=first.rng("x")))
