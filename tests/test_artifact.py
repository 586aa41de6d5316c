"""The file: it gives back what went in, runs without the class, and refuses what is not its own."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from featherweight.artifact import compact, load, package
from featherweight.coding import deflate, inflate, pack, unpack
from featherweight.data import Data, as_call
from featherweight.edits import Cut, Keep, Swap, Write, named_tensors, replay
from featherweight.errors import ArtifactError, DataError, ModelError
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, LowRank, PruneChannels, PruneWeights, QuantizeWeights
from featherweight.zoo import randomise, small_models

SQUEEZE = Recipe(
    (FoldBatchNorm(), PruneChannels(ratio=0.4), LowRank(energy=0.6), PruneWeights(ratio=0.5), QuantizeWeights(bits=4))
)
MODELS = tuple(small_models())


def squeezed(name, graph=True):
    task = small_models()[name]
    output, edits = run(SQUEEZE, task.model, Context(data=task.data))
    drawn = export_graph(output, task.data) if graph else None
    return task, output, package(output, edits, {"recipe": SQUEEZE.to_json()}, drawn)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    task, output, artifact = squeezed("residual")
    path = tmp_path_factory.mktemp("artifact") / "model.fw"
    artifact.save(path)
    return task, output, path


def inputs_of(task, count):
    example = task.data.train[0][0]
    return torch.cat([example] * math.ceil(count / len(example)))[:count]


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    task, output, artifact = squeezed(name)
    path = tmp_path / "model.fw"
    assert artifact.save(path) == path.stat().st_size
    back = load(path)
    assert back.facts == artifact.facts
    module = load(path, into=randomise(copy.deepcopy(task.model), 9))
    for size in (1, 2, 7):
        inputs = inputs_of(task, size)
        with torch.no_grad():
            wanted = output(inputs)
            assert torch.equal(module(inputs), wanted)
        assert torch.allclose(torch.from_numpy(back.run(inputs)[0]), wanted, atol=1e-4)
    before = named_tensors(output)
    assert all(torch.equal(value, before[name]) for name, value in named_tensors(module).items())
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in output.parameters()]
    module.train()(inputs_of(task, 4)).sum().backward()
    assert sum(back.bytes_by_part().values()) == path.stat().st_size


def test_into_leaves_its_model_alone(saved):
    task, _, path = saved
    before = {name: (id(value), value.clone()) for name, value in named_tensors(task.model).items()}
    load(path, into=task.model)
    assert all(id(v) == before[n][0] and torch.equal(v, before[n][1]) for n, v in named_tensors(task.model).items())


def test_ties_stay_tied():
    task, _, artifact = squeezed("transformer", graph=False)
    module = artifact.into(task.model)
    assert module.head.weight is module.embedding.weight
    assert "head.weight" not in artifact.state
    task, _, artifact = squeezed("twice", graph=False)
    module = artifact.into(task.model)
    assert module.first is module.again


def test_a_graph_with_ties_is_whole_before_it_is_saved():
    task, output, artifact = squeezed("transformer")
    inputs = inputs_of(task, 3)
    with torch.no_grad():
        (got,) = artifact.run(inputs)
        torch.testing.assert_close(torch.from_numpy(got), output(inputs), rtol=1e-4, atol=1e-4)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True, batch_first=True)

    def forward(self, steps):
        return self.lstm(steps)[0]


def test_an_lstm_with_projections_runs_outside_pytorch():
    model, steps = randomise(Projected(), 1).eval(), torch.randn(3, 5, 4)
    artifact = package(model, [], {}, export_graph(model, Data(example=steps[:1])))
    with torch.no_grad():
        (got,) = artifact.run(steps)
        torch.testing.assert_close(torch.from_numpy(got), model(steps), rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, left, right):
        return {"sum": self.left(left) + self.right(right), "left": self.left(left)}


class Counting(nn.Module):
    """A state that is made for as many samples as there are, counted by Python; or a number of them that is fixed."""

    def __init__(self, fixed=False):
        super().__init__()
        self.cell, self.fixed = nn.GRUCell(4, 3), fixed

    def forward(self, x):
        state = self.cell(x, torch.zeros(len(x), 3))
        return state.reshape(2, -1).reshape(2, 3) if self.fixed else state.view(int(x.shape[0]), -1)


def test_samples_that_are_counted_by_python_may_be_any_number(capfd):
    model, x = Counting().eval(), torch.randn(5, 4)
    graph = export_graph(model, Data(example=x[:2]))
    ours = package(model, [], {}, graph).run((x,))[0]
    torch.testing.assert_close(torch.from_numpy(ours), model(x))
    fixed = Counting(fixed=True).eval()
    ours = package(fixed, [], {}, export_graph(fixed, Data(example=x[:2]))).run((x[:2],))[0]
    torch.testing.assert_close(torch.from_numpy(ours), fixed(x[:2]))
    assert capfd.readouterr() == ("", "")


def test_inputs_by_name_position_and_array():
    model, example = randomise(Named(), 0), {"left": torch.ones(1, 3), "right": torch.ones(1, 4)}
    artifact = package(model, [], {}, export_graph(model, Data(example=example)))
    for size in (1, 2, 7):
        given = {name: torch.randn(size, value.shape[1]) for name, value in example.items()}
        with torch.no_grad():
            wanted = list(model(**given).values())
        for inputs in (given, tuple(given.values()), {name: value.numpy() for name, value in given.items()}):
            for ran, value in zip(artifact.run(inputs), wanted, strict=True):
                assert torch.allclose(torch.from_numpy(ran), value, atol=1e-4)
    assert as_call(example)[1]
    for bad in ({"left": torch.ones(1, 3)}, torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1, 5))):
        with pytest.raises(DataError, match="right"):
            artifact.run(bad)


def test_without_a_graph_it_says_what_it_needs(tmp_path):
    task, _, artifact = squeezed("perceptron")
    small, large = len(artifact.to_bytes(graph=False)), len(artifact.to_bytes())
    assert small < large
    artifact.save(tmp_path / "m.fw", graph=False)
    with pytest.raises(ArtifactError, match=r"m\.fw.*into=model"):
        load(tmp_path / "m.fw").run(inputs_of(task, 1))


def test_two_saves_are_one(saved, tmp_path):
    _, _, path = saved
    _, _, artifact = squeezed("residual")
    artifact.save(tmp_path / "other.fw")
    assert (tmp_path / "other.fw").read_bytes() == path.read_bytes()
    load(path).save(tmp_path / "again.fw")
    assert (tmp_path / "again.fw").read_bytes() == path.read_bytes()


def test_a_path_that_cannot_be_written(saved, tmp_path):
    artifact = load(saved[2])
    for path in (tmp_path / "no" / "m.fw", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be written"):
            artifact.save(path)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(tmp_path / "absent.fw")


def refused(data, folder, into=None):
    path = folder / "damaged.fw"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        load(path, into=into)


def test_truncated(saved, tmp_path):
    data = saved[2].read_bytes()
    for length in (0, 1, 2, 7, len(data) // 2, len(data) - 1):
        refused(data[:length], tmp_path)
    refused(data + b"x", tmp_path)


def test_every_97th_byte_flipped(saved, tmp_path):
    data = saved[2].read_bytes()
    for place in range(0, len(data), 97):
        refused(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :], tmp_path)


def test_foreign_and_renamed_files(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    for data in ((tmp_path / "model.pt").read_bytes(), b"PK\x03\x04", b"{}", b"FW", b"FW\x09aaaaaaaa"):
        refused(data, tmp_path)


def forged(saved, change):
    """The file with another manifest and a right checksum, as an attacker would write it."""
    from featherweight.artifact import _DICTIONARY

    sections = unpack(saved[2].read_bytes(), "file")
    manifest = json.loads(inflate(sections[0], 1 << 20, _DICTIONARY))
    manifest = change(manifest) or manifest
    return pack([deflate(json.dumps(manifest).encode(), _DICTIONARY), *sections[1:]])


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(manifest):
        target = manifest
        for key in keys:
            target = target[key]
        target[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("tensors", 0, ["stem.bias", "f", [1 << 40]]),
        put("tensors", 0, ["stem.bias", "f", [-1, 4]]),
        put("tensors", 0, ["stem.bias", "f", [math.inf]]),
        put("tensors", 0, ["stem.bias", "f", ["a"]]),
        put("tensors", 0, ["stem.bias", "z", [4]]),
        put("tensors", 0, ["stem.bias", ["f"], [4]]),
        put("tensors", 0, "nowhere"),
        lambda manifest: put("tensors", 1, manifest["tensors"][0])(manifest),
        put("tensors", []),
        put("tensors", 5),
        put("graph", [99_999]),
        put("edits", 0, 5),
        put("edits", 0, {"keep": [["stem.weight", 0, 10**14]], "sizes": {}}),
        put("aliases", {"a": "nowhere"}),
        put("facts", 5),
        lambda manifest: [1],
        lambda manifest: "text",
        lambda manifest: {"edits": []},
    ],
)
def test_manifests_that_are_not_to_be_believed(saved, tmp_path, change):
    refused(forged(saved, change), tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"swap": "stem", "kind": "linear", "options": {"in_features": 10**7, "out_features": 10**7}},
        {"swap": "stem", "kind": "linear", "options": {"in_features": -5, "out_features": 3}},
        {"swap": "stem", "kind": "os.system", "options": {"command": "true"}},
        {"swap": "", "kind": "identity", "options": {}},
        {"keep": [["stem.weight", -1, 1]], "sizes": {}},
        {"keep": [], "sizes": {"classifier.training": 1}},
    ],
    ids=str,
)
def test_edits_that_are_not_to_be_believed(saved, tmp_path, row):
    path = tmp_path / "forged.fw"
    path.write_bytes(forged(saved, lambda manifest: put("edits", [*manifest["edits"], row])(manifest)))
    with pytest.raises((ModelError, ArtifactError)):
        load(path, into=saved[0].model)


def test_the_wrong_class_is_told_by_its_tensors(saved):
    _, _, path = saved
    for name, word in (("plain", "stem|first|features|hidden"), ("perceptron", "stem|first|0")):
        with pytest.raises(ModelError, match=word):
            load(path, into=small_models()[name].model)
    plain, wide = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(ModelError, match=r"0\.weight is \[5, 3\] there and \[4, 3\] in the file"):
        package(plain, [], {}, None).into(wide)
    with pytest.raises(ModelError, match=r"no tensor '0\.bias'"):
        package(plain, [], {}, None).into(nn.Sequential(nn.Linear(3, 4, bias=False)))


def test_types_survive(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            for name, kind in {
                "h": torch.float16,
                "b": torch.bfloat16,
                "d": torch.float64,
                "l": torch.int64,
                "t": torch.bool,
            }.items():
                self.register_buffer(name, (torch.arange(6).reshape(2, 3) % 3).to(kind))
            self.register_buffer("empty", torch.zeros(0, 4))
            self.register_buffer("scalar", torch.tensor(math.pi))

    model = Mixed()
    package(model, [], {}, None).save(tmp_path / "m.fw")
    back = load(tmp_path / "m.fw", into=Mixed()).state_dict()
    assert all(
        torch.equal(value, back[name]) and value.dtype == back[name].dtype for name, value in model.state_dict().items()
    )


def test_compact_keeps_the_last_word():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    linear = {"in_features": 4, "out_features": 6, "bias": False}
    edits = [
        Keep((Cut("0.weight", 0, (0, 1, 2, 3, 4)), Cut("0.bias", 0, (0, 1, 2, 3, 4))), (("0.out_features", 5),)),
        Write(None, ("0.weight",)),
        Swap("0", "linear", linear),
        Keep(
            (Cut("0.weight", 0, (3, 1, 5, 0)), Cut("1.weight", 1, (3, 1, 5, 0))),
            (("0.out_features", 4), ("1.in_features", 4)),
        ),
        Keep((Cut("0.weight", 0, (2, 1)), Cut("1.weight", 1, (2, 1))), (("0.out_features", 2), ("1.in_features", 2))),
    ]
    short = compact(edits)
    assert [type(edit).__name__ for edit in short] == ["Swap", "Keep", "Write"]
    shapes = [{n: v.shape for n, v in replay(copy.deepcopy(model), e).state_dict().items()} for e in (edits, short)]
    assert shapes[0] == shapes[1] == {"0.weight": (2, 4), "1.weight": (2, 2), "1.bias": (2,)}
    quantized = [*edits, Swap("0", "quantized_linear", {"in_features": 4, "out_features": 2, "bits": 4, "bias": False})]
    assert [getattr(edit, "kind", "") for edit in compact(quantized)] == ["quantized_linear", "", ""]
