"""What a strength comes to where there is no training data: nothing is cut, and weights are rounded as far as the limits ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.allocation import closing_steps, loose_parameters
from featherweight.errors import RecipeError
from featherweight.job import Job
from featherweight.post_training import post_training
from featherweight.search import FULL, MILDEST, ROOM, Strength
from featherweight.technique import Context, Recipe, Technique
from featherweight.techniques import QuantizeRateDistortion, ReestimateNorms

_CUT = ("params", "macs", "memory")  # limits that only cuts keep, and cuts must heal
_BATCHES = 16  # of calibration data
_COARSEST = 5.6  # step over the root mean square of the weights, at which no bits are left
_FILLINGS = 7  # files that are made to fill a limited size


class Untrained:
    """Stands for `Contest` where nothing can be trained: one recipe a strength, and none to compare it with.

    Limited seconds ask for integers throughout, of 8 bits or as few as the size asks; else codes at the least sum of error and
    bits, errors compensated, spend the bytes that there are on the layers that need them.

    Args:
        job: started, its data without a training loader.
        price: returns the costs of a recipe that trains nothing, `size` among them.
        costs: of the original, as of `Mixer`.

    Raises:
        RecipeError: the budget limits what only cuts can make smaller.
    """

    def __init__(self, job: Job, price: Callable[[Recipe], dict[str, float]], costs: dict[str, float]) -> None:
        limits = [str(limit) for limit in job.request.budget.limits if limit.metric in _CUT]
        if limits:
            raise RecipeError(
                f"{' and '.join(limits)} can only be kept by cutting layers, which training heals, and Data(train=...) is "
                "missing: give it, or a recipe"
            )
        self._budget, self._price, self._costs = job.request.budget, price, costs
        self._norms = any(isinstance(module, _BatchNorm) for module in job.model.modules())
        self._loose = bool(loose_parameters(job.model, Context(data=job.data)))

    def recipe(self, strength: Strength, mix: str, trains: bool = True) -> Recipe:
        """Return the recipe of a strength."""
        bits = 32 / strength.factor
        if strength.static:
            steps: list[Technique] = list(post_training(min(8, max(2, int(bits))), batches=_BATCHES).steps)
        else:
            step = round(_COARSEST * 2**-bits, 4)  # a bit less for each time that it doubles
            steps = [QuantizeRateDistortion(step=step, compensate=True, batches=_BATCHES)]
            steps += [ReestimateNorms(batches=_BATCHES)] if self._norms else []
        return Recipe((*steps, *closing_steps(self._loose)))

    def winner(self, strength: Strength) -> tuple[str, Strength]:
        """Return the only mix, and the strength at which its file is as large as it may be; a limited drop asks for small ones."""
        limit, name = self._budget.limit("size"), "rounded"
        if limit is None or strength.static or self._budget.limit("drop") is not None:
            return name, strength
        allowed, best = limit.allowed(self._costs["size"]), strength
        fine, coarse = 0.0, math.inf
        for _ in range(_FILLINGS):
            size = self._price(self.recipe(strength, name))["size"]
            if size > allowed:
                fine = strength.factor
            else:
                best, coarse = strength, strength.factor
                if size >= FULL * allowed or coarse <= MILDEST:
                    break
            factor = strength.resized(size, ROOM * allowed, self._costs).factor
            if not fine < factor < coarse:
                factor = round(math.sqrt(fine * coarse), 2)
            if math.isinf(factor):  # not even the coarsest that was tried fits
                break
            strength = replace(strength, factor=factor)
        return name, best

    def epochs(self, strength: Strength) -> float:
        """Return 0: there is nothing to compare."""
        return 0.0
