"""Synthetic samples: MUNGE worked by hand, mixup between samples of a batch, the same for the same seed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.running import run
from featherweight.synthetic import mixed, munge
from featherweight.technique import Context
from featherweight.techniques import Distill

TABLE = torch.tensor([[0.0, 0.0], [1.0, 10.0], [8.0, 90.0], [10.0, 100.0]])  # neighbours: 0 with 1, 2 with 3


def test_nothing_or_everything_is_swapped():
    assert torch.equal(munge(TABLE, 2, swap=0.0), torch.cat([TABLE, TABLE]))
    swapped = munge(TABLE, 1, swap=1.0, variance=1e9)
    torch.testing.assert_close(swapped, TABLE[[1, 0, 3, 2]])


def test_values_are_drawn_around_the_neighbour():
    made = munge(TABLE, 4000, swap=1.0, variance=2.0).reshape(4000, 4, 2)
    torch.testing.assert_close(made.mean(0), TABLE[[1, 0, 3, 2]], rtol=0, atol=0.4)
    torch.testing.assert_close(
        made.std(0), torch.tensor([[0.5, 5.0], [0.5, 5.0], [1.0, 5.0], [1.0, 5.0]]), rtol=0.1, atol=0
    )


def test_each_attribute_is_swapped_by_its_own_chance():
    made = munge(TABLE, 4000, swap=0.25).reshape(4000, 4, 2)
    changed = made != TABLE
    torch.testing.assert_close(changed.float().mean((0, 1)), torch.tensor([0.25, 0.25]), rtol=0, atol=0.02)
    assert abs(changed.all(2).float().mean().item() - 0.0625) < 0.01


def test_columns_count_alike_and_names_are_names():
    """By the raw numbers the first row's neighbour is the second, and scaled the third; so it is with and without names."""
    numbers = torch.tensor([[0.0, 0.0], [5.0, 10.0], [0.0, 30.0], [1.0, 500.0]])
    assert torch.equal(munge(numbers, 1, swap=1.0, variance=1e9)[0], numbers[2])
    named = torch.tensor([[0.0, 7.0], [0.4, 6.0], [1.0, 7.0], [1.0, 0.0]])
    torch.testing.assert_close(munge(named, 1, swap=1.0, variance=1e9)[0], named[1])
    torch.testing.assert_close(munge(named, 1, swap=1.0, variance=1e9, nominal=[1])[0], named[2])
    assert set(munge(named, 50, swap=1.0, nominal=[1])[3::4, 1].tolist()) == {7.0}, "names are not blurred"


def test_more_rows_than_are_compared_at_once():
    table = torch.arange(2500.0).repeat_interleave(2)[:, None] + torch.tensor([[0.0], [0.1]]).repeat(2500, 1)
    swapped = munge(table, 1, swap=1.0, variance=1e9)
    torch.testing.assert_close(swapped, table.reshape(-1, 2).flip(1).reshape(-1, 1))


def test_a_seed_gives_the_same_samples():
    assert torch.equal(munge(TABLE, 3, seed=1), munge(TABLE, 3, seed=1))
    assert not torch.equal(munge(TABLE, 3, seed=1), munge(TABLE, 3, seed=2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: munge(TABLE[:1], 1),
        lambda: munge(TABLE.long(), 1),
        lambda: munge(TABLE[0], 1),
        lambda: munge(TABLE, 0),
        lambda: munge(TABLE, 1, swap=1.5),
        lambda: munge(TABLE, 1, variance=0.0),
        lambda: mixed([TABLE], alpha=0.0),
    ],
)
def test_what_is_refused(call):
    with pytest.raises(DataError):
        call()


def test_samples_are_mixed_within_their_batch():
    images, ids = torch.eye(4), torch.arange(4)
    loader = mixed([(images, ids), ((images, ids), ids)], alpha=1.0, seed=3)
    assert len(loader) == 2
    first, second = list(loader)
    assert first.shape == images.shape
    torch.testing.assert_close(first.sum(1), torch.ones(4))
    parts = first[first > 0].unique()
    assert len(parts) in (2, 3)
    assert parts[0] + parts[-2 if len(parts) == 3 else 1] == pytest.approx(1.0)
    assert torch.equal(second[1], ids), "what is no float stays"
    again = list(mixed([(images, ids)], alpha=1.0, seed=3))
    assert torch.equal(again[0], first)
    assert not torch.equal(next(iter(mixed([(images, ids)], seed=4))), first)


@pytest.mark.parametrize("own", [True, False])
def test_a_killed_run_mixes_the_same(own, tmp_path):
    samples = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)))
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)

    def data():
        order = RandomSampler(samples, generator=torch.Generator().manual_seed(1)) if own else None
        loader = DataLoader(samples, batch_size=8, sampler=order, shuffle=None if own else True)
        batch = samples.tensors[0]
        return Data(example=batch, train=mixed(loader), validate=[(batch, teacher(batch).argmax(1))])

    step = Distill(epochs=3, learning_rate=0.1)
    wanted = run(step, student, Context(data=data(), teacher=teacher)).model
    killed = data()
    report = []

    def stop(message, _):
        report.append(message)
        if len(report) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(step, student, Context(data=killed, teacher=teacher, workspace=tmp_path, report=stop))
    resumed = run(step, student, Context(data=data(), teacher=teacher, workspace=tmp_path)).model
    assert torch.equal(resumed.weight, wanted.weight)
    assert not torch.equal(wanted.weight, student.weight)
