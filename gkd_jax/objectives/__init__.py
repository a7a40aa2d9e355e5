"""What the student minimises, and on which outputs: divergences, the objective, the loss.

The package contains pure functions of arrays and frozen dataclasses. It does not depend on
networks, optimizers or files: a model is passed as hidden states and a function that computes
logits from them. Of the device mesh it uses only the roles of the axes (`common.mesh_axes`).

Start with `divergences`, which defines each divergence by a term per vocabulary entry, and
`per_token`, which computes its value and gradient at each token. Then read `objective`, with the
loss in its plain form, and `fused`, with the form that training uses. A divergence X is imported
as `objectives.X`.
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
