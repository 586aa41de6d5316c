"""Operators chosen by gradient descent: what may stand in, what moves the logits, and what is taken at which price."""

import copy
import json

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from featherweight.data import Data
from featherweight.edits import Swap, Write, apply, from_json, private_copy, replay, to_json
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import ChooseOperators
from featherweight.techniques.choose_operators import _Search
from featherweight.techniques.operators import Operators, stand_ins

KINDS = ("depthwise_separable_convolution", "factored_convolution", "identity")
FIRM = {"learning_rate": 1e-3, "epochs": 3, "ratio": 0.5}


def layered():
    """A layer of full rank, one of rank 2, one that is nearly the identity, and a readout."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 8)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0])
        model[2].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16) / 4)
        model[4].weight.copy_(torch.eye(16))
        model[4].bias.zero_()
    return model


def imitating(model, *shape, count=256, held=64, shuffled=False):
    """Inputs, and the model's own outputs as targets, so that its own weights are the best there are."""
    draw = torch.Generator().manual_seed(1)

    def loader(samples):
        inputs = torch.randn(samples, *shape, generator=draw)
        with torch.no_grad():
            data = TensorDataset(inputs, model(inputs))
        return DataLoader(data, batch_size=16, shuffle=shuffled, generator=torch.Generator() if shuffled else None)

    train, validate = loader(count), loader(held)
    example = next(iter(validate))[0][:1]
    return Data(example, train=train, calibrate=train, validate=validate, test=validate, loss="mse", score="mse")


def image_model():
    torch.manual_seed(0)
    block = [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    stem = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *block, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)).eval()


def searched(technique, model, data, **more):
    context = Context(data, copy.deepcopy(model), **more)
    small, edits = run(technique, model, context)
    return small, edits, context


def kinds(edits):
    return {edit.path: edit.kind for edit in edits if isinstance(edit, Swap)}


def offered(layer, image):
    model = nn.Sequential(layer).eval()
    context = Context(Data(example=image))
    return [swap.kind for swap in stand_ins(model, context, 0.5).get("0", [])], context


@pytest.mark.parametrize(
    ("layer", "shape", "wanted"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), (8, 6, 7), KINDS),
        (nn.Conv2d(8, 8, (5, 3), padding=(4, 2), dilation=2), (8, 9, 9), KINDS),
        (nn.Conv2d(8, 8, 3, padding="same"), (8, 6, 6), KINDS),
        (nn.Conv2d(8, 8, 3), (8, 6, 6), KINDS[:2]),
        (nn.Conv2d(8, 8, 3, padding=1, stride=2), (8, 6, 6), KINDS[:2]),
        (nn.Conv2d(8, 12, 3, padding=1), (8, 6, 6), KINDS[:2]),
        (nn.Conv2d(8, 8, 1), (8, 6, 6), KINDS[1:]),
        (nn.Conv2d(8, 8, 1, padding="valid"), (8, 6, 6), KINDS[1:]),
        (nn.Linear(9, 9), (5, 9), ("factored_linear", "identity")),
        (nn.Linear(9, 12), (9,), ("factored_linear",)),
        (nn.Linear(2, 1), (2,), ()),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 6, 6), ()),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (8, 6, 6), ()),
    ],
    ids=str,
)
def test_what_may_stand_in_for_a_layer(layer, shape, wanted):
    found, context = offered(layer, torch.randn(1, *shape))
    assert tuple(found) == wanted
    assert [left.path for left in context.untouched] == ([] if wanted else ["0"])


def test_no_identity_where_the_output_is_written_to_in_place():
    """It would hand out its input, which the layer before needs for its gradient."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU()).eval()
    found = stand_ins(model, Context(Data(example=torch.randn(1, 8))), 0.5)
    assert {path: [swap.kind for swap in swaps] for path, swaps in found.items()} == {
        "0": ["factored_linear"],
        "2": ["factored_linear", "identity"],
    }


@pytest.mark.parametrize("place", range(4))
def test_the_decided_mixture_computes_what_is_taken(place):
    model = image_model()
    image = torch.randn(3, 1, 8, 8)
    mixed, _ = private_copy(model)
    found = stand_ins(model, Context(Data(example=image[:1])), 0.5)
    operators = Operators(mixed, found["3"], pace=1.0)
    with torch.no_grad():
        operators.logits[place] = 0.1
        outputs = [mixed[3](torch.ones(1, 6, 8, 8))]
        alone = []
        for operators.decided in range(4):
            alone.append(mixed[3](torch.ones(1, 6, 8, 8)))
        outputs.append(sum(share * output for share, output in zip(operators.shares(), alone, strict=True)))
        torch.testing.assert_close(*outputs)
        operators.decided = operators.best()
        swap = operators.taken()
        assert (swap.kind if swap else None) == (None, *KINDS)[place]
        if swap is not None:
            apply(model, swap)
        torch.testing.assert_close(model(image), mixed(image))


def hand_made(price, cost="macs"):
    """Two layers of 4 inputs and a search that mixes them; the first is called on 3 steps of each sample."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, steps):
            return self.second(self.first(steps).sum(1))

    torch.manual_seed(0)
    model = Steps().eval()
    given, wanted = torch.randn(5, 3, 4), torch.randn(5, 4)
    data = Data(given[:1], train=[(-given, wanted)], validate=[(given, wanted)], loss="mse", score="mse")
    context = Context(data)
    found = stand_ins(model, context, 0.4)
    operators = [Operators(model, swaps, pace=2.0) for swaps in found.values()]
    times = [3.0, 1.0] if cost == "macs" else [1.0, 1.0]
    search = _Search(model, context, operators, times, ChooseOperators(price=price))
    return model, operators, search, (given, wanted)


