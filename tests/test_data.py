"""Data: what is read, what is refused, and how splits are made."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from featherweight.data import (
    Data,
    Shortened,
    as_call,
    batches,
    complete,
    describe,
    example_inputs,
    forward,
    move,
    select_output,
    split_batch,
    tensors,
)
from featherweight.errors import DataError
from featherweight.scoring import loss_function
from featherweight.techniques.seeding import reseeded


def test_batches_are_split_and_moved():
    image, label = torch.ones(2, 3), torch.tensor([0, 1])
    assert split_batch((image, label))[1] is label
    assert split_batch(image) == (image, None)
    inputs, target = split_batch([[image, image], label])
    assert isinstance(inputs, tuple)
    assert target is label
    assert split_batch({"a": image})[1] is None
    assert (
        describe(move({"a": [image, (label,)], "b": 3}, "cpu"))
        == "dict(a=tuple(Tensor[2, 3], tuple(Tensor[2])), b=int)"
    )


def test_calls():
    one = torch.ones(1)
    assert as_call(one) == ((one,), {})
    assert as_call((one, one)) == ((one, one), {})
    assert as_call({"x": one}) == ((), {"x": one})
    add = lambda x, y=0: x + y  # noqa: E731
    assert forward(add, {"x": one, "y": one}) == forward(add, (one, one)) == 2
    assert len(list(tensors({"a": [one, {"b": (one, 3)}]}))) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", ["tensor", "tuple", "dict"])
def test_values_that_are_not_finite(value, shape):
    bad = torch.tensor([[1.0, value]])
    inputs = {"tensor": bad, "tuple": (torch.ones(1), bad), "dict": {"x": bad}}[shape]
    loader = [(torch.ones(1, 2), 0), (inputs, torch.tensor([0]))]
    with pytest.raises(DataError, match=r"Data\.train: batch 1 .*\[1, 2\]"):
        list(batches(loader, "train"))


def test_missing_and_empty_loaders():
    with pytest.raises(DataError, match=r"no test loader.*Data\(test"):
        list(batches(None, "test"))
    with pytest.raises(DataError, match=r"Data\.test is empty"):
        list(batches([], "test"))
    used = iter([torch.ones(1)])
    list(batches(used, "train"))
    with pytest.raises(DataError, match="each time"):
        list(batches(used, "train"))


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label):
    loss = loss_function(Data(example=None))
    with pytest.raises(DataError, match=rf"label {label} .*\[2, 4\].*0 to 3"):
        loss(torch.zeros(2, 4), torch.tensor([0, label]))
    assert torch.isfinite(loss(torch.zeros(2, 4), torch.tensor([0, -100])))


def test_outputs_of_several_parts():
    output = (torch.zeros(2, 4), torch.ones(2, 1))
    with pytest.raises(DataError, match=r"tuple\(Tensor\[2, 4\], Tensor\[2, 1\]\).*output=0"):
        select_output(output, None)
    assert select_output(output, 1) is output[1]
    assert select_output({"logits": output[0]}, "logits") is output[0]
    assert select_output(output, lambda parts: parts[0]) is output[0]
    assert select_output(namedtuple("Output", "logits aux")(*output), "logits") is output[0]
    for choice in (0, "logits"):
        assert select_output(output[0], choice) is output[0]
    for choice in (2, "logits"):
        with pytest.raises(DataError, match=f"output={choice!r}"):
            select_output(output, choice)
    with pytest.raises(DataError, match="output='scores'"):
        select_output({"logits": output[0]}, "scores")


def test_example_is_repeated_to_two():
    assert example_inputs(Data(example=torch.ones(1, 3))).shape == (2, 3)
    assert example_inputs(Data(example=torch.ones(5, 3))).shape == (2, 3)
    made = example_inputs(Data(example={"a": torch.ones(1, 3), "b": (torch.ones(3, 1), 4)}), batch=7)
    assert describe(made) == "dict(a=Tensor[7, 3], b=tuple(Tensor[7, 1], int))"
    for bad, words in ((torch.tensor(1.0), "without dimensions"), (3, "int"), ((), "tuple")):
        with pytest.raises(DataError, match=words):
            example_inputs(Data(example=bad))


def contents(loader):
    return {int(value) for inputs, _ in batches(loader, "split") for value in inputs.flatten()}


def numbered(count, **settings):
    return DataLoader(TensorDataset(torch.arange(count).reshape(-1, 1), torch.zeros(count)), batch_size=4, **settings)


@pytest.mark.parametrize("shuffle", [True, False])
def test_splits_of_a_data_loader_are_disjoint_complete_and_said(shuffle):
    data, notes = complete(Data(example=torch.ones(1, 1), train=numbered(50, shuffle=shuffle)))
    parts = [contents(loader) for loader in (data.train, data.validate, data.test)]
    assert [len(part) for part in parts] == [40, 5, 5]
    assert set.union(*parts) == set(range(50))
    assert data.calibrate is data.train
    assert ["validate" in notes[0], "test" in notes[1], "calibrate" in notes[2]] == [True] * 3
    again, _ = complete(Data(example=torch.ones(1, 1), train=numbered(50, shuffle=shuffle)))
    assert contents(again.test) == parts[2]
    order = [int(v) for _ in range(2) for x, _ in data.train for v in x]
    assert (order[:40] != order[40:]) is shuffle


def test_splits_of_a_list():
    loader = [(torch.full((2, 1), i), torch.zeros(2)) for i in range(20)]
    data, notes = complete(Data(example=torch.ones(1, 1), train=loader, test=loader[:1]))
    assert len(data.train) == 18
    assert not contents(data.train) & contents(data.validate)
    assert data.test == loader[:1]
    assert len(notes) == 2


def test_without_training_data():
    loader = numbered(8)
    data, notes = complete(Data(example=torch.ones(1, 1), validate=loader))
    assert data.test is data.calibrate is loader
    assert data.train is None
    assert any("share" in note for note in notes)
    assert any("left out" in note for note in notes)


def test_nothing_to_say_when_all_is_given():
    loader = numbered(8)
    given = Data(torch.ones(1, 1), loader, loader, loader, loader)
    assert complete(given) == (given, ())


def test_what_cannot_be_split():
    example = torch.ones(1, 1)
    for data, words in (
        (Data(example), "no loader"),
        (Data(example, train=[torch.ones(1, 1)]), "1 batches, too few"),
        (Data(example, train=numbered(2)), "2 samples, too few"),
        (Data(example, train=iter([1])), "cannot be split"),
    ):
        with pytest.raises(DataError, match=words):
            complete(data)


def test_a_shortened_loader_gives_the_first_batches_of_each_epoch_and_is_reseeded_like_the_whole():
    generator = torch.Generator().manual_seed(0)
    whole = DataLoader(TensorDataset(torch.arange(32.0)), batch_size=4, shuffle=True, generator=generator)
    part = Shortened(whole, 3)
    assert len(part) == 3
    with reseeded(part, 7):
        first = [batch[0] for batch in part]
    with reseeded(whole, 7):
        expected = [batch[0] for batch in whole][:3]
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert len(Shortened(whole, 100)) == len(whole) == len(list(Shortened(whole, 100)))
