"""Times of the parts of a step, and traces of chosen steps."""

import dataclasses
import gzip
import json
import subprocess
import time

import processes
import pytest
import small_runs

from gkd_jax.devices import chips
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes import train
from gkd_jax.training.profiling import PhaseTimes


def test_each_line_has_the_times_of_each_kind_of_step(tmp_path, tiny_teacher):
    experiment = small_runs.gkd(tmp_path, tiny_teacher, evaluation=None, log_period=6)
    assert experiment.outputs == OutputMix(0.5)
    train.train(experiment)
    first, second = (
        row for row in small_runs.rows(tmp_path / "metrics.jsonl") if "plan" not in row
    )
    for row in (first, second):
        assert row["train/seconds_of_fetching"] > 0
        for kind, phases in (("data", ["update"]), ("on_policy", ["rollout", "update"])):
            found = {
                name.removeprefix(f"train/{kind}/seconds_of_"): value
                for name, value in row.items()
                if name.startswith(f"train/{kind}/seconds_of_")
            }
            assert sorted(found) == phases
            assert all(value > 0 for value in found.values())
    # Steps that compile are not timed: parts are no longer than the mean step that has them.
    parts = second["train/on_policy/seconds_of_update"], second["train/data/seconds_of_update"]
    assert max(parts) < first["train/seconds_per_step"]
    per_chip = second["train/target_tokens_per_second_per_chip"]
    assert per_chip == pytest.approx(second["train/target_tokens_per_second"])


def test_utilisation_is_of_the_chips_peak(tmp_path, monkeypatch):
    """FLOPs of the step by the products of its size; a known chip that does 1e12 a second."""
    assert chips.of_device("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.of_device("TPU v5") is chips.CHIPS["v5p"]
    assert chips.of_device("cpu") is None
    chip = dataclasses.replace(chips.CHIPS["v5e"], flops=1e12)
    monkeypatch.setattr(chips, "of_device", lambda kind: chip)
    experiment = small_runs.sft(tmp_path, num_steps=4, log_period=2)
    train.train(experiment)
    rows = [row for row in small_runs.rows(tmp_path / "metrics.jsonl") if "plan" not in row]
    found = {
        row["train/data/update_mfu"] * row["train/data/seconds_of_update"] * 1e12 for row in rows
    }
    assert max(found) == pytest.approx(min(found))
    # A token of the outputs takes each weight of the decoder and head once forward and twice
    # backward, a product and a sum each; one of the prompts those of the encoder.
    width, heads, mlp, vocab = 16, 16, 32, 259
    attention, feed_forward = 4 * width * heads, 3 * width * mlp
    prompts, outputs = 48 * small_runs.BATCH_SIZE, 24 * small_runs.BATCH_SIZE
    of_prompts = attention + feed_forward + 2 * width * heads  # Keys and values that are read.
    of_outputs = attention + feed_forward + 2 * width * heads + width * vocab
    least = 6 * (prompts * of_prompts + outputs * of_outputs)
    assert least < max(found) < 1.6 * least


def test_phases_wait_for_their_values_on_timed_steps_alone():
    class Value:
        waited = 0

        def block_until_ready(self):
            Value.waited += 1
            time.sleep(0.02)
            return self

    phases = PhaseTimes()
    for _ in range(4):
        phases.begin("data", None)
        with phases.phase("update") as wait:
            wait(Value())
    assert Value.waited == 1
    assert phases.take()["data"]["update"] >= 0.02
    assert phases.take() == {}
    phases.begin("data", None)
    with phases.phase("update") as wait:
        wait(Value())
    assert Value.waited == 2


TRACED = """
import pathlib, sys, small_runs
from gkd_jax.run_modes import train
from gkd_jax.objectives.mixing import OutputMix
folder, teacher = map(pathlib.Path, sys.argv[1:])
train.train(
    small_runs.gkd(folder, teacher, evaluation=None, outputs=OutputMix(1.0), profile_steps=[3, 4])
)
"""


@pytest.mark.slow
def test_a_trace_of_chosen_steps(tmp_path, tiny_teacher, monkeypatch):
    # In a process of its own: one that has compiled for a TPU without having it cannot trace.
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT / "tests"))
    arguments = [str(tmp_path), str(tiny_teacher)]
    process = processes.start(arguments, program=("-c", TRACED), stderr=subprocess.PIPE)
    log = process.communicate()[1]
    assert process.returncode == 0, log
    (trace,) = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "step"]
    assert sorted(steps) == ["3", "4"]
    names = {event.get("name") for event in events}
    assert {"rollout", "update"} <= names


@pytest.mark.parametrize("steps", [(0, 3), (4, 3), (1, 2, 3), (5, 6)])
def test_wrong_steps(steps, tmp_path):
    with pytest.raises(ValueError, match=r"profile_steps must be the first and the last.*PROFILE"):
        small_runs.sft(tmp_path, num_steps=5, profile_steps=steps)
