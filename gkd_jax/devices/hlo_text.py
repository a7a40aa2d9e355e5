"""Parser of the text of compiled programs: computations, instructions, and arrays."""

import dataclasses
import math
import re
from collections.abc import Mapping

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the text of a program.

    Attributes:
      kind: dtype in HLO, such as 'f32'.
      shape: shape of the array.
      is_on_chip: whether the array is stored in on-chip memory rather than in device memory.
    """

    kind: str
    shape: tuple[int, ...]
    is_on_chip: bool

    @property
    def bytes(self) -> float:
        """Size in bytes."""
        return math.prod(self.shape) * _BITS.get(self.kind, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: name, unique in the program.
      arrays: arrays of the result, which may be a tuple.
      opcode: operation, such as 'fusion'.
      operands: names of the operands, which are instructions of the same computation.
      rest: text after the opcode: operands and attributes; for a constant, its value.
      is_root: whether the instruction computes the result of the computation.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool = False

    @property
    def bytes(self) -> float:
        """Bytes of the result that are stored in device memory."""
        return sum(array.bytes for array in self.arrays if not array.is_on_chip)

    def called(self, name: str) -> str:
        """Returns the name of a computation that is given by an attribute, such as 'body'.

        Returns an empty string if the instruction does not have the attribute.
        """
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: maps the name of each computation to its instructions, by their names.
      entry: name of the entry computation.
      num_devices: number of devices that run the program.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    num_devices: int

    def with_called(self, name: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation and of the computations that it calls."""
        found = dict(self.computations[name])
        for instruction in self.computations[name].values():
            inner = instruction.called("calls")
            if inner in self.computations:
                found |= self.with_called(inner)
        return found


def parse(text: str) -> Program:
    """Parses the text of a program, from `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[1], {})
            if line.startswith("ENTRY"):
                entry = header[1]
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], is_root=bool(match[1]))
            current[instruction.name] = instruction
    devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Program(computations, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    shape, text = _split_shape(text)
    arrays = tuple(
        Array(kind, tuple(map(int, filter(None, sizes.split(",")))), "S(1)" in layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    )
    opcode, _, rest = text.partition("(")
    inside = rest.partition(")")[0]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, arrays, opcode.strip(), operands, rest, is_root)


def _split_shape(text: str) -> tuple[str, str]:
    """Splits text into the shape, which may be a tuple in parentheses, and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 2 :]
    return text, ""