@pytest.mark.parametrize(("cost", "times"), [("macs", (3, 1)), ("params", (1, 1))])
def test_the_expected_cost(cost, times):
    """Each layer has 16 weights, 8 at rank 1 and none as identity."""
    _, operators, search, _ = hand_made(1.0, cost)
    assert [operator.weights.tolist() for operator in operators] == [[16, 8, 0]] * 2
    with torch.no_grad():
        operators[0].logits.copy_(torch.tensor([0.5, 0.0, 1.0]))
    first = torch.tensor([1.0, 0.0, 2.0]).softmax(0)
    wanted = (times[0] * (16 * first[0] + 8 * first[1]) + times[1] * 8) / (16 * sum(times))
    torch.testing.assert_close(search.expected(), wanted)


def test_logits_follow_the_validation_data_and_the_price():
    model, operators, search, (given, wanted) = hand_made(price=0.7)
    logits = [operator.logits for operator in operators]
    loss = nn.functional.mse_loss(model(given), wanted)
    expected = torch.autograd.grad(loss + 0.7 * search.expected(), logits)
    nn.functional.mse_loss(model(-given), wanted).backward()  # a step on training data
    weights = model.first.weight.grad.clone()
    search.follow(0.0, 0.0)
    search.turn({})
    for logit, gradient in zip(logits, expected, strict=True):
        torch.testing.assert_close(logit.grad, gradient)
    assert torch.equal(model.first.weight.grad, weights)
    with torch.no_grad():
        logits[0][2] = 0.1
    assert search.follow(0.4, 0.5)
    assert [operator.decided for operator in operators] == [2, 0]
    logits[0].grad = None
    search.turn({})
    assert logits[0].grad is None


def test_prices():
    """At none the layer of full rank stays; what low rank and the identity can do they do at a small one, and a high one takes all."""
    model = layered()
    data = imitating(model, 16)
    free, modest, dear = (searched(ChooseOperators(price=p, **FIRM), model, data)[1] for p in (0.0, 0.05, 1e6))
    assert "0" not in kinds(free)
    assert "5" not in kinds(free)
    assert kinds(modest) == {"2": "factored_linear", "4": "identity"}
    assert kinds(dear) == {"0": "identity", "2": "identity", "4": "identity", "5": "factored_linear"}


def test_the_result_is_plain_exports_and_comes_back():
    model = image_model()
    data = imitating(model, 1, 8, 8, count=64, held=16)
    before = copy.deepcopy(model.state_dict())
    small, edits, context = searched(ChooseOperators(epochs=2, price=1e6), model, data)
    assert kinds(edits) == {"0": KINDS[0], "3": "identity", "8": "factored_linear"}
    assert isinstance(edits[-1], Write)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(small[1].weight, model[1].weight), "the rest comes from the same training"
    assert not [left for left in context.untouched if "undone" in left.reason]
    again = replay(image_model(), from_json(json.loads(json.dumps(to_json(edits)))))
    again.load_state_dict(small.state_dict(), strict=True)
    image = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(image), small(image))
    assert sum(parameter.numel() for parameter in small.parameters()) < sum(p.numel() for p in model.parameters())
    graph = export_graph(small, data)
    session = onnxruntime.InferenceSession(assemble(graph, small.state_dict()))
    (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(image).detach(), rtol=1e-4, atol=1e-4)


def test_one_seed_one_result_and_another_order_another():
    model = layered()
    data = imitating(model, 16, count=64, shuffled=True)
    torch.rand(3)
    results = [searched(ChooseOperators(epochs=2), model, data, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    first, second, other = (torch.cat([value.flatten() for value in one.values()]) for one in results)
    assert torch.equal(first, second)
    assert not torch.equal(first[:8], other[:8])


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_killed_search_ends_as_if_it_had_not_been(tmp_path, epoch):
    model = layered()
    data = imitating(model, 16, count=64, held=48)  # 4 batches, and 3: an epoch begins amid the validation data
    technique = ChooseOperators(epochs=4, price=0.05)
    whole, _, _ = searched(technique, model, data)

    def killed(message, done):
        if f"epoch {epoch}/" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(technique, model, data, workspace=tmp_path, report=killed)
    epochs = []
    resumed, _, _ = searched(technique, model, data, workspace=tmp_path, report=lambda said, done: epochs.append(said))
    assert f"epoch {epoch}/" in epochs[0]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_validation_batches_of_one_sample_teach_the_norms_nothing():
    """A batch norm in training would fail on a feature of one sample, and move its statistics by all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    data = imitating(model, 6, count=32)
    single = [(inputs[:1] + 1e4, target[:1]) for inputs, target in data.validate]
    data = Data(data.example, train=data.train, validate=single, loss="mse", score="mse")
    small, _, _ = searched(ChooseOperators(epochs=1), model, data)
    assert small[1].running_mean.abs().max() < 100


def test_zeros_of_a_pruned_layer_that_stays_dense_stay():
    model = layered()
    with torch.no_grad():
        model[0].weight[::2] = 0.0
    context = Context(imitating(model, 16, count=64), copy.deepcopy(model), sparse={"0.weight"})
    small, edits = run(only("0", ChooseOperators(epochs=2, price=0.0)), model, context)
    assert kinds(edits) == {}
    assert torch.equal(small[0].weight == 0, model[0].weight == 0)
    assert not torch.equal(small[0].weight, model[0].weight)


def test_where_nothing_can_be_chosen_nothing_is_trained():
    model = nn.Sequential(nn.Linear(2, 1)).eval()
    _, edits, context = searched(ChooseOperators(), model, imitating(model, 2, count=16))
    assert edits == []
    assert context.untouched[-1].reason == "no layer in scope has a cheaper operator to choose"
