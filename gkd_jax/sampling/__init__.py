"""How outputs are decoded: choosing a token, the scan over a cache, beam search.

It gets a model as functions and knows nothing of losses or data. Start with `decode`, the loop, and
`methods`, how it chooses a token.
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
