"""Weight sharing: clusters and their gradients by hand, what each way of learning leaves alone, files and ONNX Runtime."""

import copy

import pytest
import torch
from torch import nn

from featherweight.artifact import load, package
from featherweight.coding import encode_tensor
from featherweight.data import Data
from featherweight.layers import KINDS
from featherweight.layers.shared import SharedConv, SharedEmbedding, SharedLinear, SharedTransposedConv, nearest
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.technique import Context, Recipe
from featherweight.techniques import PruneWeights, ShareWeights
from featherweight.techniques.clusters import entropy_constrained, kmeans


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    nn.init.normal_(model[2].weight, std=0.2)
    inputs = drawn(640, 8)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    batches = [(inputs[at : at + 32], labels[at : at + 32]) for at in range(0, 640, 32)]
    return model, Data(example=inputs[:2], train=batches[:16], calibrate=batches[:4], validate=batches[16:])


def trained(recipe):
    model, data = task()
    context = Context(data=data, teacher=copy.deepcopy(model))
    output, edits = run(recipe, model, context)
    return output, edits, data, context


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_kmeans_by_hand():
    """From 0 and 10 the middle is 5: {0, 1, 3} and {7, 10}, whose means stay on their sides."""
    values = double(10, 0, 3, 1, 7)
    assert kmeans(values, torch.ones_like(values), 2).tolist() == pytest.approx([4 / 3, 8.5])
    weighted = kmeans(values, double(1, 1, 1, 1, 3), 2)
    assert weighted.tolist() == pytest.approx([4 / 3, (10 + 3 * 7) / 4])
    # from 0, 2.5, 5, 7.5 and 10; the empty cluster keeps its place
    assert kmeans(values, torch.ones_like(values), 5).tolist() == [0.5, 3, 5, 7, 10]


def test_entropy_constraint_by_hand():
    """A value as near to a rare cluster as to a common one goes to the common one once bits cost something."""
    values = double(0, 0, 0, 0, 0, 0, 0.55, 1)
    start, worth = double(0, 1), torch.ones(8, dtype=torch.float64)
    free, places = entropy_constrained(values, worth, start, 0.0)
    assert places.tolist() == [0] * 6 + [1, 1]
    assert free.tolist() == pytest.approx([0.0, 0.775])
    # shares 6/8 and 2/8: 0.55 costs 0.3025 + 0.415 rate in the first cluster, 0.2025 + 2 rate in the second
    bound, places = entropy_constrained(values, worth, start, 0.07)
    assert places.tolist() == [0] * 7 + [1]
    assert bound.tolist() == pytest.approx([0.55 / 7, 1.0])


def test_nearest_entries_in_any_order():
    codebook = torch.tensor([0.5, -1.0, 0.0])
    assert nearest(torch.tensor([[-0.6, 0.2], [0.3, 9.0]]), codebook).tolist() == [[1, 2], [0, 0]]


def layer(learn):
    made = SharedLinear(3, 1, clusters=3, origin=1, bias=False, learn=learn)
    made.codebook.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    made.codes.copy_(torch.tensor([[1, 1, -1]]))
    return made


@pytest.mark.parametrize("learn", ["centroids", "points", "weights"])
def test_gradients_by_hand(learn):
    """Two weights are 2.0, with inputs 1 and 4: the mean of both is the gradient of their entry; zero has none."""
    made, inputs = layer(learn), torch.tensor([[1.0, 4.0, 3.0]])
    assert made(inputs).item() == 2 + 8 - 3
    made.thaw()
    made.train()
    output = made(inputs)
    assert output.item() == 2 + 8 - 3
    output.backward()
    assert made.codebook.grad.tolist() == [3.0, 0.0, 2.5]
    if learn == "weights":
        assert made.weight.grad.tolist() == [[1.0, 4.0, 3.0]]
    with torch.no_grad():
        made.codebook.copy_(torch.tensor([-0.9, 0.0, 0.3]))
        if learn != "centroids":
            made.weight.copy_(torch.tensor([[0.4, 0.1, -1.0]]))
    made.eval()
    before = made(inputs)
    made.freeze()
    assert made.codes.tolist() == ([[1, 1, -1]] if learn == "centroids" else [[1, 0, -1]])
    assert torch.equal(made(inputs), before), "a thawed layer computes in evaluation mode what it will freeze to"
    assert {name for name, _ in made.named_buffers()} == {"codes", "codebook"}
    assert not list(made.parameters())


