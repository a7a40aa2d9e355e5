"""What the student minimises, and on whose outputs."""

from gkd_jax.objectives.divergences import (
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    ReverseKL,
    VocabularyEntries,
)
from gkd_jax.objectives.fused import fused_weighted_loss
from gkd_jax.objectives.mixing import FractionSchedule, OutputMix, RisingFraction
from gkd_jax.objectives.objective import (
    Objective,
    Predictions,
    Reduction,
    final_weights,
    weighted_loss,
)
from gkd_jax.objectives.other_divergences import (
    AlphaDivergence,
    ClippedForwardKL,
    EntropyAware,
    RenyiDivergence,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
)
from gkd_jax.objectives.policy_gradient import (
    PolicyGradient,
    token_advantages,
    with_policy_gradient,
    with_returns,
)
from gkd_jax.objectives.sequence_kl import importance_weights, returns_to_go
from gkd_jax.objectives.token_divergence import divergence_and_gradient, token_divergence

__all__ = [
    "AlphaDivergence",
    "ClippedForwardKL",
    "Divergence",
    "EntropyAware",
    "ForwardKL",
    "FractionSchedule",
    "GeneralizedJSD",
    "NegativeLogLikelihood",
    "Objective",
    "OutputMix",
    "PolicyGradient",
    "Predictions",
    "Reduction",
    "RenyiDivergence",
    "ReverseKL",
    "RisingFraction",
    "SampledReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "VocabularyEntries",
    "WeightedSum",
    "divergence_and_gradient",
    "final_weights",
    "fused_weighted_loss",
    "importance_weights",
    "returns_to_go",
    "token_advantages",
    "token_divergence",
    "weighted_loss",
    "with_policy_gradient",
    "with_returns",
]
