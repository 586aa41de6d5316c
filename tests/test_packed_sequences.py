"""Models over packed sequences: exported with lengths, cut, rounded and compressed like any other."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from featherweight import Context, Data, Recipe, compress, run
from featherweight.agreement import expected_outputs
from featherweight.delivery import deliver, subject
from featherweight.errors import ExportError
from featherweight.graph import coupled_groups
from featherweight.portable import export_graph
from featherweight.techniques import Distill, FactorRecurrent, PruneChannels, QuantizeStatic, QuantizeWeights

LONGEST, WORDS, WIDTH, UNITS = 9, 20, 6, 8


class Reader(nn.Module):
    """Classes of texts of several lengths.

    Args:
        cell: the recurrent layer's class.
        read: `state`, the last layer's final states; `largest` or `mean` over the steps; `steps`, all of them.
        options: of the layer.
    """

    def __init__(self, cell=nn.GRU, read="state", sorted_=False, **options):
        super().__init__()
        self.read, self.sorted_ = read, sorted_
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.cell = cell(WIDTH, UNITS, batch_first=True, **options)
        self.leave = nn.Linear(UNITS * (2 if self.cell.bidirectional else 1), 3)

    def forward(self, words, lengths):
        packed = pack_padded_sequence(self.embed(words), lengths.cpu(), True, enforce_sorted=self.sorted_)
        steps, state = self.cell(packed)
        if self.read == "state":
            state = state[0] if isinstance(state, tuple) else state
            return self.leave(torch.cat(list(state[-2 if self.cell.bidirectional else -1 :]), -1))
        steps, counts = pad_packed_sequence(steps, batch_first=True)
        if self.read == "steps":
            return self.leave(steps)
        return self.leave(steps.max(1).values if self.read == "largest" else steps.sum(1) / counts[:, None])


def texts(count=16, seed=0, longest=LONGEST - 2):
    """Words from 1 up, zeros behind the end, and a label that tells whether small words are many."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draws)
    words = torch.randint(1, WORDS, (count, LONGEST), generator=draws)
    words[torch.arange(LONGEST) >= lengths[:, None]] = 0
    return words, lengths, ((words > 0) & (words < WORDS // 2)).sum(1).mul(2).gt(lengths).long()


def loader(count, seed):
    words, lengths, labels = texts(count, seed)
    return DataLoader([((words[i], lengths[i]), labels[i]) for i in range(count)], 16)


def data(**parts):
    words, lengths, _ = texts(2)
    return Data(example=(words, lengths), calibrate=loader(64, 1), **parts)


def drawn(model=Reader, *arguments, **options):
    torch.manual_seed(0)
    return model(*arguments, **options).eval()


def ran(model, folder, runtime="onnxruntime", given=None):
    """What a runtime makes of texts that are shorter than the example's padding, and what the model does."""
    inputs = texts(7, 3)[:2]
    found = deliver(subject(model, given or data()), runtime, folder, inputs, expected_outputs(model, inputs), model)
    with torch.no_grad():
        return torch.from_numpy(found.program.run(inputs)[0]), model(*inputs)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("cell", "read", "options"),
    [
        (nn.LSTM, "state", {"bidirectional": True, "num_layers": 2}),
        (nn.LSTM, "largest", {}),
        (nn.GRU, "state", {"bidirectional": True}),
        (nn.GRU, "mean", {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, "steps", {"bias": False}),
        (nn.RNN, "state", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
        (nn.RNN, "largest", {"bidirectional": True, "bias": False}),
    ],
)
def test_every_sample_is_read_to_its_end_and_no_further(runtime, cell, read, options, tmp_path):
    pytest.importorskip(runtime)
    got, wanted = ran(drawn(Reader, cell, read, **options), tmp_path, runtime)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


class Stacked(nn.Module):
    """Time first; packed words, embedded in a row; a start of one's own; two layers on top of each other; padding of a value."""

    def __init__(self, longest=None):
        super().__init__()
        self.longest = longest
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = nn.LSTM(WIDTH, UNITS), nn.LSTM(UNITS, UNITS, 2)

    def forward(self, words, lengths):
        packed = pack_padded_sequence(words.T, lengths, enforce_sorted=False)
        start = self.embed(words[:, 0])[None].repeat(1, 1, 2)[..., :UNITS]
        steps, (hidden, cell) = self.first(packed._replace(data=self.embed(packed.data)), (start, start + 1))
        steps, _ = self.second(steps)
        padded, counts = pad_packed_sequence(steps, padding_value=-3.0, total_length=self.longest)
        return padded, hidden, cell, counts


@pytest.mark.parametrize("longest", [None, LONGEST, LONGEST + 2])
def test_all_that_a_packed_sequence_can_do(longest, tmp_path):
    model, inputs = drawn(Stacked, longest), texts(5, 4)[:2]
    found = deliver(subject(model, data()), "onnxruntime", tmp_path, inputs, expected_outputs(model, inputs), model)
    for ours, theirs in zip(found.program.run(inputs), model(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-4)


def test_sorted_samples_need_no_sorting(tmp_path):
    model, (words, lengths, _) = drawn(Reader, sorted_=True), texts(6, 5)
    order = lengths.argsort(descending=True)
    inputs = (words[order], lengths[order])
    found = deliver(subject(model, data()), "onnxruntime", tmp_path, inputs, expected_outputs(model, inputs), model)
    torch.testing.assert_close(torch.from_numpy(found.program.run(inputs)[0]), model(*inputs), atol=1e-5, rtol=1e-4)
    assert b"TopK" not in export_graph(model, data()).skeleton


def test_any_number_of_steps_where_their_dimension_is_named(tmp_path):
    model = drawn(Reader, nn.LSTM, "largest")
    given = data(dynamic={"words": {1: "time"}})
    whole, inputs = subject(model, given), (texts(4, 6)[0].repeat(1, 2), torch.tensor([18, 2, 11, 5]))
    found = deliver(whole, "onnxruntime", tmp_path, inputs, expected_outputs(model, inputs), model)
    torch.testing.assert_close(torch.from_numpy(found.program.run(inputs)[0]), model(*inputs), atol=1e-5, rtol=1e-4)


def test_a_final_cell_state_is_not_for_openvino(tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"final cell state of first"):
        ran(drawn(Stacked), tmp_path, "openvino")


class Counted(Reader):
    """Lengths as Python numbers, which no graph has."""

    def forward(self, words, lengths):
        return self.leave(self.cell(pack_padded_sequence(self.embed(words), lengths.tolist(), True))[1][-1])


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        (Counted, {}, r"Counted cannot be traced.*test_packed_sequences.py:\d+"),
        (Reader, {"cell": nn.LSTM, "proj_size": 4}, "projections"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_pytorch_as_it_was(model, options, told):
    before = nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward
    model = drawn(model, **options)
    model.leave = nn.Linear(options.get("proj_size", UNITS), 3)
    with pytest.raises(ExportError, match=told):
        export_graph(model, data())
    assert (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward) == before


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("read", ["state", "largest"])
def test_units_are_followed_through_packed_sequences(cell, read):
    groups, pinned = coupled_groups(drawn(Reader, cell, read), data().example)
    assert {group.name: len(group.units) for group in groups} == {"embed": WIDTH, "cell": UNITS}
    assert [one.tensor for one in pinned] == ["leave.weight"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "step",
    [QuantizeStatic(), QuantizeWeights(bits=8), FactorRecurrent(ratio=0.4, hidden="factors"), PruneChannels(ratio=0.4)],
    ids=lambda step: type(step).__name__,
)
def test_compressed_layers_go_on_reading_packed_sequences(runtime, step, tmp_path):
    pytest.importorskip(runtime)
    model = drawn(Reader, nn.LSTM)
    small = run(step, model, Context(data=data())).model
    got, wanted = ran(small, tmp_path, runtime)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert sum(tensor.numel() for tensor in small.state_dict().values()) != sum(p.numel() for p in model.parameters())


def test_compress_meets_a_size_with_lengths_of_any_kind():
    model = drawn(Reader, nn.GRU, "state", bidirectional=True)
    given = data(train=loader(256, 7), validate=loader(64, 8), test=loader(64, 9))
    recipe = Recipe((PruneChannels(ratio=0.3), Distill(epochs=1), QuantizeWeights(bits=6)))
    artifact = compress(model, given, "size<=100%", recipe)
    assert artifact.report.after["macs"] < artifact.report.before["macs"]
    inputs = texts(5, 10)[:2]
    small = artifact.into(model).eval()
    torch.testing.assert_close(torch.from_numpy(artifact.run(inputs)[0]), small(*inputs), atol=1e-4, rtol=1e-3)
