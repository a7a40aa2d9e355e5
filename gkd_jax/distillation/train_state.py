"""The training state: all arrays that an update changes and that a checkpoint stores."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gkd_jax.common.array_types import Array, Int, Params


@flax.struct.dataclass
class TrainState:
    """All arrays that training changes; the content of a checkpoint.

    Attributes:
      step: number of updates so far. Skipped steps are not counted.
      params: the student's trainable parameters, float32. If the student has adapters, its frozen
        parameters are not part of the state: they are passed to the step as an argument.
      opt_state: the optimizer's state.
      average: moving average of `params`, if one of the teacher's sources is `Average`; otherwise
        None, which adds no leaf to the pytree.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    average: Params | None = None


def init_train_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_average: bool = False
) -> TrainState:
    """Builds the state before the first step; the average, if kept, starts as a copy of `params`.

    Args:
      params: the student's trainable parameters.
      optimizer: optimizer whose state is initialized from `params`.
      with_average: whether a moving average of the parameters is kept.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: a state in which two leaves share a buffer could not be donated.
        average=jax.tree.map(jnp.copy, params) if with_average else None,
    )


def update_average(average: Params, params: Params, *, decay: float) -> Params:
    """Returns the moving average after an update: decay * average + (1 - decay) * params."""
    # In this form the average of two equal numbers is exact.
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
