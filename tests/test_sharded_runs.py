"""Whole runs whose teacher and student lie differently, and runs over several slices."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints import load
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.devices.rules import STANDARD_RULES
from gkd_jax.experiment import Experiment, Student
from gkd_jax.experiment.gin_files import configuration
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes.train import train

STEPS, LEARNING_RATE = 5, 1e-2
# Teachers split along their feed-forward blocks' width, and replicated otherwise.
OWN_TABLE = tuple((name, "data" if name == "mlp" else axis) for name, axis in STANDARD_RULES)


def run(folder, teacher, **mesh):
    """Losses of every step, and the parameters at the end."""
    experiment = dataclasses.replace(
        small_runs.gkd(folder, teacher),
        student=Student(small_runs.model()),
        train_data=small_runs.data(batch_size=16),
        outputs=OutputMix(0.0),
        evaluation=None,
        num_steps=STEPS,
        num_microbatches=1,
        log_period=1,
        partitioner=Partitioner(**mesh),
    )
    train(experiment)
    losses = [row["train/data/loss"] for row in small_runs.metrics(folder)]
    return losses, load.load_params(folder, experiment.student.model.abstract_params())


@pytest.fixture(scope="module")
def equal_rules(tmp_path_factory, tiny_teacher):
    return run(tmp_path_factory.mktemp("equal") / "run", tiny_teacher)


@pytest.mark.parametrize(
    "mesh",
    [
        dict(teacher_rules="fsdp"),
        pytest.param(dict(rules="fsdp", num_slices=2), marks=pytest.mark.slow),
        pytest.param(dict(rules="fsdp", teacher_rules="standard"), marks=pytest.mark.slow),
        pytest.param(dict(teacher_rules=OWN_TABLE), marks=pytest.mark.slow),
        pytest.param(dict(teacher_rules="fsdp", num_slices=4), marks=pytest.mark.slow),
    ],
    ids=lambda mesh: "-".join(str(value)[:12] for value in mesh.values()),
)
def test_a_run_does_not_depend_on_where_things_lie(tmp_path, tiny_teacher, equal_rules, mesh):
    losses, params = run(tmp_path / "run", tiny_teacher, **mesh)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, equal_rules[0], rtol=1e-5)
    limit = 0.02 * STEPS * LEARNING_RATE
    chex.assert_trees_all_close(*map(jax.device_get, (params, equal_rules[1])), atol=limit, rtol=0)


def built(*bindings):
    names = ("MODEL_DIR", "VOCABULARY_PATH", "INITIAL_CHECKPOINT_PATH", "TEACHER_CHECKPOINT_PATH")
    config = configuration.parse(
        roots=(Experiment,),
        gin_files=["gin_configs/wmt_ende.gin"],
        bindings=[*(f"{name} = '/none'" for name in names), *bindings],
    )
    return config.build().partitioner


def test_rules_of_both_are_set_in_gin():
    assert built().for_teacher().rules == "standard"
    assert built("PARTITIONING_RULES = 'fsdp'").for_teacher().rules == "fsdp"
    partitioner = built("TEACHER_PARTITIONING_RULES = 'fsdp'")
    assert (partitioner.rules, partitioner.for_teacher().rules) == ("standard", "fsdp")
    # A table, as a tuple or a list of pairs.
    for table in (OWN_TABLE, list(map(list, OWN_TABLE))):
        partitioner = built(f"PARTITIONING_RULES = {table!r}")
        assert partitioner.rule_table == partitioner.for_teacher().rule_table == OWN_TABLE
        hash(partitioner)  # What is jitted is kept by it.
    with pytest.raises(ValueError, match=r"Partitioner\.rules .* got 'pipe'"):
        built("PARTITIONING_RULES = (('embed', 'pipe'),)")
