"""Divergence between models with different vocabularies, measured on spans of equal text.

A span is the text between two neighbouring positions at which the tokenizations of student and
teacher both have a boundary. At the beginning of a span, both models have read the same text and
predict how it continues. The two predictions are compared over these entries:

- the classes of tokens that both vocabularies have in common (`token_classes`);
- the span's whole text, unless that text is itself a class. The probability of the text is the
  product of the probabilities of its tokens (the chain rule).

The probability of a span's first token is split in two. The part in which the span's other tokens
follow counts for the span's text. The rest counts for the class of the first token. If both models
have the same vocabulary, the distributions compared are the next-token distributions themselves.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int, Params
from gkd_jax.common.batch import TeacherTokens
from gkd_jax.objectives.divergences import NegativeLogLikelihood, VocabularyEntries
from gkd_jax.objectives.fused import chunked_loss
from gkd_jax.objectives.objective import Objective, Predictions
from gkd_jax.objectives.per_token import tempered_log_probs, term_and_slope
from gkd_jax.objectives.token_classes import Classes, Vocabularies, logaddexp

_HIGHEST_LOG_PROB = -1e-6
"""Upper limit of the log-probability of a span's tokens after the first. In float32, values closer
to 0 could be rounded to 0, which would leave no probability for other continuations of the first
token."""


@dataclasses.dataclass(frozen=True)
class SpanObjective(Objective):
    """An `Objective` whose divergence is measured per span.

    Attributes:
      vocabularies: classes over which tokens of student and teacher are compared.

    Raises:
      ValueError: `vocabularies` is None; or `z_loss` is not 0, since it is defined for tokens only.
    """

    vocabularies: Vocabularies | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabularies is None:
            raise ValueError("SpanObjective.vocabularies must be set.")
        if self.z_loss:
            raise ValueError(
                "Objective.z_loss is of the student's tokens, and a teacher with another "
                f"vocabulary is compared on spans; got {self.z_loss}. Set Objective.z_loss to 0.0."
            )

    def value_and_gradient(
        self,
        logits: Float[Array, "*n V1"],
        teacher: Any,
        targets: Int[Array, "*n"],
        advantages: Float[Array, "*n"] | None,
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n V1"]]:
        """Computes the divergence of each span, and its gradient in `logits`.

        Args:
          logits: the student's logits at the span's first token, followed by one more feature: the
            log-probability of the span's tokens after the first, 0 if the span is one token.
          teacher: a `_TeacherSpans`.
          targets: the student's first token of each span.
          advantages: not used.
        """
        del advantages
        assert self.vocabularies is not None
        both, num_entries = self.vocabularies, self.vocabularies.num_entries
        student_first, teacher_first = both.first or (None, None)

        def student_entries(logits: Array) -> Array:
            log_probs = tempered_log_probs(logits[..., :-1], self.student_temperature)
            spans = _Spans(log_probs, logits[..., -1], targets, teacher.labels, teacher.at_start)
            return _entries(spans, both.student, student_first, num_entries)

        log_probs = tempered_log_probs(teacher.logits, self.teacher_temperature)
        spans = _Spans(
            log_probs, teacher.further, teacher.targets, teacher.labels, teacher.at_start
        )
        teacher_log_probs = _entries(spans, both.teacher, teacher_first, num_entries)
        student_log_probs, pullback = jax.vjp(student_entries, logits.astype(jnp.float32))
        is_target = _is_entry(teacher.labels[..., None], num_entries)
        entries = VocabularyEntries(student_log_probs, teacher_log_probs, is_target)
        term, slope = term_and_slope(self.divergence, entries)
        (gradient,) = pullback(slope)
        return jnp.sum(term, axis=-1), gradient


@flax.struct.dataclass
class _TeacherSpans:
    """The teacher's data at each span.

    Attributes:
      logits: logits at the span's first token; hidden states until the output layer is applied.
      further: log-probability of the span's tokens after the first; 0 if the span is one token.
      targets: the teacher's first token of the span.
      labels: index of the entry that the probability of the span's text is added to.
      at_start: True if the span begins the output.
    """

    logits: Float[Array, "*n V"]
    further: Float[Array, "*n"]
    targets: Int[Array, "*n"]
    labels: Int[Array, "*n"]
    at_start: Bool[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Spans of one model, as in `_TeacherSpans`, but with log-probabilities instead of logits."""

    log_probs: Float[Array, "*n V"]
    further: Float[Array, "*n"]
    targets: Int[Array, "*n"]
    labels: Int[Array, "*n"]
    at_start: Bool[Array, "*n"]


