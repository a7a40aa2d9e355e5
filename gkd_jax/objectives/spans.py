"""A divergence between models of different vocabularies, one for each span of equal text.

A span is the text between two neighbouring places at which both tokenizations of an output have a
boundary; there both models predict what follows the same text. Their next-token distributions are
compared over common classes of tokens: those that begin with the same text. One more entry is the
span's own text, whose probability is that of all its tokens (the chain rule), where that is no
class. The rest of each class keeps the probability that is left. These are two distributions over
the same events; over one vocabulary they are the next-token distributions themselves.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Bool, Float, Int, Params
from gkd_jax.common.batch import TeacherTokens
from gkd_jax.objectives.divergences import NegativeLogLikelihood, VocabularyEntries
from gkd_jax.objectives.fused import chunked_loss
from gkd_jax.objectives.objective import Objective, Predictions
from gkd_jax.objectives.per_token import tempered_log_probs, term_and_slope

_LEAST_REST = -1e-6
"""Largest log-probability of what follows a span's first token: float32 rounds larger ones to 0,
which would leave nothing of the first token to what else might follow."""


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """The class of each entry of an output layer.

    Attributes:
      of_tokens: its number, from 0 to `num_classes`; the last is that of what has no other.
      num_classes: one less than there are.
    """

    of_tokens: Int[np.ndarray, " V"]
    num_classes: int

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A first token of each class (-1 without any), and the other tokens by class."""
        firsts = np.full(self.num_classes + 1, -1, np.int32)
        numbers, where = np.unique(self.of_tokens, return_index=True)
        firsts[numbers] = where
        order = np.argsort(self.of_tokens, kind="stable").astype(np.int32)
        others = order[~np.isin(order, where)]
        return firsts, others, self.of_tokens[others]

    def sums(self, log_probs: Float[Array, "*n V"]) -> Float[Array, "*n E1"]:
        """Log of the probability of each class; -inf for one without any."""
        firsts, others, classes = self._parts
        of_firsts = log_probs[..., np.maximum(firsts, 0)]
        missing = np.broadcast_to(firsts < 0, of_firsts.shape)
        of_firsts = jnp.where(missing, -jnp.inf, of_firsts)
        if not others.size:
            return of_firsts
        # Each class by its own largest: the sum of small probabilities must not vanish.
        parts = jnp.moveaxis(log_probs[..., others], -1, 0)
        add = functools.partial(
            jax.ops.segment_sum, segment_ids=classes, num_segments=self.num_classes + 1,
            indices_are_sorted=True,
        )  # fmt: skip
        highest = jax.ops.segment_max(
            jax.lax.stop_gradient(parts), classes, self.num_classes + 1, indices_are_sorted=True
        )
        highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
        totals = add(jnp.exp(parts - highest[classes]))
        is_there = totals > 0
        of_others = jnp.where(is_there, jnp.log(jnp.where(is_there, totals, 1.0)), -jnp.inf)
        return _logaddexp(of_firsts, jnp.moveaxis(of_others + highest, 0, -1))


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabularies:
    """The classes of the tokens of student and teacher.

    Attributes:
      student: of the student's tokens.
      teacher: of the teacher's.
      first: both, of the first token of an output, where a vocabulary begins it with a space that
        is not shown and the other does not; None where it compares as all others do.
    """

    student: Classes
    teacher: Classes
    first: tuple[Classes, Classes] | None = None

    @property
    def num_entries(self) -> int:
        """Classes, what has none, and the span's own text."""
        return self.student.num_classes + 2


