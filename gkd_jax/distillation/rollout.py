"""Rollouts: batches whose outputs are sampled from the student instead of taken from the data."""

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
    """Settings for sampling outputs.

    Attributes:
      method: decoding method. By default tokens are sampled from the model's distribution at
        temperature 1, as in "On-Policy Distillation of Language Models: Learning from
        Self-Generated Mistakes", arXiv 2306.13649.
      num_samples: number of outputs per prompt, N; the batch becomes N times as large.
      target_length: maximum length of an output; None for the length of the batch's `targets`.
      chunk_size: maximum number of decoding steps before the loop checks again whether all
        outputs have ended.
      teacher_assistance: how the teacher takes part in sampling the outputs of training steps;
        None samples from the student alone. Evaluations always sample from the student alone.

    Raises:
      ValueError: a setting is out of range, or `num_samples` is above 1 for a deterministic method.

    Examples:
      Two outputs of at most five tokens for each of two prompts:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from gkd_jax.common.batch import Batch
      >>> from gkd_jax.distillation.rollout import Rollout, sample_outputs
      >>> from gkd_jax.models import T5, T5Config
      >>> from gkd_jax.sampling import Sample
      >>> sizes = dict(emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)
      >>> layers = dict(num_encoder_layers=1, num_decoder_layers=1)
      >>> model = T5(T5Config(vocab_size=32, **sizes, **layers))
      >>> batch = Batch(
      ...     inputs=jnp.array([[4, 5, 6], [7, 0, 0]]),
      ...     inputs_mask=jnp.array([[True, True, True], [True, False, False]]),
      ...     targets=jnp.zeros((2, 5), jnp.int32),
      ...     loss_weights=jnp.ones((2, 5)),
      ...     example_id=jnp.array([10, 11]),
      ... )
      >>> sampled = sample_outputs(
      ...     model, model.init(jax.random.key(0)), batch, key=jax.random.key(1),
      ...     rollout=Rollout(Sample(temperature=0.8), num_samples=2), eos_ids=(1,), pad_id=0,
      ... )
      >>> sampled.targets.shape
      (4, 5)
      >>> sampled.example_id.tolist()
      [10, 10, 11, 11]
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
    """Replaces the outputs of a batch by outputs sampled from a model, without dropout.

    A pure function to be jitted. Its control flow depends on the global batch and is the same on
    all devices, so batches and parameters may be sharded. No gradient flows through the outputs.

    Args:
      model: model to sample from.
      params: parameters of the model.
      batch: batch of which only the prompts, ids and target length are used.
      key: random key that must differ in every step, e.g. folded with the step number.
      rollout: settings for sampling.
      eos_ids: ids that end an output; may be empty.
      pad_id: id that fills `targets` after the end of an output.

    Returns:
      A batch of B * num_samples rows, with the samples of a prompt adjacent. `loss_weights` are 1
      up to and including the end-of-sequence token, 1 everywhere if an output did not end, and 0 in
      filler rows. Fields of a prompt are repeated for each of its samples.

    Raises:
      ValueError: rows are packed, or a condition of `gkd_jax.sampling.decode.decode` is violated.
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
    return dataclasses.replace(
        _repeat_prompts(batch, rollout.num_samples),
        targets=decoded.tokens,
        loss_weights=decoded.weights,
        sample_log_probs=decoded.log_probs,
    )


def _repeat_prompts(batch: Batch, num_samples: int) -> Batch:
    """Repeats each row for its samples, and removes the fields that describe the old outputs."""
    prompts = dataclasses.replace(
        batch, advantages=None, importance=None, stored_teacher=None, teacher_tokens=None
    )
    return repeat_rows(prompts, num_samples)


def mix_outputs(
    batch: Batch, sampled: Batch, *, fraction: Float[Array, ""], key: Key[Array, ""]
) -> Batch:
    """Replaces each example's output by its sample with probability `fraction`.

    Args:
      batch: the data's outputs.
      sampled: one sample for each prompt of `batch`, of the same length.
      fraction: probability of taking the sample; the paper's lambda.
      key: random key that must differ in every step. Whether an output is replaced depends on this
        key and on the example's `example_id`.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch.example_id)
    # Coins are in (0, 1]. A fraction of 0 therefore takes no sample, and a fraction of 1 takes all.
    coins = 1.0 - jax.vmap(jax.random.uniform)(keys)
    is_sampled = (coins <= fraction)[:, None]
    return dataclasses.replace(
        batch,
        targets=jnp.where(is_sampled, sampled.targets, batch.targets),
        loss_weights=jnp.where(is_sampled, sampled.loss_weights, batch.loss_weights),
    )


def rollout_metrics(batch: Batch, *, eos_ids: tuple[int, ...]) -> Metrics:
    """Computes metrics of outputs, whether sampled or taken from the data. Can be jitted.

    * `output_length`: mean number of tokens, the end-of-sequence token included.
    * `truncated_share`: share of outputs that do not finish with an end-of-sequence token.
    * `repetition`: share of an output's 4-grams that occurred earlier in the output, averaged over
      outputs of at least four tokens. It is near 1 if outputs collapse to one token or a short
      loop.

    Args:
      batch: outputs, with `loss_weights` of 1 up to the end of each output.
      eos_ids: ids that end an output; if empty, all outputs count as truncated.

    Returns:
      A dictionary from metric names to (sum, weight) over real rows.
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
    """Returns the sum of the outputs' shares of repeated 4-grams, and the number of outputs.

    Only outputs with at least one 4-gram count. Sorting an output's 4-grams makes equal ones
    adjacent, in T log T steps and without a T x T table.
    """
    num_grams = batch.targets.shape[1] - REPETITION_GRAM + 1
    if num_grams < 1:
        return jnp.zeros(()), jnp.zeros(())
    # A 4-gram counts if its last token belongs to the output. The others are sorted to the end.
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
