"""Depth pruning: residual blocks are found, the least important leave, and the rest computes as if they never were."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.artifact import load, package
from featherweight.data import Data, Task, example_inputs
from featherweight.edits import from_json, replay, to_json
from featherweight.errors import ModelError
from featherweight.layers import Skip, build
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, LowRank, PruneBlocks
from featherweight.techniques.blocks import residual_blocks
from featherweight.testing import check_technique
from featherweight.zoo import randomise


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Two convolutions around an addition, in place as torchvision writes it."""

    def __init__(self, inner, outer, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        same = inner == outer and stride == 1
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride), nn.BatchNorm2d(outer))

    def forward(self, image):
        branch = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(image)))))
        branch += image if self.shortcut is None else self.shortcut(image)
        return self.relu(branch)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layer1 = nn.Sequential(Block(6, 6), Block(6, 6), Block(6, 6))
        self.layer2 = nn.Sequential(Block(6, 8, 2), Block(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        return self.head(self.layer2(self.layer1(F.relu(self.stem(image)))).mean((2, 3)))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of norm_first, which cannot be fused
        return nn.TransformerEncoder(layer, 4)


class Sentences(nn.Module):
    """PyTorch's own encoder over tokens, with a padding mask."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = encoder(**options)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)[:, 0])


class Layer(nn.Module):
    """A layer as libraries of language models write it: keyword arguments, a tuple back, a residual sublayer inside."""

    def __init__(self):
        super().__init__()
        self.attention = Sublayer()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        hidden = self.attention(hidden_states)
        hidden = self.norm(hidden + self.down(F.gelu(self.up(hidden))) * attention_mask)
        return hidden, None


class Sublayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.mix(hidden)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        hidden, mask = self.embedding(tokens), (tokens != 0).float()[..., None]
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, attention_mask=mask)[0]
        return self.head(hidden[:, 0])


def images(count, seed):
    return drawn(count, 3, 8, 8, seed=seed)


def tokens(count, seed):
    given = torch.randint(1, 20, (count, 5), generator=torch.Generator().manual_seed(seed))
    given[1:, 3:] = 0
    return given


def task(name):
    build_model, draw = {
        "resnet": (ResNet, images),
        "encoder": (Sentences, tokens),
        "prenorm": (lambda: Sentences(norm_first=True), tokens),
        "language": (Language, tokens),
    }[name]
    labels = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(1))
    loaders = [[(draw(6, seed), labels) for seed in range(start, start + 2)] for start in (0, 2, 4)]
    data = Data(example=draw(2, 9), train=loaders[0], validate=loaders[1], test=loaders[1], calibrate=loaders[2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model()
    return Task(randomise(model, 0).eval(), data, name=name)


NAMES = ("resnet", "encoder", "prenorm", "language")
BLOCKS = {
    "resnet": ["layer1.0", "layer1.1", "layer1.2", "layer2.1"],
    "encoder": [f"encoder.layers.{number}" for number in range(4)],
    "prenorm": [f"encoder.layers.{number}" for number in range(4)],
    "language": [f"layers.{number}" for number in range(4)],
}


def prune(case, **settings):
    context = Context(data=case.data)
    output, edits = run(PruneBlocks(**settings), case.model, context)
    return output, edits, context


@pytest.mark.parametrize("name", NAMES)
def test_which_modules_are_blocks(name):
    case = task(name)
    assert list(residual_blocks(case.model, example_inputs(case.data))) == BLOCKS[name]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


class Deaf(nn.Module):
    """Keeps the shape and adds, but not its input."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, values):
        return self.one(values) + self.other(values)


class Bystander(Sublayer):
    def forward(self, values):
        return super().forward(values), values.sum()


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(Deaf()), []),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), []),
        (nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.ReLU())), []),
        (nn.Sequential(nn.Sequential(Sublayer(), nn.Linear(8, 4))), ["0.0"]),
        (nn.Sequential(nn.Sequential(Sublayer(), Sublayer()), Sublayer()), ["0.0", "0.1", "1"]),
        (nn.Sequential(nn.Sequential(Sublayer(), nn.ReLU())), ["0"]),
        (nn.Sequential(nn.Sequential(Sublayer(), nn.Unflatten(1, (2, 4)))), ["0.0"]),
        (nn.Sequential(Bystander()), []),
    ],
    ids=["no way through", "plain", "no addition", "other width", "stack", "one inside", "other shape", "two tensors"],
)
def test_what_is_a_block(model, found):
    assert list(residual_blocks(model, drawn(2, 8))) == found


