"""Cost of a compiled program (FLOPs, memory traffic, collectives), computed from its text.

The body of a loop is counted once per iteration. XLA's own analysis counts it only once per loop.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from gkd_jax.devices import collectives
from gkd_jax.devices.hlo_loops import trip_count
from gkd_jax.devices.hlo_text import Instruction, Program, parse

# Instructions that do not read or write device memory themselves.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-done",
    "send-done", "recv-done",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of a program on one device.

    Attributes:
      flops: FLOPs of matrix products and convolutions; a multiply-add counts as two.
      bytes: upper bound on the bytes read from and written to device memory. Values that stay on
        the chip between two instructions are counted too, unless the program's text marks them as
        on-chip.
      collectives: bytes that the device sends within its slice, by kind of collective.
      between_slices: bytes that the device sends to other slices, by kind of collective.
      unknown_loops: number of loops whose trip count is not in the program.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)
    between_slices: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            _sum(self.collectives, other.collectives),
            _sum(self.between_slices, other.between_slices),
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, number: float) -> "Cost":
        """Returns the cost of `number` executions."""
        within, between = (
            {kind: number * sent for kind, sent in kinds.items()}
            for kinds in (self.collectives, self.between_slices)
        )
        return Cost(number * self.flops, number * self.bytes, within, between, self.unknown_loops)

    @property
    def sent(self) -> float:
        """Bytes that the device sends within its slice, over all collectives."""
        return sum(self.collectives.values())

    @property
    def sent_between_slices(self) -> float:
        """Bytes that the device sends to other slices, over all collectives."""
        return sum(self.between_slices.values())


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in {*one, *other}}


def cost(text: str, *, unknown_trips: int = 1, slice_size: int | None = None) -> Cost:
    """Computes the cost of a compiled program.

    Args:
      text: text of the program, from `compiled.as_text()`.
      unknown_trips: trip count assumed for loops whose number of iterations depends on the data.
      slice_size: number of consecutive devices that form a slice; None if all devices form one
        slice. If libtpu compiled the program for several slices, the text is the program of one
        slice, with explicit transfers to the other slices.
    """
    program = parse(text)
    return _Counter(program, unknown_trips, slice_size or program.num_devices).of_entry()


class _Counter:
    """Sums the costs of the instructions of a program, visiting each computation once."""

    def __init__(self, program: Program, unknown_trips: int, slice_size: int):
        self._program = program
        self._unknown_trips = unknown_trips
        self._slice_size = slice_size
        self._channels: set[str] = set()
        self._of = functools.cache(self._computation)

    def of_entry(self) -> Cost:
        return self._of(self._program.entry)

    def _computation(self, name: str) -> Cost:
        total = Cost()
        instructions = self._program.computations[name]
        for instruction in instructions.values():
            total += self._instruction(instruction, instructions)
        return total

    def _instruction(
        self, one: Instruction, others: Mapping[str, Instruction], *, is_fused: bool = False
    ) -> Cost:
        opcode = one.opcode.removesuffix("-start")
        if one.opcode == "while":
            trips = trip_count(self._program, one, others)
            cost = self._of(one.called("body")).times(
                self._unknown_trips if trips is None else trips
            )
            return cost + Cost(unknown_loops=int(trips is None))
        if opcode in collectives.KINDS:
            return self._collective(opcode, one, others, is_fused=is_fused)
        if one.opcode == "send":
            read = others[one.operands[0]].bytes if one.operands[0] in others else 0.0
            return Cost(bytes=read, between_slices=collectives.transferred(one.rest, read))
        flops = _product(one, others) if opcode in ("dot", "convolution") else 0.0
        moved = 0.0 if is_fused or opcode in _FREE else self._traffic(one, others)
        cost = Cost(flops, moved)
        inner = one.called("calls") or one.called("to_apply")
        if inner in self._program.computations and opcode in ("fusion", "call", "async"):
            inside = self._program.computations[inner]
            for fused in inside.values():
                cost += self._instruction(fused, inside, is_fused=opcode != "call")
        if opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            names += [n for k in ("true", "false") if (n := one.called(f"{k}_computation"))]
            costs = [self._of(branch) for branch in names]
            cost += max(costs, key=lambda c: (c.flops, c.bytes), default=Cost())
        return cost

    def _traffic(self, one: Instruction, others: Mapping[str, Instruction]) -> float:
        read = 0.0
        sliced = self._sliced_parameters(one)
        for index, operand in enumerate(one.operands):
            if index in sliced:
                read += sliced[index]
            elif operand in others:
                read += others[operand].bytes
        written = one.bytes
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if one.opcode == "dynamic-update-slice" and len(one.operands) > 1:
            update = others.get(one.operands[1])
            return 2 * update.bytes if update else 0.0
        return read + written - self._updated_in_place(one)

    def _sliced_parameters(self, one: Instruction) -> dict[int, float]:
        """Returns how many bytes a fusion reads from its partly read operands.

        The keys are the indices of these operands. Operands that the fusion reads as a whole are
        left out.
        """
        inside = self._program.computations.get(one.called("calls"), {})
        if one.opcode != "fusion":
            return {}
        found = {}
        for fused in inside.values():
            number = re.match(r"(\d+)\)", fused.rest)
            if fused.opcode == "parameter" and number is not None:
                read = self._read(fused.name, inside)
                if read is not None:
                    found[int(number[1])] = read
        return found

    def _read(self, name: str, inside: Mapping[str, Instruction]) -> float | None:
        """Returns how many bytes of a value the instructions of a fusion read.

        Returns None if the instructions read the whole value.

        Args:
          name: name of the value, a parameter or an instruction of the fusion.
          inside: instructions of the fusion.
        """
        total = 0.0
        readers = [x for x in inside.values() if name in x.operands]
        for reader in readers:
            read: float | None = None
            is_first = reader.operands[0] == name  # Later operands are indices or an update.
            if reader.opcode in ("dynamic-slice", "gather", "slice") and is_first:
                read = sum(array.bytes for array in reader.arrays)
            elif reader.opcode == "dynamic-update-slice" and is_first:
                read = 0.0
            elif reader.opcode == "bitcast":
                read = self._read(reader.name, inside)
            elif reader.opcode == "fusion":
                read = self._sliced_parameters(reader).get(reader.operands.index(name))
            if read is None:
                return None
            total += read
        return total if readers else None

    def _updated_in_place(self, one: Instruction) -> float:
        """Returns how many bytes of a fusion's result an in-place update leaves unwritten."""
        inner = one.called("calls")
        if one.opcode != "fusion" or inner not in self._program.computations:
            return 0.0
        inside = self._program.computations[inner]
        untouched = 0.0
        for fused in inside.values():
            if fused.opcode == "dynamic-update-slice" and len(fused.operands) > 1:
                update = inside.get(fused.operands[1])
                untouched += fused.bytes - (update.bytes if update else 0.0)
        return min(untouched, one.bytes)

    def _collective(
        self,
        kind: str,
        one: Instruction,
        others: Mapping[str, Instruction],
        *,
        is_fused: bool,
    ) -> Cost:
        # A collective that overlaps with matrix products is split into several instructions with
        # the same channel. Only the first of them is counted.
        channel = re.search(r"channel_id=(\d+)", one.rest)
        if channel:
            if channel[1] in self._channels:
                return Cost()
            self._channels.add(channel[1])
        operands = [others[name] for name in one.operands if name in others]
        read = sum(array.bytes for operand in operands for array in operand.arrays)
        if kind == "collective-permute":
            within, between = collectives.permuted(one.rest, read, self._slice_size)
        else:
            group = collectives.group(one.rest) or range(self._program.num_devices)
            slices = len({device // self._slice_size for device in group})
            readers = [other for other in others.values() if one.name in other.operands]
            is_cut = any(reader.opcode == "dynamic-slice" for reader in readers)
            if is_fused and is_cut and kind == "all-reduce":
                # On a TPU, an all-reduce that is fused with a slice runs as a reduce-scatter.
                kind = "reduce-scatter"
            within, between = collectives.sent(kind, read, len(group), slices)
        return Cost(
            collectives={kind: within} if within else {},
            between_slices={kind: between} if between else {},
        )


def _product(one: Instruction, others: Mapping[str, Instruction]) -> float:
    """Returns the FLOPs of a matrix product or convolution, two for each multiply-add."""
    if any(name not in others for name in one.operands[:2]):
        return 0.0
    left, right = (others[name].arrays[0].shape for name in one.operands[:2])
    result = math.prod(one.arrays[0].shape)
    if one.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        summed = [int(axis) for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * result * math.prod(left[axis] for axis in summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None
    total = 2.0 * result * right[labels[2].index("i")]
    return total * math.prod(_terms(one, left, labels, axis) for axis in _windows(one))


def _windows(one: Instruction) -> Iterator[dict[str, int]]:
    """Yields, for each spatial axis of a convolution, its index and the window attributes."""
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    settings = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    for number, size in enumerate(filter(None, settings.get("size", "").split("x"))):
        axis = {"number": number, "size": int(size)}
        for name, default in (("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1")):
            values = settings.get(name, "").split("x")
            axis[name] = int(values[number] if len(values) > number and values[number] else default)
        pads = settings.get("pad", "").split("x")
        low = pads[number].split("_")[0] if len(pads) > number and pads[number] else "0"
        axis["low"] = int(low)
        yield axis


def _terms(
    one: Instruction, left: tuple[int, ...], labels: "re.Match[str]", axis: dict[str, int]
) -> float:
    """Returns how many entries of a convolution's window overlap the input along one axis.

    The returned number is a mean over the positions of the result. Near the borders, a part of the
    window overlaps padding instead of the input.
    """
    name = str(axis["number"])
    size_in = (left[labels[1].index(name)] - 1) * axis["lhs_dilate"] + 1
    size_out = one.arrays[0].shape[labels[3].index(name)]
    valid = 0
    for out in range(size_out):
        for entry in range(axis["size"]):
            position = out * axis["stride"] - axis["low"] + entry * axis["rhs_dilate"]
            valid += 0 <= position < size_in and position % axis["lhs_dilate"] == 0
    return valid / max(size_out, 1)
