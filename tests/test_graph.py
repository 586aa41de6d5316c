"""Coupled groups: for every model, cutting a group for real gives what zeroing its slices gives."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from featherweight.edits import Cut, Keep, apply, named_tensors
from featherweight.errors import ModelError
from featherweight.graph import coupled_groups
from featherweight.masking import masked
from featherweight.sizes import alternatives, following_sizes


def randomise(model):
    """Random batch-norm statistics and affine parameters, so that no channel is a copy of another."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.eval()


def keep_of(model, cuts):
    """The edit that removes `(group, units)` pairs."""
    gone = {}
    for group, units in cuts:
        for m, member in enumerate(group.members):
            gone.setdefault(member, set()).update(i for u in units for i in group.units[u][m])
    tensors = named_tensors(model)
    edit = [
        Cut(name, dim, tuple(i for i in range(tensors[name].shape[dim]) if i not in indices))
        for (name, dim), indices in gone.items()
    ]
    return Keep(tuple(edit), tuple(following_sizes(model, edit)))


def difference(model, cuts, args, kwargs):
    """How far the cut model is from the masked one; the model itself is not cut."""
    small = copy.deepcopy(model)
    edit = keep_of(small, cuts)
    with masked(small, edit), torch.no_grad():
        want = small(*args, **kwargs)
    for variant in (edit, *alternatives(small, edit)):
        undo = apply(small, variant)
        try:
            with torch.no_grad():
                got = small(*args, **kwargs)
            flat = zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True)
            gap = max(float((a - b).abs().max()) for a, b in flat)
        except RuntimeError:
            gap = float("inf")
        if gap < 1e-5:
            break
        undo()
    return gap


