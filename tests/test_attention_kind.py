"""Our attention computes what `nn.MultiheadAttention` does, whatever it is called with and wherever it stands."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from torch import nn

from featherweight.artifact import package
from featherweight.data import Data
from featherweight.edits import Cut, Keep, apply, from_json, module_at, named_tensors, replay, to_json
from featherweight.errors import ModelError
from featherweight.layers import MultiHeadAttention
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import LowRank
from featherweight.techniques.attention import attention_swaps
from featherweight.zoo import randomise

BATCH, STEPS, SOURCES, WIDTH, HEADS = 3, 5, 7, 12, 4


def swapped(model, **context):
    """A copy with every attention swapped, and the edits."""
    model, edits = copy.deepcopy(model), []
    for edit in attention_swaps(model, Context(data=Data(example=torch.ones(1)), **context)):
        apply(model, edit)
        edits.append(edit)
    return model, edits


class Holder(nn.Module):
    """One attention layer in a model that passes everything on to it."""

    def __init__(self, **options):
        super().__init__()
        self.attention = randomise(nn.MultiheadAttention(WIDTH, HEADS, **options), 1)

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(batch_first, *values):
    return [value if batch_first else value.transpose(0, 1) for value in values]


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def padding(kind):
    mask = torch.arange(SOURCES) >= torch.tensor([[7], [4], [1]])
    return {"none": None, "bool": mask, "float": drawn(BATCH, SOURCES, seed=8)}[kind]


def attend(kind):
    causal = nn.Transformer.generate_square_subsequent_mask(SOURCES)[:STEPS] == -torch.inf
    return {
        "none": None,
        "bool": causal,
        "float": drawn(STEPS, SOURCES, seed=9),
        "each": drawn(BATCH * HEADS, STEPS, SOURCES, seed=9),
    }[kind]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_cross_attention_under_every_mask(options, batch_first, training):
    theirs = Holder(batch_first=batch_first, **options).train(training)
    ours, _ = swapped(theirs)
    assert type(ours.attention) is MultiHeadAttention
    query, key, value = laid_out(
        batch_first,
        drawn(BATCH, STEPS, WIDTH),
        drawn(BATCH, SOURCES, options.get("kdim", WIDTH), seed=1),
        drawn(BATCH, SOURCES, options.get("vdim", WIDTH), seed=2),
    )
    masks = itertools.product(("none", "bool", "float"), ("none", "bool", "float", "each"))
    for (padded, attended), (weights, average) in itertools.product(
        masks, ((False, True), (True, True), (True, False))
    ):
        call = {
            "key_padding_mask": padding(padded),
            "attn_mask": attend(attended),
            "need_weights": weights,
            "average_attn_weights": average,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs warns of two kinds of masks at once
            same(ours(query, key, value, **call), theirs(query, key, value, **call))


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_with_the_causal_hint(batch_first):
    theirs = Holder(batch_first=batch_first).eval()
    ours, _ = swapped(theirs)
    (steps,) = laid_out(batch_first, drawn(BATCH, SOURCES, WIDTH))
    mask = nn.Transformer.generate_square_subsequent_mask(SOURCES)
    for weights, padded in itertools.product((False, True), ("none", "float")):
        call = {"attn_mask": mask, "is_causal": True, "need_weights": weights, "key_padding_mask": padding(padded)}
        same(ours(steps, steps, steps, **call), theirs(steps, steps, steps, **call))
        with torch.no_grad():  # where theirs may be fused
            same(ours(steps, steps, steps, **call), theirs(steps, steps, steps, **call))
    with pytest.raises(ModelError, match="attn_mask"):
        ours(steps, steps, steps, is_causal=True)


def test_without_a_batch():
    theirs = Holder().eval()
    ours, _ = swapped(theirs)
    query, key = drawn(STEPS, WIDTH), drawn(SOURCES, WIDTH, seed=1)
    for weights, average in ((False, True), (True, True), (True, False)):
        for mask in (None, drawn(STEPS, SOURCES, seed=3), drawn(HEADS, STEPS, SOURCES, seed=3)):
            call = {
                "need_weights": weights,
                "average_attn_weights": average,
                "attn_mask": mask,
                "key_padding_mask": drawn(SOURCES, seed=4),
            }
            same(ours(query, key, key, **call), theirs(query, key, key, **call))


def test_dropout_while_training_only():
    ours, _ = swapped(Holder(dropout=0.5))
    steps = drawn(BATCH, STEPS, WIDTH)
    ours.eval()
    assert torch.equal(ours(steps, steps, steps)[0], ours(steps, steps, steps)[0])
    ours.train()
    for weights in (False, True):
        first, second = (ours(steps, steps, steps, need_weights=weights)[0] for _ in range(2))
        assert not torch.allclose(first, second)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, dropout=0.0, batch_first=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of norm_first, which cannot be fused
        return randomise(nn.TransformerEncoder(layer, 2), 3)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_inside_an_encoder_it_is_always_called(options):
    theirs = encoder(**options)
    ours, edits = swapped(theirs)
    assert len(edits) == 2
    steps = drawn(BATCH, SOURCES, WIDTH)
    calls = []
    for path in ("layers.0.self_attn", "layers.1.self_attn"):
        module = module_at(ours, path)
        module.forward = lambda *args, kept=module.forward, **kwargs: calls.append(1) or kept(*args, **kwargs)
    lengths = {"none": None, "bool": padding("bool")}
    for training, padded in itertools.product((False, True), lengths):
        call = {"src_key_padding_mask": lengths[padded]}
        theirs.train(training)
        ours.train(training)
        calls.clear()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors, in theirs
            wanted, got = theirs(steps, **call), ours(steps, **call)
        assert len(calls) == 2
        real = slice(None) if lengths[padded] is None else ~lengths[padded]  # theirs may fill padding with zeros
        torch.testing.assert_close(got[real], wanted[real], atol=2e-6, rtol=1e-5)
    ours.train()(steps).sum().backward()
    assert all(value.grad is not None for value in ours.parameters())


def test_inside_a_decoder():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, dropout=0.0)
    theirs = randomise(nn.TransformerDecoder(layer, 2), 3).eval()
    ours, edits = swapped(theirs)
    assert len(edits) == 4
    target, memory = drawn(STEPS, BATCH, WIDTH), drawn(SOURCES, BATCH, WIDTH, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(STEPS)
    call = {"tgt_mask": mask, "memory_key_padding_mask": padding("bool")}
    torch.testing.assert_close(ours(target, memory, **call), theirs(target, memory, **call), atol=2e-6, rtol=1e-5)


def test_its_projections_can_be_factored():
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True)).eval()
    swapped_model, _ = swapped(model)
    paths = [f"0.self_attn.{part}" for part in ("query", "key", "value", "out")]
    context = Context(data=Data(example=drawn(2, STEPS, WIDTH)))
    output, edits = run(only("0.self_attn", LowRank(energy=0.4)), swapped_model, context)
    assert [edit.path for edit in edits] == paths
    assert output[0].self_attn.out[0].weight.shape[0] < WIDTH
    _, edits = run(only("0.self_attn", LowRank(energy=0.4)), model, context)
    assert [edit.path for edit in edits] == ["0.self_attn", *paths]  # it is taken apart first


def without_head(path, head, model):
    """The Keep that takes one head out of an attention."""
    attention = module_at(model, path)
    width = attention.query.out_features // attention.heads
    rows = tuple(row for row in range(attention.query.out_features) if row // width != head)
    cuts = [Cut(f"{path}.{part}.{name}", 0, rows) for part in ("query", "key", "value") for name in ("weight", "bias")]
    return Keep((*cuts, Cut(f"{path}.out.weight", 1, rows)), ((f"{path}.heads", attention.heads - 1),))


def test_a_head_leaves_as_if_it_were_zero():
    masked, edits = swapped(Holder())
    cut = copy.deepcopy(masked)
    masked.attention.out.weight.data[:, 3:6] = 0
    edits.append(without_head("attention", 1, cut))
    apply(cut, edits[-1])
    assert (cut.attention.heads, cut.attention.num_heads) == (3, 3)
    assert sum(map(torch.Tensor.numel, cut.parameters())) == 4 * 9 * 12 + 3 * 9 + 12
    query, key = drawn(STEPS, BATCH, WIDTH), drawn(SOURCES, BATCH, WIDTH, seed=1)
    torch.testing.assert_close(cut(query, key, key)[0], masked(query, key, key)[0], atol=1e-6, rtol=1e-5)
    rows = json.loads(json.dumps(to_json(edits)))
    again = replay(randomise(Holder(), 7), from_json(rows))
    again.load_state_dict(cut.state_dict(), strict=True)
    assert torch.equal(again(query, key, key)[0], cut(query, key, key)[0])


def test_narrower_heads_keep_their_scale():
    masked, _ = swapped(Holder())
    cut = copy.deepcopy(masked)
    kept = tuple(row for row in range(WIDTH) if row % 3)
    gone = [row for row in range(WIDTH) if not row % 3]
    cuts = [
        Cut(f"attention.{part}.{name}", 0, kept) for part in ("query", "key", "value") for name in ("weight", "bias")
    ]
    apply(cut, Keep((*cuts, Cut("attention.out.weight", 1, kept))))
    for layer in (masked.attention.query, masked.attention.key, masked.attention.value):
        layer.weight.data[gone] = 0
        layer.bias.data[gone] = 0
    steps = drawn(STEPS, BATCH, WIDTH)
    for weights in (False, True):
        same(cut(steps, steps, steps, need_weights=weights), masked(steps, steps, steps, need_weights=weights))


class Sentence(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, steps, memory):
        mixed, weights = self.attention(self.layer(steps), memory, memory)
        return self.head(mixed).mean(1) + weights.mean((1, 2))[:, None]


def test_the_artifact_runs_with_any_batch():
    ours, edits = swapped(randomise(Sentence(), 2).eval())
    edits.append(without_head("layer.self_attn", 0, ours))
    apply(ours, edits[-1])
    graph = export_graph(ours, Data(example=(drawn(1, STEPS, WIDTH), drawn(1, SOURCES, 6))))
    artifact = package(ours, edits, {}, graph)
    back = artifact.into(randomise(Sentence(), 9)).eval()
    for size in (1, 2, 7):
        inputs = (drawn(size, STEPS, WIDTH, seed=size), drawn(size, SOURCES, 6, seed=size))
        with torch.no_grad():
            wanted = ours(*inputs)
            assert torch.equal(back(*inputs), wanted)
        torch.testing.assert_close(torch.from_numpy(artifact.run(inputs)[0]), wanted, atol=1e-5, rtol=1e-4)


def test_what_is_left_alone_and_why():
    tied = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    tied[1].out_proj.weight = tied[0].out_proj.weight
    for model, reason in (
        (nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True)]), "add_bias_kv"),
        (nn.ModuleList([nn.MultiheadAttention(8, 2, add_zero_attn=True)]), "add_zero_attn"),
        (tied, "tied to 1.out_proj.weight"),
    ):
        context = Context(data=Data(example=torch.ones(1)))
        assert not list(attention_swaps(model, context))
        assert context.untouched[0].path == "0"
        assert reason in context.untouched[0].reason
    twice = nn.ModuleList([nn.MultiheadAttention(8, 2)] * 2)
    model, edits = swapped(twice)
    assert len(edits) == 1
    assert model[0] is model[1]
    model, edits = swapped(nn.ModuleList([nn.MultiheadAttention(8, 2) for _ in range(2)]), scope=(("1",),))
    assert [edit.path for edit in edits] == ["1"]


def test_precision_follows_the_model():
    ours, _ = swapped(Holder().double())
    assert {value.dtype for value in named_tensors(ours).values()} == {torch.float64}
    steps = drawn(STEPS, BATCH, WIDTH).double()
    assert ours(steps, steps, steps, key_padding_mask=torch.zeros(BATCH, STEPS).bool())[0].dtype == torch.float64
