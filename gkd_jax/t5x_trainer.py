"""GKD in T5X's own trainer: a model class and a trainer class for `t5x.train.train()`.

T5X reads the data, restores and saves the student, makes the updates and evaluates; from here come
the objective, the rollout, the coin, and a teacher whose parameters are an argument of T5X's
partitioned step. `gin_configs/t5x/gkd.gin` sets both classes; docs/t5x.md has the commands.

The only module that imports T5X, which is on no package index; nothing else imports this one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp
import t5x.metrics
import t5x.trainer
from absl import logging
from jax.sharding import PartitionSpec
from t5x import decoding, models
from t5x.examples.t5 import network

from gkd_jax.checkpoints.load import load_params
from gkd_jax.common.array_types import Array, Float, Int, Params
from gkd_jax.common.batch import Batch
from gkd_jax.common.mesh_axes import use_mesh_axes
from gkd_jax.devices.mesh import axes_of
from gkd_jax.distillation.loss import make_loss_fn
from gkd_jax.distillation.rollout import Rollout, rollout_metrics, sample_outputs
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights

T5XBatch = Mapping[str, Array]
"""T5X's names of features to arrays, as `seqio.EncDecFeatureConverter` makes them."""

# The weights of the whole batch, in the step alone: there before T5X splits it into microbatches.
_FINAL_WEIGHTS = "gkd_final_weights"

# Keeps the keys of samples apart from those of dropout, which T5X derives from the step's key.
_SAMPLE_STREAM = 0x73616D70


def t5_of(module: nn.Module, *, setting: str) -> T5:
    """Our T5 with the sizes, and so with the parameters, of a network of T5X's.

    Args:
      module: a `t5x.examples.t5.network.Transformer`.
      setting: what to call it in an error.

    Raises:
      ValueError: it is another kind of network.
    """
    if not isinstance(module, network.Transformer):
        raise ValueError(
            f"{setting} must be a t5x.examples.t5.network.Transformer; got "
            f"{type(module).__module__}.{type(module).__name__}. Set {setting} to "
            "@network.Transformer(): other networks of T5X have other parameters."
        )
    sizes = module.config
    # How an output starts is no setting of T5X's, which shifts in a 0, and its minimal network has
    # its layers one by one.
    ours = {"dtype", "decoder_start_id", "scan_layers", "remat_policy"}
    names = {field.name for field in dataclasses.fields(T5Config)} - ours
    same = {name: getattr(sizes, name) for name in names}
    return T5(T5Config(**same, dtype=jnp.dtype(sizes.dtype).name))


def to_batch(batch: T5XBatch) -> Batch:
    """T5X's features as a `Batch`.

    They have no ids of examples: an example is told from others by its row in the global batch.

    Raises:
      ValueError: several examples are packed into a row.
    """
    packed = sorted(name for name in batch if name.endswith("_segment_ids"))
    if packed:
        raise ValueError(
            "a row of the batch must be one example, to which the student can write its own "
            f"output; got packed rows, with {', '.join(packed)}. Set utils.DatasetConfig.pack = "
            "False for train and train_eval."
        )
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    loss_weights = batch["decoder_loss_weights"].astype(jnp.float32)
    # An evaluation completes its last batch with rows of zeros.
    is_filler = ~jnp.any(loss_weights > 0, axis=1)
    return Batch(
        inputs=inputs,
        inputs_mask=inputs > 0,
        targets=targets,
        loss_weights=loss_weights,
        example_id=jnp.where(is_filler, -1, jnp.arange(targets.shape[0], dtype=jnp.int32)),
    )


