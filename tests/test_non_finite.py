"""NaN and infinity in a step: stopped at or skipped, and the batch kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.distillation import train_step
from gkd_jax.experiment import Checkpoints, NonFinite
from gkd_jax.run_modes import train
from gkd_jax.training.non_finite import STEPS_UNDER_WAY

BAD_STEP = 2


def poison(monkeypatch, steps=(BAD_STEP,)):
    """The importance of a token of these steps' batches is NaN."""
    original = train.Trainer.step

    def step(self, state, batch, step):
        if step in steps:
            importance = jnp.ones_like(batch.loss_weights).at[1, 0].set(jnp.nan)
            batch = dataclasses.replace(batch, importance=importance)
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    experiment = small_runs.sft(folder, num_steps=6, log_period=6, checkpoints=Checkpoints(1, 10))
    return folder, train.train(experiment)


def test_a_run_stops_at_the_step_and_keeps_its_batch(tmp_path, monkeypatch):
    """Long before the next line of metrics, which is due at the end."""
    made = []
    poison(monkeypatch)
    original = train.Trainer.step

    def step(self, state, batch, step):
        made.append(step)
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    experiment = small_runs.sft(tmp_path, num_steps=40, log_period=40)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss or its gradient is not finite"):
        train.train(experiment)
    assert made[-1] == BAD_STEP + STEPS_UNDER_WAY
    rows = small_runs.rows(tmp_path / "non_finite" / "step_3.process_0.jsonl")
    arrays = np.load(tmp_path / "non_finite" / "step_3.process_0.npz")
    assert [row["example_id"] for row in rows] == [8, 9, 10, 11] == arrays["example_id"].tolist()
    assert np.isnan(arrays["importance"][1, 0])
    decode = experiment.train_data.vocabulary.decode
    mask = arrays["inputs_mask"]
    assert [row["inputs"] for row in rows] == [
        decode(row[kept].tolist()) for row, kept in zip(arrays["inputs"], mask, strict=True)
    ]
    assert all(row["inputs"] and row["targets"] for row in rows)


def test_a_step_skipped_changes_nothing(tmp_path, monkeypatch, undisturbed):
    """State after it is that before it; then the run goes on."""
    poison(monkeypatch)
    experiment = small_runs.sft(
        tmp_path, num_steps=6, log_period=6, checkpoints=Checkpoints(1, 10),
        non_finite=NonFinite("skip"),
    )  # fmt: skip
    result = train.train(experiment)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        result.state,
    )
    manager = CheckpointManager(tmp_path, read_only=True)
    before, _, _ = manager.restore(abstract, step=BAD_STEP)
    after, _, _ = manager.restore(abstract, step=BAD_STEP + 1)
    assert int(after.step) == int(before.step) == BAD_STEP
    small_runs.assert_equal_bits(after, before)
    assert int(result.state.step) == 5
    # Until then it is the undisturbed run, and what comes after trains.
    folder, _ = undisturbed
    other, _, _ = CheckpointManager(folder, read_only=True).restore(abstract, step=BAD_STEP)
    small_runs.assert_equal_bits(before, other)
    (row,) = small_runs.metrics(tmp_path)
    assert row["train/data/skipped"] == pytest.approx(1 / 6)
    assert np.isfinite([value for value in row.values() if value is not None]).all()
    assert (tmp_path / "non_finite" / "step_3.process_0.npz").exists()
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), result.state.params, after.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_the_action_may_change_within_a_line_of_metrics(tmp_path, monkeypatch, tiny_teacher):
    """What was summed before has no count of skipped steps."""
    changes = {"num_steps": 6, "log_period": 6, "checkpoints": Checkpoints(2, 10)}
    for action, stop in (("stop", 3), ("skip", 5), ("stop", None)):
        experiment = small_runs.sft(tmp_path, non_finite=NonFinite(action), **changes)
        with monkeypatch.context() as patch:
            if stop is None:
                train.train(experiment)
                break
            small_runs.stop_at(patch, stop)
            with pytest.raises(small_runs.Stopped):
                train.train(experiment)
    (row,) = small_runs.metrics(tmp_path)
    assert row["train/data/skipped"] == 0.0
    assert row["train/data/loss"] > 0


