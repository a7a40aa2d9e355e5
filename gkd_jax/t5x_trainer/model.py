"""T5X's encoder-decoder model with a distillation loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import clu.metrics
import flax.linen as nn
import jax.numpy as jnp
import t5x.metrics
from t5x import decoding, models
from t5x.examples.t5 import network

from gkd_jax.common.array_types import Array, Float, Params
from gkd_jax.common.batch import Batch
from gkd_jax.distillation.loss import make_loss_fn
from gkd_jax.distillation.rollout import rollout_metrics
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.t5x_trainer.batches import T5XBatch, to_batch

# Name of the feature with the final loss weights, computed over the whole batch. The training step
# adds it before T5X splits the batch into microbatches. Evaluation batches do not have it.
FINAL_WEIGHTS = "gkd_final_weights"


def t5_of(module: nn.Module, *, setting: str) -> T5:
    """Returns gkd_jax's T5 with the sizes of T5X's network, and so with the same parameter tree.

    Args:
      module: a `t5x.examples.t5.network.Transformer`.
      setting: name of the setting that gives the module, for messages.

    Raises:
      ValueError: the module is another kind of network.
    """
    if not isinstance(module, network.Transformer):
        raise ValueError(
            f"{setting} must be a t5x.examples.t5.network.Transformer; got "
            f"{type(module).__module__}.{type(module).__name__}. Set {setting} to "
            "@network.Transformer(): other networks of T5X have other parameters."
        )
    sizes = module.config
    # Settings that are not copied. `dtype` is converted below. T5X has no settings for the others:
    # its decoder always starts with 0, and its minimal network does not scan layers.
    ours = {"dtype", "decoder_start_id", "scan_layers", "remat_policy"}
    names = {field.name for field in dataclasses.fields(T5Config)} - ours
    same = {name: getattr(sizes, name) for name in names}
    return T5(T5Config(**same, dtype=jnp.dtype(sizes.dtype).name))


class GkdModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder model with a distillation loss.

    Initialisation, decoding and scoring are T5X's and use T5X's network. The loss is computed by
    `gkd_jax.distillation.loss`, with gkd_jax's T5 and the same parameters. The model stores the
    teacher's network but not the teacher's parameters, which are an argument of `loss_fn`.
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
          module: student's network, a `t5x.examples.t5.network.Transformer`.
          input_vocabulary, output_vocabulary: seqio vocabularies, as in T5X. The end-of-sequence
            id of the output vocabulary ends the student's samples.
          optimizer_def: T5X optimizer of the student.
          teacher_module: teacher's network, with the student's vocabulary size.
          objective: divergence, temperatures, reduction and z-loss.
          decode_fn, default_decoder_params: T5X's decoding for evaluation. The student's samples
            for training come from the trainer's `Rollout`.
          feature_converter_cls: converter with the features of `seqio.EncDecFeatureConverter`.

        Raises:
          ValueError: a network is of another kind, the output layers differ, the objective
            uses no teacher, or the objective needs a reward.
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
        """Ids that end an output: the vocabulary's end of sequence, if it has one."""
        eos_id = self.output_vocabulary.eos_id
        return () if eos_id is None else (int(eos_id),)

    def loss_fn(
        self,
        params: Params,
        batch: T5XBatch,
        dropout_rng: Array | None,
        teacher_params: Params | None = None,
    ) -> tuple[Float[Array, ""], dict[str, clu.metrics.Metric]]:
        """Computes the objective on a batch, with T5X's type of metrics.

        Args:
          params: student's parameters, with respect to which the loss is differentiated.
          batch: features of a batch or a microbatch. In a training step they include
            `FINAL_WEIGHTS`, which is computed over the whole batch.
          dropout_rng: key of the student's dropout; None disables it. The teacher has no dropout.
          teacher_params: teacher's parameters, which get no gradient.

        Returns:
          The loss (float32) and its metrics.

        Raises:
          ValueError: `teacher_params` is None, or rows are packed.
        """
        if teacher_params is None:
            raise ValueError(
                "GkdModel.loss_fn needs the teacher's parameters; got none. Set "
                "train.trainer_cls = @t5x_trainer.GkdTrainer, which gives them to each step."
            )
        ours = to_batch(batch)
        weights = batch.get(FINAL_WEIGHTS)
        if weights is None:
            weights = final_weights(ours.loss_weights, reduction=self.objective.reduction)
        loss, per_token = self._loss_fn(params, teacher_params, ours, weights, dropout_rng)
        return loss, self._metrics_of(loss, per_token, ours)

    def _metrics_of(
        self, loss: Float[Array, ""], per_token: Float[Array, "B T"], batch: Batch
    ) -> dict[str, clu.metrics.Metric]:
        """Returns metrics that can be summed over microbatches and steps."""
        num_tokens = jnp.sum(batch.loss_weights)
        rate = t5x.metrics.TimeRate.from_model_output
        metrics = {
            # The sum over a step's microbatches, averaged over steps.
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
