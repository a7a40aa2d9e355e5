"""Decoding: sampling methods, the decoding loop over a key-value cache, and beam search.

This package depends only on the interface of models, and not on losses or data. Start with
`decode`, the decoding loop, and `methods`, the sampling methods that choose the next token.
"""

from typing import Any

from gkd_jax.common.lazy import load_export

_EXPORTS = {
    "methods": (
        "Greedy",
        "Sample",
    ),
    "beam_search": ("BeamSearch",),
    "teacher_assisted": (
        "Corrected",
        "TeacherMixed",
    ),
}


def __getattr__(name: str) -> Any:
    return load_export(__name__, _EXPORTS, name)
