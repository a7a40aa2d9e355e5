"""What the student minimises, and on whose outputs: divergences, the objective, the loss.

Pure functions of arrays and frozen dataclasses. The room knows no network (a model comes as hidden
states and a function that makes logits of them), no optimizer and no files; of the device mesh it
knows the roles of its axes (`common.mesh_axes`).

Start with `divergences`, where a divergence is a term per vocabulary entry, and `per_token`, which
makes a value and a gradient of it. Then `objective`, with the loss in its plain form, and `fused`,
the form that training uses. `objectives.X` is the public name of every divergence.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "divergence_sums": (
        "EntropyAware",
        "WeightedSum",
    ),
    "divergences": (
        "Divergence",
        "ForwardKL",
        "GeneralizedJSD",
        "NegativeLogLikelihood",
        "ReverseKL",
        "VocabularyEntries",
    ),
    "fused": ("fused_weighted_loss",),
    "mixing": (
        "FractionSchedule",
        "OutputMix",
        "RisingFraction",
    ),
    "objective": (
        "Objective",
        "Predictions",
        "Reduction",
        "final_weights",
        "weighted_loss",
    ),
    "other_divergences": (
        "AlphaDivergence",
        "ClippedForwardKL",
        "RenyiDivergence",
        "SampledReverseKL",
        "SkewForwardKL",
        "SkewReverseKL",
        "TotalVariation",
    ),
    "policy_gradient": (
        "PolicyGradient",
        "token_advantages",
        "with_policy_gradient",
        "with_returns",
    ),
    "sequence_kl": (
        "importance_weights",
        "returns_to_go",
    ),
    "per_token": (
        "divergence_and_gradient",
        "token_divergence",
    ),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
