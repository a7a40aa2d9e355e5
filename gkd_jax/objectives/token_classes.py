"""Classes of tokens that two vocabularies have in common.

Student and teacher with different vocabularies are compared on classes. A class consists of the
tokens of both vocabularies that begin with the same text (`data.common_text` finds the classes).
The probability of a class under a model is the sum over the model's tokens in the class.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """The class of each entry of one model's output layer.

    Attributes:
      of_tokens: class of each token, from 0 to `num_classes`. The last class, `num_classes`, holds
        the tokens that begin with no common text.
      num_classes: number of classes, not counting that last class.
    """

    of_tokens: Int[np.ndarray, " V"]
    num_classes: int

    @functools.cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three arrays: one token per class, the other tokens, and the classes of these others.

        An empty class has -1 in the first array. The other tokens are sorted by class.
        """
        firsts = np.full(self.num_classes + 1, -1, np.int32)
        classes, where = np.unique(self.of_tokens, return_index=True)
        firsts[classes] = where
        order = np.argsort(self.of_tokens, kind="stable").astype(np.int32)
        others = order[~np.isin(order, where)]
        return firsts, others, self.of_tokens[others]

    def sums(self, log_probs: Float[Array, "*n V"]) -> Float[Array, "*n E1"]:
        """Returns the log of each class's probability; -inf for a class without tokens.

        Most classes have one token, whose log-probability is gathered. A sum is computed only for
        classes with several tokens.
        """
        firsts, others, classes = self._tokens
        first_log_probs = log_probs[..., np.maximum(firsts, 0)]
        missing = np.broadcast_to(firsts < 0, first_log_probs.shape)
        first_log_probs = jnp.where(missing, -jnp.inf, first_log_probs)
        if not others.size:
            return first_log_probs
        # Probabilities are divided by the largest one in their class, so that sums of small
        # probabilities do not underflow.
        other_log_probs = jnp.moveaxis(log_probs[..., others], -1, 0)
        add = functools.partial(
            jax.ops.segment_sum, segment_ids=classes, num_segments=self.num_classes + 1,
            indices_are_sorted=True,
        )  # fmt: skip
        highest = jax.ops.segment_max(
            jax.lax.stop_gradient(other_log_probs), classes, self.num_classes + 1,
            indices_are_sorted=True,
        )  # fmt: skip
        highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
        totals = add(jnp.exp(other_log_probs - highest[classes]))
        positive = totals > 0
        log_totals = jnp.where(positive, jnp.log(jnp.where(positive, totals, 1.0)), -jnp.inf)
        return logaddexp(first_log_probs, jnp.moveaxis(log_totals + highest, 0, -1))


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabularies:
    """The classes of the student's and of the teacher's tokens.

    Attributes:
      student: classes of the student's tokens.
      teacher: classes of the teacher's tokens.
      first: classes (student, teacher) for the first token of an output. They differ from `student`
        and `teacher` if only one of the two vocabularies begins an output with a space that
        decoding drops. None if the first token has the same classes as all other tokens.
    """

    student: Classes
    teacher: Classes
    first: tuple[Classes, Classes] | None = None

    @property
    def num_entries(self) -> int:
        """Number of entries compared: all classes, including the last, and the span's own text."""
        return self.student.num_classes + 2


def logaddexp(x: Array, y: Array) -> Array:
    """Returns log(exp(x) + exp(y)), with gradient 0 where both are -inf."""
    is_nothing = jnp.isneginf(x) & jnp.isneginf(y)
    total = jnp.logaddexp(jnp.where(is_nothing, 0.0, x), jnp.where(is_nothing, 0.0, y))
    return jnp.where(is_nothing, -jnp.inf, total)