@dataclasses.dataclass(frozen=True)
class SpanObjective(Objective):
    """An objective whose divergence is one of spans.

    Attributes:
      vocabularies: how tokens of student and teacher compare.

    Raises:
      ValueError: there are none; a z-loss, which is one of tokens.
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

    def of_logits(
        self,
        logits: Float[Array, "*n V1"],
        teacher: Any,
        targets: Int[Array, "*n"],
        advantages: Float[Array, "*n"] | None,
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n V1"]]:
        """The divergence of each span, and its gradient.

        Args:
          logits: the student's at the span's first token, and in the last place the log
            probability of its further tokens; 0 where there are none.
          teacher: a `_TeacherSpans`.
          targets: the student's first tokens.
          advantages: None.
        """
        del advantages
        assert self.vocabularies is not None
        both, num_entries = self.vocabularies, self.vocabularies.num_entries
        firsts = both.first or (None, None)

        def entries(classes: Classes, first: Classes | None, spans: "_Spans") -> Array:
            return _entries(spans, classes, first, num_entries)

        def of_student(logits: Array) -> Array:
            log_probs = tempered_log_probs(logits[..., :-1], self.student_temperature)
            spans = _Spans(log_probs, logits[..., -1], targets, teacher.labels, teacher.at_start)
            return entries(both.student, firsts[0], spans)

        log_probs = tempered_log_probs(teacher.logits, self.teacher_temperature)
        spans = _Spans(
            log_probs, teacher.further, teacher.targets, teacher.labels, teacher.at_start
        )
        of_teacher = entries(both.teacher, firsts[1], spans)
        student, pullback = jax.vjp(of_student, logits.astype(jnp.float32))
        is_target = _is_entry(teacher.labels[..., None], num_entries)
        compared = VocabularyEntries(student, of_teacher, is_target)
        term, slope = term_and_slope(self.divergence, compared)
        (gradient,) = pullback(slope)
        return jnp.sum(term, axis=-1), gradient


@flax.struct.dataclass
class _TeacherSpans:
    """What there is of the teacher at each span.

    Attributes:
      logits: at its first token there; until they are made, the hidden states.
      further: log-probability of its further tokens; 0 where there are none.
      targets: its first token.
      labels: the entry that the span's text is.
      at_start: True where the span begins the output.
    """

    logits: Float[Array, "*n V"]
    further: Float[Array, "*n"]
    targets: Int[Array, "*n"]
    labels: Int[Array, "*n"]
    at_start: Bool[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class _Spans:
    """Of one side: log-probabilities at the first token, of further tokens, and the rest."""

    log_probs: Float[Array, "*n V"]
    further: Float[Array, "*n"]
    targets: Int[Array, "*n"]
    labels: Int[Array, "*n"]
    at_start: Bool[Array, "*n"]


def _entries(
    spans: _Spans, classes: Classes, first: Classes | None, num_entries: int
) -> Float[Array, "*n E"]:
    """Log-probabilities of the classes, of no class, and of the span's text, which sum to 1."""
    log_probs, targets = spans.log_probs, spans.targets[..., None]
    is_target = _is_entry(targets, log_probs.shape[-1])
    others = jnp.where(is_target, -jnp.inf, log_probs)
    of_target = jnp.take_along_axis(log_probs, targets, axis=-1)
    sums, of_tokens = classes.sums(others), jnp.asarray(classes.of_tokens)[targets]
    if first is not None:
        at_start = spans.at_start[..., None]
        sums = jnp.where(at_start, first.sums(others), sums)
        of_tokens = jnp.where(at_start, jnp.asarray(first.of_tokens)[targets], of_tokens)
    text = jnp.full((*sums.shape[:-1], 1), -jnp.inf, sums.dtype)
    entries = jnp.concatenate([sums, text], axis=-1)
    # The first token was left out: it goes on to the span's text, or to something else.
    further = spans.further[..., None]
    is_one = further == 0
    otherwise = jnp.where(is_one, -jnp.inf, _log1mexp(jnp.where(is_one, -1.0, further)))
    entries = _add(entries, of_tokens, of_target + otherwise)
    return _add(entries, spans.labels[..., None], of_target + further)


def _add(entries: Array, where: Int[Array, "*n 1"], log_prob: Float[Array, "*n 1"]) -> Array:
    """Adds a probability to one entry of each."""
    total = _logaddexp(jnp.take_along_axis(entries, where, axis=-1), log_prob)
    return jnp.put_along_axis(entries, where, total, axis=-1, inplace=False)


