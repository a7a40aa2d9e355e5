"""Peak rates of TPU chips, and the available slice topologies."""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, from the system architecture pages of the Cloud TPU documentation.

    Attributes:
      flops: bfloat16 FLOPs per second.
      memory: size of the HBM in bytes.
      bandwidth: bandwidth of the HBM in bytes per second.
      interconnect: bytes per second that the chip can send to other chips of its slice over all of
        its links.
      network: bytes per second that the chip can send to other slices over the data center
        network.
      slices: available slice topologies, smallest first.
    """

    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    network: float
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# The documentation states these network bandwidths: 50 Gbit/s per chip for v5p, 6.4 Tbit/s per pod
# of 256 chips for v5e, and 25.6 Tbit/s per pod of 256 chips for v6e. It states no bandwidth for v4,
# for which the value of v5p is used.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 6.25e9, _CUBES),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 3.125e9, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, _CUBES),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 448e9, 12.5e9, _FLAT),
}


# Maps JAX's `Device.device_kind` to the name of the chip in `CHIPS`.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def of_device(kind: str) -> Chip | None:
    """Returns the chip for a `Device.device_kind` of JAX; None if the kind is unknown."""
    return CHIPS[_KINDS[kind]] if kind in _KINDS else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several TPU slices, such as 'v5e:4x4', or 'v5e:4x4*2' for two slices.

    Attributes:
      generation: generation of the chips, a key of `CHIPS`.
      size: topology of each slice.
      num_slices: number of slices, connected by the data center network.
    """

    generation: str
    size: str
    num_slices: int = 1

    def __str__(self) -> str:
        several = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.of_one_slice}{several}"

    @property
    def of_one_slice(self) -> str:
        """libtpu's name for the topology of one slice."""
        return f"{self.generation}:{self.size}"

    @property
    def chip(self) -> Chip:
        """Peak rates of each chip."""
        return CHIPS[self.generation]


def parse_topology(topology: str) -> Topology:
    """Parses a topology such as 'v5e:4x4' or 'v5e:4x4*2'.

    Raises:
      ValueError: the generation or the size is unknown, or the number of slices is invalid.
    """
    generation, _, rest = topology.partition(":")
    size, times, number = rest.partition("*")
    is_number = not times or (number.isdecimal() and int(number) > 0)
    if generation not in CHIPS or size not in CHIPS[generation].slices or not is_number:
        known = "; ".join(f"{name}: {', '.join(chip.slices)}" for name, chip in CHIPS.items())
        raise ValueError(
            "TOPOLOGY must be a chip and a size such as 'v5e:4x4', or 'v5e:4x4*2' for two slices; "
            f"got {topology!r}. Known are {known}. Set TOPOLOGY (Experiment.topology) to one of "
            "them."
        )
    return Topology(generation, size, int(number or 1))


def larger(topology: str) -> list[str]:
    """Returns the larger topologies of the same generation and number of slices, smallest first."""
    given = parse_topology(topology)
    sizes = given.chip.slices
    others = sizes[sizes.index(given.size) + 1 :]
    return [str(dataclasses.replace(given, size=other)) for other in others]
