"""Sharding rules: tables that map logical axes of parameters and activations to mesh axes."""

from collections.abc import Sequence
from typing import TypeAlias

Rules: TypeAlias = tuple[tuple[str, str | None], ...]
"""Pairs of a logical axis and the mesh axis that splits it, or None to replicate. If a logical axis
occurs in several pairs, the first applies."""

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
"""T5X's rules for `parameter_partitioning_dims=2`: parameters and optimizer state are also split
over 'data', along 'embed', and all-gathered layer by layer where they are used."""

_TABLES = {"standard": STANDARD_RULES, "fsdp": FSDP_RULES}
_MESH_AXES = ("data", "model", None)


def parse_rules(rules: str | Sequence[Sequence[str | None]], *, setting: str) -> Rules:
    """Looks up a table by its name, or checks a table and converts it to tuples.

    Args:
      rules: 'standard', 'fsdp', or a table of pairs. Table and pairs may be tuples or, as gin
        passes them, lists.
      setting: name of the setting, for error messages.

    Raises:
      ValueError: the name is unknown, an entry is not a pair, or a mesh axis is unknown.
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
