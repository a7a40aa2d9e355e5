"""The report of `compile_ahead`: memory, FLOPs, traffic and time of a run, and their table."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from gkd_jax.devices import chips, hlo
from gkd_jax.devices.chips import GIB

_MIB = 1 << 20
_COLUMNS = (
    "part", "temporaries, MiB", "in all, of the chip", "GFLOPs a chip", "of the least",
    "recomputed", "GB of memory", "MB sent", "MB to other slices", "least seconds", "bound by",
    "compiled in",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One compiled function.

    Attributes:
      name: 'train step', 'rollout', 'evaluation' or 'divergence'.
      temporaries: bytes per chip in addition to the resident arrays; None if the function does
        not fit.
      needed: needed memory, as written in the compiler's error message; '' if the function fits.
      seconds_to_compile: compilation time on this machine.
      cost: cost of one call on one chip.
      traced: FLOPs of one call on all chips, counted in the traced function.
      recomputed: part of `traced` that is recomputation by rematerialisation.
    """

    name: str
    temporaries: int | None
    needed: str
    seconds_to_compile: float
    cost: hlo.Cost
    traced: float
    recomputed: float = 0.0

    @property
    def least(self) -> float:
        """FLOPs of one call on all chips, without recomputation by rematerialisation."""
        return self.traced - self.recomputed


@dataclasses.dataclass(frozen=True)
class Report:
    """Requirements of a run on a slice.

    Attributes:
      topology: the slice, such as 'v5e:4x4'.
      mesh: sizes of the mesh axes by name.
      residents: bytes per chip of the arrays that persist across steps, by description.
      parts: the compiled functions.
    """

    topology: str
    mesh: dict[str, int]
    residents: dict[str, int]
    parts: list[Part]

    @property
    def chip(self) -> chips.Chip:
        """The kind of chip of the slice."""
        return chips.parse_topology(self.topology).chip

    @property
    def num_chips(self) -> int:
        """Number of chips of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def resident(self) -> int:
        """Bytes per chip of all arrays that persist across steps."""
        return sum(self.residents.values())

    def share(self, part: Part) -> float:
        """Returns the share of a chip's memory that a function and the resident arrays need.

        The share is infinite if the compiler reported that the function does not fit.
        """
        if part.temporaries is None:
            return math.inf
        return (self.resident + part.temporaries) / self.chip.memory

    def of_least(self, part: Part) -> float:
        """Returns the ratio of compiled FLOPs on all chips, without recomputation, to `Part.least`.

        A ratio above 1 means that several chips do the same work, or that chips compute on padding.
        """
        done = part.cost.flops * self.num_chips - part.recomputed
        return done / part.least if part.least else math.nan

    def fits_part(self, part: Part) -> bool:
        """Returns whether a function fits on a chip together with the resident arrays."""
        return self.share(part) <= 1

    @property
    def fits(self) -> bool:
        """Whether every function fits."""
        return all(map(self.fits_part, self.parts))

    def table(self) -> str:
        """Returns the report as Markdown tables."""
        chip = self.chip
        lines = [
            f"{self.topology}: {self.num_chips} chips of {chip.memory / GIB:.0f} GiB, mesh "
            + " x ".join(f"{name} {size}" for name, size in self.mesh.items()),
            "",
            "| resident on each chip | MiB |",
            "|---|---|",
            *(f"| {what} | {size / _MIB:,.1f} |" for what, size in self.residents.items()),
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---" * len(_COLUMNS) + "|",
            *map(self._row, self.parts),
            *self._sent("sent by each chip:", lambda cost: cost.collectives),
            *self._sent("sent by each chip to other slices:", lambda cost: cost.between_slices),
        ]
        guessed = [
            f"{part.name}: {part.cost.unknown_loops}"
            for part in self.parts
            if part.cost.unknown_loops
        ]
        if guessed:
            lines += ["", "loops whose length depends on data, counted at the loss's longest:"]
            lines += guessed
        return "\n".join(lines)

    def _row(self, part: Part) -> str:
        if part.temporaries is None:
            empty = "| " * (len(_COLUMNS) - 2)
            return f"| {part.name} | does not fit: {part.needed} {empty}|"
        cost = part.cost
        seconds, bound = roofline(cost, self.chip)
        cells = (
            part.name,
            f"{part.temporaries / _MIB:,.1f}",
            f"{self.share(part):.1%}",
            f"{cost.flops / 1e9:,.1f}",
            f"{self.of_least(part):.2f}",
            f"{part.recomputed / part.least:.0%}" if part.least else "",
            f"{cost.bytes / 1e9:,.2f}",
            f"{cost.sent / 1e6:,.1f}",
            f"{cost.sent_between_slices / 1e6:,.1f}",
            f"{seconds:.4f}",
            bound,
            f"{part.seconds_to_compile:.0f} s",
        )
        return f"| {' | '.join(cells)} |"

    def _sent(self, title: str, kinds_of: Callable[[hlo.Cost], Mapping[str, float]]) -> list[str]:
        lines = [
            f"{part.name}: {sent}"
            for part in self.parts
            if (sent := describe_sent(kinds_of(part.cost)))
        ]
        return ["", title, *lines] if lines else []


def describe_sent(kinds: Mapping[str, float]) -> str:
    """Formats bytes by kind of collective; returns '' if nothing is sent."""
    return ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in sorted(kinds.items()) if size)


def roofline(cost: hlo.Cost, chip: chips.Chip) -> tuple[float, str]:
    """Returns the minimum time in seconds on a chip, and the resource that limits it."""
    times = {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "interconnect": cost.sent / chip.interconnect,
        "network": cost.sent_between_slices / chip.network,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound
