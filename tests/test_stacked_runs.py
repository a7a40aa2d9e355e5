"""Checkpoints with layers stacked or one by one serve models of either form; whole runs too."""

import dataclasses

import chex
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints import hf, load
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.checkpoints.save import save_params
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Evaluation, Export, Student
from gkd_jax.models import lora, stacking
from gkd_jax.models.lora import LoRA
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes.export import export
from gkd_jax.run_modes.train import train

DEEP = dict(num_encoder_layers=3, num_decoder_layers=2)


def deep(width=16, **changes):
    return small_runs.model(width, **DEEP | changes)


def abstract(model, partitioner, dtype=jnp.float32):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        model.abstract_params(),
        partitioner.param_shardings(model),
    )


@pytest.mark.parametrize("kind", ["params", "run"])
@pytest.mark.parametrize("stored_stacked", [False, True])
def test_either_form_is_read_as_the_other(tmp_path, kind, stored_stacked):
    partitioner = Partitioner(rules="fsdp")
    stored, wanted = deep(scan_layers=stored_stacked), deep(scan_layers=not stored_stacked)
    params = jax.device_get(jax.jit(stored.init)(jax.random.key(0)))
    path = tmp_path / kind
    if kind == "params":
        save_params(path, params)
    else:
        with CheckpointManager(path) as manager:
            manager.save(1, {"params": params})
    want = abstract(wanted, partitioner)
    load.check_compatible(path, want)
    got = load.load_params(path, want)
    turn = stacking.unstack if stored_stacked else stacking.stack
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(turn(params)))
    for leaf, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert leaf.sharding.is_equivalent_to(one.sharding, leaf.ndim)
    # Another depth is still refused, by the name that the checkpoint has.
    other = deep(num_decoder_layers=4, scan_layers=not stored_stacked)
    for read in (load.check_compatible, load.load_params):
        with pytest.raises(ValueError, match=r"does not fit: .*decoder/layers"):
            read(path, abstract(other, partitioner))


@pytest.mark.parametrize("name", ["t5_1_1", "gemma3"])
def test_a_hugging_face_checkpoint_is_read_into_a_loop_and_written_from_it(tmp_path, name):
    there = hf_models.save(name, tmp_path / "there")
    partitioner = Partitioner(model_parallelism=2)
    model = hf.hf_model(str(there), dtype="float32")
    loop = hf.hf_model(str(there), dtype="float32", scan_layers=True, remat_policy="full")
    one_by_one = load.load_params(there, abstract(model, partitioner))
    stacked = load.load_params(there, abstract(loop, partitioner))
    chex.assert_trees_all_equal(stacking.unstack(stacked), one_by_one)
    hf.write_hf_checkpoint(tmp_path / "a", model, one_by_one)
    hf.write_hf_checkpoint(tmp_path / "b", loop, stacked)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def load_state(path, wanted):
    with CheckpointManager(path, read_only=True) as manager:
        return manager.restore(wanted)


def test_a_base_is_known_again_in_either_form():
    params = jax.jit(deep().init)(jax.random.key(0))
    assert lora.fingerprint(params) == lora.fingerprint(stacking.stack(params))
    other = stacking.stack(jax.tree.map(lambda leaf: leaf + 1, params))
    assert lora.fingerprint(params) != lora.fingerprint(other)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep_teacher") / "run"
    train(small_runs.sft(folder, student=Student(deep(small_runs.TEACHER_WIDTH))))
    return folder


def run(model_dir, teacher, start, *, is_loop, **changes):
    how = dict(scan_layers=is_loop, remat_policy="full" if is_loop else "none")
    experiment = dataclasses.replace(
        small_runs.gkd(model_dir, teacher),
        student=Student(deep(**how), str(start)),
        teacher=Teacher(deep(small_runs.TEACHER_WIDTH, **how), str(teacher)),
        outputs=OutputMix(0.0), num_steps=6, log_period=1,
        evaluation=Evaluation(small_runs.data("validation"), period=6),
    )  # fmt: skip
    experiment = dataclasses.replace(experiment, **changes)
    train(experiment)
    return experiment, [row for row in small_runs.metrics(model_dir) if "train/data/loss" in row]


def test_a_run_of_stacked_layers_is_that_of_one_by_one(tmp_path, teacher):
    """From one student, checkpoint and teacher; and its export is that of one by one."""
    start = tmp_path / "start"
    save_params(start, jax.jit(deep().init)(jax.random.key(5)))
    _, rows = run(tmp_path / "one", teacher, start, is_loop=False)
    loop, loop_rows = run(tmp_path / "loop", teacher, start, is_loop=True)
    assert len(rows) == len(loop_rows) == 6
    for row, loop_row in zip(rows, loop_rows, strict=True):
        np.testing.assert_allclose(row["train/data/loss"], loop_row["train/data/loss"], rtol=1e-5)
    ours = load.load_params(tmp_path / "loop", deep(scan_layers=True).abstract_params())
    theirs = load.load_params(tmp_path / "one", deep().abstract_params())
    limit = 0.02 * 6 * 1e-2
    chex.assert_trees_all_close(stacking.unstack(ours), theirs, atol=limit, rtol=0)
    for form in ("hf", "t5x"):
        out = str(tmp_path / form)
        export(dataclasses.replace(loop, export=Export(output=out, dtype="float32", format=form)))
        exported = load.load_params(out, deep().abstract_params())
        chex.assert_trees_all_equal(exported, stacking.unstack(ours))
    # It goes on in its own form alone, and a message says which.
    other = {"params": deep().abstract_params()}
    with pytest.raises(ValueError, match=r"layers are stacked.* Set scan_layers .*to True"):
        load_state(tmp_path / "loop", other)


@pytest.mark.slow
def test_a_run_of_stacked_layers_goes_on_as_if_it_had_not_stopped(tmp_path, teacher, monkeypatch):
    start = tmp_path / "start"
    save_params(start, jax.jit(deep().init)(jax.random.key(5)))
    options = dict(is_loop=True, outputs=OutputMix(0.5))
    run(tmp_path / "whole", teacher, start, **options)
    with monkeypatch.context() as patch:
        small_runs.stop_at(patch, 5)
        with pytest.raises(small_runs.Stopped):
            run(tmp_path / "cut", teacher, start, **options)
    run(tmp_path / "cut", teacher, start, **options)
    model = deep(scan_layers=True).abstract_params()
    small_runs.assert_equal_bits(
        load.load_params(tmp_path / "whole", model), load.load_params(tmp_path / "cut", model)
    )


@pytest.mark.slow
def test_adapters_on_stacked_layers_train_and_are_exported(tmp_path, teacher):
    student = LoRA(deep(scan_layers=True), rank=4, alpha=8.0, base_dtype="float32")
    start = tmp_path / "start"
    save_params(start, jax.jit(deep().init)(jax.random.key(5)))
    experiment, rows = run(
        tmp_path / "run", teacher, start, is_loop=True, student=Student(student, str(start))
    )
    assert all(np.isfinite(row["train/data/loss"]) for row in rows)
    for adapters in (False, True):
        output = tmp_path / f"exported_{adapters}"
        settings = Export(output=str(output), dtype="float32", adapters=adapters)
        export(dataclasses.replace(experiment, export=settings))
        assert any(path.suffix == ".safetensors" for path in output.iterdir())
