"""How often a loop of a compiled program runs.

Loops that JAX and XLA make count up: the condition compares a counter with a constant, and the body
adds a constant to it. That is 1 in `lax.scan`; XLA's products that overlap with the gathering of
their operand take several shards a turn, and add as many.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from gkd_jax.devices.hlo_text import Instruction, Program

_COUNTERS = ("s32", "u32", "s64")
_SAME = ("copy", "bitcast", "copy-start", "copy-done", "convert")

Instructions: TypeAlias = Mapping[str, Instruction]
# The instructions at hand, and the fusion that they are within: that of the next.
_Scopes: TypeAlias = Sequence[tuple[Instructions, Instruction | None]]


def trip_count(program: Program, loop: Instruction, others: Instructions) -> int | None:
    """How often it runs; None where the data decide.

    Args:
      program: that it is in.
      loop: an instruction `while`.
      others: those beside it.
    """
    condition = loop.called("condition")
    limit = _limit(program.with_called(condition))
    if limit is None:
        return None
    counters = [
        int(found[1])
        for one in program.computations[condition].values()
        if one.opcode == "get-tuple-element"
        and (one.arrays[0].kind, one.arrays[0].shape) in [(kind, ()) for kind in _COUNTERS]
        and (found := re.search(r"index=(\d+)", one.rest))
    ]
    step, start = None, None
    if len(counters) == 1:
        body = program.computations[loop.called("body")]
        step = _added(program, _entry(_root(body), counters[0], [(body, None)]), [(body, None)])
        start = _constant(_entry(others.get(loop.operands[0]), counters[0], [(others, None)]),
                          [(others, None)])  # fmt: skip
    return max(0, math.ceil((limit - (start or 0)) / (step or 1)))


def _limit(condition: Instructions) -> int | None:
    """The largest constant that the condition compares a counter with."""
    found = [
        value
        for one in condition.values()
        if one.opcode == "constant" and (value := _value(one)) is not None
    ]
    compared = any("direction=LT" in one.rest for one in condition.values())
    return max(found) if found and compared and max(found) > 0 else None


def _value(one: Instruction) -> int | None:
    match = re.match(r"(-?\d+)\)", one.rest)
    is_counter = one.arrays[0].kind in _COUNTERS and not one.arrays[0].shape
    return int(match[1]) if match and is_counter else None


def _root(computation: Instructions) -> Instruction | None:
    return next((one for one in computation.values() if one.is_root), None)


def _entry(one: Instruction | None, number: int, scopes: _Scopes) -> Instruction | None:
    """Of a tuple's instruction, the one that makes an entry."""
    if one is None or one.opcode != "tuple" or number >= len(one.operands):
        return None
    return scopes[0][0].get(one.operands[number])


def _source(one: Instruction | None, scopes: _Scopes) -> tuple[Instruction | None, _Scopes]:
    """What a value is a copy of, also outside the fusion that it is a parameter of."""
    while one is not None:
        instructions, fusion = scopes[0]
        number = re.match(r"(\d+)\)", one.rest)
        if one.opcode in _SAME:
            one = instructions.get(one.operands[0])
        elif one.opcode == "parameter" and fusion is not None and number is not None:
            scopes = scopes[1:]
            one = scopes[0][0].get(fusion.operands[int(number[1])])
        else:
            break
    return one, scopes


def _constant(one: Instruction | None, scopes: _Scopes) -> int | None:
    one, _ = _source(one, scopes)
    return _value(one) if one is not None and one.opcode == "constant" else None


def _added(program: Program, one: Instruction | None, scopes: _Scopes) -> int | None:
    """The constant that an instruction adds to something; None where it does not."""
    one, scopes = _source(one, scopes)
    if one is None:
        return None
    instructions = scopes[0][0]
    if one.opcode == "add":
        values = [_constant(instructions.get(name), scopes) for name in one.operands]
        return next((value for value in values if value is not None), None)
    number = None
    if one.opcode == "get-tuple-element":
        found = re.search(r"index=(\d+)", one.rest)
        number = int(found[1]) if found else None
        one = instructions.get(one.operands[0])
    if one is None or one.opcode != "fusion":
        return None
    inside = program.computations[one.called("calls")]
    within = [(inside, one), *scopes]
    result = _root(inside)
    if number is not None:
        result = _entry(result, number, within)
    return _added(program, result, within)