def _entries(
    spans: _Spans, classes: Classes, first: Classes | None, num_entries: int
) -> Float[Array, "*n E"]:
    """Returns log-probabilities of the classes and of the span's text; they sum to 1."""
    log_probs, targets = spans.log_probs, spans.targets[..., None]
    is_target = _is_entry(targets, log_probs.shape[-1])
    without_target = jnp.where(is_target, -jnp.inf, log_probs)
    target_log_prob = jnp.take_along_axis(log_probs, targets, axis=-1)
    sums, target_class = classes.sums(without_target), jnp.asarray(classes.of_tokens)[targets]
    if first is not None:
        at_start = spans.at_start[..., None]
        sums = jnp.where(at_start, first.sums(without_target), sums)
        target_class = jnp.where(at_start, jnp.asarray(first.of_tokens)[targets], target_class)
    text = jnp.full((*sums.shape[:-1], 1), -jnp.inf, sums.dtype)
    entries = jnp.concatenate([sums, text], axis=-1)
    # `sums` excludes the span's first token. The probability of that token is split: the part that
    # continues as the span's text is added to the entry of the text, the rest to the token's class.
    further = spans.further[..., None]
    is_single = further == 0
    otherwise = jnp.where(is_single, -jnp.inf, _log1mexp(jnp.where(is_single, -1.0, further)))
    entries = _add(entries, target_class, target_log_prob + otherwise)
    return _add(entries, spans.labels[..., None], target_log_prob + further)


def _add(entries: Array, index: Int[Array, "*n 1"], log_prob: Float[Array, "*n 1"]) -> Array:
    """Adds a probability, given as its logarithm, to one entry of each row."""
    total = logaddexp(jnp.take_along_axis(entries, index, axis=-1), log_prob)
    return jnp.put_along_axis(entries, index, total, axis=-1, inplace=False)


def _is_entry(index: Int[Array, "*n 1"], size: int) -> Bool[Array, "*n E"]:
    """Returns a mask that is True at the entry `index` of each row."""
    shape = (*index.shape[:-1], size)
    return index == jax.lax.broadcasted_iota(index.dtype, shape, index.ndim - 1)


def _log1mexp(x: Array) -> Array:
    """Returns log(1 - exp(x)) for x < 0."""
    is_near = x > -0.693
    near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -1.0)))
    return jnp.where(is_near, near, jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x))))


