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
    WeightedLoss,
    final_weights,
    weighted_loss,
)
from gkd_jax.objectives.token_divergence import divergence_and_gradient, token_divergence

__all__ = [
    "Divergence",
    "ForwardKL",
    "FractionSchedule",
    "GeneralizedJSD",
    "NegativeLogLikelihood",
    "Objective",
    "OutputMix",
    "Predictions",
    "Reduction",
    "ReverseKL",
    "RisingFraction",
    "VocabularyEntries",
    "WeightedLoss",
    "divergence_and_gradient",
    "final_weights",
    "fused_weighted_loss",
    "token_divergence",
    "weighted_loss",
]
