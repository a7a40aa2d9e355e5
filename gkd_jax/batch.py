"""The one type that flows from data to rollout to step."""

import flax.struct

from gkd_jax.array_types import Array, Bool, Float, Int


@flax.struct.dataclass
class Batch:
    """Prompts and outputs, in the words of a seqio task.

    Masks and weights are explicit, so nothing is ever inferred from a padding id: a
    vocabulary may use its end-of-sequence id as padding, or have none at all.

    Attributes:
      inputs: prompt tokens, padded on the right.
      inputs_mask: True on the real tokens of `inputs`.
      targets: output tokens including the end-of-sequence token, padded on the right. From
        the data, from a teacher or sampled by the student: the step cannot tell.
      loss_weights: 1 up to and including the end of the output, 0 after it.
      example_id: position in the global order of examples, from which random keys are
        derived; -1 marks a filler row that completes a short last batch and counts nowhere.
      sample_log_probs: log-probabilities of `targets` under the sampling policy, where they
        were sampled.
      advantages: A_t of each token of `targets`, by which a policy gradient weighs it; constants,
        with no gradient to whatever they were made from. 0 where `loss_weights` is.
      importance: factor of each token's loss where outputs were drawn from another distribution
        than the student's; it is no part of what a mean divides by.
    """

    inputs: Int[Array, "B S"]
    inputs_mask: Bool[Array, "B S"]
    targets: Int[Array, "B T"]
    loss_weights: Float[Array, "B T"]
    example_id: Int[Array, " B"]
    sample_log_probs: Float[Array, "B T"] | None = None
    advantages: Float[Array, "B T"] | None = None
    importance: Float[Array, "B T"] | None = None
