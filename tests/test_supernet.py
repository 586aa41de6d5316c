"""A supernet: subnets run on slices of the shared weights, train together, and come out as plain models."""

import random

import pytest
import torch
from torch import nn

from featherweight.data import complete, example_inputs, forward
from featherweight.edits import from_json, replay, to_json
from featherweight.errors import ModelError
from featherweight.layers.skip import Skip
from featherweight.scoring import evaluate
from featherweight.supernet import Subnet, Supernet
from featherweight.technique import Context


class Residual(nn.Module):
    """A stem, two residual blocks with norms, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(10, 16), nn.ReLU())
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.head = nn.Linear(16, 4)

    def forward(self, values):
        return self.head(self.blocks(self.stem(values)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 16)

    def forward(self, values):
        return values + self.second(torch.relu(self.norm(self.first(values))))


@pytest.fixture
def supernet(clusters):
    torch.manual_seed(0)
    return Supernet(Residual().eval(), Context(data=complete(clusters.data)[0]), shares=(1.0, 0.5))


def test_what_is_elastic_by_hand(supernet):
    assert sorted(supernet.choices) == [(12, 6), (12, 6), (16, 8)]
    assert sorted(supernet.blocks) == ["blocks.0", "blocks.1"]
    assert supernet.largest == Subnet(tuple(counts[0] for counts in supernet.choices))
    assert supernet.smallest.skipped == supernet.blocks[:1]


def test_blocks_leave_in_one_order_the_least_missed_first(clusters):
    """Three blocks that add much, little and something: no depth lacks one without those that are missed less."""
    torch.manual_seed(0)
    model = Residual().eval()
    model.blocks.append(Block().eval())
    with torch.no_grad():
        for block, size in zip(model.blocks, (3.0, 0.01, 0.3), strict=True):
            block.second.weight *= size
    supernet = Supernet(model, Context(data=complete(clusters.data)[0]), shares=(1.0, 0.5))
    assert supernet.blocks == ("blocks.1", "blocks.2", "blocks.0")
    assert all(not isinstance(block, Skip) for block in supernet.model.blocks)
    assert supernet.smallest.skipped == ("blocks.1", "blocks.2")
    draw = random.Random(0)
    sampled = [supernet.sampled(draw) for _ in range(30)]
    found = supernet.evolved(lambda subnet: -sum(subnet.counts), lambda subnet: 1.0, 1.0, 60, population=5)
    depths = {subnet.skipped for subnet in (*sampled, *(subnet for *_, subnet in found))}
    assert depths == {(), ("blocks.1",), ("blocks.1", "blocks.2")}


def test_a_subnet_computes_what_it_computes_alone(supernet, clusters):
    inputs = example_inputs(supernet.context.data, batch=5)
    before = {name: value.clone() for name, value in supernet.model.state_dict().items()}
    draw = random.Random(0)
    for subnet in (supernet.largest, supernet.smallest, *(supernet.sampled(draw) for _ in range(3))):
        alone, edits = supernet.extracted(subnet, norms=False)
        torch.testing.assert_close(supernet.forward(subnet, inputs), forward(alone, inputs))
        same = replay(Residual(), edits)
        same.load_state_dict(alone.state_dict())
        torch.testing.assert_close(forward(same.eval(), inputs), forward(alone, inputs))
    for name, value in supernet.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_reach_what_a_subnet_uses_and_nothing_else(supernet):
    place = supernet.names.index("blocks.1.first")
    counts = tuple(c[-1] if at == place else c[0] for at, c in enumerate(supernet.choices))
    supernet.model.train()
    running = supernet.model.blocks[1].norm.running_mean.clone()
    supernet.forward(Subnet(counts, ("blocks.0",)), example_inputs(supernet.context.data, batch=8)).sum().backward()
    rows = supernet.model.blocks[1].first.weight.grad.abs().sum(1)
    ((_, order),) = supernet.units[place]
    assert set(rows.nonzero().flatten().tolist()) <= set(order[:6])
    assert rows.any()
    assert supernet.model.blocks[0].first.weight.grad is None
    assert torch.equal(supernet.model.blocks[1].norm.running_mean, running)


def test_training_makes_the_small_ones_work(clusters):
    """Weights that know nothing of each other: after the sandwich all of them tell the clusters apart."""
    torch.manual_seed(1)
    data = complete(clusters.data)[0]
    model = Residual().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for _ in range(2):
        supernet = Supernet(model, Context(data=data, teacher=clusters.model), shares=(1.0, 0.5))
        supernet.train(epochs=12, learning_rate=1e-2)
        found.append(supernet.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    reached = evaluate(clusters.model, data, "validate").value
    for subnet in (supernet.largest, supernet.smallest):
        assert evaluate(supernet.extracted(subnet).model, data, "validate").value > reached - 0.08


def test_it_trains_in_the_precision_of_all_trainings(clusters, monkeypatch):
    data, model = complete(clusters.data)[0], Residual().eval()
    seen = set()
    for precision in ("float32", "bfloat16"):
        monkeypatch.setenv("FEATHERWEIGHT_TRAINING", precision)
        supernet = Supernet(model, Context(data=data, teacher=clusters.model))
        hook = supernet.model.head.register_forward_hook(lambda *given: seen.add((precision, given[2].dtype)))  # noqa: B023
        supernet.train(epochs=1, learning_rate=1e-3)
        hook.remove()
        assert {weight.dtype for weight in supernet.model.parameters()} == {torch.float32}
    assert ("float32", torch.bfloat16) not in seen
    assert ("bfloat16", torch.bfloat16) in seen


class Attending(nn.Module):
    """Self-attention whose forward reads the number of heads from an attribute."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.enter, self.qkv, self.out, self.leave = (
            nn.Linear(2, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, values):
        values = self.enter(values.unflatten(1, (5, 2)))
        query, key, value = self.qkv(values).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.leave((values + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


class Convolving(nn.Module):
    """Kernels of 7 (dilated), 5 (`same`), 5 without room for less, and 3; a residual block in the middle."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv1d(1, 8, 7, padding=6, dilation=2, stride=2)
        self.block = Widening()
        self.tight = nn.Conv1d(8, 8, 5)
        self.small = nn.Conv1d(8, 8, 3, padding=1)
        self.leave = nn.Linear(8, 4)

    def forward(self, values):
        values = torch.relu(self.block(torch.relu(self.enter(values[:, None]))))
        return self.leave(torch.relu(self.small(torch.relu(self.tight(values)))).mean(2))


class Widening(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(8, 12, 5, padding="same")
        self.second = nn.Conv1d(12, 8, 1)

    def forward(self, values):
        return values + self.second(torch.relu(self.first(values)))


def test_kernels_are_elastic_by_their_middle(clusters):
    torch.manual_seed(0)
    supernet = Supernet(Convolving().eval(), Context(data=complete(clusters.data)[0]), shares=(1.0, 0.5))
    assert supernet.kernels == {"enter": (7, 5, 3), "block.first": (5, 3)}
    assert supernet.smallest.kernels == (3, 3)
    inputs, draw = example_inputs(supernet.context.data, batch=5), random.Random(0)
    for subnet in (supernet.largest, supernet.smallest, *(supernet.sampled(draw) for _ in range(4))):
        alone, edits = supernet.extracted(subnet, norms=False)
        torch.testing.assert_close(supernet.forward(subnet, inputs), forward(alone, inputs))
        assert alone.enter.kernel_size == alone.enter.weight.shape[2:] == subnet.kernels[:1]
        same = replay(Convolving(), from_json(to_json(edits)))
        same.load_state_dict(alone.state_dict())
        torch.testing.assert_close(forward(same.eval(), inputs), forward(alone, inputs))
    narrow = Subnet(supernet.largest.counts, (), (3, 5))
    assert torch.equal(supernet.extracted(narrow).model.enter.weight, supernet.model.enter.weight[:, :, 2:5])
    whole = supernet.forward(Subnet(supernet.largest.counts), inputs)
    torch.testing.assert_close(whole, forward(supernet.model, inputs))
    found = supernet.evolved(lambda subnet: sum(subnet.kernels), lambda subnet: sum(subnet.counts), 1e9, 40, seed=1)
    assert found[0][0] == 12
    fixed = Supernet(Convolving().eval(), Context(data=complete(clusters.data)[0]), kernels=False)
    assert fixed.largest.kernels == ()


def test_heads_in_an_attribute_follow(clusters):
    supernet = Supernet(Attending().eval(), Context(data=complete(clusters.data)[0]), shares=(1.0, 0.5))
    assert sorted(supernet.choices) == [(4, 2), (16, 8)]
    narrow = supernet.smallest
    assert supernet.extracted(narrow).model.heads == 2
    inputs = example_inputs(supernet.context.data, batch=5)
    torch.testing.assert_close(supernet.forward(narrow, inputs), forward(supernet.extracted(narrow).model, inputs))
    assert supernet.model.heads == 4


def test_evolution_keeps_the_limit_and_finds_the_best(supernet):
    def width(subnet):
        return sum(subnet.counts) + 4.0 * (2 - len(subnet.skipped))

    best = supernet.evolved(score=width, cost=width, limit=36.0, evaluations=20, seed=2)
    assert best == supernet.evolved(score=width, cost=width, limit=36.0, evaluations=20, seed=2)
    assert all(cost <= 36 for _, cost, _ in best)
    assert best[0][0] >= best[-1][0]
    assert best[0][0] == 36
    with pytest.raises(ModelError, match="the smallest subnet costs"):
        supernet.evolved(width, width, 3.0, 5)


def test_nothing_elastic_is_said(clusters):
    with pytest.raises(ModelError, match="no channels, blocks or kernels"):
        Supernet(nn.Linear(10, 4), Context(data=complete(clusters.data)[0]))