def test_frozen_layers_are_blocks_too():
    model = encoder().requires_grad_(False)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # with which PyTorch would fuse the stack
    found = residual_blocks(model, {"src": drawn(2, 5, 8), "src_key_padding_mask": padding})
    assert list(found) == [f"layers.{number}" for number in range(4)]


def test_a_block_called_twice_is_none():
    shared = Sublayer()
    assert not residual_blocks(nn.Sequential(shared, nn.ReLU(), shared), drawn(2, 8))
    assert list(residual_blocks(nn.Sequential(shared, nn.ReLU(), Sublayer()), drawn(2, 8))) == ["0", "2"]


def of_strength(*factors):
    """Residual blocks in a row whose branches are scaled."""
    model = nn.Sequential(*[Sublayer() for _ in factors])
    randomise(model, 4)
    for layer, factor in zip(model, factors, strict=True):
        layer.mix.weight.data = drawn(8, 8, seed=7) * factor
        layer.mix.bias.data.zero_()
    batches = [(drawn(5, 8, seed=seed), drawn(5, 8)) for seed in range(2)]
    return Task(model, Data(example=drawn(2, 8), train=batches, calibrate=batches, loss="mse"))


@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_the_least_important_leave_first(importance):
    output, edits, _ = prune(of_strength(0.3, 0.001, 0.2, 0.01), ratio=0.5, importance=importance)
    assert [edit.path for edit in edits] == ["1", "3"]
    assert [type(layer) is Skip for layer in output] == [False, True, False, True]


def test_influence_is_the_angle_and_loss_the_error():
    """A branch that doubles its input turns nothing and matters; the two measures must tell it apart."""
    case = of_strength(0.0, 0.05)
    case.model[0].mix.weight.data = torch.eye(8)
    _, edits, _ = prune(case, ratio=0.5, importance="influence")
    assert [edit.path for edit in edits] == ["0"]
    _, edits, _ = prune(case, ratio=0.5, importance="loss")
    assert [edit.path for edit in edits] == ["1"]


class InPlace(Sublayer):
    def forward(self, values):
        return super().forward(F.leaky_relu_(values, 0.1))


def test_influence_sees_what_entered_though_the_block_writes_into_it():
    case = of_strength(0.05, 0.0)
    writes = InPlace()
    writes.load_state_dict(case.model[1].state_dict())
    case.model[1] = writes
    _, edits, _ = prune(case, ratio=0.5)
    assert [edit.path for edit in edits] == ["0"]


def test_loss_of_classes_is_the_divergence_of_their_probabilities():
    """A block that adds the same to every logit changes no probability, however much it adds."""
    case = of_strength(0.0, 0.0)
    case = dataclasses.replace(case, data=dataclasses.replace(case.data, loss="cross_entropy"))
    case.model[0].mix.weight.data = torch.eye(8)  # sharpens
    case.model[1].mix.bias.data.fill_(5.0)
    _, edits, _ = prune(case, ratio=0.5, importance="loss")
    assert [edit.path for edit in edits] == ["1"]


def test_loss_is_measured_again_after_each_removal():
    """One block doubles and one halves: the second matters most, until the first has left."""
    case = of_strength(0.0, 1.0, 0.0)
    case.model[0].mix.weight.data = torch.eye(8)
    case.model[2].mix.weight.data = -0.5 * torch.eye(8)
    output, edits, _ = prune(case, ratio=0.67, importance="loss")
    assert [edit.path for edit in edits] == ["0", "2"]
    torch.testing.assert_close(output(drawn(3, 8)), case.model(drawn(3, 8)))


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_computes_as_if_they_never_were(name):
    case = task(name)
    output, edits, _ = prune(case, ratio=0.75)
    assert len(edits) == 3
    left = {edit.path for edit in edits}
    inputs = case.data.calibrate[0][0]
    for path in left:  # by hand: blocks that give back what they were given
        block = case.model.get_submodule(path)
        block.forward = {
            "language": lambda hidden_states, attention_mask=None: (hidden_states, None),
            "resnet": lambda image: image,
        }.get(name, lambda src, **_: src)
        block.train()  # and are not fused
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        torch.testing.assert_close(output(inputs), case.model(inputs))


