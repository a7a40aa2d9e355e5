"""Metrics are read back from what the writers wrote."""

import io
import json
import subprocess
import sys
import time
import types

import pytest
from absl import logging

from gkd_jax.training import writers

# TensorBoard's reader takes seconds to import TensorFlow, unless this module exists.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def _read_json_lines(path):
    def refuse(text):
        raise AssertionError(f"not JSON: {text}")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_json_lines(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = writers.JsonLinesWriter(str(path))
    writer.write(1, {"train/loss": 0.5, "train/bad": float("nan"), "train/worse": float("inf")})
    writer.write_text(2, "plan", "two\nlines: ä")
    writer.close()
    first, second = _read_json_lines(path)
    assert abs(first.pop("time") - time.time()) < 60
    assert first == {"step": 1, "train/loss": 0.5, "train/bad": None, "train/worse": None}
    assert second["plan"] == "two\nlines: ä"


def test_json_lines_after_a_crash_have_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonLinesWriter(str(path))
    for step in range(1, 8):
        writer.write(step, {"loss": step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    writer = writers.JsonLinesWriter(str(path), start_step=5)
    writer.write(6, {"loss": 60})
    writer.close()
    rows = _read_json_lines(path)
    assert [(row["step"], row["loss"]) for row in rows] == [*((n, n) for n in range(1, 6)), (6, 60)]

    writer = writers.JsonLinesWriter(str(path), start_step=0)
    writer.write(0, {"loss": 0})
    writer.close()
    assert [row["step"] for row in _read_json_lines(path)] == [0]


def _accumulate(folder):
    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def _scalars(accumulator, tag):
    """Steps and values, in either of the forms in which TensorBoard keeps scalars."""
    if tag in accumulator.Tags()["scalars"]:
        return [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return [(e.step, e.tensor_proto.float_val[0]) for e in accumulator.Tensors(tag)]


def test_tensorboard_reads_the_event_file(tmp_path):
    writer = writers.TensorBoardWriter(str(tmp_path))
    writer.write(1, {"train/loss": 0.5, "eval/bleu": 33.25})
    writer.write(300, {"train/loss": -0.25, "huge": 1e39, "nan": float("nan")})
    writer.write(2**40, {"train/loss": 1e-8})
    writer.write_text(3, "plan", "first\nsecond ä")
    writer.close()
    accumulator = _accumulate(tmp_path)
    assert _scalars(accumulator, "train/loss") == [
        (1, 0.5),
        (300, -0.25),
        (2**40, pytest.approx(1e-8)),
    ]
    assert _scalars(accumulator, "eval/bleu") == [(1, 33.25)]
    assert _scalars(accumulator, "huge") == [(300, float("inf"))]
    assert accumulator.PluginTagToContent("text").keys() == {"plan"}
    (text,) = accumulator.Tensors("plan")
    assert text.step == 3
    assert text.tensor_proto.string_val[0].decode() == "    first\n    second ä\n"


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    writer = writers.TensorBoardWriter(str(tmp_path))
    for step in range(1, 8):
        writer.write(step, {"loss": step})
    writer.close()
    time.sleep(0.002)  # files are ordered by their names, which begin with the time in ms
    writer = writers.TensorBoardWriter(str(tmp_path), start_step=5)
    writer.write(6, {"loss": 60})
    writer.close()
    expected = [*((n, float(n)) for n in range(1, 6)), (6, 60.0)]
    assert _scalars(_accumulate(tmp_path), "loss") == expected


def test_record_checksum():
    """CRC-32C of '123456789' is 0xE3069283 (RFC 3720, B.4), masked as in TFRecord files."""
    crc = 0xE3069283
    expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert int.from_bytes(writers._masked_crc(b"123456789"), "little") == expected


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    writer = writers.ProgressWriter(start_step=100, num_steps=1000, stream=stream)
    now[0] += 50
    writer.write(
        200,
        {
            "train/data/loss": 1.23456,
            "train/data/entropy": 3.0,
            "train/seconds_per_step": 0.4,
            "train/target_tokens_per_second": 12345.6,
        },
    )
    writer.write(200, {"eval/bleu": 33.251, "eval/loss": 0.5})
    writer.close()
    assert stream.getvalue() == (
        "step 200/1000  data/loss 1.235  0.4 s/step  12,346 tokens/s  6m40s left\n"
        "step 200: eval/bleu 33.25  eval/loss 0.5\n"
    )


def test_progress_line_is_rewritten_on_a_terminal():
    stream = _Terminal()
    writer = writers.ProgressWriter(start_step=0, num_steps=3, stream=stream)
    writer.write(1, {"train/loss": 3.0})
    writer.write(2, {"train/loss": 2.0})
    logging.error("a line of the log")
    writer.write(3, {"train/loss": 1.0})
    writer.close()
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[0].count("\r") == 2
    assert lines[0].endswith("left\x1b[K")
    assert lines[1].startswith("\rstep 3/3  loss 1")
    assert lines[2] == ""


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    writer = writers.default_writer(str(tmp_path / "run"), start_step=0, num_steps=1)
    writer.write(1, {"train/loss": 1.0})
    writer.write_text(1, "plan", "text")
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_default_writer_writes_files(tmp_path, capsys):
    writer = writers.default_writer(str(tmp_path), start_step=0, num_steps=1)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert _read_json_lines(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0
    assert _scalars(_accumulate(tmp_path / "tensorboard"), "train/loss") == [(1, 1.0)]
    assert "step 1/1" in capsys.readouterr().err


def test_writing_needs_neither_tensorflow_nor_tensorboard(tmp_path):
    program = (
        "import sys\n"
        "from gkd_jax.training import writers\n"
        "writer = writers.default_writer(sys.argv[1], start_step=0, num_steps=1)\n"
        "writer.write(1, {'train/loss': 1.0})\n"
        "writer.close()\n"
        "assert not {'tensorflow', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)


def test_one_that_cannot_be_closed_does_not_keep_the_others_open(tmp_path, caplog):
    class Broken(writers.JsonLinesWriter):
        def close(self) -> None:
            raise RuntimeError("gs://bucket/run/metrics.jsonl could not be written")

    whole = writers.JsonLinesWriter(str(tmp_path / "whole.jsonl"))
    writers.MultiWriter([Broken(str(tmp_path / "broken.jsonl")), whole]).close()
    assert "gs://bucket/run/metrics.jsonl could not be written" in caplog.text
    with pytest.raises(ValueError, match="closed"):
        whole.write(1, {"a": 1.0})
