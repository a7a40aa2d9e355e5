"""Collectives of a compiled program: participating devices, and bytes sent per device."""

import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def sent(kind: str, read: float, size: int, slices: int) -> tuple[float, float]:
    """Returns the bytes that each device of a group sends within its slice and to other slices.

    A collective over several slices has two stages, one within each slice and one between slices.
    In the stage between slices, each device of a slice handles a different part of the data, so
    that no part is sent to another slice twice.

    Args:
      kind: kind of collective.
      read: bytes of the operands of one device.
      size: number of devices in the group.
      slices: number of slices that the group spans. Each of these slices contains the same number
        of the group's devices.
    """
    here = size / slices
    if kind == "all-gather":
        return read * slices * (here - 1), read * (slices - 1)
    if kind == "all-to-all":
        return read * (here - 1) / size, read * (slices - 1) / slices
    times = 2 if kind == "all-reduce" else 1
    within = times * read * (here - 1) / here
    return within, times * read / here * (slices - 1) / slices


def permuted(rest: str, read: float, slice_size: int) -> tuple[float, float]:
    """Returns the bytes that a device sends, like `sent`, for a collective-permute.

    In a collective-permute, each device sends its operand to one other device. If some devices send
    within a slice and others to another slice, the operand is counted in both results, since the
    program waits for the slower transfer.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    ends = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
    crossing = [int(a) // slice_size != int(b) // slice_size for a, b in ends]
    within = not crossing or not all(crossing)
    return read if within else 0.0, read if any(crossing) else 0.0


def transferred(rest: str, read: float) -> dict[str, float]:
    """Returns the bytes that a host transfer sends to other slices, by kind of collective.

    libtpu compiles the second stage of a collective over several slices to host transfers.

    Args:
      rest: attributes of the instruction `send`.
      read: bytes of the operand of `send`.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    kind = found[1].lower().replace("_", "-") if found else "send"
    if kind not in KINDS:
        return {kind: read}
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', rest)
    ranges = [ids.split(":") for ids in target[1].split(",")] if target else []
    slices = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges) or 1
    return {kind: sent(kind, read, slices, slices)[1]}


def group(rest: str) -> list[int]:
    """Returns the device ids of a collective's first group; an empty list means all devices.

    Args:
      rest: attributes of the instruction.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return [int(device) for device in listed[1].split(",")]
    tiled = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", rest)
    if tiled:
        return _iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2]))[0].tolist()
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((?:{_IOTA}|([\d,\s]*))\))?"
        r"\s*\{([^}]*)\}",
        rest,
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        devices = np.arange(math.prod(sizes.values()))
        if mesh[2]:
            devices = _iota(mesh[2], mesh[3])
        elif mesh[4]:
            devices = np.asarray(_numbers(mesh[4]))
        among = re.findall(r"'(\w+)'", mesh[5])
        first = tuple(slice(None) if name in among else 0 for name in sizes)
        return devices.reshape(tuple(sizes.values()))[first].ravel().tolist()
    return []


def _iota(sizes: str, axes: str | None) -> np.ndarray:
    """Returns the device ids that an HLO text such as '[2,4]T(1,0)' denotes.

    This text is a range of ids, reshaped to [2, 4] and then transposed.

    Args:
      sizes: the shape, such as '2,4'.
      axes: the permutation, such as '1,0'; None if the ids are not transposed.
    """
    shape = _numbers(sizes)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(axes)) if axes else devices


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()