def check(model, *args, attention="heads", **kwargs):
    """Cut every group alone, then all together; return groups by name and pins by tensor."""
    randomise(model)
    groups, pins = coupled_groups(model, args, kwargs, attention)
    generator = torch.Generator().manual_seed(0)
    cuts = [(g, torch.randperm(len(g), generator=generator)[: max(1, len(g) // 3)].tolist()) for g in groups]
    together = {}
    for cut in cuts:
        together.setdefault(cut[0].size or cut[0].name, []).append(cut)
    for some in [*list(together.values())[:6], cuts]:
        assert some == [] or difference(model, some, args, kwargs) < 1e-5
    owners = [
        (name, dim, i)
        for g in groups
        for u in g.units
        for (name, dim), own in zip(g.members, u, strict=True)
        for i in own
    ]
    assert len(owners) == len(set(owners))
    return {g.name: g for g in groups}, {p.tensor: p for p in pins}


def images(channels=3, size=8):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """conv, batch norm, activation."""

    def __init__(self, inner, outer, size=3, stride=1, groups=1, act=None):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def head(channels, classes=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def test_plain_cnn_flatten_gives_each_channel_its_columns():
    model = nn.Sequential(Block(3, 6), nn.MaxPool2d(2), Block(6, 8), nn.Flatten(), nn.Linear(8 * 16, 10), nn.PReLU(10))
    groups, pins = check(model, images())
    assert set(groups) == {"0.conv", "2.conv"}
    group = groups["2.conv"]
    assert group.members == tuple(sorted(group.members))
    assert group.members == (
        ("2.bn.bias", 0),
        ("2.bn.running_mean", 0),
        ("2.bn.running_var", 0),
        ("2.bn.weight", 0),
        ("2.conv.weight", 0),
        ("4.weight", 1),
    )
    assert len(group) == 8
    assert group.units[3][5] == tuple(range(48, 64))
    assert pins == {"4.weight": pins["4.weight"]}
    assert pins["4.weight"].reason == "it is an output of the model"


def test_perceptron():
    groups, pins = check(
        nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)),
        torch.randn(3, 4),
    )
    assert {n: len(g) for n, g in groups.items()} == {"0": 7, "3": 6}
    assert list(pins) == ["5.weight"]


class Residual(nn.Module):
    def __init__(self, inner, outer, stride=1):
        super().__init__()
        self.first, self.second = Block(inner, outer, stride=stride), Block(outer, outer, act=nn.Identity())
        self.short = Block(inner, outer, 1, stride, act=nn.Identity()) if inner != outer else nn.Identity()

    def forward(self, x):
        return F.relu(self.second(self.first(x)) + self.short(x))


def test_residual_network_couples_the_trunk():
    model = nn.Sequential(Block(3, 6), Residual(6, 6), Residual(6, 8, 2), Residual(8, 8), head(8))
    groups, _ = check(model, images())
    trunk = {name for name, dim in groups["0.conv"].members if name.endswith("conv.weight") and dim == 0}
    assert trunk == {"0.conv.weight", "1.second.conv.weight"}
    assert {n for n, d in groups["2.second.conv"].members if n.endswith("conv.weight") and d == 0} == {
        "2.second.conv.weight",
        "2.short.conv.weight",
        "3.second.conv.weight",
    }


class OptionA(nn.Module):
    """ResNet-20 for CIFAR: shortcuts pad the missing channels with zeros."""

    def __init__(self, width=4, depth=3):
        super().__init__()
        self.stem = Block(3, width)
        self.stages = nn.ModuleList()
        for stage in range(3):
            for i in range(depth):
                inner = width * 2 ** (stage - (i == 0 and stage > 0))
                outer = width * 2**stage
                self.stages.append(
                    nn.ModuleList(
                        [Block(inner, outer, stride=1 + (inner != outer)), Block(outer, outer, act=nn.Identity())]
                    )
                )
        self.head = head(width * 4)

    def forward(self, x):
        x = self.stem(x)
        for i, (first, second) in enumerate(self.stages):
            y = second(first(x))
            if i in (3, 6):
                side = 2 if i == 3 else 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
            x = F.relu(x + y)
        return self.head(x)


def test_padded_shortcut_channels_are_pinned_and_the_rest_is_free():
    groups, pins = check(OptionA(), images())
    assert len(groups) == 10  # the stem's channels run through all stages; nine blocks have inner ones
    assert len(groups["stem.conv"]) == 4
    pin = pins["stages.3.1.conv.weight"]
    assert pin.reason.startswith("4 of 8 channels: aten.add meets a tensor of fixed size at test_graph.py:")


def test_depthwise_separable_with_multiplier():
    model = nn.Sequential(
        Block(3, 6),
        Block(6, 6, groups=6),
        Block(6, 8, 1, act=nn.Hardswish()),
        Block(8, 16, groups=8),
        nn.Conv2d(16, 4, 1),
        head(4),
    )
    groups, _ = check(model, images())
    assert len(groups["0.conv"]) == 6
    assert ("1.conv.weight", 0) in groups["0.conv"].members
    unit = dict(zip(groups["2.conv"].members, groups["2.conv"].units[3], strict=True))
    assert unit["3.conv.weight", 0] == (6, 7)
    assert unit["4.weight", 1] == (6, 7)


def test_grouped_convolution_loses_the_same_positions_of_every_group():
    model = nn.Sequential(Block(3, 12), Block(12, 8, groups=4), Block(8, 6, 1), head(6))
    groups, _ = check(model, images())
    unit = dict(zip(groups["0.conv"].members, groups["0.conv"].units[1], strict=True))
    assert unit["0.conv.weight", 0] == (1, 4, 7, 10)
    assert unit["1.conv.weight", 1] == (1,)
    assert groups["1.conv"].units[0][groups["1.conv"].members.index(("2.conv.weight", 1))] == (0, 2, 4, 6)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Block(3, 4)
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1))
                for i in range(3)
            ]
        )
        self.head = head(13)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x)


def test_concatenation_keeps_each_layers_channels_apart():
    groups, _ = check(Dense(), images())
    assert {n: len(g) for n, g in groups.items()} == {"stem.conv": 4, "layers.0.2": 3, "layers.1.2": 3, "layers.2.2": 3}
    unit = dict(zip(groups["layers.0.2"].members, groups["layers.0.2"].units[1], strict=True))
    assert unit["layers.2.2.weight", 1] == (5,)


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Block(3, 16)
        self.branches = nn.ModuleList(
            [nn.Sequential(Block(8, 6, 1), Block(6, 6, groups=6), Block(6, 8, 1)) for _ in range(2)]
        )
        self.head = head(16)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            a, b = x.chunk(2, 1)
            x = torch.cat([a, branch(b)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x)


def test_channel_shuffle():
    groups, _ = check(Shuffle(), images())
    assert {len(g) for n, g in groups.items() if n.startswith("branches")} == {6}
    assert len(groups["stem.conv"]) > 1


class Excite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 3, 1), nn.Linear(3, channels)

    def forward(self, x):
        y = F.relu(self.down(x.mean((2, 3), keepdim=True))).flatten(1)
        return x * torch.sigmoid(self.up(y))[:, :, None, None]


