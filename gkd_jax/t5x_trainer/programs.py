"""Jitted functions with the methods that T5X's trainer uses to lower, compile and call them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gkd_jax.common.array_types import Array, Params
from gkd_jax.common.mesh_axes import use_mesh_axes
from gkd_jax.devices.mesh import axes_of
from gkd_jax.t5x_trainer.batches import T5XBatch
from gkd_jax.t5x_trainer.model import GkdModel


@dataclasses.dataclass(frozen=True)
class ModelWithTeacher:
    """The model with the teacher's parameters, for T5X's step and evaluation functions.

    An instance exists only while one of these functions is traced. Its `teacher_params`
    are tracers, so that the parameters become an argument of the compiled program, not a constant
    in it.
    """

    model: GkdModel
    teacher_params: Params
    mesh: jax.sharding.Mesh

    def loss_fn(self, params: Params, batch: T5XBatch, dropout_rng: Array | None) -> Any:
        """Calls `GkdModel.loss_fn` within the mesh, so that the fused loss is sharded by rows."""
        mesh = self.mesh.abstract_mesh
        with jax.sharding.use_abstract_mesh(mesh), use_mesh_axes(axes_of(self.mesh)):
            return self.model.loss_fn(params, batch, dropout_rng, self.teacher_params)

    def eval_fn(self, params: Params, batch: T5XBatch) -> Any:
        """Computes the objective without dropout."""
        return self.loss_fn(params, batch, None)


@dataclasses.dataclass(frozen=True)
class ProgramWithTeacher:
    """Adds the teacher's parameters to the arguments with which T5X calls a partitioned function.

    T5X calls an instance with `(train_state, batch)`; the instance calls the partitioned function
    with `(train_state, teacher_params, batch)`. T5X's `partitioner.compile` calls `lower`, which
    returns a lowered function, and then `compile`, which returns a compiled one.
    """

    program: Any
    teacher_params: Params

    def __call__(self, train_state: Any, batch: Any) -> Any:
        return self.program(train_state, self.teacher_params, batch)

    def lower(self, train_state: Any, batch: Any) -> "ProgramWithTeacher":
        lowered = self.program.lower(train_state, self.teacher_params, batch)
        return dataclasses.replace(self, program=lowered)

    def compile(self) -> "ProgramWithTeacher":
        return dataclasses.replace(self, program=self.program.compile())


@dataclasses.dataclass(frozen=True)
class GkdStep:
    """One step of GKD's Algorithm 1: choose the source of the outputs, sample if needed, update.

    T5X lowers and compiles a step in the same way as a `ProgramWithTeacher`.

    Attributes:
      is_on_policy: function that decides, on the host, whether the next step uses the student's
        outputs.
      on_data: update on the data's outputs; None if lambda is 1.
      sample: maps `(params, step, batch)` to a batch with the student's outputs; None if lambda
        is 0.
      on_samples: update on the batch that `sample` returns; None if lambda is 0.
    """

    is_on_policy: Callable[[], bool]
    on_data: Any
    sample: Any
    on_samples: Any

    def __call__(self, train_state: Any, batch: Any) -> Any:
        if not self.is_on_policy():
            return self.on_data(train_state, batch)
        sampled = self.sample(train_state.params, train_state.step, batch)
        return self.on_samples(train_state, sampled)

    def lower(self, train_state: Any, batch: Any) -> "GkdStep":
        on_data = self.on_data and self.on_data.lower(train_state, batch)
        if self.sample is None:
            return dataclasses.replace(self, on_data=on_data)
        sample = self.sample.lower(train_state.params, train_state.step, batch)
        # The shapes of samples and of the data's outputs may differ.
        on_samples = self.on_samples.lower(train_state, sample.out_info)
        return GkdStep(self.is_on_policy, on_data, sample, on_samples)

    def compile(self) -> "GkdStep":
        stages = (self.on_data, self.sample, self.on_samples)
        return GkdStep(self.is_on_policy, *(stage and stage.compile() for stage in stages))