def test_metrics_of_a_skipped_step_do_not_count(tmp_path, monkeypatch):
    rows = {}
    for name, steps in (("with", (0,)), ("without", ())):
        with monkeypatch.context() as patch:
            poison(patch, steps)
            experiment = small_runs.sft(
                tmp_path / name, num_steps=1, log_period=1, non_finite=NonFinite("skip")
            )
            train.train(experiment)
        (rows[name],) = small_runs.metrics(tmp_path / name)
    assert rows["with"]["train/data/skipped"] == 1.0
    assert "train/data/loss" not in rows["with"]
    assert rows["without"]["train/data/skipped"] == 0.0
    assert rows["without"]["train/data/loss"] > 0


def test_too_many_skipped_in_a_row_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, range(1, 30))
    experiment = small_runs.sft(
        tmp_path, num_steps=30, log_period=30, non_finite=NonFinite("skip", most_in_a_row=3)
    )
    with pytest.raises(FloatingPointError, match=r"step 5: .* 3 steps in a row .*most_in_a_row"):
        train.train(experiment)
    assert len(list((tmp_path / "non_finite").glob("*.npz"))) == 4


def test_a_gradient_alone_may_be_infinite():
    """A loss that is finite where its gradient is not: sqrt at 0."""
    state = {"a": jnp.zeros(2)}
    grads, loss = jax.grad(lambda s: jnp.sqrt(s["a"].sum()))(state), jnp.float32(0)
    assert not np.isfinite(np.asarray(grads["a"])).any()
    metrics = {"loss": (loss, jnp.float32(1)), "target_tokens": (jnp.float32(3), jnp.float32(1))}
    old = train_step.TrainState(step=jnp.int32(4), params=state, opt_state=())
    new = old.replace(step=jnp.int32(5), params={"a": state["a"] - grads["a"]})
    kept, counted = train_step._unless_finite(jnp.bool_(False), old, new, metrics)
    assert int(kept.step) == 4
    assert np.asarray(kept.params["a"]).tolist() == [0, 0]
    assert [float(value) for value in counted["loss"]] == [0, 0]
    assert [float(value) for value in counted["target_tokens"]] == [3, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "ignore"}, r"NonFinite.action must be 'stop' or 'skip'.*NON_FINITE_ACTION"),
        ({"most_in_a_row": 0}, "NonFinite.most_in_a_row must be at least 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NonFinite(**settings)


@pytest.mark.parametrize(("what", "period"), [("data", 100), ("reward", 100), ("reward", 2)])
def test_a_failure_before_the_update_loses_no_step(
    what, period, tmp_path, monkeypatch, undisturbed
):
    """The run has saved, just now or when it was due, and goes on to what it would have been."""
    experiment = small_runs.sft(
        tmp_path, num_steps=6, log_period=6, checkpoints=Checkpoints(period, 10)
    )
    with monkeypatch.context() as patch:
        original = train.Trainer._update

        def update(self, state, batch, step, *arguments):
            if step == 4:
                raise RuntimeError("the judge does not answer")
            return original(self, state, batch, step, *arguments)

        if what == "reward":
            patch.setattr(train.Trainer, "_update", update)
        else:
            shard = small_runs.Partitioner.shard_batch

            def fail(self, batch):
                if 16 in np.asarray(batch.example_id):
                    raise RuntimeError("the judge does not answer")
                return shard(self, batch)

            patch.setattr(small_runs.Partitioner, "shard_batch", fail)
        with pytest.raises(RuntimeError, match="the judge does not answer") as error:
            train.train(experiment)
    assert "has saved the 4 steps before" in error.value.__notes__[0]
    host = json.loads((tmp_path / "checkpoint_4" / "host.json").read_text())
    assert host["host"]["position"] == 16
    _, whole = undisturbed
    small_runs.assert_equal_bits(train.train(experiment).state, whole.state)