def test_one_block_always_stays():
    _, edits, _ = prune(task("resnet"), ratio=0.99)
    assert len(edits) == 3
    output, edits, context = prune(of_strength(0.1), ratio=0.9)
    assert not edits
    assert "none that could leave: 0" in context.untouched[0].reason
    assert type(output[0]) is Sublayer


def test_a_model_without_blocks_is_left_and_listed():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    batch = [(drawn(2, 8), drawn(2, 8))]
    case = Task(model, Data(example=drawn(2, 8), calibrate=batch, loss="mse"))
    _, edits, context = prune(case)
    assert not edits
    assert "no module" in context.untouched[0].reason


class Reads(nn.Module):
    """Its forward reads an attribute of its second block, so that one cannot leave."""

    def __init__(self):
        super().__init__()
        self.blocks = of_strength(0.3, 0.001, 0.2).model

    def forward(self, values):
        return self.blocks(values) + self.blocks[1].mix.bias


@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_a_block_that_cannot_leave_is_listed_and_the_next_one_leaves(importance):
    batches = [(drawn(5, 8), drawn(5, 8))]
    case = Task(Reads(), Data(example=drawn(2, 8), calibrate=batches, loss="mse"))
    output, edits, context = prune(case, ratio=0.67, importance=importance)
    assert [edit.path for edit in edits] == ["blocks.2", "blocks.0"]
    assert type(output.blocks[1]) is Sublayer
    if importance == "influence":
        assert context.untouched[0].path == "blocks.1"
        assert "undone" in context.untouched[0].reason


@pytest.mark.parametrize("name", NAMES)
def test_the_file_runs_without_the_class(name, tmp_path):
    case = task(name)
    recipe = Recipe((FoldBatchNorm(), PruneBlocks(ratio=0.5), LowRank(energy=0.6)))
    output, edits = run(recipe, case.model, Context(data=case.data))
    assert sum(type(module) is Skip for module in output.modules()) == 2
    package(output, edits, {}, export_graph(output, case.data)).save(tmp_path / "model.fw")
    back, module = load(tmp_path / "model.fw"), load(tmp_path / "model.fw", into=case.model)
    for size in (1, 2, 5):
        inputs = case.data.calibrate[0][0][:size]
        with torch.no_grad():
            wanted = output(inputs)
            assert torch.equal(module(inputs), wanted)
        torch.testing.assert_close(torch.from_numpy(back.run(inputs)[0]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_keeps_every_promise(name, importance):
    check_technique(PruneBlocks(ratio=0.5, importance=importance), task(name))


def test_a_skip_passes_its_first_tensor_on():
    values, other = drawn(2, 3), drawn(1)
    assert build("skip", {})(None, 1, values, other) is values
    assert build("skip", {})(flag=True, values=values) is values
    nested = build("skip", {"structure": ["tuple", None, ["list", "tensor", None]]})
    assert str(nested(values)) == str((None, [values, None]))
    with pytest.raises(ModelError, match="without a tensor"):
        nested(1)
    for wrong in ("tuple", ["set", "tensor"], 3, {}):
        with pytest.raises(ModelError, match="skip"):
            build("skip", {"structure": wrong})


def test_a_skip_is_replayed_from_json():
    case = task("language")
    output, edits, _ = prune(case, ratio=0.5)
    again = replay(randomise(Language(), 5), from_json(to_json(edits)))
    again.load_state_dict(output.state_dict(), strict=True)
    assert torch.equal(again.eval()(tokens(3, 1)), output(tokens(3, 1)))


def test_a_skip_stands_first_in_the_stacks_of_pytorch():
    case = task("encoder")
    layers = case.model.encoder.layers
    layers[0] = build("skip", {"batch_first": True})
    given = case.data.calibrate[0][0]
    with torch.no_grad():
        fused = case.model(given)  # would be, if the stack found the weights of its first layer
        case.model.encoder.layers = layers[1:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors
            torch.testing.assert_close(fused, case.model(given))
    stack = randomise(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2), 0).eval()
    steps, memory = drawn(5, 2, 8), drawn(4, 2, 8, seed=1)
    found = residual_blocks(stack, (steps, memory))
    assert [swap.options["batch_first"] for swap in found.values()] == [False, False]
    wanted = stack.layers[1](steps, memory)
    stack.layers[0] = build("skip", found["layers.0"].options)
    torch.testing.assert_close(stack(steps, memory), wanted)