def test_squeeze_and_excitation():
    groups, pins = check(nn.Sequential(Block(3, 8), Excite(8), head(8)), images())
    assert {n: len(g) for n, g in groups.items()} == {"0.conv": 8, "1.down": 3}
    assert {("1.up.weight", 0), ("1.down.weight", 1), ("1.up.bias", 0), ("2.2.weight", 1)} <= set(
        groups["0.conv"].members
    )
    assert list(pins) == ["2.2.weight"]


class SpatialAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.map, self.head = Block(3, 8), nn.Conv2d(8, 1, 3, padding=1), head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * torch.sigmoid(self.map(x)))


def test_one_channel_map_is_broadcast():
    assert len(check(SpatialAttention(), images())[0]["stem.conv"]) == 8


class UNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.down, self.middle = Block(3, 6), Block(6, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2, groups=groups)
        self.last, self.out = Block(10, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.middle(skip))
        x = torch.cat([F.interpolate(x, skip.shape[2:], mode="bilinear"), skip], 1)
        return self.out(self.last(x))


@pytest.mark.parametrize("count", [1, 2])
def test_transposed_convolution_and_skip(count):
    groups, pins = check(UNet(count), images())
    sizes = {n: len(g) for n, g in groups.items()}
    assert sizes == {"down.conv": 6, "middle.conv": 8 // count, "up": 4 // count, "last.conv": 6}
    assert ("up.weight", 1) in groups["up"].members
    assert list(pins) == ["out.weight"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = Block(3, 6), nn.Conv2d(6, 6, 3, padding=1), head(6)
        self.alias = self.shared

    def forward(self, x):
        return self.head(self.alias(F.relu(self.shared(self.stem(x)))))


def test_layer_used_twice_couples_its_inputs_and_outputs():
    groups, _ = check(Twice(), images())
    assert list(groups) == ["stem.conv"]
    assert {("shared.weight", 0), ("shared.weight", 1)} <= set(groups["stem.conv"].members)
    assert not any(name.startswith("alias") for name, _ in groups["stem.conv"].members)


class ConvNeXt(nn.Module):
    def __init__(self, normalise):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8) if normalise else nn.Identity()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.rand(8))
        self.head = head(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


def test_layer_scale_and_layer_norm():
    groups, _ = check(ConvNeXt(False), images())
    assert ("scale", 0) in groups["stem"].members
    assert {n: len(g) for n, g in groups.items()} == {"stem": 8, "wide": 12}
    groups, _ = check(ConvNeXt(True), images())
    assert {n: len(g) for n, g in groups.items()} == {"stem": 8, "wide": 12}
    assert {("norm.weight", 0), ("norm.bias", 0)} <= set(groups["stem"].members)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm([8, 4, 4]),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(1, 8),
        nn.GroupNorm(8, 8),
        nn.Sequential(nn.Flatten(), nn.RMSNorm(128), nn.Unflatten(1, (-1, 4, 4))),
    ],
    ids=["layer over space", "groups", "one group", "instance", "rms over a flatten"],
)
def test_norms_over_cut_channels_see_those_that_stay(norm):
    groups, _ = check(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm, nn.ReLU(), head(8)), images())
    assert len(groups["0"]) == (4 if getattr(norm, "num_groups", 0) == 2 else 8)


