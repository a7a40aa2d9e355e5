"""Decoding with a key-value cache: one prefill, then a scan in chunks with early stopping."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Key, Params
from gkd_jax.models.base import DecodeState, LanguageModel
from gkd_jax.sampling.beam_search import Beams, BeamSearch, beam_search
from gkd_jax.sampling.methods import Greedy, Sample, position_keys, row_keys
from gkd_jax.sampling.outputs import check_output_ids, is_any_of, repeat_rows

CHUNK_SIZE = 16
"""Maximum number of steps between two checks of whether all outputs on all devices have ended."""

DecodingMethod = Greedy | Sample | BeamSearch


@flax.struct.dataclass
class Decoded:
    """Decoded outputs of a batch. The samples of one prompt are in consecutive rows.

    Attributes:
      tokens: output tokens up to and including the end-of-sequence token, then the padding id.
      weights: 1 up to and including the end-of-sequence token, 0 after it; 0 on filler rows.
      log_probs: log-probability of each token, for `Sample` at its temperature but before top-k
        and top-p, for other methods at temperature 1; 0 where the weight is 0.
      lengths: number of tokens, including the end-of-sequence token.
      truncated: True if the output has no end-of-sequence token; False on filler rows.
      steps_run: number of output positions that were computed, a scalar.
    """

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    truncated: Bool[Array, " B"]
    steps_run: Int[Array, ""]


@flax.struct.dataclass
class _Columns:
    """Fields of `Decoded` for one step, [B], or for all steps, [B, T]."""

    tokens: Array
    weights: Array
    log_probs: Array


@flax.struct.dataclass
class _Progress:
    """State carried from one step to the next."""

    tokens: Int[Array, " B"]
    state: DecodeState
    ended: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Limits of the outputs.

    Attributes:
      max_length: maximum number of output tokens.
      eos_ids: ids that end an output.
      pad_id: id that fills outputs after their end.
    """

    max_length: int
    eos_ids: tuple[int, ...]
    pad_id: int


_Step = Callable[[_Progress, Int[Array, ""]], tuple[_Progress, _Columns]]


