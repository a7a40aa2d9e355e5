"""T5X's trainer, extended by a teacher and by training on the student's own outputs."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp
import t5x.trainer
from absl import logging
from jax.sharding import PartitionSpec

from gkd_jax.checkpoints.load import load_params
from gkd_jax.common.array_types import Array, Int, Params
from gkd_jax.distillation.rollout import Rollout, sample_outputs
from gkd_jax.models.t5 import T5
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import final_weights
from gkd_jax.t5x_trainer.batches import T5XBatch, from_batch, to_batch
from gkd_jax.t5x_trainer.model import FINAL_WEIGHTS, GkdModel
from gkd_jax.t5x_trainer.programs import GkdStep, ModelWithTeacher, ProgramWithTeacher

# Folded into a step's key to get the key of its samples. T5X derives the keys of dropout from the
# step's key too, and samples and dropout must not share random numbers.
_SAMPLE_STREAM = 0x73616D70


class GkdTrainer(t5x.trainer.Trainer):
    """T5X's trainer, extended by a teacher and by training on the student's own outputs.

    The teacher's parameters are sharded by the axis rules of T5X's partitioner. They are
    an argument of each step and each training evaluation. They are not donated, not differentiated
    and not saved in the run's checkpoints, and have no optimizer state.
    """

    def __init__(
        self,
        *args: Any,
        teacher_checkpoint: str,
        output_mix: OutputMix,
        rollout: Rollout,
        seed: int,
        **kwargs: Any,
    ) -> None:
        """Makes the trainer and restores the teacher.

        Args:
          *args: arguments of `t5x.trainer.Trainer`, whose model must be a `GkdModel`.
          teacher_checkpoint: T5X checkpoint (native or Orbax), or another format that `load_params`
            reads.
          output_mix: lambda, the share of steps on the student's own outputs.
          rollout: sampling of the student's outputs.
          seed: seed of the choice between the data's and the student's outputs. The choice
            depends on the seed and the step alone, so that it is the same on all hosts and after a
            restart.
          **kwargs: further arguments of `t5x.trainer.Trainer`.

        Raises:
          ValueError: the model is not a `GkdModel`, or a setting needs gkd_jax's own trainer.
          FileNotFoundError, CorruptCheckpointError: as in `load_params`.
        """
        _check_settings(output_mix, rollout)
        super().__init__(*args, **kwargs)
        if not isinstance(self._model, GkdModel):
            raise ValueError(
                f"GkdTrainer trains a GkdModel; got {type(self._model).__name__}. Set train.model "
                "to @t5x_trainer.GkdModel()."
            )
        self._output_mix, self._rollout, self._seed = output_mix, rollout, seed
        self._next_step = 0
        self.teacher_params = self._restore_teacher(teacher_checkpoint)

    @cached_property
    def _teacher_shardings(self) -> Any:
        rules = self._partitioner.logical_axis_rules
        axes = self._model.teacher.logical_axes()
        return nn.logical_to_mesh_sharding(axes, self._partitioner.mesh, rules)

    def _restore_teacher(self, checkpoint: str) -> Params:
        teacher: T5 = self._model.teacher
        # The compute dtype suffices, since the teacher's parameters are never updated.
        wanted = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, teacher.config.dtype, sharding=s),
            teacher.abstract_params(),
            self._teacher_shardings,
        )
        params = load_params(checkpoint, wanted)
        num_params = sum(array.size for array in jax.tree.leaves(params))
        logging.info(
            "Teacher: %s, %d parameters in %s.", checkpoint, num_params, teacher.config.dtype
        )
        return params

    def train(
        self, batch_iter: Iterator[Any], num_steps: int, start_step: int | None = None
    ) -> Any:
        """Trains like T5X's trainer, and counts steps on the host.

        The step number decides whether a step uses the data's or the student's outputs.
        """
        if start_step is None:
            start_step = int(self.train_state.step)
        self._next_step = start_step
        return super().train(batch_iter, num_steps, start_step=start_step)

    def _is_on_policy(self) -> bool:
        step, self._next_step = self._next_step, self._next_step + 1
        return self._output_mix.is_on_policy(step, seed=self._seed)

    @cached_property
    def _partitioned_train_step(self) -> GkdStep:
        fraction = self._output_mix.student_data_fraction
        return GkdStep(
            self._is_on_policy,
            on_data=None if fraction == 1 else self._make_update(on_policy=False),
            sample=None if fraction == 0 else self._make_sample(),
            on_samples=None if fraction == 0 else self._make_update(on_policy=True),
        )

    @cached_property
    def _partitioned_eval_step(self) -> ProgramWithTeacher:
        return self._with_teacher(t5x.trainer.eval_step, out_axis_resources=None)

    def _make_update(self, *, on_policy: bool) -> ProgramWithTeacher:
        """Returns T5X's update over microbatches.

        Loss weights are normalized over the whole batch, before it is split.
        """

        def update(model: ModelWithTeacher, train_state: Any, batch: T5XBatch) -> Any:
            reduction = self._model.objective.reduction
            weights = final_weights(to_batch(batch).loss_weights, reduction=reduction)
            train_state, metrics = t5x.trainer.train_with_lr(
                train_state,
                {**batch, FINAL_WEIGHTS: weights},
                learning_rate=self._learning_rate_fn(train_state.step),
                dropout_rng=self._get_step_rng(train_state.step),
                model=model,
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )
            share = jnp.array([float(on_policy)])
            metrics["on_policy_share"] = clu.metrics.Average.from_model_output(share)
            return train_state, metrics

        out = (self._train_state_axes, None)
        return self._with_teacher(update, out_axis_resources=out, donate_argnums=(0,))

    def _make_sample(self) -> Any:
        def sample(params: Params, step: Int[Array, ""], batch: T5XBatch) -> dict[str, Array]:
            key = jax.random.fold_in(self._get_step_rng(step), _SAMPLE_STREAM)
            sampled = sample_outputs(
                self._model.student,
                params,
                to_batch(batch),
                # T5X's keys are raw arrays.
                key=jax.random.wrap_key_data(key),
                rollout=self._rollout,
                eos_ids=self._model.eos_ids,
                pad_id=self._model.output_vocabulary.pad_id,
            )
            return from_batch(sampled)

        data = self._partitioner.data_partition_spec
        return self._partitioner.partition(
            sample,
            in_axis_resources=(self._train_state_axes.params, PartitionSpec(), data),
            out_axis_resources=data,
        )

    def _with_teacher(self, function: Callable[..., Any], **partition: Any) -> ProgramWithTeacher:
        """Partitions a function of `(model: ModelWithTeacher, train_state, batch)`."""

        def program(train_state: Any, teacher_params: Params, batch: T5XBatch) -> Any:
            model = ModelWithTeacher(self._model, teacher_params, self._partitioner.mesh)
            return function(model, train_state, batch)

        data = self._partitioner.data_partition_spec
        resources = (self._train_state_axes, self._teacher_shardings, data)
        partitioned = self._partitioner.partition(program, in_axis_resources=resources, **partition)
        return ProgramWithTeacher(partitioned, self.teacher_params)


def _check_settings(output_mix: OutputMix, rollout: Rollout) -> None:
    if output_mix.per_example:
        raise ValueError(
            "OutputMix.per_example must be False in T5X's trainer: the coin is a step's. Set it to "
            "False, or use gkd_jax's own trainer."
        )
    if rollout.teacher_assistance is not None:
        raise ValueError(
            "Rollout.teacher_assistance must be None in T5X's trainer; got "
            f"{type(rollout.teacher_assistance).__name__}. "
            "Remove it, or use gkd_jax's own trainer for a rollout with the teacher's help."
        )