def _logaddexp(x: Array, y: Array) -> Array:
    """log(exp(x) + exp(y)), whose gradient is 0 where both are -inf."""
    is_nothing = jnp.isneginf(x) & jnp.isneginf(y)
    total = jnp.logaddexp(jnp.where(is_nothing, 0.0, x), jnp.where(is_nothing, 0.0, y))
    return jnp.where(is_nothing, -jnp.inf, total)


def _is_entry(where: Int[Array, "*n 1"], size: int) -> Bool[Array, "*n E"]:
    """True on one entry of each."""
    shape = (*where.shape[:-1], size)
    return where == jax.lax.broadcasted_iota(where.dtype, shape, where.ndim - 1)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) of x < 0."""
    near = x > -0.693
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


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

    In chunks of spans and of tokens, as `fused_weighted_loss`; the student's output layer runs
    over the further tokens of spans once for their probability and once for its gradient.

    Args:
      objective: the divergence and its settings; its reduction is already in `weights`.
      student: hidden states and head, which get gradients.
      teacher: likewise, of its own tokens; it gets none.
      targets: the student's tokens.
      tokens: the teacher's, and the spans of both.
      weights: final weights: those at the first token of each span count.

    Returns:
      The loss, and the divergence of each span at its first token, 0 elsewhere.
    """
    num_spans = min(targets.shape[1], tokens.targets.shape[1])
    own, is_span = _places(tokens.spans, num_spans)
    theirs, _ = _places(tokens.teacher_spans, num_spans)
    further = _further(
        student, targets, tokens.spans, own, temperature=objective.student_temperature
    )
    weights = jnp.where(is_span, jnp.take_along_axis(weights, own, axis=1), 0.0)
    teacher = teacher.without_gradient()
    of_further = _further(
        teacher, tokens.targets, tokens.teacher_spans, theirs,
        temperature=objective.teacher_temperature,
    )  # fmt: skip
    at_spans = _TeacherSpans(
        logits=_take(teacher.hidden, theirs),
        further=jax.lax.stop_gradient(of_further),
        targets=jnp.take_along_axis(tokens.targets, theirs, axis=1),
        labels=jnp.take_along_axis(tokens.labels, own, axis=1),
        at_start=theirs == 0,
    )

    def with_logits(head: Params, spans: _TeacherSpans) -> _TeacherSpans:
        return dataclasses.replace(spans, logits=teacher.unembed(head, spans.logits))

    loss, values = chunked_loss(
        objective,
        student=_with_further(student, own, further),
        teacher=(at_spans, teacher.head),
        make_teacher=with_logits,
        targets=jnp.take_along_axis(targets, own, axis=1),
        weights=weights,
    )
    number = jnp.maximum(tokens.spans - 1, 0)
    per_token = jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 1))), number, axis=1)
    places = jnp.arange(targets.shape[1])[None, :]
    starts = (tokens.spans > 0) & (jnp.take_along_axis(own, number, axis=1) == places)
    return loss, jax.lax.stop_gradient(jnp.where(starts, per_token, 0.0))


def _with_further(
    student: Predictions, own: Int[Array, "B K"], further: Float[Array, "B K"]
) -> Predictions:
    """The student at the spans, with the probability of further tokens as one more feature."""
    hidden = _take(student.hidden, own).astype(jnp.float32)
    dtype = student.hidden.dtype

    def unembed(head: Params, both: Array) -> Array:
        logits = student.unembed(head, both[..., :-1].astype(dtype))
        return jnp.concatenate([logits.astype(jnp.float32), both[..., -1:]], axis=-1)

    both = jnp.concatenate([hidden, further[..., None]], axis=-1)
    return Predictions(both, student.head, unembed)