def from_batch(batch: Batch) -> dict[str, Array]:
    """A `Batch` as T5X's features; the decoder's inputs are its targets, moved by one."""
    return {
        "encoder_input_tokens": batch.inputs,
        "decoder_input_tokens": jnp.pad(batch.targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": batch.targets,
        "decoder_loss_weights": batch.loss_weights,
    }


class GkdModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder, whose loss compares it with a teacher.

    Initialisation, decoding and scoring are T5X's, with its network; the loss is that of
    `gkd_jax.distillation.train_step`, of our T5 on the same parameters. The teacher's parameters
    are an argument of the loss: this class has its network only.
    """

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: Any,
        output_vocabulary: Any,
        optimizer_def: Any,
        *,
        teacher_module: nn.Module,
        objective: Objective,
        decode_fn: Callable[..., Any] = decoding.beam_search,
        feature_converter_cls: Callable[..., Any] | None = None,
        default_decoder_params: Any = None,
    ) -> None:
        """Makes the model.

        Args:
          module: the student's network, a `t5x.examples.t5.network.Transformer`.
          input_vocabulary, output_vocabulary: of seqio, as in T5X; the latter's end of sequence
            ends the student's samples.
          optimizer_def: an optimizer of T5X's, for the student.
          teacher_module: the teacher's network, with the student's number of entries.
          objective: divergence, temperatures, reduction and z-loss.
          decode_fn, default_decoder_params: how T5X decodes to evaluate; samples are the trainer's.
          feature_converter_cls: makes the features of `seqio.EncDecFeatureConverter`.

        Raises:
          ValueError: a network is of another kind, the output layers differ, or the objective is
            not between a student and a teacher alone.
        """
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            default_decoder_params=default_decoder_params,
        )
        self.objective = objective
        self.student = t5_of(module, setting="GkdModel.module")
        self.teacher = t5_of(teacher_module, setting="GkdModel.teacher_module")
        if self.student.vocab_size != self.teacher.vocab_size:
            raise ValueError(
                "teacher and student must have output layers of one size; got "
                f"{self.teacher.vocab_size} and {self.student.vocab_size}. Set "
                "network.T5Config.vocab_size to the same number for both."
            )
        divergence = objective.divergence
        if divergence.needs_advantages or not divergence.needs_teacher:
            raise ValueError(
                "GkdModel.objective must compare the student with a teacher, and need no reward; "
                f"got {type(divergence).__name__}. Choose a divergence such as ForwardKL; T5X's "
                "EncoderDecoderModel fine-tunes, and rewards need gkd_jax's own trainer."
            )
        self._loss_fn = make_loss_fn(self.student, self.teacher, objective)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends an output: the vocabulary's end of sequence, where it has one."""
        eos_id = self.output_vocabulary.eos_id
        return () if eos_id is None else (int(eos_id),)

    def loss_fn(
        self,
        params: Params,
        batch: T5XBatch,
        dropout_rng: Array | None,
        teacher_params: Params | None = None,
    ) -> tuple[Float[Array, ""], dict[str, clu.metrics.Metric]]:
        """The objective on a batch, and T5X's kind of metrics of it.

        Args:
          params: the student's, which the gradient is of.
          batch: features; the step adds the weights of the batch that this is a part of.
          dropout_rng: key of the student's dropout; none without it. The teacher never drops out.
          teacher_params: the teacher's, which get no gradient.

        Returns:
          The loss (float32), and metrics.

        Raises:
          ValueError: there are no parameters of the teacher, or rows are packed.
        """
        if teacher_params is None:
            raise ValueError(
                "GkdModel.loss_fn needs the teacher's parameters; got none. Set "
                "train.trainer_cls = @t5x_trainer.GkdTrainer, which gives them to each step."
            )
        ours = to_batch(batch)
        weights = batch.get(_FINAL_WEIGHTS)
        if weights is None:
            weights = final_weights(ours.loss_weights, reduction=self.objective.reduction)
        loss, per_token = self._loss_fn(params, teacher_params, ours, weights, dropout_rng)
        return loss, self._metrics_of(loss, per_token, ours)

    def _metrics_of(
        self, loss: Float[Array, ""], per_token: Float[Array, "B T"], batch: Batch
    ) -> dict[str, clu.metrics.Metric]:
        """Metrics that add up over microbatches and steps."""
        num_tokens = jnp.sum(batch.loss_weights)
        rate = t5x.metrics.TimeRate.from_model_output
        metrics = {
            # Parts of a batch add up to its loss, so this is a mean over steps.
            "loss": t5x.metrics.AveragePerStep(total=loss),
            "loss_per_token": clu.metrics.Average(
                total=jnp.sum(batch.loss_weights * per_token), count=num_tokens
            ),
            "timing/seconds": t5x.metrics.Time(),
            "timing/steps_per_second": t5x.metrics.StepsPerTime.from_model_output(),
            "timing/seqs_per_second": rate(numerator=jnp.float32(batch.targets.shape[0])),
            "timing/target_tokens_per_second": rate(numerator=num_tokens),
        }
        for name, (total, count) in rollout_metrics(batch, eos_ids=self.eos_ids).items():
            metrics[name] = clu.metrics.Average(total=total, count=count)
        return metrics


@dataclasses.dataclass(frozen=True)
class _WithTeacher:
    """The model as T5X's step and evaluation call it, while they are traced.

    `teacher_params` are then an argument of the function that is traced, and no constant of it.
    """

    model: GkdModel
    teacher_params: Params
    mesh: jax.sharding.Mesh

    def loss_fn(self, params: Params, batch: T5XBatch, dropout_rng: Array | None) -> Any:
        """As `GkdModel.loss_fn`; the loss runs through the rows of each part of the mesh."""
        mesh = self.mesh.abstract_mesh
        with jax.sharding.use_abstract_mesh(mesh), use_mesh_axes(axes_of(self.mesh)):
            return self.model.loss_fn(params, batch, dropout_rng, self.teacher_params)

    def eval_fn(self, params: Params, batch: T5XBatch) -> Any:
        """The objective without dropout."""
        return self.loss_fn(params, batch, None)


@dataclasses.dataclass(frozen=True)
class _TaughtProgram:
    """A partitioned function `(train_state, teacher_params, batch)` that T5X calls without teacher.

    It goes through the stages of `partitioner.compile`: partitioned, lowered, compiled.
    """

    program: Any
    teacher_params: Params

    def __call__(self, train_state: Any, batch: Any) -> Any:
        return self.program(train_state, self.teacher_params, batch)

    def lower(self, train_state: Any, batch: Any) -> "_TaughtProgram":
        lowered = self.program.lower(train_state, self.teacher_params, batch)
        return dataclasses.replace(self, program=lowered)

    def compile(self) -> "_TaughtProgram":
        return dataclasses.replace(self, program=self.program.compile())


@dataclasses.dataclass(frozen=True)
class _GkdStep:
    """A step of Algorithm 1: the coin, perhaps the rollout, the update; at each of those stages.

    Attributes:
      is_on_policy: tosses the coin of the next step, on the host.
      on_data: the update on the data's outputs; None where lambda is 1.
      sample: `(params, step, batch)` to the batch of the student's outputs; None where it is 0.
      on_samples: the update on those; None where it is 0.
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

    def lower(self, train_state: Any, batch: Any) -> "_GkdStep":
        on_data = self.on_data and self.on_data.lower(train_state, batch)
        if self.sample is None:
            return dataclasses.replace(self, on_data=on_data)
        sample = self.sample.lower(train_state.params, train_state.step, batch)
        # Samples may be of other shapes than the data's outputs.
        on_samples = self.on_samples.lower(train_state, sample.out_info)
        return _GkdStep(self.is_on_policy, on_data, sample, on_samples)

    def compile(self) -> "_GkdStep":
        stages = (self.on_data, self.sample, self.on_samples)
        return _GkdStep(self.is_on_policy, *(stage and stage.compile() for stage in stages))


class GkdTrainer(t5x.trainer.Trainer):
    """T5X's trainer with a teacher and with the student's own outputs.

    The teacher's parameters lie as T5X's partitioner lays out a model of its sizes. Each step and
    each training evaluation takes them as an argument; they are not donated, not differentiated,
    have no optimizer state, and are in no checkpoint of the run.
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
        """Restores the teacher.

        Args:
          *args: those of `t5x.trainer.Trainer`, whose model must be a `GkdModel`.
          teacher_checkpoint: T5X's, native or Orbax, or another that `load_params` reads.
          output_mix: lambda, the share of steps on the student's own outputs.
          rollout: how those are sampled.
          seed: of the coin, which is a function of it and of the step, on all hosts and after a
            restart.
          **kwargs: as *args.

        Raises:
          ValueError: the model is another, or a setting needs gkd_jax's own trainer.
          FileNotFoundError, CorruptCheckpointError: as `load_params`.
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
        # In its compute dtype: nothing is ever added to it.
        wanted = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, teacher.config.dtype, sharding=s),
            teacher.abstract_params(),
            self._teacher_shardings,
        )
        params = load_params(checkpoint, wanted)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        logging.info(
            "Teacher: %s, %d parameters in %s.", checkpoint, num_params, teacher.config.dtype
        )
        return params

    def train(
        self, batch_iter: Iterator[Any], num_steps: int, start_step: int | None = None
    ) -> Any:
        """As in T5X, which counts steps on the host; so do the coins."""
        if start_step is None:
            start_step = int(self.train_state.step)
        self._next_step = start_step
        return super().train(batch_iter, num_steps, start_step=start_step)

    def _toss(self) -> bool:
        step, self._next_step = self._next_step, self._next_step + 1
        return self._output_mix.is_on_policy(step, seed=self._seed)

    @cached_property
    def _partitioned_train_step(self) -> _GkdStep:
        fraction = self._output_mix.student_data_fraction
        return _GkdStep(
            self._toss,
            on_data=None if fraction == 1 else self._make_update(on_policy=False),
            sample=None if fraction == 0 else self._make_sample(),
            on_samples=None if fraction == 0 else self._make_update(on_policy=True),
        )

    @cached_property
    def _partitioned_eval_step(self) -> _TaughtProgram:
        return self._taught(t5x.trainer.eval_step, out_axis_resources=None)

    def _make_update(self, *, on_policy: bool) -> _TaughtProgram:
        """T5X's update, with its microbatches; the weights are those of the whole batch."""

        def update(model: _WithTeacher, train_state: Any, batch: T5XBatch) -> Any:
            reduction = self._model.objective.reduction
            weights = final_weights(to_batch(batch).loss_weights, reduction=reduction)
            train_state, metrics = t5x.trainer.train_with_lr(
                train_state,
                {**batch, _FINAL_WEIGHTS: weights},
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
        return self._taught(update, out_axis_resources=out, donate_argnums=(0,))

    def _make_sample(self) -> Any:
        def sample(params: Params, step: Int[Array, ""], batch: T5XBatch) -> dict[str, Array]:
            key = jax.random.fold_in(self._get_step_rng(step), _SAMPLE_STREAM)
            sampled = sample_outputs(
                self._model.student,
                params,
                to_batch(batch),
                # T5X's keys are plain arrays.
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

    def _taught(self, function: Callable[..., Any], **partition: Any) -> _TaughtProgram:
        """Partitions a function of a `_WithTeacher`, the train state and a batch."""

        def taught(train_state: Any, teacher_params: Params, batch: T5XBatch) -> Any:
            model = _WithTeacher(self._model, teacher_params, self._partitioner.mesh)
            return function(model, train_state, batch)

        data = self._partitioner.data_partition_spec
        resources = (self._train_state_axes, self._teacher_shardings, data)
        program = self._partitioner.partition(taught, in_axis_resources=resources, **partition)
        return _TaughtProgram(program, self.teacher_params)


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