def check_num_samples(method: DecodingMethod, num_samples: int) -> None:
    """Checks the number of samples per prompt.

    Raises:
      ValueError: `num_samples` is below 1, or it is above 1 and the method is deterministic.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}. Set 1 or more.")
    if num_samples > 1 and not isinstance(method, Sample):
        raise ValueError(
            f"num_samples must be 1 for {method}, which always gives the same output; got "
            f"{num_samples}. Use Sample(...) for several outputs a prompt."
        )


def decode(
    model: LanguageModel,
    params: Params,
    inputs: Int[Array, "B S"],
    inputs_mask: Bool[Array, "B S"],
    *,
    method: DecodingMethod,
    max_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: Key[Array, ""] | None = None,
    example_id: Int[Array, " B"] | None = None,
    num_samples: int = 1,
    chunk_size: int = CHUNK_SIZE,
) -> Decoded:
    """Decodes up to `max_length` tokens for each prompt.

    The end of each output is recorded during decoding and not inferred from its token ids, so
    `pad_id` may be one of `eos_ids`. With `BeamSearch`, the best beam is returned.

    Args:
      model: model to decode from.
      params: its parameters.
      inputs: token ids of the prompts.
      inputs_mask: True at prompt tokens, False at padding.
      method: how tokens are chosen.
      max_length: T, maximum number of output tokens, at least 1.
      eos_ids: ids that end an output. If empty, each output has `max_length` tokens.
      pad_id: id that fills `tokens` after the end.
      key: random key, required by `Sample`; use a new key for each call.
      example_id: position of each prompt in the global order of examples, which is folded into
        `key`. Rows with -1 are filler and not decoded. Defaults to the row indices.
      num_samples: N, number of outputs per prompt. The prompt is prefilled once.
      chunk_size: maximum number of steps between two checks for the end of all outputs.

    Returns:
      Outputs of B * num_samples rows.

    Raises:
      ValueError: an id is outside the vocabulary, `max_length` is below 1, `Sample` is used without
        a key, or `num_samples` is above 1 for a deterministic method.
    """
    check_output_ids(model.vocab_size, eos_ids=eos_ids, pad_id=pad_id, max_length=max_length)
    check_num_samples(method, num_samples)
    if example_id is None:
        example_id = jnp.arange(inputs.shape[0], dtype=jnp.int32)
    prompts, limits = (inputs, inputs_mask), _Limits(max_length, eos_ids, pad_id)
    if isinstance(method, BeamSearch):
        beams = beam_search(
            model, params, *prompts, method=method, example_id=example_id, **vars(limits)
        )
        return _best_beam(beams, is_filler=example_id < 0)
    hidden, state = model.prefill(params, *prompts, max_length=max_length)
    hidden, state, example_id = repeat_rows((hidden, state, example_id), num_samples)
    keys = _output_keys(method, key, example_id, num_samples)
    decoder = _Decoder(model, params, method, keys, limits)
    first = decoder.choose(hidden, state, example_id < 0, jnp.zeros((), jnp.int32))
    return _run_chunks(decoder.step, *first, limits=limits, chunk_size=chunk_size)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """Computes the decoding steps of one batch.

    Attributes:
      model: model to decode from.
      params: its parameters.
      method: how tokens are chosen.
      keys: random key of each row; None if `method` needs no keys.
      limits: limits of the outputs.
    """

    model: LanguageModel
    params: Params
    method: Greedy | Sample
    keys: Key[Array, " B"] | None
    limits: _Limits

    def choose(
        self, hidden: Array, state: DecodeState, ended: Array, position: Array
    ) -> tuple[_Progress, _Columns]:
        """Chooses the tokens at `position` from the hidden states that predict them."""
        keys = None if self.keys is None else position_keys(self.keys, position)
        logits = self.model.unembed(self.params, hidden).astype(jnp.float32)
        tokens, log_probs = self.method.choose(logits, keys=keys)
        tokens = jnp.where(ended, self.limits.pad_id, tokens)
        columns = _Columns(tokens, (~ended).astype(jnp.float32), jnp.where(ended, 0.0, log_probs))
        ends = is_any_of(tokens, self.limits.eos_ids) & (position < self.limits.max_length)
        return _Progress(tokens, state, ended | ends), columns

    def step(self, progress: _Progress, position: Int[Array, ""]) -> tuple[_Progress, _Columns]:
        """Runs the model on the tokens before `position` and chooses the tokens at `position`."""
        # The last chunk may have steps beyond max_length, whose outputs are cut off afterwards.
        # These steps overwrite the last slot of the cache, which is no longer needed.
        index = jnp.minimum(position, self.limits.max_length - 1) - 1
        hidden, state = self.model.decode_step(self.params, progress.state, progress.tokens, index)
        return self.choose(hidden, state, progress.ended, position)


def _output_keys(
    method: Greedy | Sample,
    key: Key[Array, ""] | None,
    example_id: Int[Array, " B"],
    num_samples: int,
) -> Key[Array, " B"] | None:
    """Returns the random key of each row; None if the method is deterministic."""
    if not method.needs_key:
        return None
    if key is None:
        raise ValueError("decode needs a random key for Sample; got key=None. Give each call one.")
    sample_index = jnp.arange(example_id.shape[0], dtype=jnp.int32) % num_samples
    return row_keys(key, example_id=example_id, sample_index=sample_index)


def _run_chunks(
    step: _Step, progress: _Progress, first: _Columns, *, limits: _Limits, chunk_size: int
) -> Decoded:
    """Runs positions 1 to max_length - 1 in equal chunks, until all outputs have ended.

    Args:
      step: function that computes one position.
      progress: the state after position 0.
      first: the outputs of position 0.
      limits: limits of the outputs.
      chunk_size: maximum number of positions in a chunk.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}. 8 to 16 is usual.")
    num_chunks = -(-(limits.max_length - 1) // chunk_size)
    if num_chunks == 0:
        columns = jax.tree.map(lambda x: x[:, None], first)
        return _decoded(columns, progress.ended, jnp.ones((), jnp.int32))
    # All chunks have the same size. Together they exceed max_length by fewer than num_chunks
    # positions.
    chunk = -(-(limits.max_length - 1) // num_chunks)
    padding = ((0, 0), (0, num_chunks * chunk))
    columns = _Columns(
        tokens=jnp.pad(first.tokens[:, None], padding, constant_values=limits.pad_id),
        weights=jnp.pad(first.weights[:, None], padding),
        log_probs=jnp.pad(first.log_probs[:, None], padding),
    )

    def is_open(carry: tuple[_Progress, _Columns, Array]) -> Bool[Array, ""]:
        progress, _, number = carry
        return (number < num_chunks) & ~jnp.all(progress.ended)

    def run_chunk(
        carry: tuple[_Progress, _Columns, Array],
    ) -> tuple[_Progress, _Columns, Array]:
        progress, columns, number = carry
        start = 1 + number * chunk
        progress, new = lax.scan(step, progress, start + jnp.arange(chunk, dtype=jnp.int32))
        columns = jax.tree.map(
            lambda old, part: lax.dynamic_update_slice(old, part.T, (0, start)), columns, new
        )
        return progress, columns, number + 1

    # The loop counts chunks, so that its maximum trip count can be read from the compiled program.
    carry = (progress, columns, jnp.zeros((), jnp.int32))
    progress, columns, number = lax.while_loop(is_open, run_chunk, carry)
    columns = jax.tree.map(lambda x: x[:, : limits.max_length], columns)
    return _decoded(columns, progress.ended, jnp.minimum(1 + number * chunk, limits.max_length))


def _decoded(columns: _Columns, ended: Bool[Array, " B"], steps_run: Int[Array, ""]) -> Decoded:
    return Decoded(
        tokens=columns.tokens,
        weights=columns.weights,
        log_probs=columns.log_probs,
        lengths=columns.weights.sum(axis=1).astype(jnp.int32),
        truncated=~ended,
        steps_run=steps_run,
    )


def _best_beam(beams: Beams, *, is_filler: Bool[Array, " B"]) -> Decoded:
    """Returns the first beam of each prompt; beams are sorted best first."""
    weights = beams.weights[:, 0]
    return Decoded(
        tokens=beams.tokens[:, 0],
        weights=weights,
        log_probs=beams.log_probs[:, 0],
        lengths=weights.sum(axis=1).astype(jnp.int32),
        truncated=~beams.finished[:, 0] & ~is_filler,
        steps_run=beams.steps_run,
    )
