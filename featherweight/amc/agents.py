"""Four ways to choose shares in the same environment: DDPG, evolution, chance, and the integer program."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from featherweight.allocation.program import solve
from featherweight.amc.cuts import Counts
from featherweight.amc.environment import Environment
from featherweight.errors import BudgetError, need

_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
_WARM_UP = 0.2  # of the episodes that draw at random
_NOISE, _DECAY = 0.5, 0.95
_PARENTS, _MUTATED = 0.25, 0.15


def by_agent(environment: Environment, evaluations: int, seed: int = 0) -> list[tuple[float, Counts]]:
    """Return reward and choice of each episode of a DDPG agent (Lillicrap et al., 2016), two layers of 300 units.

    Args:
        environment: fresh.
        evaluations: episodes.
        seed: of the agent.

    Raises:
        ExportError: stable-baselines3 is not installed.
    """
    baselines = need("stable_baselines3", "amc", "the DDPG agent")
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    steps = len(environment.cuts.units)
    noise = NormalActionNoise(np.zeros(1), np.full(1, 2 * _NOISE))  # actions span 2

    class Settles(BaseCallback):
        """Makes the noise smaller with each episode after the random ones."""

        def _on_step(self) -> bool:
            after = len(environment.history) - _WARM_UP * evaluations
            noise._sigma = np.full(1, 2 * _NOISE * _DECAY ** max(0.0, after))
            return True

    agent: Any = baselines.DDPG(
        "MlpPolicy",
        environment,
        learning_rate=1e-3,
        buffer_size=100 * steps,
        learning_starts=int(_WARM_UP * evaluations) * steps,
        batch_size=64,
        tau=0.01,
        gamma=1.0,
        train_freq=(1, "episode"),
        gradient_steps=-1,
        action_noise=noise,
        policy_kwargs={"net_arch": [300, 300]},
        seed=seed,
        device="cpu",
    )
    agent.learn(evaluations * steps, callback=Settles())
    return environment.history[:evaluations]


def by_evolution(
    environment: Environment, evaluations: int, seed: int = 0, population: int = 20
) -> list[tuple[float, Counts]]:
    """Return reward and choice of each evaluation of an evolution: the best quarter are parents of crossed, mutated children."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    steps, made = len(environment.cuts.units), []
    alive: list[tuple[float, list[float]]] = []
    for index in range(evaluations):
        if index < population:
            child = [draw.uniform(environment.least, 1.0) for _ in range(steps)]
        else:
            parents = sorted(alive, key=lambda one: one[0], reverse=True)[: max(2, int(_PARENTS * population))]
            (_, one), (_, other) = draw.sample(parents, 2)
            child = [draw.choice(pair) for pair in zip(one, other, strict=True)]
            child = [share + draw.gauss(0, 0.15) if draw.random() < _MUTATED else share for share in child]
            child = [min(1.0, max(environment.least, share)) for share in child]
        counts = environment.whole(child)
        value = environment.judged(counts)
        made.append((value, counts))
        alive = sorted([*alive, (value, child)], key=lambda one: one[0], reverse=True)[:population]
    return made


def by_chance(environment: Environment, evaluations: int, seed: int = 0) -> list[tuple[float, Counts]]:
    """Return reward and choice of each of so many random draws."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    made = []
    for _ in range(evaluations):
        counts = environment.whole([draw.uniform(environment.least, 1.0) for _ in environment.cuts.units])
        made.append((environment.judged(counts), counts))
    return made


def by_program(environment: Environment, evaluations: int, seed: int = 0) -> list[tuple[float, Counts]]:
    """Return reward and choice of each evaluation of the integer program with learnt coefficients.

    First each group is cut alone to each share, which gives the damages. Then the program is solved, and solved again with the
    damages of the groups multiplied by coefficients that are changed a few at a time, the better kept (Frantar & Alistarh,
    "SPDY", ICML 2022), until the evaluations are spent. Choices of single groups do not meet the target and count for nothing.

    Args:
        environment: with the constrained reward.
        evaluations: in all; at least one more than groups times shares.
        seed: of the changes.

    Raises:
        BudgetError: too few evaluations, or no choice meets the target.
    """
    cuts, draw = environment.cuts, random.Random(seed)  # noqa: S311 - no secret
    shares = [[share for share in _SHARES if share >= environment.least] for _ in cuts.units]
    made: list[tuple[float, Counts]] = []
    damages = []
    for place, units in enumerate(cuts.units):
        lost = [0.0]
        for share in shares[place][1:]:
            counts = cuts.counts([share if at == place else 1.0 for at in range(len(cuts.units))])
            made.append((-float("inf"), counts))
            lost.append(max(lost[-1], cuts.score - cuts.evaluate(counts), 0.0))
        damages.append(lost)
        shares[place] = [cuts.counts([share] * len(cuts.units))[place] / units for share in shares[place]]
    if len(made) >= evaluations:
        raise BudgetError(f"the program needs {len(made) + 1} evaluations of this network at least, not {evaluations}")
    best: tuple[float, list[float]] = (-float("inf"), [1.0] * len(damages))
    while len(made) < evaluations:
        tried = list(best[1])
        if best[0] > -float("inf"):
            for place in draw.sample(range(len(tried)), max(1, len(tried) // 5)):
                tried[place] *= 2 ** draw.gauss(0, 1)
        scaled = [[factor * value for value in lost] for factor, lost in zip(tried, damages, strict=True)]
        found = solve(cuts.tables(scaled, shares), {"macs": environment.target})
        counts = cuts.counts(found.shares)
        value = environment.judged(counts)
        made.append((value, counts))
        if value >= best[0]:
            best = (value, tried)
    return made


WAYS = {"amc": by_agent, "evolution": by_evolution, "random": by_chance, "program": by_program}
