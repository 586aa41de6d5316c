"""Which samples of a large unlabelled pool are worth having: those like the few that are known, and those worth a label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Data, Loader, batches, forward, select_output
from featherweight.errors import DataError
from featherweight.modes import evaluating
from featherweight.techniques.matching import captured
from featherweight.techniques.seeding import seeded

STRATEGIES = ("entropy", "margin", "core_set")
_STEPS, _RATE, _HIDDEN = 400, 1e-2, 64


def likely_positives(
    teacher: nn.Module, known: Loader, pool: Loader, at: str | Iterable[str], prior: float, seed: int = 0
) -> Tensor:
    """Return how likely each sample of a pool is of the kind of the known ones, `[n]` from 0 to 1.

    A small classifier learns on the teacher's features to tell the known samples, positives all, from the pool, of which a
    share `prior` is positive too; its risk is unbiased and never below zero. Keep what is above a half, and distil on it:
    Xu et al., "Positive-Unlabeled Compression on the Cloud", NeurIPS 2019; the risk: Kiryo et al., NeurIPS 2017.

    Args:
        teacher: gives the features; it comes back as it was.
        known: batches of samples of the right kind; labels are not read.
        pool: batches of samples of any kind.
        at: dotted paths of the teacher's modules whose outputs are the features, several for several scales; all but the
            channels, dimension 1, is averaged.
        prior: share of the pool that is positive, above 0 and below 1.
        seed: of the classifier.

    Raises:
        DataError: a loader is empty, or `prior` is out of range.
        ModelError: a path is not there.
    """
    if not 0 < prior < 1:
        raise DataError(f"likely_positives: prior={prior} must be above 0 and below 1")
    paths = [at] if isinstance(at, str) else list(at)
    positive, unlabelled = (
        _features(teacher, loader, paths, name) for loader, name in ((known, "known"), (pool, "pool"))
    )
    mean, deviation = unlabelled.mean(0), unlabelled.std(0).clamp_min(1e-6)
    positive, unlabelled = (positive - mean) / deviation, (unlabelled - mean) / deviation
    with seeded(seed):
        judge = nn.Sequential(nn.Linear(positive.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
    optimizer = torch.optim.AdamW(judge.parameters(), _RATE, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(_STEPS):
            loss = non_negative_risk(judge(positive)[:, 0], judge(unlabelled)[:, 0], prior)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        likely: Tensor = torch.sigmoid(judge(unlabelled)[:, 0])
    return likely


def non_negative_risk(positive: Tensor, unlabelled: Tensor, prior: float) -> Tensor:
    """Return the risk of a classifier from positive and unlabelled samples, with the sigmoid loss `l(z) = sigmoid(-z)`.

    `prior E_p[l(g)] + max(0, E_u[l(-g)] - prior E_p[l(-g)])`: the second part is the risk on negatives, estimated from what is
    not labelled. Where the estimate falls below zero, which is overfitting, its gradient is turned around.
    Kiryo et al., "Positive-Unlabeled Learning with Non-Negative Risk Estimator", NeurIPS 2017.

    Args:
        positive: values of the classifier on positives, `[n]`.
        unlabelled: and on the others, `[m]`.
        prior: share of positives among these, 0 to 1.
    """
    right = prior * torch.sigmoid(-positive).mean()
    negative = torch.sigmoid(unlabelled).mean() - prior * torch.sigmoid(positive).mean()
    return right + negative if bool(negative >= 0) else -negative


def worth_labelling(model: nn.Module, data: Data, pool: Loader, budget: int, strategy: str = "margin") -> Tensor:
    """Return the numbers of the samples of a pool whose labels should tell a model most, `[budget]`, the most telling first.

    `entropy` takes those whose predicted classes are most spread, `margin` those whose best two are nearest to one another
    (Settles, "Active Learning Literature Survey", 2009), `core_set` those that leave no sample of the pool far from a chosen
    one, by outputs (Sener & Savarese, ICLR 2018).

    Args:
        model: with logits, classes on dimension 1; it comes back as it was.
        data: says which output counts.
        pool: batches; labels are not read.
        budget: how many, 1 to the size of the pool.
        strategy: one of `STRATEGIES`.

    Raises:
        DataError: the pool has fewer samples, or the strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise DataError(f"worth_labelling: strategy={strategy!r} is not one of {', '.join(map(repr, STRATEGIES))}")
    with evaluating(model):
        outputs = torch.cat(
            [select_output(forward(model, inputs), data.output).float() for inputs, _ in batches(pool, "pool")]
        )
    if not 1 <= budget <= len(outputs):
        raise DataError(f"worth_labelling: budget={budget} must be 1 to the {len(outputs)} samples of the pool")
    logs = F.log_softmax(outputs, 1).reshape(len(outputs), outputs.shape[1], -1)
    if strategy == "core_set":
        return _spread_out(logs.exp().flatten(1), budget)
    if strategy == "entropy":
        doubt = -(logs.exp() * logs).sum(1).mean(1)
    else:
        best = logs.exp().topk(2, 1).values
        doubt = -(best[:, 0] - best[:, 1]).mean(1)
    return doubt.argsort(descending=True, stable=True)[:budget]


def _spread_out(points: Tensor, budget: int) -> Tensor:
    """Greedy k-centre: the point nearest to the mean, then always the one farthest from all chosen."""
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    apart = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < budget:
        chosen.append(int(apart.argmax()))
        apart = torch.minimum(apart, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def _features(teacher: nn.Module, loader: Loader, paths: Sequence[str], name: str) -> Tensor:
    """What the modules at the paths give, averaged over all places, one row a sample, `[n, channels]`."""
    rows = []
    with evaluating(teacher), captured(teacher, paths) as seen:
        for inputs, _ in batches(loader, name):
            forward(teacher, inputs)
            rows.append(
                torch.cat(
                    [
                        seen[path].float().flatten(2).mean(2) if seen[path].dim() > 2 else seen[path].float()
                        for path in paths
                    ],
                    1,
                )
            )
    return torch.cat(rows)
