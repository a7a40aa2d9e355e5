"""Writers of metrics: JSON lines, TensorBoard (without TensorFlow) and the terminal."""

import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax
from absl import logging as absl_logging
from etils import epath

from gkd_jax.common.growing_files import GrowingFile

METRICS_FILE = "metrics.jsonl"


class Writer(Protocol):
    """Interface of the writers of a run's metrics."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics after update number `step`."""
        ...

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text, such as the configuration."""
        ...

    def sync(self) -> None:
        """Makes everything written so far durable, so that a run can resume from it."""
        ...

    def close(self) -> None:
        """Writes buffered data and closes the files."""
        ...


def default_writer(
    model_dir: str, *, start_step: int, num_steps: int, owes_evaluation: bool = False
) -> Writer:
    """Returns the writer of a run's metrics. Only the writer of the first process writes them.

    Args:
      model_dir: the run's folder, local or in a bucket.
      start_step: step that the run resumes from. Existing entries of later steps are dropped,
        because these steps are made again. 0 drops all entries.
      num_steps: total number of updates, for the estimate of the remaining time.
      owes_evaluation: whether the evaluation of `start_step` is still to be written. Existing
        entries of this evaluation are then dropped as well.
    """
    if jax.process_index() != 0:
        return MultiWriter(())
    return MultiWriter(
        (
            JsonLinesWriter(
                f"{model_dir}/{METRICS_FILE}",
                start_step=start_step,
                owes_evaluation=owes_evaluation,
            ),
            TensorBoardWriter(f"{model_dir}/tensorboard", start_step=start_step),
            ProgressWriter(start_step=start_step, num_steps=num_steps),
        )
    )


class MultiWriter:
    """Passes everything on to several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def write_text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.write_text(step, name, text)

    def sync(self) -> None:
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """Closes all writers. If an upload fails, this is only logged, since `sync` came before."""
        for writer in self._writers:
            try:
                writer.close()
            except RuntimeError as error:
                absl_logging.error("%s", error)


class JsonLinesWriter:
    """Writes one JSON object per line: `step`, `time` (seconds since 1970) and metrics by name.

    NaN and infinity are written as null, which every JSON parser accepts.
    """

    def __init__(self, path: str, *, start_step: int = 0, owes_evaluation: bool = False):
        self._owes_evaluation = owes_evaluation
        before = epath.Path(path).read_bytes() if epath.Path(path).exists() else b""
        kept = self._up_to(start_step, before.decode("utf-8", errors="replace"))
        self._file = GrowingFile(path, kept.encode("utf-8"))

    def _up_to(self, start_step: int, text: str) -> str:
        """Returns the lines of steps up to `start_step`. Drops an incomplete last line."""
        kept = []
        # Not `splitlines`, because it also splits at other characters that a text may contain.
        for line in text.split("\n")[:-1]:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            is_owed = self._owes_evaluation and row["step"] == start_step and _is_evaluation(row)
            if start_step > 0 and row["step"] <= start_step and not is_owed:
                kept.append(line + "\n")
        return "".join(kept)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        self._append(step, {n: v if math.isfinite(v) else None for n, v in values.items()})

    def write_text(self, step: int, name: str, text: str) -> None:
        self._append(step, {name: text})

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": int(step), "time": round(time.time(), 3), **values}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self._file.append(line.encode("utf-8"))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