class MeanSquare(nn.Module):
    """The norm of the Llama family as its users write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_mean_square_norm_written_by_hand_is_taken_over_those_that_stay():
    groups, _ = check(nn.Sequential(nn.Linear(4, 8), MeanSquare(8), nn.Linear(8, 2)), torch.randn(2, 4))
    assert {n: len(g) for n, g in groups.items()} == {"0": 8}


def test_a_norm_without_gains_is_pinned_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2))
    groups, pins = check(model, torch.randn(2, 4))
    assert not groups
    assert "without weights that say which are kept" in pins["0.weight"].reason


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Linear(128, 2)

    def forward(self, x):
        return self.out(F.max_pool2d(self.conv(x), 2).reshape(-1, 128))


def test_hard_coded_size_is_found_by_running_the_cut_model():
    groups, _ = coupled_groups(HardCoded().eval(), (images(),))
    assert len(groups[0].units[0][-1]) == 16
    assert difference(HardCoded().eval(), [(groups[0], [0])], (images(),), {}) == float("inf")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
        )
        self.out = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.out(self.encoder(self.embed(tokens) + self.place)[:, 0])


def test_transformer_layer_of_torch_frees_width_and_hidden_units_but_not_its_heads():
    groups, _ = coupled_groups(Encoder().eval(), (torch.randint(0, 20, (2, 6)),))
    sizes = {g.name: len(g) for g in groups}
    assert sizes["embed"] == 8
    assert sizes["encoder.layers.0.linear1"] == sizes["encoder.layers.1.linear1"] == 12


class Attention(nn.Module):
    """Attention in separate layers as most people write it, with the queries of several heads to one key if asked."""

    def __init__(self, heads=4, keys=4, scale=None, fused=True):
        super().__init__()
        width = 4 * heads
        self.inner, self.out, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.query, self.key, self.value = (
            nn.Linear(width, width),
            nn.Linear(width, 4 * keys),
            nn.Linear(width, 4 * keys),
        )
        self.heads, self.keys, self.scale, self.fused = heads, keys, scale, fused

    def forward(self, x):
        x = self.inner(x)
        b, t, _ = x.shape
        q = self.query(x).view(b, t, self.heads, -1).transpose(1, 2)
        k = self.key(x).view(b, t, self.keys, -1).transpose(1, 2)
        v = self.value(x).view(b, t, self.keys, -1).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=self.heads != self.keys)
        else:
            k, v = (item.repeat_interleave(self.heads // self.keys, 1) for item in (k, v))
            y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("keys", [4, 2])
def test_whole_heads_leave_with_their_attribute(fused, keys):
    groups, _ = check(Attention(4, keys, fused=fused), torch.randn(2, 5, 4))
    assert {n: len(g) for n, g in groups.items()} == {"inner": 16, "query": keys}
    group = groups["query"]
    assert dict(zip(group.members, group.units[1], strict=True))["query.weight", 0] == tuple(
        range(16 // keys, 32 // keys)
    )


@pytest.mark.parametrize(("scale", "fused"), [(0.5, True), (None, False)])
def test_the_width_of_heads_leaves_where_the_scale_is_given(scale, fused):
    groups, _ = check(Attention(scale=scale, fused=fused), torch.randn(2, 5, 4), attention="width")
    assert {n: len(g) for n, g in groups.items()} == {"inner": 16, "query": 4, "value": 4}


def test_a_scale_that_follows_from_the_width_pins_it():
    groups, pins = check(Attention(), torch.randn(2, 5, 4), attention="width")
    assert set(groups) == {"inner", "value"}
    assert "scales by the width of a head" in pins["query.weight"].reason


class Fused(nn.Module):
    """Fused projections with rotary-like constants and gains inside a head, heads as an attribute or as a literal."""

    def __init__(self, literal=False):
        super().__init__()
        self.inner, self.qkv, self.out, self.head = nn.Linear(4, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2)
        self.heads, self.literal, self.gain = 2, literal, nn.Parameter(torch.rand(4) + 0.5)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.inner(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2 if self.literal else self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.norm(q) * self.gain
        k = k * torch.linspace(1, 2, 4) + torch.cat((-k[..., 2:], k[..., :2]), -1)
        y = torch.einsum("bhlk,bhsk->bhls", q, k).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, -1)))


def test_fused_projections_with_gains_and_constants_inside_a_head():
    groups, _ = check(Fused(), torch.randn(2, 5, 4))
    assert {n: len(g) for n, g in groups.items()} == {"inner": 8, "qkv": 2}


def test_heads_written_as_a_literal_are_refused_by_the_forward():
    model = Fused(literal=True).eval()
    groups, _ = coupled_groups(model, (torch.randn(2, 5, 4),))
    cut = next(g for g in groups if g.name == "qkv")
    assert difference(model, [(cut, [0])], (torch.randn(2, 5, 4),), {}) > 1e-3


class Tagger(nn.Module):
    """Embedding, recurrent layers, a linear layer on every step or on the final states."""

    def __init__(self, kind=nn.LSTM, final=False, **settings):
        super().__init__()
        self.embed, self.wide = nn.Embedding(10, 6), nn.Linear(6, 7)
        self.rnn = kind(7, 5, **settings)
        width = settings.get("proj_size") or 5
        self.final, self.first = final, settings.get("batch_first", False)
        self.out = nn.Linear(width * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, tokens):
        x = F.relu(self.wide(self.embed(tokens)))
        steps, state = self.rnn(x if self.first else x.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        if self.final:
            return self.out(torch.cat((state[-2], state[-1]), 1) if self.rnn.bidirectional else state[-1])
        return self.out(steps)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"batch_first": True, "num_layers": 2}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True, "bias": False}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {"num_layers": 3}),
        (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    ],
    ids=str,
)
def test_hidden_units_of_recurrent_layers(kind, settings, final):
    model = Tagger(kind, final, **settings)
    groups, _ = coupled_groups(randomise(model), (torch.randint(0, 10, (2, 4)),))
    hidden = [g for g in groups if g.size]
    lines = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    assert sorted(len(g) for g in hidden) == sorted(([3] * lines if "proj_size" in settings else []) + [5] * lines)
    assert len({g.size for g in hidden}) == (2 if "proj_size" in settings else 1)
    apart = [(g, [i % len(g)]) for i, g in enumerate(hidden)]  # each layer and direction loses units of its own
    assert difference(model, apart, (torch.randint(0, 10, (2, 4)),), {}) < 1e-5
    check(model, torch.randint(0, 10, (2, 4)))


class Translator(nn.Module):
    """A decoder that starts from the encoder's state, attends to its steps, and starts another from made zeros."""

    def __init__(self):
        super().__init__()
        self.hidden = 6
        self.encoder, self.decoder = nn.GRU(4, 6, batch_first=True), nn.GRU(3, 6, batch_first=True)
        self.last, self.out = nn.LSTM(12, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, source, target):
        memory, state = self.encoder(source)
        steps, _ = self.decoder(target, state)
        found = torch.bmm(torch.bmm(steps, memory.transpose(1, 2)).softmax(-1), memory)
        zeros = torch.zeros(1, len(source), self.hidden)
        return self.out(self.last(torch.cat((steps, found), -1), (zeros, zeros))[0])


