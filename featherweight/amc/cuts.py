"""A network whose groups of channels each keep a share: what it then computes and how good it is, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import nn

from featherweight.allocation.tables import cluster_of, macs_of_one
from featherweight.allocation.treatments import Group, Row, Tables, Treatment
from featherweight.data import Data
from featherweight.errors import ModelError
from featherweight.graph import CoupledGroup
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.technique import Context, Edits, Recipe, Stage, Technique
from featherweight.techniques import ReestimateNorms
from featherweight.techniques.cuts import clusters, keep_edit
from featherweight.techniques.importance import importance
from featherweight.techniques.matrices import matrices
from featherweight.techniques.unit_costs import uses

Counts = tuple[int, ...]
_FEWEST = 2  # units that a group keeps at least


@final
@dataclass(frozen=True)
class _Keep(Technique):
    """Cut groups that were found and ordered before."""

    stage: ClassVar[Stage | None] = Stage.CUT
    clusters: tuple[tuple[CoupledGroup, ...], ...] = ()
    orders: tuple[tuple[tuple[int, ...], ...], ...] = ()
    counts: Counts = ()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Keep for all clusters, so that the forward is checked once."""
        parts = [
            (group, set(order[:count]))
            for cluster, orders, count in zip(self.clusters, self.orders, self.counts, strict=True)
            for group, order in zip(cluster, orders, strict=True)
            if count < len(group)
        ]
        if parts and not (yield keep_edit(model, parts, {})[0]):
            raise ModelError(f"these cuts do not go together: {context.untouched[-1].reason}")


class Cuts:
    """What AMC's environment is about: the same cuts and the same score for every way to choose them.

    Units leave in the order of their importance, batch norms take their statistics anew, nothing is trained.

    Attributes:
        names: of the groups, in the order of the model.
        units: in each group.
        rows: the weights, with the multiply-adds of each and the groups that make and read it.
        base: multiply-adds of one sample of the whole network, and `fixed`, those that no cut changes.
        known: score by units kept, larger being better; what is in it is not evaluated again.
        score: of the network with all units, its batch norms taken anew too.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        importance_kind: str = "l2",
        batches: int = 8,
        seed: int = 0,
        known: dict[Counts, float] | None = None,
    ) -> None:
        """Find the groups of a model that can be cut.

        Args:
            model: trained; it is not changed.
            data: complete; `validate` is what cuts are judged on.
            importance_kind: what orders units, see `PruneChannels`.
            batches: calibration batches for importance and for batch norms.
            seed: of random draws.
            known: scores from before, to go on with.

        Raises:
            ModelError: nothing in the model can be cut.
        """
        self.model, self.data, self.batches = model, data, batches
        self.context = Context(data=data, seed=seed)
        self.known = known if known is not None else {}
        self.clusters = [tuple(cluster) for cluster in clusters(model, self.context)]
        self._order(importance_kind)
        self.clusters = [cluster for place, cluster in enumerate(self.clusters) if self._stands(place)]
        if not self.clusters:
            raise ModelError(f"{type(model).__name__} has no channels that can be cut")
        self._order(importance_kind)
        self.names = [cluster[0].name for cluster in self.clusters]
        self.units = [min(map(len, cluster)) for cluster in self.clusters]
        used, self.rows = uses(model, self.context), []
        for name, weight in matrices(model, self.context).items():
            macs = weight.numel() * used.get(id(weight), 1.0)
            out, inside = (cluster_of(self.clusters, name, dim) for dim in (0, 1))
            whole = Treatment(32, 1.0, 0, 0.0, 0.0, 4.0 * weight.numel(), float(weight.numel()), macs)
            self.rows.append(Row(name, name.rpartition(".")[0], tuple(weight.shape), out, inside, (whole,)))
        self.base = macs_of_one(model, self.context)
        self.fixed = max(0.0, self.base - sum(row.treatments[0].macs for row in self.rows))
        self.score = self.evaluate(tuple(self.units))

    def _order(self, kind: str) -> None:
        flat = [group for cluster in self.clusters for group in cluster]
        found = {
            id(group): score
            for group, score in zip(flat, importance(self.model, flat, kind, self.context, self.batches), strict=True)
        }
        self.orders = tuple(
            tuple(tuple(found[id(group)].argsort(descending=True, stable=True).tolist()) for group in cluster)
            for cluster in self.clusters
        )

    def _stands(self, place: int) -> bool:
        """Whether half of a cluster can be cut, alone."""
        cluster = self.clusters[place]
        half = _Keep(clusters=(cluster,), orders=(self.orders[place],), counts=(max(1, min(map(len, cluster)) // 2),))
        try:
            run(half, self.model, replace(self.context, untouched=[]))
        except ModelError:
            return False
        return True

    def counts(self, shares: Sequence[float]) -> Counts:
        """Return how many units each group keeps at these shares, rounded down, at least two."""
        return tuple(
            min(units, max(_FEWEST, int(share * units + 1e-9))) for share, units in zip(shares, self.units, strict=True)
        )

    def macs(self, counts: Counts) -> float:
        """Return the multiply-adds of one sample when groups keep so many units."""
        kept = [count / units for count, units in zip(counts, self.units, strict=True)]
        left = self.fixed
        for row in self.rows:
            out, inside = (kept[at] if at >= 0 else 1.0 for at in (row.makes, row.reads))
            left += row.treatments[0].macs * out * inside
        return left

    def evaluate(self, counts: Counts) -> float:
        """Return the score on validation data when groups keep so many units, larger being better."""
        if counts not in self.known:
            step = _Keep(clusters=tuple(self.clusters), orders=self.orders, counts=counts)
            recipe = Recipe((step, ReestimateNorms(batches=self.batches)))
            cut = run(recipe, self.model, replace(self.context, untouched=[])).model
            score = evaluate(cut, self.data, "validate")
            self.known[counts] = score.value if score.higher_is_better else -score.value
        return self.known[counts]

    def tables(self, damages: Sequence[Sequence[float]], shares: Sequence[Sequence[float]]) -> Tables:
        """Return the cuts as tables for the integer program.

        Args:
            damages: of each group, by share.
            shares: kept of each group, the largest first.
        """
        groups = (
            Group((name,), units, tuple(kept), tuple(lost))
            for name, units, kept, lost in zip(self.names, self.units, shares, damages, strict=True)
        )
        return Tables(tuple(self.rows), tuple(groups), {"size": 0.0, "params": 0.0, "macs": self.fixed})
