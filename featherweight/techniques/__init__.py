"""Every technique we ship, one line each; a new one is a file here, a line below, a test and a row in the docs."""

from __future__ import annotations

from featherweight.technique import Technique
from featherweight.techniques.distill import Distill
from featherweight.techniques.fold_batch_norm import FoldBatchNorm
from featherweight.techniques.low_rank import LowRank
from featherweight.techniques.prune_channels import PruneChannels
from featherweight.techniques.prune_weights import PruneWeights
from featherweight.techniques.quantize_static import QuantizeStatic
from featherweight.techniques.quantize_weights import QuantizeWeights

TECHNIQUES: tuple[type[Technique], ...] = (
    FoldBatchNorm,
    PruneChannels,
    LowRank,
    PruneWeights,
    QuantizeStatic,
    QuantizeWeights,
    Distill,
)

__all__ = [
    "TECHNIQUES",
    "Distill",
    "FoldBatchNorm",
    "LowRank",
    "PruneChannels",
    "PruneWeights",
    "QuantizeStatic",
    "QuantizeWeights",
]