def test_encoder_and_decoder_share_their_units_and_states_made_by_hand_follow():
    groups, _ = check(Translator(), torch.randn(2, 5, 4), torch.randn(2, 3, 3))
    assert {n: len(g) for n, g in groups.items()} == {"encoder": 6, "last": 6}
    assert ("decoder.weight_hh_l0", 1) in groups["encoder"].members


def test_a_layer_that_is_read_by_number_pins_every_layer_of_its_size():
    class Reader(Tagger):
        def forward(self, tokens):
            steps, _ = self.rnn(self.wide(self.embed(tokens)))
            return self.out(steps) + steps[..., 1:4]

    groups, pins = check(Reader(nn.LSTM, num_layers=2), torch.randint(0, 10, (2, 4)))
    assert set(groups) == {"embed", "wide"}
    assert "share one size" in pins["rnn.weight_ih_l0"].reason


class Untraceable(nn.Module):
    """A forward that no tracer follows around children that any tracer follows."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.b = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        y = self.a(x)
        return self.b(y if y.mean() > -100 else -y)


def test_a_model_that_cannot_be_traced_whole_is_followed_child_by_child():
    groups, pins = check(Untraceable(), torch.randn(2, 4))
    assert {n: len(g) for n, g in groups.items()} == {"a.0": 8, "b.0": 6}
    assert pins["a.2.weight"].reason == "it is an output of the model"


class Many(nn.Module):
    """Two inputs, a dictionary of them, and a nested output."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.join = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 5)
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x, batch, *, scale=None):
        y = F.relu(self.join(self.left(x) + self.right(batch["y"]) * scale))
        return {"a": self.a(y)}, (self.b(y), y.mean(1))


