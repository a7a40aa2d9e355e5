"""The one type that flows from data to rollout to step, and what a store adds to it."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int


@flax.struct.dataclass
class TeacherDistributions:
    """A teacher's next-token distributions at a batch's outputs, made once and kept (a store).

    Of the whole vocabulary, or of some entries of it, the rest of which is one more entry, the
    tail. The teacher's temperature is in them. Together with the tail they sum to 1.

    Attributes:
      log_probs: log p of each of E entries; -inf where it is 0.
      ids: the entries' tokens, all different; -1 for a place that holds none, whose log p is
        -inf. None: the entries are the whole vocabulary in its order.
      tail: log of the probability of all other tokens together; None where there are no others.
    """

    log_probs: Float[Array, "B T E"]
    ids: Int[Array, "B T E"] | None = None
    tail: Float[Array, "B T"] | None = None


@flax.struct.dataclass
class TeacherTokens:
    """A batch's outputs in the tokens of a teacher with another vocabulary, and their spans.

    A span is a text that neighbouring tokens of both write, the shortest there are. The end of
    sequence is one too.

    Attributes:
      targets: the teacher's tokens of the outputs, padded on the right.
      loss_weights: 1 on its real tokens, 0 after them.
      spans: the number of the span of each of the student's tokens, from 1 and rising along a
        row; 0 on tokens of none.
      teacher_spans: likewise of the teacher's.
      labels: on each of the student's tokens, the entry that its span is of the distributions
        that are compared (`objectives.spans`).
    """

    targets: Int[Array, "B U"]
    loss_weights: Float[Array, "B U"]
    spans: Int[Array, "B T"]
    teacher_spans: Int[Array, "B U"]
    labels: Int[Array, "B T"]


@flax.struct.dataclass
class Batch:
    """Prompts and outputs, in the words of a seqio task.

    Masks and weights are explicit, so nothing is ever inferred from a padding id: a
    vocabulary may use its end-of-sequence id as padding, or have none at all.

    Packed, a row holds several examples: their prompts one behind the other in `inputs`, their
    outputs in `targets`. Models let none of them see another, and a mean over sequences is one
    over outputs, not over rows.

    Attributes:
      inputs: prompt tokens, padded on the right.
      inputs_mask: True on the real tokens of `inputs`.
      targets: output tokens including the end-of-sequence token, padded on the right. From
        the data, from a teacher or sampled by the student: the step cannot tell.
      loss_weights: 1 up to and including the end of the output, 0 after it.
      example_id: position in the global order of examples, from which random keys are
        derived; -1 marks a filler row that completes a short last batch and counts nowhere. Of a
        packed row that of its first example.
      sample_log_probs: log-probabilities of `targets` under the sampling policy, where they
        were sampled.
      advantages: A_t of each token of `targets`, by which a policy gradient weighs it; constants,
        with no gradient to whatever they were made from. 0 where `loss_weights` is.
      importance: factor of each token's loss where outputs were drawn from another distribution
        than the student's; it is no part of what a mean divides by.
      source_id: number of the source in the data's mixture that an example comes from, where
        teachers are chosen by it; of packed rows that of each output position's example.
      teacher_inputs: the prompt as the teacher reads it, padded on the right, where its template
        or its vocabulary is another than the student's.
      teacher_inputs_mask: True on the real tokens of `teacher_inputs`.
      stored_teacher: what a store holds of the teacher for `targets`, where one teaches.
      inputs_segments: of packed rows, which example of its row a prompt token is of, from 1 on in
        order; 0 is padding. None where a row is one example.
      targets_segments: the same of output tokens.
      teacher_inputs_segments: the same of `teacher_inputs`.
      teacher_tokens: `targets` in the teacher's tokens, where its vocabulary is another.
    """

    inputs: Int[Array, "B S"]
    inputs_mask: Bool[Array, "B S"]
    targets: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    example_id: Int[Array, " B"]
    sample_log_probs: Float[Array, "B T"] | None = None
    advantages: Float[Array, "B T"] | None = None
    importance: Float[Array, "B T"] | None = None
    source_id: Int[Array, " B"] | Int[Array, "B T"] | None = None
    teacher_inputs: Int[Array, "B Z"] | None = None
    teacher_inputs_mask: Bool[Array, "B Z"] | None = None
    stored_teacher: TeacherDistributions | None = None
    inputs_segments: Int[Array, "B S"] | None = None
    targets_segments: Int[Array, "B T"] | None = None
    teacher_inputs_segments: Int[Array, "B Z"] | None = None
    teacher_tokens: TeacherTokens | None = None

    def as_teacher_reads(self) -> "Batch":
        """The batch with the teacher's prompts and tokens, where they are others."""
        batch = self
        if self.teacher_inputs is not None:
            assert self.teacher_inputs_mask is not None
            batch = dataclasses.replace(
                batch,
                inputs=self.teacher_inputs,
                inputs_mask=self.teacher_inputs_mask,
                inputs_segments=self.teacher_inputs_segments,
                teacher_inputs=None,
                teacher_inputs_mask=None,
                teacher_inputs_segments=None,
            )
        if self.teacher_tokens is not None:
            batch = dataclasses.replace(
                batch,
                targets=self.teacher_tokens.targets,
                loss_weights=self.teacher_tokens.loss_weights,
                teacher_tokens=None,
            )
        return batch

    @property
    def measured_weights(self) -> Float[Array, "B T"]:
        """`loss_weights` where a divergence is measured: of a span at its first token alone."""
        if self.teacher_tokens is None:
            return self.loss_weights
        spans = self.teacher_tokens.spans
        # A token without text may stand between two of one span.
        before = jax.lax.cummax(jnp.pad(spans[:, :-1], ((0, 0), (1, 0))), axis=1)
        return jnp.where(spans > before, self.loss_weights, 0.0)
