"""Every technique we ship, one line each; a new one is a file here, a line below, a test and a row in the docs."""

from __future__ import annotations

from featherweight.technique import Technique
from featherweight.techniques.binarize_weights import BinarizeWeights
from featherweight.techniques.choose_operators import ChooseOperators
from featherweight.techniques.correct_biases import CorrectBiases
from featherweight.techniques.distill import Distill
from featherweight.techniques.equalize_layers import EqualizeLayers
from featherweight.techniques.factor_recurrent import FactorRecurrent
from featherweight.techniques.factor_tensors import FactorTensors
from featherweight.techniques.fold_batch_norm import FoldBatchNorm
from featherweight.techniques.low_rank import LowRank
from featherweight.techniques.mix_precisions import MixPrecisions
from featherweight.techniques.penalize_entropy import PenalizeEntropy
from featherweight.techniques.prune_blocks import PruneBlocks
from featherweight.techniques.prune_channels import PruneChannels
from featherweight.techniques.prune_dead_units import PruneDeadUnits
from featherweight.techniques.prune_movement import PruneMovement
from featherweight.techniques.prune_sparse_gpt import PruneSparseGpt
from featherweight.techniques.prune_variational import PruneVariational
from featherweight.techniques.prune_wanda import PruneWanda
from featherweight.techniques.prune_weights import PruneWeights
from featherweight.techniques.quantize_aware import QuantizeAware
from featherweight.techniques.quantize_rate_distortion import QuantizeRateDistortion
from featherweight.techniques.quantize_static import QuantizeStatic
from featherweight.techniques.quantize_weights import QuantizeWeights
from featherweight.techniques.reestimate_norms import ReestimateNorms
from featherweight.techniques.regularize_groups import RegularizeGroups
from featherweight.techniques.reinitialize import Reinitialize
from featherweight.techniques.round_parameters import RoundParameters
from featherweight.techniques.separate_convolutions import SeparateConvolutions
from featherweight.techniques.share_weights import ShareWeights
from featherweight.techniques.smooth_activations import SmoothActivations
from featherweight.techniques.split_layers import SplitLayers
from featherweight.techniques.ternarize_weights import TernarizeWeights

TECHNIQUES: tuple[type[Technique], ...] = (
    FoldBatchNorm,
    SplitLayers,
    PruneBlocks,
    PruneChannels,
    PruneDeadUnits,
    LowRank,
    FactorRecurrent,
    FactorTensors,
    PruneWeights,
    PruneWanda,
    PruneSparseGpt,
    PruneMovement,
    PruneVariational,
    QuantizeStatic,
    QuantizeWeights,
    MixPrecisions,
    QuantizeRateDistortion,
    PenalizeEntropy,
    QuantizeAware,
    TernarizeWeights,
    BinarizeWeights,
    ShareWeights,
    Distill,
    ReestimateNorms,
    RegularizeGroups,
    Reinitialize,
    SeparateConvolutions,
    ChooseOperators,
    EqualizeLayers,
    SmoothActivations,
    CorrectBiases,
    RoundParameters,
)

__all__ = [
    "TECHNIQUES",
    "BinarizeWeights",
    "ChooseOperators",
    "CorrectBiases",
    "Distill",
    "EqualizeLayers",
    "FactorRecurrent",
    "FactorTensors",
    "FoldBatchNorm",
    "LowRank",
    "MixPrecisions",
    "PenalizeEntropy",
    "PruneBlocks",
    "PruneChannels",
    "PruneDeadUnits",
    "PruneMovement",
    "PruneSparseGpt",
    "PruneVariational",
    "PruneWanda",
    "PruneWeights",
    "QuantizeAware",
    "QuantizeRateDistortion",
    "QuantizeStatic",
    "QuantizeWeights",
    "ReestimateNorms",
    "RegularizeGroups",
    "Reinitialize",
    "RoundParameters",
    "SeparateConvolutions",
    "ShareWeights",
    "SmoothActivations",
    "SplitLayers",
    "TernarizeWeights",
]