def test_many_inputs_and_outputs():
    groups, pins = check(Many(), torch.randn(1, 4), {"y": torch.randn(1, 3)}, scale=torch.rand(1, 1))
    assert {n: len(g) for n, g in groups.items()} == {"left": 6}
    assert "aten.mean over its channels" in pins["join.weight"].reason


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.tokens = nn.Sequential(nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 16))
        self.place, self.first = nn.Parameter(torch.randn(1, 17, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(x[:, 0] + x.mean(1))


def test_channels_pass_through_a_layer_that_mixes_tokens():
    groups, pins = check(Mixer(), images())
    assert {n: len(g) for n, g in groups.items()} == {"patch": 8, "tokens.0": 10}
    assert {("place", 2), ("first", 2)} <= set(groups["patch"].members)
    assert "fixed size" in pins["tokens.2.weight"].reason


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.seed, self.up = nn.Linear(4, 6 * 4), nn.ConvTranspose2d(6, 8, 2, 2)
        self.fine, self.out = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)

    def forward(self, z):
        x = self.norm(self.up(self.seed(z).view(len(z), -1, 2, 2)))
        return self.out(F.pad(F.pixel_shuffle(self.fine(x), 2), (1, 1, 1, 1), mode="reflect"))


def test_view_into_channels_and_pixel_shuffle():
    groups, _ = check(Generator(), torch.randn(2, 4))
    assert {n: len(g) for n, g in groups.items()} == {"seed": 6, "up": 8, "fine": 3}
    assert groups["fine"].units[1][groups["fine"].members.index(("fine.weight", 0))] == (4, 5, 6, 7)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(6, 10), nn.Linear(5, 2)

    def forward(self, x):
        x = F.glu(self.a(x), -1)
        gate, value = self.b(x).unflatten(-1, (2, -1)).unbind(1)
        with torch.no_grad():
            scale = torch.ones_like(value) * 2
        return self.c(torch.sigmoid(gate) * value * scale)


def test_gates_lose_both_halves():
    groups, _ = check(Gated(), torch.randn(2, 4))
    assert {n: len(g) for n, g in groups.items()} == {"a": 6, "b": 5}
    assert groups["b"].units[1][groups["b"].members.index(("b.weight", 0))] == (1, 6)


class Hazard(nn.Module):
    """One operator that reads channels by number between two linear layers."""

    def __init__(self, operation, width=8):
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(4, 8), nn.Linear(width, 2), operation
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x):
        return self.b(self.operation(self.a(x), self))


