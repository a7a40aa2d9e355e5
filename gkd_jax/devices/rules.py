"""Tables of rules: which axis of the mesh a logical axis of a parameter or activation lies on."""

from collections.abc import Sequence
from typing import TypeAlias

Rules: TypeAlias = tuple[tuple[str, str | None], ...]
"""(logical axis, mesh axis or None for replicated); of two for one array, the first wins."""

STANDARD_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("layers", None),
    ("relpos_buckets", None),
)
"""T5X's rules for `parameter_partitioning_dims=1`: parameters are replicated over 'data'."""

FSDP_RULES: Rules = tuple(
    (name, "data" if name == "embed" else axis) for name, axis in STANDARD_RULES
)
"""T5X's rules for `parameter_partitioning_dims=2`: parameters and optimizer state are also
split over 'data', along 'embed', and gathered layer by layer where they are used."""

_TABLES = {"standard": STANDARD_RULES, "fsdp": FSDP_RULES}
_MESH_AXES = ("data", "model", None)


def table_of(rules: str | Sequence[Sequence[str | None]], *, setting: str) -> Rules:
    """The table that a name stands for, or a table of one's own, checked.

    Args:
      rules: 'standard', 'fsdp', or pairs; lists, as gin may give them, become tuples.
      setting: where they were given, for messages.

    Raises:
      ValueError: no such name, no pairs, or no such axis of the mesh.
    """
    if isinstance(rules, str) and rules in _TABLES:
        return _TABLES[rules]
    if not isinstance(rules, list | tuple):
        raise ValueError(
            f"{setting} must be one of {sorted(_TABLES)} or a table; got {rules!r}. Set "
            f"{setting} to one of those."
        )
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(
                f"{setting} must hold pairs of a logical axis and a mesh axis; got {rule!r}. Write "
                "each as ('embed', 'data'), or ('embed', None) to replicate."
            )
        if rule[1] not in _MESH_AXES:
            raise ValueError(
                f"{setting} must name the mesh axes 'data' or 'model', or None; got "
                f"{rule[1]!r}. Change that entry of {setting}."
            )
    return tuple((logical, mesh) for logical, mesh in rules)
