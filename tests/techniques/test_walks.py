"""Forwards that wait at a layer: what they give is what running from the start gives, and they leave nothing behind."""

import copy
import threading

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.technique import Context
from featherweight.techniques import paired
from featherweight.techniques.paired import Pairs, Wave, waves
from featherweight.techniques.walks import Walk, stopping


class Doubled(nn.Module):
    """Its second layer is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.second(self.second(self.first(x)).relu()))


def context():
    torch.manual_seed(1)
    return Context(data=Data(example=torch.ones(1, 3), calibrate=list(torch.randn(3, 5, 3))))


def moments(model):
    """The pairs of all layers, the weight of each doubled once it has been read."""
    changed = copy.deepcopy(model)
    found, order = {}, waves(model, context(), ["first", "second", "last"])
    with Pairs(model, changed, context(), order, 3) as pairs:
        for wave in order:
            found |= pairs.at(wave)
            for path in wave.paths:
                fresh = nn.Linear(*reversed(getattr(changed, path).weight.shape))
                fresh.weight.data, fresh.bias.data = (2 * value.data for value in getattr(changed, path).parameters())
                setattr(changed, path, fresh)
    return found


def second_inputs(model, x):
    once = model.first(x)
    return torch.cat((once, model.second(once).relu()))


def test_every_call_counts_and_goes_through_what_has_changed():
    model = Doubled()
    assert [wave.again for wave in waves(model, context(), ["first", "second", "last"])] == [False, True, False]
    found = moments(model)
    x = torch.cat(list(context().data.calibrate))
    with torch.no_grad():
        louder = copy.deepcopy(model)
        for value in louder.first.parameters():
            value.mul_(2)
        torch.testing.assert_close(found["second"].mean[0].float(), second_inputs(model, x).mean(0))
        torch.testing.assert_close(found["second"].changed[0].float(), second_inputs(louder, x).mean(0))
        for value in louder.second.parameters():
            value.mul_(2)
        entering = louder.second(louder.second(louder.first(x)).relu())
        torch.testing.assert_close(found["last"].changed[0].float(), entering.mean(0))


def test_without_room_every_wave_starts_anew_and_finds_the_same(monkeypatch):
    waited = moments(Doubled())
    monkeypatch.setattr(paired, "_ROOM", 0)
    for path, pair in moments(Doubled()).items():
        for name in ("mean", "changed", "second", "cross"):
            assert torch.equal(getattr(pair, name), getattr(waited[path], name)), (path, name)


def test_what_the_forward_raises_is_raised_and_no_thread_stays():
    class Failing(Doubled):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("of the user's own")

    before, model = threading.active_count(), Failing().eval()
    walk = Walk(model, torch.ones(1, 3))
    with stopping({"last": model.last}, ["last"]):
        assert walk.on()
        assert walk.path == "last"
        with pytest.raises(RuntimeError, match="of the user's own"):
            walk.on()
    other = Walk(model, torch.ones(1, 3))
    with stopping({"first": model.first}, ["first"]):
        assert other.on()
    other.leave()
    Walk(model, torch.ones(1, 3)).leave()
    assert threading.active_count() == before
    assert "forward" not in vars(model.last)


def test_another_forward_does_not_stop():
    model = Doubled()
    with stopping({"first": model.first, "last": model.last}, ["first", "last"]):
        assert model(torch.ones(1, 3)).shape == (1, 2)


def test_a_walk_left_by_the_way_closes_with_its_reader():
    before, model = threading.active_count(), Doubled()
    order = [Wave(("first",)), Wave(("last",))]
    with Pairs(model, copy.deepcopy(model), context(), order, 2) as pairs:
        pairs.at(order[0])
        assert threading.active_count() == before + 4
    assert threading.active_count() == before


def test_a_model_that_fails_on_the_way_leaves_no_thread():
    class Failing(Doubled):
        def forward(self, x):
            if len(x) > 1:
                raise RuntimeError("of the user's own")
            return super().forward(x)

    before, model = threading.active_count(), Doubled()
    changed = Failing()
    with (
        pytest.raises(RuntimeError, match="of the user's own"),
        Pairs(model, changed, context(), [Wave(("last",))], 2) as pairs,
    ):
        pairs.at(Wave(("last",)))
    assert threading.active_count() == before


def test_a_walk_runs_under_the_modes_of_its_caller():
    class Making(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Identity()

        def forward(self, x):
            return self.last(torch.ones(2))

    model = Making()
    with torch.device("meta"), stopping({"last": model.last}, ["last"]):
        walk = Walk(model, torch.ones(1))
        assert walk.on()
        assert walk.value.is_meta
        walk.leave()
