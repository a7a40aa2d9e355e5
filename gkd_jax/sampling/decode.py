"""Decoding with a cache: one prefill, then scans in chunks that end when all outputs have."""

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
"""The most steps between two looks, over all devices, at whether every output has ended."""

DecodingMethod = Greedy | Sample | BeamSearch


@flax.struct.dataclass
class Decoded:
    """Outputs of a batch; with several samples a prompt, rows are prompt-major.

    Attributes:
      tokens: output tokens up to and including the end, then the padding id.
      weights: 1 up to and including the end, 0 after it; all 0 on filler rows.
      log_probs: of each token under the sampling policy; 0 where the weight is.
      lengths: number of tokens, the end-of-sequence token included.
      truncated: True where the output did not end within the length; never on filler rows.
      steps_run: output positions that were computed, a scalar.
    """

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    truncated: Bool[Array, " B"]
    steps_run: Int[Array, ""]


@flax.struct.dataclass
class _Columns:
    """What one step writes, [B]; or what all steps wrote, [B, T]."""

    tokens: Array
    weights: Array
    log_probs: Array


@flax.struct.dataclass
class _Progress:
    """What a step hands to the next."""

    tokens: Int[Array, " B"]
    state: DecodeState
    ended: Bool[Array, " B"]


_Step = Callable[[_Progress, Int[Array, ""]], tuple[_Progress, _Columns]]


def check_num_samples(method: DecodingMethod, num_samples: int) -> None:
    """Refuses a number of samples below 1, or of a method that would repeat one output.

    Raises:
      ValueError: naming the setting.
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
    """Decodes up to `max_length` tokens for every prompt.

    Whether an output has ended is tracked, never read off the ids, so `pad_id` may equal an
    end-of-sequence id. With `BeamSearch` the best beam is returned.

    Args:
      method: how tokens are chosen.
      max_length: T, any number from 1.
      eos_ids: ids that end an output; none makes every output `max_length` long.
      pad_id: fills `tokens` after the end.
      key: for `Sample`; a new one for every call.
      example_id: position in the global order of examples, folded into `key`; -1 marks filler
        rows, which count as ended. The numbers of the rows by default.
      num_samples: N outputs a prompt, which is read once.
      chunk_size: the most steps between two looks at whether all outputs have ended.

    Returns:
      Outputs of B * num_samples rows.

    Raises:
      ValueError: ids outside the vocabulary, a length below 1, `Sample` without a key, or
        several samples of a method that always gives the same one.
    """
    check_output_ids(model.vocab_size, eos_ids=eos_ids, pad_id=pad_id, max_length=max_length)
    check_num_samples(method, num_samples)
    if example_id is None:
        example_id = jnp.arange(inputs.shape[0], dtype=jnp.int32)
    if isinstance(method, BeamSearch):
        beams = beam_search(
            model,
            params,
            inputs,
            inputs_mask,
            method=method,
            max_length=max_length,
            eos_ids=eos_ids,
            pad_id=pad_id,
            example_id=example_id,
        )
        return _best_beam(beams, filler=example_id < 0)

    hidden, state = model.prefill(params, inputs, inputs_mask, max_length=max_length)
    hidden, state, example_id = repeat_rows((hidden, state, example_id), num_samples)
    keys = _output_keys(method, key, example_id, num_samples)

    def choose(
        hidden: Array, state: DecodeState, ended: Array, position: Array
    ) -> tuple[_Progress, _Columns]:
        now_keys = None if keys is None else position_keys(keys, position)
        logits = model.unembed(params, hidden).astype(jnp.float32)
        tokens, log_probs = method.choose(logits, keys=now_keys)
        tokens = jnp.where(ended, pad_id, tokens)
        columns = _Columns(tokens, (~ended).astype(jnp.float32), jnp.where(ended, 0.0, log_probs))
        ends = is_any_of(tokens, eos_ids) & (position < max_length)
        return _Progress(tokens, state, ended | ends), columns

    def step(progress: _Progress, position: Array) -> tuple[_Progress, _Columns]:
        # The last chunk may run past the end. What it writes there is cut off; in the cache it
        # lands on the last place, which nothing reads any more.
        index = jnp.minimum(position, max_length - 1) - 1
        hidden, state = model.decode_step(params, progress.state, progress.tokens, index)
        return choose(hidden, state, progress.ended, position)

    filler = example_id < 0
    progress, first = choose(hidden, state, filler, jnp.zeros((), jnp.int32))
    ended, columns, steps_run = _run_chunks(
        step, progress, first, max_length=max_length, chunk_size=chunk_size, pad_id=pad_id
    )
    return Decoded(
        tokens=columns.tokens,
        weights=columns.weights,
        log_probs=columns.log_probs,
        lengths=columns.weights.sum(axis=1).astype(jnp.int32),
        truncated=~ended,
        steps_run=steps_run,
    )


def _output_keys(
    method: Greedy | Sample,
    key: Key[Array, ""] | None,
    example_id: Int[Array, " B"],
    num_samples: int,
) -> Key[Array, " B"] | None:
    """The key of every row, where the method draws at all."""
    if not method.needs_key:
        return None
    if key is None:
        raise ValueError("decode needs a random key for Sample; got key=None. Give each call one.")
    sample_index = jnp.arange(example_id.shape[0], dtype=jnp.int32) % num_samples
    return row_keys(key, example_id=example_id, sample_index=sample_index)


def _run_chunks(
    step: _Step,
    progress: _Progress,
    first: _Columns,
    *,
    max_length: int,
    chunk_size: int,
    pad_id: int,
) -> tuple[Bool[Array, " B"], _Columns, Int[Array, ""]]:
    """Runs positions 1 to max_length - 1 in equal chunks, while any output has not ended.

    Returns:
      Who has ended, the columns [B, max_length] and the number of positions computed.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}. 8 to 16 is usual.")
    num_chunks = -(-(max_length - 1) // chunk_size)
    if num_chunks == 0:
        return progress.ended, jax.tree.map(lambda x: x[:, None], first), jnp.ones((), jnp.int32)
    # Equal chunks run past the end by less than their number.
    chunk = -(-(max_length - 1) // num_chunks)
    padding = ((0, 0), (0, num_chunks * chunk))
    columns = _Columns(
        tokens=jnp.pad(first.tokens[:, None], padding, constant_values=pad_id),
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

    # Counted in chunks, so that the program says how often its loop may run.
    state = (progress, columns, jnp.zeros((), jnp.int32))
    progress, columns, number = lax.while_loop(is_open, run_chunk, state)
    columns = jax.tree.map(lambda x: x[:, :max_length], columns)
    return progress.ended, columns, jnp.minimum(1 + number * chunk, max_length)


def _best_beam(beams: Beams, *, filler: Bool[Array, " B"]) -> Decoded:
    """The first of the beams, which come best first."""
    weights = beams.weights[:, 0]
    return Decoded(
        tokens=beams.tokens[:, 0],
        weights=weights,
        log_probs=beams.log_probs[:, 0],
        lengths=weights.sum(axis=1).astype(jnp.int32),
        truncated=~beams.finished[:, 0] & ~filler,
        steps_run=beams.steps_run,
    )
