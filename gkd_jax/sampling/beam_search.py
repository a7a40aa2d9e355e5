"""Beam search with the length penalty of T5X."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from gkd_jax.common.array_types import Array, Bool, Float, Int, Params, PyTree
from gkd_jax.models.base import DecodeState, LanguageModel
from gkd_jax.sampling.outputs import check_output_ids, is_any_of, repeat_rows

_BLOCK_SIZE = 128  # the lanes of a TPU's vector register


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Beam search: keeps the `num_beams` most likely prefixes and returns the best outputs.

    A finished output of n tokens, including the end-of-sequence token, has the score

        log P(output) / ((5 + n) / 6) ** alpha

    with the length penalty of "Google's Neural Machine Translation System: Bridging the Gap between
    Human and Machine Translation" (arXiv 1609.08144, equation 14).

    Attributes:
      num_beams: number of prefixes that are kept, and of outputs that are returned, per prompt.
      alpha: exponent of the length penalty. If it is 0, the score is the log-probability; larger
        values favour longer outputs.
    """

    num_beams: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(
                f"BeamSearch.num_beams must be at least 1; got {self.num_beams}. For one beam "
                "without search use Greedy()."
            )
        if not self.alpha >= 0:
            raise ValueError(
                f"BeamSearch.alpha must be at least 0; got {self.alpha}. Set 0 for no length "
                "penalty."
            )


@flax.struct.dataclass
class Beams:
    """Outputs of a beam search, sorted **best first** (T5X sorts them worst first).

    If no output of a prompt has finished, its unfinished beams are returned, as in T5X. Their
    `finished` is False, and their score is the log-probability without length penalty. If some but
    fewer than `num_beams` outputs have finished, the remaining beams are empty: their tokens are
    padding, with weight 0, and their score is -inf.

    Attributes:
      tokens: output tokens up to and including the end-of-sequence token, then the padding id.
      weights: 1 up to and including the end-of-sequence token, 0 after it.
      log_probs: log-probability of each token; 0 where the weight is 0.
      scores: scores that the beams are sorted by.
      finished: True if the output has an end-of-sequence token.
      steps_run: number of output positions that were computed, a scalar.
    """

    tokens: Int[Array, "B N T"]
    weights: Float[Array, "B N T"]
    log_probs: Float[Array, "B N T"]
    scores: Float[Array, "B N"]
    finished: Bool[Array, "B N"]
    steps_run: Int[Array, ""]


class _Hypotheses(flax.struct.PyTreeNode):
    """Prefixes or finished outputs, sorted best first. Empty entries have the score -inf."""

    tokens: Int[Array, "B N T"]
    log_probs: Float[Array, "B N T"]
    lengths: Int[Array, "B N"]
    scores: Float[Array, "B N"]