def test_centroids_train_and_places_stay():
    start, _, data, _ = trained(ShareWeights(clusters=4, epochs=0))
    after, edits, _, _ = trained(ShareWeights(clusters=4, epochs=6, learning_rate=1e-2))
    assert torch.equal(start[2].codes, after[2].codes)
    assert not torch.equal(start[2].codebook, after[2].codebook)
    scores = [evaluate(model, data, "validate", torch.device("cpu")).value for model in (start, after)]
    assert scores[1] > scores[0], scores
    assert [type(edit).__name__ for edit in edits] == ["Swap", "Swap", "Swap", "Write"]


@pytest.mark.parametrize(("learn", "moves"), [("points", False), ("weights", True)])
def test_latents_move_only_where_weights_are_learnt(learn, moves):
    """With no learning rate codes are those of k-means; with one, points alone follow the codebook."""
    start, _, data, _ = trained(ShareWeights(clusters=3, epochs=0))
    after, _, _, _ = trained(ShareWeights(clusters=3, epochs=6, learning_rate=1e-2, learn=learn))
    model, _ = task()
    same = torch.equal(after[2].codes, nearest(model[2].weight, after[2].codebook).to(torch.int8) - after[2].origin)
    assert same is not moves
    scores = [evaluate(model, data, "validate", torch.device("cpu")).value for model in (start, after)]
    assert scores[1] >= scores[0], scores


def test_a_rate_makes_indices_cheaper():
    sizes = []
    for rate in (0.0, 20.0):
        output, _, _, _ = trained(ShareWeights(rate=rate, epochs=0))
        sizes.append(len(encode_tensor(output[2].codes)))
    assert sizes[1] < 0.9 * sizes[0], sizes


def test_what_costs_the_output_is_kept_closer():
    """With inputs that never move a column's output, its weights may be anywhere."""
    model, data = task()
    blind = [(torch.cat([inputs[:, :4], torch.zeros(32, 4)], 1), labels) for inputs, labels in data.train]
    context = Context(data=Data(example=data.example, train=data.train, calibrate=blind, validate=data.validate))
    errors = []
    for sensitivity in ("none", "fisher"):
        output, _ = run(ShareWeights(clusters=4, sensitivity=sensitivity, epochs=0), model, context)
        errors.append((output[0].dequantized() - model[0].weight).square()[:, :4].sum().item())
    assert errors[1] < errors[0]


def test_zeros_of_pruned_tensors_have_an_entry_alone():
    recipe = Recipe((PruneWeights(ratio=0.7, ranking="layer"), ShareWeights(clusters=5, epochs=2, learning_rate=1e-2)))
    pruned, _, _, _ = trained(recipe.parts[0])
    output, _, _, _ = trained(recipe)
    shared = output[2]
    zero = pruned[2].weight == 0
    assert not shared.codes[zero].any(), "their code is 0, which is cheap in the file"
    assert not shared.dequantized()[zero].any()
    assert shared.codes[~zero].all()
    assert len(shared.codebook) == 5


class Every(nn.Module):
    """A layer of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8, padding_idx=0)
        self.convolution = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        steps = self.up(self.convolution(self.embedding(tokens).mT)).mT
        return self.head(self.lstm(steps)[0][:, -1])


@pytest.mark.parametrize("clusters", [2, 16])
def test_every_kind_in_a_file_and_in_onnx_runtime(clusters, tmp_path):
    tokens = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(2))
    output, edits = run(ShareWeights(clusters=clusters, epochs=0), Every().eval(), Context(data=Data(example=tokens)))
    kinds = {type(layer) for layer in output.modules()} & {*KINDS.values()}
    assert kinds >= {SharedEmbedding, SharedConv, SharedTransposedConv, SharedLinear}
    package(output, edits, {}, export_graph(output, Data(example=tokens))).save(tmp_path / "model.fw")
    artifact = load(tmp_path / "model.fw")
    with torch.no_grad():
        wanted = output(tokens)
        assert torch.equal(load(tmp_path / "model.fw", into=Every()).eval()(tokens), wanted)
    torch.testing.assert_close(torch.from_numpy(artifact.run(tokens)[0]), wanted, atol=1e-5, rtol=1e-4)
    floats = sum(value.numel() for value in artifact.state.values() if value.is_floating_point() and value.dim() > 1)
    assert not floats


def test_two_hundred_and_fifty_six_values_fit_codes_of_eight_bits():
    model = nn.Sequential(nn.Linear(64, 64))
    output, _ = run(ShareWeights(clusters=256, epochs=0), model.eval(), Context(data=Data(example=drawn(2, 64))))
    assert float((output[0].dequantized() - model[0].weight).abs().max()) < 2e-3
    assert output[0].origin == 128
