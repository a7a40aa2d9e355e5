"""The type `Batch`, which is passed from the data pipeline to rollout and training step."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Array, Bool, Float, Int


@flax.struct.dataclass
class TeacherDistributions:
    """A teacher's next-token distribution for each output token of a batch, computed in advance.

    A distribution consists either of all entries of the vocabulary, or of some entries and a tail.
    The tail is the total probability of all other tokens, so that entries and tail sum to 1. The
    teacher's temperature is already applied.

    Attributes:
      log_probs: log-probability of each of E entries; -inf if the probability is 0.
      ids: token ids of the entries, all different. The id -1 marks an unused entry, whose
        log-probability is -inf. None if the entries are the whole vocabulary in order.
      tail: log of the total probability of all other tokens; None if there are no others.
    """

    log_probs: Float[Array, "B T E"]
    ids: Int[Array, "B T E"] | None = None
    tail: Float[Array, "B T"] | None = None


@flax.struct.dataclass
class TeacherTokens:
    """The outputs of a batch in the vocabulary of a teacher, if it differs from the student's.

    Spans align the two tokenizations. A span is the text between two consecutive positions at which
    both tokenizations have a token boundary. The end of sequence is a span of its own.

    Attributes:
      targets: token ids of the outputs in the teacher's vocabulary, padded on the right.
      loss_weights: 1 on real tokens, 0 on padding.
      spans: for each of the student's tokens, the number of its span; numbers start at 1 and
        increase along a row, and 0 marks tokens outside of all spans.
      teacher_spans: the same for the teacher's tokens.
      labels: for each of the student's tokens, the index of the entry to which the probability of
        its span's text is added, in the distributions that `objectives.spans` compares.
    """

    targets: Int[Array, "B U"]
    loss_weights: Float[Array, "B U"]
    spans: Int[Array, "B T"]
    teacher_spans: Int[Array, "B U"]
    labels: Int[Array, "B T"]


@flax.struct.dataclass
class Batch:
    """Prompts and outputs. The fields `inputs` and `targets` are named as in seqio.

    Masks and weights are explicit and never inferred from a padding id: a vocabulary may use its
    end-of-sequence token as padding, or have no padding token.

    In a packed batch a row holds several examples: their prompts are concatenated in `inputs` and
    their outputs in `targets`. Models process the examples of a row independently of each other. A
    mean over sequences is taken over outputs, not over rows.

    Examples:
      The pipeline makes a batch of two additions, '1+1=' with output '2' and '20+3=' with output
      '23'. The vocabulary consists of bytes. The last token of each output is the end of sequence
      (1); padding is 0.

      >>> from gkd_jax import data
      >>> from gkd_jax.data.vocabularies import ByteVocabulary
      >>> source = data.InMemory([{"inputs": "1+1=", "targets": "2"},
      ...                         {"inputs": "20+3=", "targets": "23"}])
      >>> config = data.DatasetConfig(
      ...     task=data.Task("sums", {"train": source}, data.FieldsToText(), inputs_eos=False),
      ...     split="train",
      ...     feature_lengths={"inputs": 6, "targets": 4},
      ...     batch_size=2,
      ...     vocabulary=ByteVocabulary(),
      ...     shuffle=False,
      ... )
      >>> batch = next(config.build().train_iterator())
      >>> batch.inputs
      array([[52, 46, 52, 64,  0,  0],
             [53, 51, 46, 54, 64,  0]], dtype=int32)
      >>> batch.inputs_mask.astype(int)
      array([[1, 1, 1, 1, 0, 0],
             [1, 1, 1, 1, 1, 0]])
      >>> batch.targets
      array([[53,  1,  0,  0],
             [53, 54,  1,  0]], dtype=int32)
      >>> batch.loss_weights
      array([[1., 1., 0., 0.],
             [1., 1., 1., 0.]], dtype=float32)
      >>> batch.example_id
      array([0, 1], dtype=int32)

    Attributes:
      inputs: prompt tokens, padded on the right.
      inputs_mask: True on the real tokens of `inputs`.
      targets: output tokens including the end-of-sequence token, padded on the right. They come
        from the data or from a teacher, or were sampled by the student; the training step does not
        distinguish these cases.
      loss_weights: 1 up to and including the end of the output, 0 after it.
      example_id: position in the global order of examples, from which random keys are derived. The
        id -1 marks a filler row, which completes a short last batch and is ignored everywhere. A
        packed row has the id of its first example.
      sample_log_probs: log-probabilities of `targets` under the sampling distribution, if they were
        sampled.
      advantages: A_t, the weight of each token of `targets` in a policy gradient. Advantages are
        treated as constants: no gradient flows through them. 0 where `loss_weights` is 0.
      importance: importance weight that multiplies the loss of each token, if outputs were sampled
        from a distribution other than the student's. The divisor of a mean loss does not include
        this factor.
      source_id: index of the example's source in the mixture, if each source has its own teacher.
        In packed rows there is one index for each output position.
      teacher_inputs: prompt of the teacher, padded on the right, if its template or vocabulary
        differs from the student's.
      teacher_inputs_mask: True on the real tokens of `teacher_inputs`.
      stored_teacher: the stored distributions of a teacher for `targets`, if a store is used.
      inputs_segments: for packed rows, the example that each prompt token belongs to: 1, 2, ... in
        order, and 0 on padding. None if each row holds one example.
      targets_segments: the same for output tokens.
      teacher_inputs_segments: the same for `teacher_inputs`.
      teacher_tokens: the outputs in the teacher's vocabulary, if that differs from the student's.
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
        """Returns the batch with the teacher's prompts and tokens in place of the student's.

        Fields that teacher and student share are unchanged.
        """
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
        """`loss_weights` at the positions where a divergence is computed, 0 elsewhere.

        With `teacher_tokens` a divergence is computed at the first token of each span.
        """
        if self.teacher_tokens is None:
            return self.loss_weights
        spans = self.teacher_tokens.spans
        # Tokens without text have span 0 and may be between two tokens of one span. The running
        # maximum is the number of the last span before each token.
        before = jax.lax.cummax(jnp.pad(spans[:, :-1], ((0, 0), (1, 0))), axis=1)
        return jnp.where(spans > before, self.loss_weights, 0.0)
