"""Attention as runtimes know it: keys turned at once, one scale, and the same outputs."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.onnxruntime import Session


class Attending(nn.Module):
    """Attention over `[batch, 2, steps, 8]`, or `[batch, steps, 16]`, with or without a mask, its keys read elsewhere or not."""

    def __init__(self, masked=False, reads=False, heads=True):
        super().__init__()
        self.enter, self.reads, self.heads = nn.Linear(16, 48), reads, heads
        self.register_buffer("mask", torch.randn(5, 5) if masked else None)

    def forward(self, steps):
        query, key, value = self.enter(steps).chunk(3, -1)
        if self.heads:
            query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return found + key.mean() if self.reads else found


@pytest.mark.parametrize("settings", [{}, {"masked": True}, {"reads": True}], ids=lambda settings: str(list(settings)))
def test_keys_are_turned_at_once_and_one_number_scales(settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, steps = Attending(**settings).eval(), torch.randn(3, 5, 16)
    graph = assemble(export_graph(model, Data(example=steps[:1])), model.state_dict())
    nodes = onnx.load_from_string(graph).graph.node
    turns = [[*attribute.ints] for node in nodes if node.op_type == "Transpose" for attribute in node.attribute]
    assert turns.count([0, 1, 3, 2]) == 1
    assert [0, 2, 1] not in turns
    assert [node.op_type for node in nodes].count("Mul") == 1
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(Session(graph).run(steps)[0]), model(steps), rtol=1e-5, atol=1e-6)


def test_the_scale_has_the_type_of_what_it_scales():
    model, steps = Attending().double().eval(), torch.randn(3, 5, 16, dtype=torch.float64)
    graph = assemble(export_graph(model, Data(example=steps[:1])), model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(Session(graph).run(steps)[0]), model(steps))


class Product(nn.Module):
    """Products that look like attention and are something else."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, steps):
        turned = steps.reshape(-1, 5, 16).transpose(1, 2)
        scaled = steps * (steps.mean() if self.own else 0.5)
        return scaled @ (turned * 3.0), scaled


@pytest.mark.parametrize("own", [True, False])
def test_other_products_stay_what_they_are(own):
    steps = torch.randn(3, 5, 16)
    graph = assemble(export_graph(Product(own), Data(example=steps[:1])), {})
    for given, wanted in zip(Session(graph).run(steps), Product(own)(steps), strict=True):
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-5, atol=1e-5)
