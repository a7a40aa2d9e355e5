"""Replay: the buffer against a plain one, what is drawn when, and runs that use and resume it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_runs import Stopped, stop_at

from gkd_jax.checkpoints import layout
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.common.batch import Batch
from gkd_jax.data.pipeline import Dataset
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import replay
from gkd_jax.distillation.replay import FallingRefresh, Replay, ReplayBuffer
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.experiment import prepare
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.run_modes import train
from gkd_jax.training import parameters

ROWS = 4


def make_outputs(step: int) -> Batch:
    """A batch in which every number tells step and row."""
    number = 100 * step + np.arange(ROWS, dtype=np.int32)[:, None]
    return Batch(
        inputs=np.repeat(number, 3, 1),
        inputs_mask=np.arange(3) < 1 + number % 3,
        targets=np.repeat(number, 5, 1) + 1,
        loss_weights=(np.arange(5) < 1 + number % 5).astype(np.float32),
        example_id=number[:, 0],
    )


def make_buffer(settings: Replay, partitioner: Partitioner, *, seed: int = 3) -> ReplayBuffer:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_outputs(0))
    return ReplayBuffer(settings, shapes, partitioner, seed=seed)


@pytest.mark.parametrize("data_parallelism", [1, 4])
def test_buffer_is_a_plain_ring(data_parallelism):
    """Against a deque of NumPy batches; outputs come with their own prompts and weights."""
    partitioner = Partitioner(
        data_parallelism=data_parallelism, devices=tuple(jax.devices()[:data_parallelism])
    )
    buffer = make_buffer(Replay(3 * ROWS + 1, refresh=0.5), partitioner)
    plain: collections.deque = collections.deque(maxlen=3)
    written = (0, 1, 5, 6, 9, 12, 13)
    for step in written:
        assert not (len(plain) < 3 and buffer.is_used(step))
        buffer.add(partitioner.shard_batch(make_outputs(step)), step)
        plain.append((step, make_outputs(step)))
        if len(plain) < 3:
            continue
        # The oldest is overwritten first: slot s holds the newest write w with w % 3 == s.
        newest = written.index(step)
        by_slot = {(newest - back) % 3: plain[-1 - back] for back in range(3)}
        got, (total, weight) = buffer.draw(step + 1)
        slots = buffer.draw_slots(step + 1)
        for row, slot in enumerate(slots):
            expected = by_slot[int(slot)][1]
            for field in dataclasses.fields(Batch):
                if getattr(expected, field.name) is not None:
                    np.testing.assert_array_equal(
                        getattr(got, field.name)[row], getattr(expected, field.name)[row]
                    )
        assert total == sum(step + 1 - by_slot[int(slot)][0] for slot in slots)
        assert weight == ROWS
        assert got.targets.sharding.spec[0] == "data"


def test_nothing_is_sent_between_devices():
    """A row of the buffer lies where that row of every batch does."""
    partitioner = Partitioner(data_parallelism=4, devices=tuple(jax.devices()[:4]))
    buffer = make_buffer(Replay(3 * ROWS), partitioner)
    outputs = partitioner.shard_batch(make_outputs(0))
    slots = np.zeros(ROWS, np.int32)
    for lowered in (
        replay._jit_draw(partitioner).lower(buffer.arrays, slots),
        replay._jit_write(partitioner).lower(buffer.arrays, outputs, np.int32(0)),
    ):
        program = lowered.compile().as_text()
        assert not any(f"{name}(" in program for name in ("all-gather", "all-reduce", "all-to-all"))


def test_a_checkpoint_names_sources_as_earlier_versions_did():
    """Buffers with source ids were saved when the field was called `component`."""
    rows = dataclasses.replace(make_outputs(7), source_id=np.arange(ROWS, dtype=np.int32))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
    buffers = [ReplayBuffer(Replay(ROWS), shapes, small_runs.one_device(), seed=3)
               for _ in range(2)]  # fmt: skip
    buffers[0].add(rows, 0)
    saved = buffers[0].attach(dataclasses.make_dataclass("State", [])())["replay"]
    assert "component" in layout.shapes_of(saved)
    assert "source_id" not in layout.shapes_of(saved)
    buffers[1].restore(saved, buffers[0].host_part())
    drawn, _ = buffers[1].draw(1)
    np.testing.assert_array_equal(drawn.source_id, rows.source_id)


def test_draws_are_functions_of_seed_and_step():
    """So hosts agree and a resumed run draws the same; steps, seeds and rows differ."""
    settings = Replay(50 * ROWS)
    one, same = (make_buffer(settings, small_runs.one_device()) for _ in range(2))
    other = make_buffer(settings, small_runs.one_device(), seed=4)
    draws = np.stack([one.draw_slots(step) for step in range(200)])
    np.testing.assert_array_equal(draws[::-1], [same.draw_slots(s) for s in reversed(range(200))])
    assert len(np.unique(draws, axis=0)) == 200
    assert not np.array_equal(draws[0], other.draw_slots(0))
    # Uniform over the slots: chi-squared with 49 degrees of freedom, mean 49, deviation 9.9.
    counts = np.bincount(draws.ravel(), minlength=50)
    assert ((counts - 16) ** 2 / 16).sum() < 49 + 5 * 9.9


def test_share_of_new_samples():
    tossed = [Replay(8, refresh=0.3).is_refreshed(step, seed=0) for step in range(4000)]
    assert abs(np.mean(tossed) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    for refresh, expected in ((0.0, False), (1.0, True)):
        assert {Replay(8, refresh=refresh).is_refreshed(s, seed=0) for s in range(100)} == {
            expected
        }
    falling = FallingRefresh(num_steps=4)
    assert [falling(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert Replay(8, refresh=falling).is_refreshed(0, seed=0)
    assert not Replay(8, refresh=falling).is_refreshed(4, seed=0)


def gkd(model_dir, teacher, **changes):
    """On-policy at every step; two rollouts are kept, most steps use them again."""
    settings = {
        "outputs": OutputMix(1.0),
        "replay": Replay(2 * small_runs.BATCH_SIZE, refresh=0.4),
        "evaluation": None,
        "log_period": 1,
    }
    return small_runs.gkd(model_dir, teacher, **settings | changes)


@pytest.fixture(scope="module")
def replay_run(tiny_teacher, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("replay") / "run"
    return model_dir, train.train(gkd(model_dir, tiny_teacher))


@pytest.mark.pitfall(43)
def test_resumed_run_with_replay_is_the_uninterrupted_one(
    replay_run, tiny_teacher, tmp_path, monkeypatch
):
    """Stopped at step 8, saved at 5; the buffer goes on, bit for bit, and so do the metrics."""
    whole_dir, whole = replay_run
    experiment = gkd(tmp_path / "parts", tiny_teacher)
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Stopped):
            train.train(experiment)
    resumed = train.train(experiment)
    small_runs.assert_equal_bits(resumed.state, whole.state)
    assert small_runs.metrics(tmp_path / "parts") == small_runs.metrics(whole_dir)
    saved = []
    for folder in (whole_dir, tmp_path / "parts"):
        trainer = train.Trainer(experiment, Dataset(experiment.train_data))
        with CheckpointManager(folder, read_only=True) as manager:
            state, host, _ = manager.restore(trainer.abstract_state, step=12)
        saved.append((state["replay"], host["replay"]))
    small_runs.assert_equal_bits(saved[0][0], saved[1][0])
    assert saved[0][1] == saved[1][1]
    # Something was drawn after the resumption from what was sampled before it.
    ages = {row["step"]: row["train/replay/staleness"] for row in small_runs.metrics(whole_dir)
            if "train/replay/staleness" in row}  # fmt: skip
    assert any(step > 6 and step - 1 - age < 5 for step, age in ages.items()), ages


def test_steps_sample_until_the_buffer_is_full_and_by_the_coin_then(replay_run):
    model_dir, _ = replay_run
    settings = Replay(2 * small_runs.BATCH_SIZE, refresh=0.4)
    kinds, kept = [], [0, 0]
    rows = small_runs.metrics(model_dir)
    for step, row in enumerate(rows):
        assert row["step"] == step + 1
        new = step < 2 or settings.is_refreshed(step, seed=0)
        kinds.append(new)
        assert ("train/on_policy/loss" in row, "train/replay/loss" in row) == (new, not new)
        assert ("train/rollout/output_length" in row) == new
        if new:
            kept[(sum(kinds) - 1) % 2] = step
        else:
            generator_slots = make_buffer(
                dataclasses.replace(settings, capacity=2 * ROWS), small_runs.one_device(), seed=0
            ).draw_slots(step)
            expected = np.mean([step - kept[slot] for slot in generator_slots])
            assert row["train/replay/staleness"] == expected
    assert 0 < sum(kinds) < len(kinds)


def test_parameters_of_a_run_with_replay_load_as_those_of_any(replay_run, tiny_teacher):
    model_dir, result = replay_run
    student = parameters.student_to_use(gkd(model_dir, tiny_teacher))
    small_runs.assert_equal_bits(student.params, result.state.params)


def test_a_buffer_that_is_always_refreshed_changes_nothing(tiny_teacher, tmp_path):
    states = []
    always = Replay(small_runs.BATCH_SIZE, refresh=1.0)
    for name, settings in (("none", None), ("always", always)):
        experiment = gkd(tmp_path / name, tiny_teacher, replay=settings, num_steps=4)
        states.append(train.train(experiment).state)
    small_runs.assert_equal_bits(*states)


@pytest.mark.pitfall(50)
def test_replayed_steps_draw_other_outputs_and_other_noise(tiny_teacher, tmp_path, monkeypatch):
    """With a student that stays as it is, what each step trains on and its dropout key differ."""
    seen, keys = [], []
    original = train.Trainer.step

    def step(self, state, batch, step):
        def keep(state, teacher_params, batch, key, frozen):
            seen.append(np.asarray(batch.targets).tobytes())
            keys.append(jax.random.key_data(key).tobytes())
            one = jnp.float32(1)
            return state, {"target_tokens": (one, one), "non_finite": (0 * one, one)}

        self.step_fn = self.on_policy_step_fn = keep
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    settings = Replay(8 * small_runs.BATCH_SIZE, refresh=0.0)
    train.train(gkd(tmp_path, tiny_teacher, replay=settings, num_steps=16))
    assert len(set(keys)) == 16
    # Eight samples, then eight draws of 4096 that there are.
    assert len(set(seen)) == 16


BAD = {
    "capacity below a batch": (
        {"replay": Replay(3)}, r"Replay.capacity must hold .* got 3, and 4 outputs a rollout"
    ),
    "capacity below the samples": (
        {"replay": Replay(7), "rollout": Rollout(num_samples=2)}, "got 7, and 8 outputs a rollout"
    ),
    "never full": ({"replay": Replay(48)}, r"no output is ever used again; got 48, and 12 steps"),
    "supervised": (
        {"outputs": OutputMix(0.0)}, r"Experiment.replay takes the place .* above 0"
    ),
    "coins of examples": (
        {"outputs": OutputMix(0.5, per_example=True)}, r"per_example to False"
    ),
    "an estimate": (
        {"objective": Objective(SampledReverseKL())}, "draws alone and now; .* Experiment.replay"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_buffer_that_cannot_be_used_is_refused(case, tiny_teacher, tmp_path):
    changes, message = BAD[case]
    experiment = gkd(tmp_path, tiny_teacher, **changes)
    with pytest.raises(ConfigurationError, match=message):
        prepare.prepare(experiment, run_mode="train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "Replay.capacity must be a whole number from 1 on; got 0"),
        ({"capacity": 2.5}, "Replay.capacity must be a whole number"),
        ({"refresh": 1.5}, r"Replay.refresh must be a probability .* got 1.5"),
        ({"refresh": -0.1}, r"Replay.refresh must be a probability .* got -0.1"),
        ({"refresh": FallingRefresh}, r"@FallingRefresh\(\) with brackets"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Replay(**settings)


def test_a_schedule_that_leaves_its_range_is_refused():
    with pytest.raises(ValueError, match=r"Replay.refresh must be a probability .* got 2"):
        Replay(8, refresh=lambda step: 2.0).is_refreshed(0, seed=0)
    with pytest.raises(ValueError, match=r"FallingRefresh.num_steps must be a whole number"):
        FallingRefresh(0)


def test_a_checkpoint_without_a_buffer_does_not_fit(tiny_teacher, tmp_path):
    train.train(gkd(tmp_path, tiny_teacher, replay=None, num_steps=4))
    with pytest.raises(ValueError, match=r"replay/inputs .* is missing"):
        train.train(gkd(tmp_path, tiny_teacher, num_steps=6))