class _Search(flax.struct.PyTreeNode):
    """State of the search loop."""

    index: Int[Array, ""]  # next output position
    live: _Hypotheses  # unfinished prefixes, scored without length penalty
    ended: _Hypotheses  # finished outputs, scored with length penalty
    parents: Int[Array, "B N"]  # index of the beam whose cache each live beam continues
    state: DecodeState


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Constants of a search."""

    num_beams: int
    alpha: float
    max_length: int
    eos_ids: tuple[int, ...]

    @property
    def num_candidates(self) -> int:
        """Number of candidates per step.

        Each beam has at most one finished candidate for each end-of-sequence id. The number is
        large enough that at least `num_beams` candidates are always unfinished.
        """
        return self.num_beams * (1 + max(1, len(self.eos_ids)))

    def penalty(self, length: int | Int[Array, ""]) -> Float[Array, ""]:
        """Returns the divisor of the log-probability of an output of this length."""
        return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** self.alpha


def beam_search(
    model: LanguageModel,
    params: Params,
    inputs: Int[Array, "B S"],
    inputs_mask: Bool[Array, "B S"],
    *,
    method: BeamSearch,
    max_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    example_id: Int[Array, " B"] | None = None,
) -> Beams:
    """Searches for the best outputs of each prompt; see `BeamSearch` and `Beams`.

    The search keeps the `num_beams` best finished outputs of each prompt. It stops when, for
    every prompt, no unfinished beam can outscore the last of these. A beam's log-probability can
    only decrease, and the length penalty of `max_length` is the largest. Therefore the current
    log-probability divided by this penalty is an upper bound of the beam's score.

    Args:
      model: model to decode from.
      params: its parameters.
      inputs: token ids of the prompts.
      inputs_mask: True at prompt tokens, False at padding.
      method: number of beams and length penalty.
      max_length: T, maximum number of output tokens, at least 1.
      eos_ids: ids that end an output; may be empty.
      pad_id: id that fills `tokens` after the end.
      example_id: index of each example. Rows with -1 are filler: their beams are empty, and the
        search does not wait for them.

    Returns:
      All beams, best first.

    Raises:
      ValueError: an id is outside the vocabulary, `max_length` is below 1, or the vocabulary is
        too small for the number of beams.
    """
    check_output_ids(model.vocab_size, eos_ids=eos_ids, pad_id=pad_id, max_length=max_length)
    rules = _Rules(method.num_beams, method.alpha, max_length, eos_ids)
    if rules.num_candidates > model.vocab_size:
        raise ValueError(
            f"BeamSearch.num_beams needs a vocabulary of {rules.num_candidates} entries; got "
            f"{model.vocab_size}. Set num_beams to a smaller number."
        )
    batch_size = inputs.shape[0]
    filler = jnp.zeros(batch_size, bool) if example_id is None else example_id < 0

    hidden, state = model.prefill(params, inputs, inputs_mask, max_length=max_length)
    hidden, state = repeat_rows((hidden, state), method.num_beams)
    search = _extend(_start(rules, batch_size, state), model.unembed(params, hidden), rules)
    search = lax.while_loop(
        lambda search: _can_improve(search, filler, rules),
        lambda search: _step(search, model, params, rules),
        search,
    )
    return _collect(search, filler, pad_id)


def _step(search: _Search, model: LanguageModel, params: Params, rules: _Rules) -> _Search:
    """Runs the model on the last tokens of the live beams and extends the beams."""
    state = _gather_rows(search.state, search.parents)
    last = lax.dynamic_index_in_dim(search.live.tokens, search.index - 1, 2, keepdims=False)
    hidden, state = model.decode_step(params, state, last.reshape(-1), search.index - 1)
    return _extend(search.replace(state=state), model.unembed(params, hidden), rules)


def _can_improve(search: _Search, filler: Bool[Array, " B"], rules: _Rules) -> Bool[Array, ""]:
    """Returns whether any prompt has a live beam that can outscore one of its finished outputs."""
    best_possible = search.live.scores[:, 0] / rules.penalty(rules.max_length)
    open_rows = (best_possible > search.ended.scores[:, -1]) & ~filler
    return (search.index < rules.max_length) & jnp.any(open_rows)


def _start(rules: _Rules, batch_size: int, state: DecodeState) -> _Search:
    """Returns the initial state, with the empty prefix as the only live beam of each prompt."""
    shape = (batch_size, rules.num_beams)
    none = _Hypotheses(
        tokens=jnp.zeros((*shape, rules.max_length), jnp.int32),
        log_probs=jnp.zeros((*shape, rules.max_length), jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        scores=jnp.full(shape, -jnp.inf, jnp.float32),
    )
    return _Search(
        index=jnp.zeros((), jnp.int32),
        live=none.replace(scores=none.scores.at[:, 0].set(0.0)),
        ended=none,
        parents=jnp.zeros(shape, jnp.int32),
        state=state,
    )


def _extend(search: _Search, logits: Float[Array, "BN V"], rules: _Rules) -> _Search:
    """Extends the live beams by their best next tokens and moves finished outputs to `ended`."""
    batch_size, num_beams = search.live.scores.shape
    vocab_size = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_probs = log_probs.reshape(batch_size, num_beams, vocab_size)
    totals = (search.live.scores[:, :, None] + log_probs).reshape(batch_size, -1)
    totals, indices = _top_few(totals, rules.num_candidates)
    parents, tokens = indices // vocab_size, indices % vocab_size
    token_log_probs = jnp.take_along_axis(log_probs.reshape(batch_size, -1), indices, axis=1)

    candidates = _gather(search.live, parents)
    candidates = candidates.replace(
        tokens=candidates.tokens.at[:, :, search.index].set(tokens),
        log_probs=candidates.log_probs.at[:, :, search.index].set(token_log_probs),
        lengths=candidates.lengths + 1,
        scores=totals,
    )
    ends = is_any_of(tokens, rules.eos_ids)
    live_scores, order = _top_few(jnp.where(ends, -jnp.inf, totals), num_beams)
    live = _gather(candidates, order).replace(scores=live_scores)

    scores = jnp.where(ends, totals / rules.penalty(search.index + 1), -jnp.inf)
    pool = jax.tree.map(
        lambda *arrays: jnp.concatenate(arrays, axis=1),
        search.ended,
        candidates.replace(scores=scores),
    )
    ended = _gather(pool, _top_few(pool.scores, num_beams)[1])
    return search.replace(
        index=search.index + 1,
        live=live,
        ended=ended,
        parents=jnp.take_along_axis(parents, order, axis=1),
    )


def _collect(search: _Search, filler: Bool[Array, " B"], pad_id: int) -> Beams:
    """Returns the finished outputs, or the live beams for prompts without a finished output."""
    any_ended = search.ended.scores[:, 0] > -jnp.inf

    def choose(ended: Array, live: Array) -> Array:
        return jnp.where(any_ended.reshape(-1, *[1] * (ended.ndim - 1)), ended, live)

    chosen = jax.tree.map(choose, search.ended, search.live)
    real = (chosen.scores > -jnp.inf) & ~filler[:, None]
    positions = lax.broadcasted_iota(jnp.int32, chosen.tokens.shape, 2)
    mask = (positions < chosen.lengths[:, :, None]) & real[:, :, None]
    return Beams(
        tokens=jnp.where(mask, chosen.tokens, pad_id),
        weights=mask.astype(jnp.float32),
        log_probs=jnp.where(mask, chosen.log_probs, 0.0),
        scores=jnp.where(real, chosen.scores, -jnp.inf),
        finished=real & any_ended[:, None],
        steps_run=search.index,
    )


def _top_few(
    values: Float[Array, "B n"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns the same as `lax.top_k`, with equal values in the same order; fast only for small
    `count`.

    If the batch is sharded, `lax.top_k` gathers the whole batch on every device, while this
    function moves no data between devices. Large rows are divided into blocks. The k = `count`
    largest entries are in the k blocks with the largest maxima, so only these blocks are searched.
    """
    size = values.shape[1]
    ids = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    if size > count * _BLOCK_SIZE:
        padding = ((0, 0), (0, -size % _BLOCK_SIZE))
        blocks = jnp.pad(values, padding, constant_values=-jnp.inf)
        blocks = blocks.reshape(values.shape[0], -1, _BLOCK_SIZE)
        maxima = jnp.max(blocks, axis=2)
        _, best = _top_by_turns(maxima, ids[:, : maxima.shape[1]], count)
        values = _gather(blocks, best).reshape(values.shape[0], -1)
        ids = best[:, :, None] * _BLOCK_SIZE + ids[:, None, :_BLOCK_SIZE]
        ids = ids.reshape(values.shape)
    best_values, best_ids = _top_by_turns(values, ids, count)
    # If a row has NaNs, it can happen that no entry equals the maximum. The id found is then beyond
    # the row and is replaced by the last id.
    return best_values, jnp.minimum(best_ids, size - 1)


