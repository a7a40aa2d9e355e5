"""The rollout: a Batch whose outputs the policy itself has sampled."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Float, Key, Metrics, Params
from gkd_jax.common.batch import Batch
from gkd_jax.models.base import LanguageModel
from gkd_jax.sampling.decode import CHUNK_SIZE, DecodingMethod, check_num_samples, decode
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.outputs import is_any_of, repeat_rows
from gkd_jax.sampling.teacher_assisted import TeacherAssistance

REPETITION_GRAM = 4


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How outputs are sampled.

    Attributes:
      method: how tokens are chosen; the model's own distribution at temperature 1 by default,
        as the paper trains.
      num_samples: N outputs a prompt; the batch grows N-fold.
      target_length: longest output; the length of the batch's `targets` by default.
      chunk_size: the most steps between two looks at whether all outputs have ended.
      teacher_assistance: how the teacher takes part in sampling the outputs of training steps;
        None samples from the student alone. Evaluations always sample from the student alone.
    """

    method: DecodingMethod = dataclasses.field(default_factory=Sample)
    num_samples: int = 1
    target_length: int | None = None
    chunk_size: int = CHUNK_SIZE
    teacher_assistance: TeacherAssistance | None = None

    def __post_init__(self) -> None:
        check_num_samples(self.method, self.num_samples)
        for name in ("target_length", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"Rollout.{name} must be at least 1; got {value}. Set a positive number"
                    f"{' or None' if name == 'target_length' else ''}."
                )


def sample_outputs(
    model: LanguageModel,
    params: Params,
    batch: Batch,
    *,
    key: Key[Array, ""],
    rollout: Rollout,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Batch:
    """Replaces the outputs of a batch by outputs of the model, without dropout.

    A pure function to be jitted: control flow looks at the whole batch over all devices, so it
    works on sharded batches and parameters. No gradient flows through it.

    Args:
      batch: only its prompts, ids and target length are used.
      key: new for every step, e.g. folded with the step number.
      rollout: how to sample.
      eos_ids: ids that end an output; may be empty.
      pad_id: fills `targets` after the end.

    Returns:
      A batch of B * num_samples rows, prompt-major, with `targets`, `loss_weights` (1 up to and
      including the end of an output, all 1 where it did not end, 0 on filler rows) and
      `sample_log_probs`. What belongs to a prompt repeats with it.

    Raises:
      ValueError: rows are packed; or as `gkd_jax.sampling.decode.decode`.
    """
    if batch.inputs_segments is not None:
        raise ValueError(
            "outputs are sampled for one prompt a row; got packed rows. Set DatasetConfig.pack to "
            "False."
        )
    decoded = decode(
        model,
        lax.stop_gradient(params),
        batch.inputs,
        batch.inputs_mask,
        method=rollout.method,
        max_length=rollout.target_length or batch.targets.shape[1],
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        example_id=batch.example_id,
        num_samples=rollout.num_samples,
        chunk_size=rollout.chunk_size,
    )
    # What belongs to a prompt repeats with it; what belonged to other outputs goes.
    repeated = repeat_rows(
        dataclasses.replace(
            batch, advantages=None, importance=None, stored_teacher=None, teacher_tokens=None
        ),
        rollout.num_samples,
    )
    return dataclasses.replace(
        repeated,
        targets=decoded.tokens,
        loss_weights=decoded.weights,
        sample_log_probs=decoded.log_probs,
    )


def mix_outputs(
    batch: Batch, sampled: Batch, *, fraction: Float[Array, ""], key: Key[Array, ""]
) -> Batch:
    """Takes each example's output from the samples with probability `fraction`, else from the data.

    Args:
      batch: the data's outputs.
      sampled: one sample for each prompt of `batch`, of the same length.
      fraction: lambda.
      key: new for every step; an example's coin comes from it and its `example_id`.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.example_id)
    # In (0, 1]: a fraction of 0 is never hit, a fraction of 1 always.
    coins = 1.0 - jax.vmap(jax.random.uniform)(keys)
    is_own = (coins <= fraction)[:, None]
    return dataclasses.replace(
        batch,
        targets=jnp.where(is_own, sampled.targets, batch.targets),
        loss_weights=jnp.where(is_own, sampled.loss_weights, batch.loss_weights),
    )


def rollout_metrics(batch: Batch, *, eos_ids: tuple[int, ...]) -> Metrics:
    """Measures outputs, sampled or not, for curves and alarms; jittable.

    `output_length`: mean number of tokens, the end included. `truncated_share`: outputs that do
    not finish with an end-of-sequence token. `repetition`: per output, the share of its 4-grams
    that it has had before, near 1 where it has collapsed to one token or to a short loop;
    averaged over outputs of at least four tokens.

    Args:
      batch: outputs whose weights are 1 up to their end.
      eos_ids: ids that end an output; where there are none, all outputs count as truncated.

    Returns:
      Metric name to (sum, weight) over real rows.
    """
    is_real = (batch.example_id >= 0).astype(jnp.float32)
    mask = batch.loss_weights > 0
    lengths = jnp.sum(mask, axis=1)
    last = jnp.take_along_axis(batch.targets, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    truncated = ~(is_any_of(last, eos_ids) & (lengths > 0))
    num_rows = jnp.sum(is_real)
    repetition = _repetition(batch)
    return {
        "output_length": (jnp.sum(lengths * is_real), num_rows),
        "truncated_share": (jnp.sum(truncated * is_real), num_rows),
        "repetition": repetition,
    }


def _repetition(batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over outputs of the share of repeated 4-grams, and the number of outputs with any.

    Sorting the 4-grams of an output puts equal ones side by side: T log T, and no T x T table.
    """
    num_grams = batch.targets.shape[1] - REPETITION_GRAM + 1
    if num_grams < 1:
        return jnp.zeros(()), jnp.zeros(())
    # A 4-gram counts where its last token does. The others sort behind all that count.
    is_output = (batch.loss_weights > 0) & (batch.example_id >= 0)[:, None]
    outside = (~is_output[:, REPETITION_GRAM - 1 :]).astype(jnp.int32)
    grams = [batch.targets[:, i : i + num_grams] for i in range(REPETITION_GRAM)]
    outside, *grams = lax.sort((outside, *grams), dimension=1, num_keys=REPETITION_GRAM + 1)
    same = jnp.stack([gram[:, 1:] == gram[:, :-1] for gram in grams]).all(axis=0)
    counted = outside == 0
    repeats = jnp.sum(same & counted[:, 1:], axis=1)
    totals = jnp.sum(counted, axis=1)
    shares = repeats / jnp.maximum(totals, 1)
    return jnp.sum(shares), jnp.sum(totals > 0).astype(jnp.float32)
