"""What TPU chips can do, and how many of them a slice has."""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip. Source: Cloud TPU's pages on system architecture.

    Attributes:
      flops: bfloat16, a second.
      memory: bytes of HBM.
      bandwidth: of that memory, bytes a second.
      interconnect: bytes a second that all its links together send to other chips of the slice.
      slices: sizes that there are, in the words of a topology, smallest first.
    """

    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, _CUBES),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CUBES),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 448e9, _FLAT),
}


def parse_topology(topology: str) -> tuple[str, str]:
    """Generation and size of a slice such as 'v5e:4x4'.

    Raises:
      ValueError: there is no such chip or size.
    """
    generation, _, size = topology.partition(":")
    if generation not in CHIPS or size not in CHIPS[generation].slices:
        known = "; ".join(f"{name}: {', '.join(chip.slices)}" for name, chip in CHIPS.items())
        raise ValueError(
            f"TOPOLOGY must be a chip and a size such as 'v5e:4x4'; got {topology!r}. Known are "
            f"{known}. Set TOPOLOGY (Experiment.topology) to one of them."
        )
    return generation, size


def larger(topology: str) -> list[str]:
    """Larger slices of the same chips, smallest first."""
    generation, size = parse_topology(topology)
    slices = CHIPS[generation].slices
    return [f"{generation}:{other}" for other in slices[slices.index(size) + 1 :]]