def _top_by_turns(
    values: Float[Array, "B n"], ids: Int[Array, "B n"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Selects the `count` largest values, one after the other; equal values by ascending id."""
    beyond = jnp.iinfo(jnp.int32).max

    def next_best(last: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple]:
        last_value, last_id = last
        comes_later = (values < last_value) | ((values == last_value) & (ids > last_id))
        value = jnp.max(jnp.where(comes_later, values, -jnp.inf), axis=1, keepdims=True)
        is_best = comes_later & (values == value)
        best_id = jnp.min(jnp.where(is_best, ids, beyond), axis=1, keepdims=True)
        return (value, best_id), (value[:, 0], best_id[:, 0])

    first = (jnp.full_like(values[:, :1], jnp.inf), jnp.full_like(ids[:, :1], -1))
    _, (best_values, best_ids) = lax.scan(next_best, first, None, length=count)
    return best_values.T, best_ids.T


def _gather(tree: Any, beams: Int[Array, "B M"]) -> Any:
    """Selects entries of arrays [B, N, ...] by index within each row."""
    take = jax.vmap(lambda array, indices: array[indices])
    return jax.tree.map(lambda array: take(array, beams), tree)


def _gather_rows(state: PyTree, beams: Int[Array, "B N"]) -> PyTree:
    """Selects rows of a decoding state, [B * N, ...], by the index of a beam within its prompt.

    The indexing is batched over prompts, so that no data moves between devices if the batch is
    sharded.
    """
    grouped = jax.tree.map(lambda array: array.reshape(*beams.shape, *array.shape[1:]), state)
    taken = _gather(grouped, beams)
    return jax.tree.map(lambda array, like: array.reshape(like.shape), taken, state)