class TensorBoardWriter:
    """Writes event files for TensorBoard, without TensorFlow or TensorBoard.

    A file is a sequence of records: length, checksum of the length, data, checksum of the data. The
    data are an `Event` protocol buffer (tensorflow/core/util/event.proto), of which only a few
    fields are needed.
    """

    def __init__(self, folder: str, *, start_step: int = 0):
        now = time.time()
        name = f"events.out.tfevents.{int(now * 1000)}.{socket.gethostname()}.{os.getpid()}"
        self._file = GrowingFile(f"{folder}/{name}")
        self._append(_text_field(3, "brain.Event:2"))
        # Event.session_log with status START tells readers to drop those events of earlier files
        # whose step is `first_step` or later.
        first_step = start_step + 1 if start_step else 0
        self._append(_varint_field(2, first_step) + _bytes_field(7, _varint_field(1, 1)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one event with all metrics."""
        values = (
            # Summary.Value: tag, simple_value
            _bytes_field(1, _text_field(1, name) + b"\x15" + struct.pack("<f", _float32(value)))
            for name, value in scalars.items()
        )
        self._append(_varint_field(2, int(step)) + _bytes_field(5, b"".join(values)))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Appends a text, which TensorBoard's Text tab shows verbatim."""
        string_dtype = 7
        # Markdown shows indented lines verbatim.
        verbatim = "".join(f"    {line}\n" for line in text.splitlines())
        tensor = _varint_field(1, string_dtype) + _text_field(8, verbatim)
        metadata = _bytes_field(1, _text_field(1, "text"))
        value = _text_field(1, name) + _bytes_field(8, tensor) + _bytes_field(9, metadata)
        self._append(_varint_field(2, int(step)) + _bytes_field(5, _bytes_field(1, value)))

    def _append(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.append(length + _masked_crc(length) + event + _masked_crc(event))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def _float32(value: float) -> float:
    """Returns infinity for values beyond float32's range, for which `struct.pack` would raise."""
    limit = 3.4028234663852886e38
    value = float(value)
    return math.copysign(math.inf, value) if abs(value) > limit else value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _text_field(number: int, value: str) -> bytes:
    return _bytes_field(number, value.encode())


def _make_crc_table() -> tuple[int, ...]:
    """Returns the byte-wise table of CRC-32C (Castagnoli, reflected polynomial 0x82F63B78)."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _make_crc_table()


def _masked_crc(data: bytes) -> bytes:
    """Returns the masked CRC-32C that records store: the rotated CRC-32C plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


class ProgressWriter:
    """Shows progress on standard error.

    On a terminal, each entry overwrites the same line. Otherwise each entry has its own line. The
    remaining time is the number of remaining steps, multiplied by the mean time per step so far.
    This mean includes evaluations and checkpoints.
    """

    def __init__(self, *, start_step: int, num_steps: int, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._is_line_open = False
        self._num_steps = num_steps
        self._start_step = start_step
        self._start_time = time.monotonic()
        if self._in_place:
            # A log line must not be appended to the progress line.
            absl_logging.get_absl_logger().addFilter(self._end_line_before_log)

    def _end_line_before_log(self, record: logging.LogRecord) -> bool:
        self._end_line()
        return True

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows training metrics on the progress line, and evaluations on lines of their own."""
        is_training = any(name.startswith("train/") for name in scalars)
        if not is_training:
            self._end_line()
            self._stream.write(f"step {step}: {_format_all(scalars)}\n")
        else:
            line = self._progress(step, scalars)
            if self._in_place:
                self._stream.write(f"\r{line}\x1b[K")
                self._is_line_open = True
            else:
                self._stream.write(f"{line}\n")
        self._stream.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Does nothing; texts are only written to files."""

    def sync(self) -> None:
        """Does nothing; lines are shown immediately."""

    def _progress(self, step: int, scalars: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._num_steps}"]
        parts += [
            f"{name.removeprefix('train/')} {_format(value)}"
            for name, value in scalars.items()
            if name.rpartition("/")[2] == "loss"
        ]
        seconds = scalars.get("train/seconds_per_step")
        if seconds is not None:
            parts.append(f"{_format(seconds)} s/step")
        tokens = scalars.get("train/target_tokens_per_second")
        if tokens is not None:
            parts.append(f"{tokens:,.0f} tokens/s")
        done = step - self._start_step
        if done > 0:
            elapsed = time.monotonic() - self._start_time
            parts.append(f"{_duration(elapsed / done * (self._num_steps - step))} left")
        return "  ".join(parts)

    def _end_line(self) -> None:
        if self._is_line_open:
            self._stream.write("\n")
            self._is_line_open = False

    def close(self) -> None:
        """Ends the progress line."""
        self._end_line()
        absl_logging.get_absl_logger().removeFilter(self._end_line_before_log)
        self._stream.flush()


def _format(value: float) -> str:
    return f"{float(value):.4g}"


def _format_all(scalars: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {_format(value)}" for name, value in scalars.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
