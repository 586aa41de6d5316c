"""The environment of AMC: one step a group of channels, one reward at the end."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from torch import nn

from featherweight.amc.cuts import Counts, Cuts
from featherweight.edits import module_at, named_tensors

REWARDS = ("constrained", "guaranteed")
_AVERAGE = 0.95  # of the moving average of rewards that is subtracted
Array = NDArray[np.float32]


class Environment(gymnasium.Env[Array, Array]):
    """Choose how much of each group is kept, the first of the model first.

    The state of a group: its place, whether it is a convolution, units, inputs, positions, stride, kernel, multiply-adds of the
    layers that make it, those gone so far, those still to come, and the action before; all in 0 to 1.

    With the `"constrained"` reward an action is held below what still lets the rest, cut to the limit, meet the target, and
    the reward is the score. With `"guaranteed"` it is `-(1 - score) log(multiply-adds)`, and nothing is held.
    """

    def __init__(self, cuts: Cuts, target: float, reward: str = "constrained", least: float = 0.2) -> None:
        """Start an environment.

        Args:
            cuts: what is cut and judged.
            target: multiply-adds that the network may have left, for the constrained reward.
            reward: `"constrained"` or `"guaranteed"`.
            least: share that each group keeps at least.
        """
        self.cuts, self.target, self.reward, self.least = cuts, target, reward, least
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (11,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.history: list[tuple[float, Counts]] = []
        self.average: float | None = None
        self.taken: list[float] = []
        self._fixed = self._features()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin with the first group."""
        super().reset(seed=seed)
        self.taken = []
        return self._state(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Keep a share of a group, `action` from -1 (the least) to 1 (all); the last one is judged."""
        share = self.least + (1 - self.least) * (float(np.clip(action[0], -1.0, 1.0)) + 1) / 2
        self.taken.append(self.held(self.taken, share))
        if len(self.taken) < len(self.cuts.units):
            return self._state(), 0.0, False, False, {}
        counts = self.cuts.counts(self.taken)
        value = self.judged(counts)
        base = value if self.average is None else self.average
        self.average = _AVERAGE * base + (1 - _AVERAGE) * value
        self.history.append((value, counts))
        return self._state(), value - base, True, False, {"reward": value, "counts": counts}

    def judged(self, counts: Counts) -> float:
        """Return the reward of a whole choice."""
        score = self.cuts.evaluate(counts)
        return score if self.reward == "constrained" else -(1 - score) * math.log(self.cuts.macs(counts))

    def held(self, before: list[float], share: float) -> float:
        """Return the largest share up to this one with which the groups after it can still meet the target."""
        rest = len(self.cuts.units) - len(before) - 1
        if self.reward != "constrained":
            return share

        def fits(tried: float) -> bool:
            return self.cuts.macs(self.cuts.counts([*before, tried, *[self.least] * rest])) <= self.target

        if fits(share):
            return share
        low, high = self.least, share
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def whole(self, shares: list[float]) -> Counts:
        """Return the units that a choice of all shares keeps, held like single actions."""
        taken: list[float] = []
        for share in shares:
            taken.append(self.held(taken, min(1.0, max(self.least, share))))
        return self.cuts.counts(taken)

    def _features(self) -> Array:
        tensors, rows = named_tensors(self.cuts.model), []
        for place, name in enumerate(self.cuts.names):
            layer = module_at(self.cuts.model, name)
            weight = next((tensors[row.name] for row in self.cuts.rows if row.path == name), None)
            shape = tuple(weight.shape) if weight is not None else (self.cuts.units[place], 1)
            macs = sum(row.treatments[0].macs for row in self.cuts.rows if row.makes == place)
            stride = getattr(layer, "stride", (1,))
            rows.append(
                [
                    place,
                    float(isinstance(layer, nn.modules.conv._ConvNd)),
                    self.cuts.units[place],
                    shape[1],
                    macs / max(1, math.prod(shape)),
                    float(stride[0]) if isinstance(stride, tuple) else 1.0,
                    math.prod(shape[2:]),
                    macs,
                ]
            )
        table = np.array(rows, dtype=np.float32)
        return np.asarray(table / np.maximum(table.max(axis=0), 1e-9), dtype=np.float32)

    def _state(self) -> Array:
        place = min(len(self.taken), len(self.cuts.units) - 1)
        ones = [1.0] * (len(self.cuts.units) - len(self.taken))
        now = self.cuts.macs(self.cuts.counts([*self.taken, *ones]))
        coming = sum(r.treatments[0].macs for r in self.cuts.rows if r.makes > place) / self.cuts.base
        last = self.taken[-1] if self.taken else 1.0
        return np.array([*self._fixed[place], 1 - now / self.cuts.base, min(1.0, coming), last], dtype=np.float32)
