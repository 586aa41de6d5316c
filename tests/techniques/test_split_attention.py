"""Attention taken apart: the same function, its parts ordinary layers that later steps can name."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import PruneWeights, QuantizeWeights, SplitAttention


class Reader(nn.Module):
    """Attention of a sequence to itself, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True, **options), nn.Linear(16, 3)

    def forward(self, value):
        return self.head(self.attention(value, value, value, need_weights=False)[0])


def split(technique, **options):
    torch.manual_seed(0)
    model, steps = Reader(**options).eval(), torch.randn(4, 6, 16)
    context = Context(data=Data(example=steps))
    output, edits = run(technique, model, context)
    return model, output, edits, context, steps


def test_the_same_function_of_ordinary_layers():
    model, output, edits, _, steps = split(SplitAttention())
    assert [(edit.path, edit.kind) for edit in edits] == [("attention", "attention")]
    parts = [output.attention.query, output.attention.key, output.attention.value, output.attention.out]
    assert all(type(part) is nn.Linear for part in parts)
    assert torch.allclose(model(steps), output(steps), atol=1e-6)


def test_later_steps_treat_each_part_by_its_name():
    recipe = (
        SplitAttention()
        + PruneWeights(ratios="attention.query.weight 0.75, attention.value.weight 0.5")
        + only("attention.key, attention.out", QuantizeWeights(bits=3))
    )
    _, output, _, context, steps = split(recipe)
    assert context.sparse == {"attention.query.weight", "attention.value.weight"}
    assert int((output.attention.query.weight == 0).sum()) == 192
    assert type(output.attention.key).__name__ == "QuantizedLinear"
    assert type(output.attention.value) is nn.Linear
    assert output(steps).shape == (4, 6, 3)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_attends_to_more_than_its_input_is_left(options):
    _, output, edits, context, _ = split(SplitAttention(), **options)
    assert not edits
    assert type(output.attention) is nn.MultiheadAttention
    assert "attends to more than its input" in context.untouched[0].reason


def test_a_model_without_attention_is_left():
    _, edits = run(SplitAttention(), nn.Sequential(nn.Linear(3, 2)), Context(data=Data(example=torch.ones(1, 3))))
    assert not edits