def _take(hidden: Float[Array, "B T D"], places: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    return jnp.take_along_axis(hidden, places[..., None], axis=1)


def _places(
    spans: Int[Array, "B T"], num_spans: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """The first token of each span, by its number, and whether there is one."""
    length = spans.shape[1]

    def of_row(row: Array) -> Array:
        empty = jnp.full(num_spans + 1, length, jnp.int32)
        return empty.at[row].min(jnp.arange(length, dtype=jnp.int32), mode="drop")[1:]

    places = jax.vmap(of_row)(spans)
    return jnp.minimum(places, length - 1), places < length


def _further(
    model: Predictions,
    tokens: Int[Array, "B T"],
    spans: Int[Array, "B T"],
    places: Int[Array, "B K"],
    *,
    temperature: float,
) -> Float[Array, "B K"]:
    """Log-probability of each span's tokens after its first; 0 where there are none."""
    number = jnp.maximum(spans - 1, 0)
    here = jnp.arange(tokens.shape[1])[None, :]
    is_further = (spans > 0) & (jnp.take_along_axis(places, number, axis=1) != here)
    settings = Objective(NegativeLogLikelihood(), student_temperature=temperature)
    log_probs = _log_probs(
        (settings, model.unembed), (model.hidden, model.head), (tokens, is_further)
    )

    def of_row(values: Array, row: Array) -> Array:
        return jnp.zeros(places.shape[1] + 1, values.dtype).at[row].add(values, mode="drop")[1:]

    sums = jax.vmap(of_row)(log_probs, spans)
    has_further = jax.vmap(of_row)(is_further.astype(jnp.float32), spans) > 0
    return jnp.where(has_further, jnp.minimum(sums, _LEAST_REST), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(functions: Any, model: Any, constants: Any) -> Float[Array, "B T"]:
    """Log-probability of wanted tokens, 0 of others, in chunks of those that are wanted."""
    settings, unembed = functions
    tokens, wanted = constants
    _, negative = _likelihood(settings, unembed, model, tokens, wanted.astype(jnp.float32))
    return -negative


def _likelihood(
    settings: Objective, unembed: Any, model: Any, tokens: Array, weights: Array
) -> tuple[Array, Array]:
    hidden, head = model
    return chunked_loss(
        settings, student=Predictions(hidden, head, unembed), teacher=None, targets=tokens,
        weights=weights,
    )  # fmt: skip


def _log_probs_forward(functions: Any, model: Any, constants: Any) -> tuple[Array, Any]:
    return _log_probs(functions, model, constants), (model, constants)


def _log_probs_backward(functions: Any, kept: Any, cotangent: Array) -> tuple[Any, None]:
    settings, unembed = functions
    model, (tokens, wanted) = kept
    weights = jnp.where(wanted, -cotangent, 0.0)

    def total(model: Any) -> Array:
        return _likelihood(settings, unembed, model, tokens, weights)[0]

    return jax.grad(total)(model), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def span_metrics(
    tokens: TeacherTokens, loss_weights: Float[Array, "B T"]
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """How well two tokenizations of outputs agree, as sums and weights; jittable.

    `covered_share`: tokens of the student in any span. `one_to_one_share`: tokens that one token
    of the teacher's is. `tokens_per_span`: the student's; `teacher_tokens_per_span`: the
    teacher's.
    """
    num_spans = min(tokens.spans.shape[1], tokens.targets.shape[1])

    def counts(row: Array) -> Array:
        return jnp.zeros(num_spans + 1).at[row].add(1.0, mode="drop")[1:]

    own, theirs = jax.vmap(counts)(tokens.spans), jax.vmap(counts)(tokens.teacher_spans)
    total = jnp.sum((loss_weights > 0).astype(jnp.float32))
    spans = jnp.sum(own > 0).astype(jnp.float32)
    return {
        "covered_share": (jnp.sum(own), total),
        "one_to_one_share": (jnp.sum((own == 1) & (theirs == 1)).astype(jnp.float32), total),
        "tokens_per_span": (jnp.sum(own), spans),
        "teacher_tokens_per_span": (jnp.sum(theirs), spans),
    }
