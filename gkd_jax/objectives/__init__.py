"""The loss that the student minimises: divergences, the objective, and the source of outputs.

The package contains pure functions of arrays and frozen dataclasses. It does not depend on
networks, optimizers or files: a model is passed as hidden states and a function that computes
logits from them. It knows the device mesh only by the roles of its axes (`common.mesh_axes`).

Start with `divergences`, which defines each divergence by a term per vocabulary entry, and
`per_token`, which computes its value and gradient at each token. Then read `objective`, which
defines the loss in its plain form, and `fused`, which computes the same loss in less memory and is
used in training. A divergence X is imported as `objectives.X`.
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
