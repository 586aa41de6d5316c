"""A supernet out of the user's own model: one set of weights, trained so that many smaller networks in it work at once.

Widths are the coupled groups of channels, of heads, and of the ranks of factored layers; depth is the residual blocks that can be
left out; kernels of 5 and more can be narrower, by their middle. Units and blocks are nested: what a subnet lacks, a smaller one of
that cluster, or of that depth, lacks too, so that few networks compete for each weight. The user's forward runs on slices of the
whole weights, so that a gradient reaches what a subnet uses. Sandwich rule with in-place distillation (Yu & Huang, "Universally
Slimmable Networks", ICCV 2019; Yu et al., "BigNAS", ECCV 2020), inheriting the trained weights sorted by importance as in Cai et
al., "Once-for-All", ICLR 2020.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.allocation.truth import Reference
from featherweight.data import Inputs, as_call, example_inputs, forward, select_output, tensors
from featherweight.edits import Edit, Keep, Swap, apply, named_tensors, private_copy
from featherweight.errors import ModelError
from featherweight.modes import evaluating
from featherweight.running import Outcome, run
from featherweight.scoring import loss_function
from featherweight.technique import Context, Edits, Recipe, Stage, Technique
from featherweight.techniques import ReestimateNorms
from featherweight.techniques.autocasting import Autocast
from featherweight.techniques.blocks import residual_blocks
from featherweight.techniques.cuts import Cluster, clusters, keep_edit
from featherweight.techniques.imitation import imitation, output_kind
from featherweight.techniques.importance import importance
from featherweight.techniques.kernels import elastic_kernels, middle
from featherweight.techniques.train import Training, fit

SHARES = (1.0, 0.75, 0.5)
_PARENTS, _MUTATED = 0.25, 0.1
_JUDGED_ON = 512  # calibration samples that say which block is missed least


@dataclass(frozen=True)
class Subnet:
    """One of the networks in a supernet.

    Attributes:
        counts: units that each cluster of groups keeps, the most important first.
        skipped: paths of the blocks that are left out, the first of the supernet's.
        kernels: sizes of the kernels that are elastic, in the order of the supernet's; none are all whole.
    """

    counts: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    kernels: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class _Extract(Technique):
    """Cut a subnet out."""

    stage: ClassVar[Stage | None] = Stage.CUT
    swaps: tuple[Swap, ...] = ()
    keep: Keep | None = None

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each block that is left out, and one Keep of all units that stay.

        Raises:
            ModelError: the model does not run as this subnet.
        """
        wanted: list[Edit] = [*self.swaps, *([self.keep] if self.keep is not None else [])]
        for edit in wanted:
            if not (yield edit):
                raise ModelError(f"this subnet does not run alone: {context.untouched[-1].reason}")