HAZARDS = {
    "index_select": (lambda x, m: x.index_select(1, m.order), 8),
    "index": (lambda x, m: x[:, m.order], 8),
    "gather": (lambda x, m: x.gather(1, m.order.expand(len(x), -1)), 8),
    "roll": (lambda x, m: x.roll(2, 1), 8),
    "strided": (lambda x, m: x[:, ::2], 4),
    "select": (lambda x, m: x + x[:, :1], 8),
    "in place": (lambda x, m: x.index_fill(1, m.order[:2], 0.0), 8),
    "write": (lambda x, m: torch.zeros(2, 8).copy_(x), 8),
    "softmax": (lambda x, m: x.softmax(-1), 8),
    "cumsum": (lambda x, m: x.cumsum(1), 8),
    "norm": (lambda x, m: F.normalize(x), 8),
    "outer": (lambda x, m: (x[:, :, None] * x[:, None, :]).sum(1), 8),
    "constant": (lambda x, m: x + torch.arange(8.0), 8),
    "uneven slice": (lambda x, m: torch.cat([x[:, :3].relu(), x[:, 3:]], 1), 8),
    "uneven split": (lambda x, m: torch.cat(x.split([3, 5], 1)[::-1], 1), 8),
    "crop": (lambda x, m: F.pad(x, (-2, 0)), 6),
    "group norm": (lambda x, m: F.group_norm(x, 2), 8),
    "fixed rows": (
        lambda x, m: (x.unflatten(1, (4, 2)) * torch.arange(4.0)[:, None] * torch.arange(2.0)).flatten(1),
        8,
    ),
    "max": (lambda x, m: x / x.max(), 8),
    "mask": (lambda x, m: x * (x > x.median(1, keepdim=True)[0]), 8),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_channels_read_by_number_are_pinned(name):
    groups, pins = check(Hazard(*HAZARDS[name]), torch.randn(2, 4))
    assert not groups
    assert pins["a.weight"].reason


SAFE = {
    "flip": (lambda x, m: x.flip(1), 8),
    "repeat": (lambda x, m: x.repeat(1, 2), 16),
    "interleave": (lambda x, m: x.repeat_interleave(2, 1), 16),
    "halves": (lambda x, m: torch.cat(x.chunk(2, 1)[::-1], 1), 8),
    "constant column": (lambda x, m: torch.cat([x, torch.ones(len(x), 1)], 1), 9),
    "buffer": (lambda x, m: x + m.order, 8),
    "share": (lambda x, m: torch.cat([x[:, : x.shape[1] // 4].relu(), x[:, x.shape[1] // 4 :]], 1), 8),
    "outer -1": (lambda x, m: x.view(len(x), -1, 2).transpose(1, 2).flatten(1), 8),
    "inner -1": (lambda x, m: x.view(len(x), 2, -1).transpose(1, 2).flatten(1), 8),
    "heads": (lambda x, m: (x.unflatten(1, (-1, 2)) * m.order[: len(m.order) // 2, None]).flatten(1), 8),
    "pad": (lambda x, m: F.pad(x, (2, 1)), 11),
    "max": (lambda x, m: torch.stack([x, x.sigmoid()]).max(0)[0], 8),
    "rows": (lambda x, m: x[torch.arange(len(x)).flip(0)], 8),
    "matmul": (lambda x, m: x @ torch.ones(8, 8), 8),
}


@pytest.mark.parametrize("name", SAFE)
def test_data_movement_is_followed(name):
    groups, _ = check(Hazard(*SAFE[name]), torch.randn(2, 4))
    assert bool(groups) == (name != "matmul")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.wide, self.narrow, self.out = (
            nn.Embedding(9, 6),
            nn.Linear(6, 5),
            nn.Linear(5, 6),
            nn.Linear(6, 9),
        )
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.out(x + self.narrow(self.wide(x)))


def test_tied_weights_are_one_tensor():
    groups, pins = coupled_groups(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert [len(g) for g in groups] == [6, 5]
    assert ("embed.weight", 1) in groups[0].members
    assert not any(name == "out.weight" for name, _ in groups[0].members)
    assert [(p.tensor, p.dim) for p in pins] == [("embed.weight", 0)]


class LowRankUpdate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 6), nn.Linear(5, 2)
        self.weight, self.down, self.up = (nn.Parameter(torch.randn(s)) for s in ((5, 6), (2, 6), (5, 2)))

    def forward(self, x):
        return self.c(F.linear(self.a(x), self.weight + self.up @ self.down))


def test_a_weight_computed_from_parameters_is_followed():
    groups, _ = check(LowRankUpdate(), torch.randn(2, 4))
    assert {("down", 1), ("weight", 1)} <= set(groups["a"].members)
    assert sorted(len(g) for g in groups.values()) == [5, 6]


def test_the_model_comes_back_as_it_was():
    model = nn.Sequential(Block(3, 6), nn.Dropout(0.5), head(6))
    model[0].bn.eval()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes, fused = [m.training for m in model.modules()], torch.backends.mha.get_fastpath_enabled()
    coupled_groups(model, (images(),))
    assert [m.training for m in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert len(model[0]._forward_hooks) == 1
    assert model(images()).requires_grad


def test_a_deep_network_is_read_in_seconds():
    layers = [Block(3, 16)]
    for width in (16, 32, 64, 128):
        inner = width // 2 if width > 16 else 16
        layers += [Residual(inner if i == 0 else width, width, 2 if i == 0 and width > 16 else 1) for i in range(6)]
    model = nn.Sequential(*layers, head(128)).eval()
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 52
    start = time.perf_counter()
    groups, _ = coupled_groups(model, (torch.zeros(1, 3, 64, 64),))
    assert time.perf_counter() - start < 20
    assert len(groups) == 28


def test_a_model_that_cannot_be_traced_says_why():
    class Odd(nn.Module):
        def forward(self, x):
            raise ValueError("seven is odd")

    with pytest.raises(ModelError, match=r"Odd cannot be traced.*ValueError: seven is odd"):
        coupled_groups(Odd(), (torch.zeros(1, 2),))