def span_loss(
    objective: SpanObjective,
    *,
    student: Predictions,
    teacher: Predictions,
    targets: Int[Array, "B T"],
    tokens: TeacherTokens,
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Sums weights * divergence over all spans.

    Spans and tokens are processed in chunks, as in `fused_weighted_loss`. The student's output
    layer is applied twice to the tokens after a span's first token: once to compute their
    probability, and once to compute the gradient of that probability.

    Args:
      objective: the divergence and its settings. `weights` already include its reduction.
      student: hidden states and output layer, which get gradients.
      teacher: hidden states at the teacher's own tokens, and output layer. They get no gradient.
      targets: the student's tokens.
      tokens: the teacher's tokens, and the spans of both models.
      weights: final weights, which are read only at the first token of each span.

    Returns:
      The loss, and the divergence of each span at its first token; 0 at all other tokens.
    """
    num_spans = min(targets.shape[1], tokens.targets.shape[1])
    student_starts, is_span = _span_starts(tokens.spans, num_spans)
    teacher_starts, _ = _span_starts(tokens.teacher_spans, num_spans)
    further = _further_log_probs(
        student, targets, tokens.spans, student_starts, temperature=objective.student_temperature
    )
    weights = jnp.where(is_span, jnp.take_along_axis(weights, student_starts, axis=1), 0.0)
    teacher = teacher.without_gradient()
    teacher_spans = _teacher_spans(
        teacher, tokens, student_starts, teacher_starts, temperature=objective.teacher_temperature
    )

    def with_logits(head: Params, spans: _TeacherSpans) -> _TeacherSpans:
        return dataclasses.replace(spans, logits=teacher.unembed(head, spans.logits))

    loss, per_span = chunked_loss(
        objective,
        student=_with_further(student, student_starts, further),
        teacher=(teacher_spans, teacher.head),
        make_teacher=with_logits,
        targets=jnp.take_along_axis(targets, student_starts, axis=1),
        weights=weights,
    )
    return loss, jax.lax.stop_gradient(_at_first_tokens(per_span, tokens.spans, student_starts))


def _teacher_spans(
    teacher: Predictions,
    tokens: TeacherTokens,
    student_starts: Int[Array, "B K"],
    teacher_starts: Int[Array, "B K"],
    *,
    temperature: float,
) -> _TeacherSpans:
    """Collects the teacher's data at each span, with hidden states in place of logits."""
    further = _further_log_probs(
        teacher, tokens.targets, tokens.teacher_spans, teacher_starts, temperature=temperature
    )
    return _TeacherSpans(
        logits=_take_positions(teacher.hidden, teacher_starts),
        further=jax.lax.stop_gradient(further),
        targets=jnp.take_along_axis(tokens.targets, teacher_starts, axis=1),
        labels=jnp.take_along_axis(tokens.labels, student_starts, axis=1),
        at_start=teacher_starts == 0,
    )


def _at_first_tokens(
    per_span: Float[Array, "B K"], spans: Int[Array, "B T"], starts: Int[Array, "B K"]
) -> Float[Array, "B T"]:
    """Returns the value of each span at the span's first token, and 0 at all other tokens."""
    index = jnp.maximum(spans - 1, 0)
    per_token = jnp.take_along_axis(jnp.pad(per_span, ((0, 0), (0, 1))), index, axis=1)
    positions = jnp.arange(spans.shape[1])[None, :]
    is_start = (spans > 0) & (jnp.take_along_axis(starts, index, axis=1) == positions)
    return jnp.where(is_start, per_token, 0.0)


def _with_further(
    student: Predictions, starts: Int[Array, "B K"], further: Float[Array, "B K"]
) -> Predictions:
    """Returns the predictions at each span, with `further` appended as one more feature."""
    hidden = _take_positions(student.hidden, starts).astype(jnp.float32)
    dtype = student.hidden.dtype

    def unembed(head: Params, both: Array) -> Array:
        logits = student.unembed(head, both[..., :-1].astype(dtype))
        return jnp.concatenate([logits.astype(jnp.float32), both[..., -1:]], axis=-1)

    both = jnp.concatenate([hidden, further[..., None]], axis=-1)
    return Predictions(both, student.head, unembed)


def _take_positions(
    hidden: Float[Array, "B T D"], positions: Int[Array, "B K"]
) -> Float[Array, "B K D"]:
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def _span_starts(
    spans: Int[Array, "B T"], num_spans: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """Returns the position of each span's first token, and a mask of the spans that exist."""
    length = spans.shape[1]

    def row_starts(row: Array) -> Array:
        empty = jnp.full(num_spans + 1, length, jnp.int32)
        return empty.at[row].min(jnp.arange(length, dtype=jnp.int32), mode="drop")[1:]

    starts = jax.vmap(row_starts)(spans)
    return jnp.minimum(starts, length - 1), starts < length


def _further_log_probs(
    model: Predictions,
    tokens: Int[Array, "B T"],
    spans: Int[Array, "B T"],
    starts: Int[Array, "B K"],
    *,
    temperature: float,
) -> Float[Array, "B K"]:
    """Returns the log-probability of each span's tokens after the first; 0 for a single token."""
    index = jnp.maximum(spans - 1, 0)
    positions = jnp.arange(tokens.shape[1])[None, :]
    is_further = (spans > 0) & (jnp.take_along_axis(starts, index, axis=1) != positions)
    settings = Objective(NegativeLogLikelihood(), student_temperature=temperature)
    log_probs = _log_probs(
        (settings, model.unembed), (model.hidden, model.head), (tokens, is_further)
    )

    def row_sums(values: Array, row: Array) -> Array:
        return jnp.zeros(starts.shape[1] + 1, values.dtype).at[row].add(values, mode="drop")[1:]

    sums = jax.vmap(row_sums)(log_probs, spans)
    has_further = jax.vmap(row_sums)(is_further.astype(jnp.float32), spans) > 0
    return jnp.where(has_further, jnp.minimum(sums, _HIGHEST_LOG_PROB), 0.0)


# Arguments of `_log_probs`: the objective and the function of the output layer; hidden states and
# parameters of the output layer; tokens and a mask.
_LikelihoodFunctions: TypeAlias = tuple[Objective, Callable[[Params, Array], Array]]
_Model: TypeAlias = tuple[Float[Array, "B T D"], Params]
_Tokens: TypeAlias = tuple[Int[Array, "B T"], Bool[Array, "B T"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(
    functions: _LikelihoodFunctions, model: _Model, tokens: _Tokens
) -> Float[Array, "B T"]:
    """Returns the log-probability of tokens where the mask is True, and 0 elsewhere.

    The log-probabilities are computed in chunks, only at tokens in the mask. The gradient depends
    on the cotangent of each token, which is unknown in the forward pass. The backward pass
    therefore runs over the chunks a second time.
    """
    ids, mask = tokens
    _, negative = _likelihood(functions, model, ids, mask.astype(jnp.float32))
    return -negative


def _likelihood(
    functions: _LikelihoodFunctions, model: _Model, ids: Array, weights: Array
) -> tuple[Array, Array]:
    (settings, unembed), (hidden, head) = functions, model
    return chunked_loss(
        settings, student=Predictions(hidden, head, unembed), teacher=None, targets=ids,
        weights=weights,
    )  # fmt: skip


def _log_probs_forward(
    functions: _LikelihoodFunctions, model: _Model, tokens: _Tokens
) -> tuple[Array, tuple[_Model, _Tokens]]:
    return _log_probs(functions, model, tokens), (model, tokens)


def _log_probs_backward(
    functions: _LikelihoodFunctions, residuals: tuple[_Model, _Tokens], cotangent: Array
) -> tuple[Any, None]:
    model, (ids, mask) = residuals
    weights = jnp.where(mask, -cotangent, 0.0)

    def total(model: _Model) -> Array:
        return _likelihood(functions, model, ids, weights)[0]

    return jax.grad(total)(model), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def span_metrics(
    tokens: TeacherTokens, loss_weights: Float[Array, "B T"]
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Measures how well the two tokenizations of outputs agree.

    Returns:
      Pairs (sum, weight) by name. 'covered_share' is the share of the student's tokens that are in
      any span. 'one_to_one_share' is the share of the student's tokens whose span is a single token
      of each model. 'tokens_per_span' is the mean number of the student's tokens in a span, and
      'teacher_tokens_per_span' the mean number of the teacher's tokens.
    """
    num_spans = min(tokens.spans.shape[1], tokens.targets.shape[1])

    def span_lengths(row: Array) -> Array:
        return jnp.zeros(num_spans + 1).at[row].add(1.0, mode="drop")[1:]

    student = jax.vmap(span_lengths)(tokens.spans)
    teacher = jax.vmap(span_lengths)(tokens.teacher_spans)
    total = jnp.sum((loss_weights > 0).astype(jnp.float32))
    spans = jnp.sum(student > 0).astype(jnp.float32)
    one_to_one = jnp.sum((student == 1) & (teacher == 1)).astype(jnp.float32)
    return {
        "covered_share": (jnp.sum(student), total),
        "one_to_one_share": (one_to_one, total),
        "tokens_per_span": (jnp.sum(student), spans),
        "teacher_tokens_per_span": (jnp.sum(teacher), spans),
    }
