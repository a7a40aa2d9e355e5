"""A run that hangs tells where, and ends."""

import os
import subprocess
import sys
import threading
import time

import pytest
import small_runs

from gkd_jax.run_modes import train
from gkd_jax.training import interruption, watchdog


def test_stacks_are_written_and_the_process_ends(tmp_path):
    """In a process of its own, whose main thread waits for ever in a function of a known name."""
    program = """
import sys, threading
from gkd_jax.training import watchdog
watchdog._SECONDS_TO_TELL = 0.1
def waits_for_ever():
    threading.Event().wait()
with watchdog.Watchdog(0.5, sys.argv[1]):
    waits_for_ever()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == interruption.EXIT_STATUS, done.stderr
    stacks = (tmp_path / "run" / "stacks.process_0.txt").read_text()
    for text in (done.stderr, stacks):
        assert "waits_for_ever" in text
    assert "nothing has happened for 0.5 seconds (Experiment.hang_seconds)" in done.stderr
    assert "HANG_SECONDS" in done.stderr


def test_beats_keep_it_quiet(tmp_path):
    ended = threading.Event()
    with watchdog.Watchdog(0.4, str(tmp_path), end=ended.set):
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
    assert not ended.is_set()
    assert not list(tmp_path.iterdir())
    watchdog.beat()  # Outside of one it is nothing.


def test_what_goes_on_after_all_is_not_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "_SECONDS_TO_TELL", 0.5)
    ended = threading.Event()
    with watchdog.Watchdog(0.3, str(tmp_path), end=ended.set):
        time.sleep(0.5)
        for _ in range(6):
            watchdog.beat()
            time.sleep(0.1)
    assert not ended.is_set()
    told = capfd.readouterr().err
    assert "nothing has happened" in told
    assert "it goes on" in told


def test_a_training_run_is_watched(tmp_path, monkeypatch):
    """A step that hangs is noticed; the run's own watchdog knows of each step."""
    monkeypatch.setattr(watchdog, "_SECONDS_TO_TELL", 0.0)
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "_end", ended.set)
    monkeypatch.setattr(watchdog.Watchdog.__init__, "__kwdefaults__", {"end": ended.set})
    original = train.Trainer.step

    def step(self, state, batch, step):
        if step == 3:
            assert ended.wait(60)
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    # What compiles takes longer than a second.
    train.train(small_runs.sft(tmp_path / "compiled", num_steps=3))
    assert not ended.is_set()
    train.train(small_runs.sft(tmp_path / "run", hang_seconds=2.0))
    assert "in step" in (tmp_path / "run" / "stacks.process_0.txt").read_text()


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_wrong_settings(seconds, tmp_path):
    with pytest.raises(ValueError, match=r"hang_seconds must be above 0.*HANG_SECONDS"):
        small_runs.sft(tmp_path, hang_seconds=seconds)