class Supernet:
    """A model and the networks in it.

    Attributes:
        model: a private copy of the user's, whose weights all subnets share; `train` changes it.
        choices: for each cluster the unit counts it may keep, the largest first.
        names: of the clusters, after a layer that makes their units.
        blocks: paths of the residual blocks that may be left out, in the order in which they leave: first the one whose absence
            changes the outputs least.
        kernels: by path of a convolution the kernel sizes it may have, the largest first.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        shares: Sequence[float] = SHARES,
        depth: bool = True,
        batches: int = 8,
        kernels: bool = True,
    ) -> None:
        """Find what can be narrower or left out, and sort the units by importance.

        Args:
            model: trained; it is not changed. Factor its layers by `low_rank` first, and their ranks are elastic too.
            context: data, seed, device.
            shares: of the units that a cluster may keep, 1 being one of them.
            depth: whether blocks may be left out.
            batches: calibration batches for importance and batch norms.
            kernels: whether kernels may be smaller.

        Raises:
            ModelError: nothing can be narrower or left out.
        """
        self.model, _ = private_copy(model)
        self.model.to(context.device)
        self.context, self.batches = context, batches
        found = clusters(self.model, context)
        flat = [group for cluster in found for group in cluster]
        scores = iter(importance(self.model, flat, "l1", context, batches))
        self.units = [[(g, next(scores).argsort(descending=True, stable=True).tolist()) for g in c] for c in found]
        self.names = [cluster[0].name for cluster in found]
        self.choices: list[tuple[int, ...]] = []
        for cluster in found:
            most = min(map(len, cluster))
            self.choices.append(tuple(sorted({max(1, round(share * most)) for share in shares}, reverse=True)))
        self.swaps = residual_blocks(self.model, example_inputs(context.data, context.device)) if depth else {}
        self.blocks = self._least_missed() if self.swaps else ()
        self.kernels = dict(elastic_kernels(self.model, context)) if kernels else {}
        self.sizes: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._try_each()
        if not (self.blocks or self.kernels or any(len(counts) > 1 for counts in self.choices)):
            raise ModelError(f"{type(model).__name__} has no channels, blocks or kernels that could be elastic")

    def _least_missed(self) -> tuple[str, ...]:
        """The blocks by how far the outputs diverge without each, the least first."""
        reference, damage = Reference(self.model, self.context, _JUDGED_ON), {}
        for path, swap in self.swaps.items():
            undo = apply(self.model, swap)
            damage[path] = reference.divergence(self.model)
            undo()
        return tuple(sorted(damage, key=lambda path: damage[path]))

    def _try_each(self) -> None:
        """Drop the counts that do not run, and note the user's own sizes that the others need (`self.heads`).

        Raises:
            ModelError: the smallest subnet computes something else in the supernet than alone.
        """
        for place, counts in enumerate(self.choices):
            running = [counts[0]]
            for count in counts[1:]:
                narrow = Subnet(tuple(count if at == place else other[0] for at, other in enumerate(self.choices)))
                try:
                    edits = self.extracted(narrow, norms=False).edits
                except ModelError:
                    continue
                found, own = edits[-1], self._keep(narrow)
                if isinstance(found, Keep) and own is not None:
                    self.sizes[place, count] = tuple(size for size in found.sizes if size not in own.sizes)
                running.append(count)
            self.choices[place] = tuple(running)
        inputs = example_inputs(self.context.data, self.context.device)
        with torch.no_grad(), evaluating(self.model):
            within = list(tensors(self.forward(self.smallest, inputs)))
            alone = list(tensors(forward(self.extracted(self.smallest, norms=False).model, inputs)))
        for one, other in zip(within, alone, strict=True):
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
                raise ModelError(
                    f"the smallest subnet of {type(self.model).__name__} differs from what it computes alone"
                )

    @property
    def largest(self) -> Subnet:
        """The whole model."""
        return Subnet(
            tuple(counts[0] for counts in self.choices), (), tuple(sizes[0] for sizes in self.kernels.values())
        )

    @property
    def smallest(self) -> Subnet:
        """The narrowest, without any block but the last."""
        least = tuple(sizes[-1] for sizes in self.kernels.values())
        return Subnet(tuple(counts[-1] for counts in self.choices), self.blocks[:-1], least)

    def sampled(self, draw: random.Random) -> Subnet:
        """Return a random subnet."""
        counts = tuple(draw.choice(counts) for counts in self.choices)
        kernels = tuple(draw.choice(sizes) for sizes in self.kernels.values())
        return Subnet(counts, self._shallower(draw), kernels)

    def _shallower(self, draw: random.Random) -> tuple[str, ...]:
        """The blocks that a random depth lacks: none to all but one."""
        return self.blocks[: draw.randrange(len(self.blocks))] if self.blocks else ()

    def forward(self, subnet: Subnet, inputs: Inputs) -> Any:
        """Run the user's forward as a subnet, on slices of the weights; running statistics stay as they are."""
        args, kwargs = as_call(inputs)
        keep = self._keep(subnet)
        with self._reduced(subnet, keep) as whole:
            given: dict[str, Tensor] = {}
            buffers = {name for name, _ in self.model.named_buffers()}
            for name in named_tensors(self.model):
                given[name] = whole[name].clone() if name in buffers else whole[name]
            for cut in keep.cuts if keep is not None else ():
                given[cut.tensor] = given[cut.tensor].index_select(cut.dim, self._index(cut.index))
            return functional_call(self.model, given, args, kwargs)

    def _index(self, kept: tuple[int, ...]) -> Tensor:
        """The places as a tensor on the device, moved there once."""
        if kept not in self._indices:
            self._indices[kept] = torch.tensor(kept, device=self.context.device)
        return self._indices[kept]

    @contextmanager
    def _reduced(self, subnet: Subnet, keep: Keep | None) -> Iterator[dict[str, Tensor]]:
        """Give the model a subnet's structure for a while; yields the whole tensors by name."""
        whole = named_tensors(self.model)
        with ExitStack() as stack:
            for path in subnet.skipped:
                stack.callback(apply(self.model, self.swaps[path]))
            if keep is not None:
                stack.callback(apply(self.model, keep))
            yield whole

    def _keep(self, subnet: Subnet) -> Keep | None:
        """One Keep of all units that stay, but for those in blocks that are left out; None where nothing is cut."""
        parts: Cluster = [
            (group, set(order[:count]))
            for cluster, count in zip(self.units, subnet.counts, strict=True)
            for group, order in cluster
            if count < len(group)
        ]
        keep, _ = keep_edit(self.model, parts, {})
        narrow = [
            middle(self.model, path, size)
            for path, size in zip(self.kernels, subnet.kernels, strict=False)  # none are all whole
            if size < self.kernels[path][0]
        ]
        gone = tuple(f"{path}." for path in subnet.skipped)
        cuts = tuple(cut for one in (keep, *narrow) for cut in one.cuts if not cut.tensor.startswith(gone))
        further = (self.sizes.get((place, count), ()) for place, count in enumerate(subnet.counts))
        every = [size for sizes in (keep.sizes, *(one.sizes for one in narrow), *further) for size in sizes]
        sizes = tuple((path, size) for path, size in every if not path.startswith(gone))
        return Keep(cuts, sizes) if cuts else None

    def train(self, epochs: int, learning_rate: float, samples: int = 2, temperature: float = 1.0) -> None:
        """Train the shared weights: each step the whole model, the smallest subnet and `samples` random ones.

        The whole model learns from the task, and from the context's teacher where there is one; the others from the whole
        model, as it is at that step. The last epoch is kept.

        Args:
            epochs: passes over the training data.
            learning_rate: peak rate.
            samples: random subnets a step.
            temperature: of the outputs that subnets learn from.
        """
        data, task = self.context.data, loss_function(self.context.data)
        kind, teacher = output_kind(data.loss), self.context.teacher
        autocast = Autocast(self.model, self.context.device)

        def step(model: nn.Module, batch: Any) -> Tensor:
            inputs, target = batch
            output = autocast.run(forward, model, inputs)
            wanted = select_output(output, data.output)
            loss = task(output, target) if target is not None else wanted.new_zeros(())
            if teacher is not None:
                with torch.no_grad():
                    taught = select_output(autocast.run(forward, teacher, inputs), data.output)
                loss = loss + imitation(wanted, taught, kind, temperature)
            draw = random.Random(int(torch.randint(2**31, ())))  # noqa: S311 - the loop seeds torch for each epoch
            for subnet in (self.smallest, *(self.sampled(draw) for _ in range(samples))):
                given = select_output(autocast.run(self.forward, subnet, inputs), data.output)
                loss = loss + imitation(given, wanted.detach(), kind, temperature)
            return loss

        context = replace(self.context, data=replace(data, step=step), step=self.context.step or "supernet")
        fit(self.model, context, Training(epochs, learning_rate), schedule=_never)

    def extracted(self, subnet: Subnet, norms: bool = True) -> Outcome:
        """Return a subnet as a plain model of its own, and the edits that make it out of the user's.

        Args:
            subnet: which.
            norms: whether its batch norms take their statistics anew on calibration data.

        Raises:
            ModelError: it does not run.
        """
        swaps = tuple(self.swaps[path] for path in subnet.skipped)
        steps: list[Technique] = [_Extract(swaps=swaps, keep=self._keep(subnet))]
        steps += [ReestimateNorms(batches=self.batches)] if norms else []
        return run(Recipe(tuple(steps)), self.model, replace(self.context, untouched=[]))

    def evolved(
        self,
        score: Callable[[Subnet], float],
        cost: Callable[[Subnet], float],
        limit: float,
        evaluations: int,
        seed: int = 0,
        population: int = 20,
    ) -> list[tuple[float, float, Subnet]]:
        """Return score, cost and subnet of every evaluation of an evolution under a limit, the best first.

        Args:
            score: of a subnet, larger being better, such as its validation score.
            cost: of a subnet, such as its measured milliseconds.
            limit: most that it may cost; what costs more is not scored.
            evaluations: subnets to score.
            seed: of every draw.
            population: subnets that stay alive; the best quarter are parents.

        Raises:
            ModelError: not even the smallest subnet costs so little.
        """
        if cost(self.smallest) > limit:
            raise ModelError(f"the smallest subnet costs {cost(self.smallest):.4g}, more than {limit:.4g}")
        draw = random.Random(seed)  # noqa: S311 - no secret
        made: dict[Subnet, tuple[float, float]] = {}
        candidate, tries = self.smallest, 0
        while len(made) < evaluations and tries < 100 * evaluations:
            tries += 1
            if candidate not in made and cost(candidate) <= limit:
                made[candidate] = (score(candidate), cost(candidate))
            alive = sorted(made, key=lambda subnet: made[subnet], reverse=True)[: max(2, int(_PARENTS * population))]
            if len(made) < population or len(alive) < 2:
                candidate = self.sampled(draw)
            else:
                one, other = draw.sample(alive, 2)
                candidate = self._child(one, other, draw)
        return sorted(((*values, subnet) for subnet, values in made.items()), key=lambda row: row[:2], reverse=True)

    def _child(self, one: Subnet, other: Subnet, draw: random.Random) -> Subnet:
        counts = tuple(
            draw.choice(options) if draw.random() < _MUTATED else draw.choice(pair)
            for options, *pair in zip(self.choices, one.counts, other.counts, strict=True)
        )
        skipped = self._shallower(draw) if draw.random() < _MUTATED else draw.choice((one, other)).skipped
        kernels = tuple(
            draw.choice(options) if draw.random() < _MUTATED else draw.choice(pair)
            for options, *pair in zip(self.kernels.values(), one.kernels, other.kernels, strict=True)
        )
        return Subnet(counts, skipped, kernels)


def _never(before: float, now: float) -> bool:
    """No epoch but the last is a candidate: the whole model alone is no measure of a supernet."""
    return False
