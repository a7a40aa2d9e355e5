"""Learning-rate schedules and optimizers as frozen dataclasses.

Steps are counted from 0, so `schedule(0)` is the learning rate of the first update. With a warm-up
of W steps, the learning rate is multiplied by `(step + 1) / W` during the warm-up, so the first
update has `learning_rate / W`. T5X's `linear_warmup` multiplies by `step / W`, so its first update
has a learning rate of 0. The schedules here are one step ahead of T5X during the warm-up, and equal
to T5X's afterwards.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gkd_jax.common.array_types import Array, Float, Int, Params, PyTree
from gkd_jax.models import stacking

Schedule: TypeAlias = Callable[[Int[Array, ""] | int], Float[Array, ""]]
"""Function of the step, counted from 0, that returns the learning rate, float32. Can be jitted."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant learning rate after a linear warm-up, as GKD uses for fine-tuning.

    rate(step) = learning_rate * min(1, (step + 1) / warmup_steps)

    Attributes:
      learning_rate: rate after the warm-up.
      warmup_steps: number of updates until the rate is reached; 0 for no warm-up.
    """

    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_schedule(self)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        return jnp.float32(self.learning_rate) * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
    """Warm-up, then decay with the inverse square root of the step: T5's pretraining schedule.

    With W = warmup_steps,

    rate(step) = learning_rate * min(1, (step + 1) / W) * sqrt(W / max(step, W)).

    This is T5X's `constant * linear_warmup * rsqrt_normalized_decay`, in which `learning_rate` is
    the peak. (With T5X's `rsqrt_decay` the peak is `learning_rate / sqrt(W)`.)

    Attributes:
      learning_rate: peak learning rate, at the end of the warm-up.
      warmup_steps: length of the warm-up, at least 1. It also sets the time scale of the decay.
    """

    learning_rate: float
    warmup_steps: int = 10_000

    def __post_init__(self) -> None:
        _check_schedule(self)
        if self.warmup_steps < 1:
            raise ValueError(
                f"InverseSquareRoot.warmup_steps must be at least 1; got {self.warmup_steps}. "
                "The decay is measured in warm-up lengths: set it to 1 for almost no warm-up."
            )

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        past = jnp.maximum(jnp.asarray(step, jnp.float32), self.warmup_steps)
        peak = jnp.float32(self.learning_rate) * _warmup(step, self.warmup_steps)
        return peak * jnp.sqrt(self.warmup_steps / past)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Warm-up to `learning_rate`, then linear decay to `end` at step `decay_steps`.

    rate(step) = end + (learning_rate - end) * (1 - p)

    with p = (step - warmup_steps) / (decay_steps - warmup_steps) clipped to [0, 1]. During the
    warm-up the rate is learning_rate * (step + 1) / warmup_steps.

    Attributes:
      learning_rate: peak learning rate, at the end of the warm-up.
      decay_steps: step at which `end` is reached, warm-up included; usually the number of training
        steps. Later steps use `end`.
      warmup_steps: number of updates until the peak is reached; 0 for no warm-up.
      end: final learning rate.
    """

    learning_rate: float
    decay_steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self)
        _check_decay(self)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        return _decay(self, step, lambda progress: 1.0 - progress)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Warm-up to `learning_rate`, then cosine decay to `end` at step `decay_steps`.

    The formula is the same as for `Linear`, with (1 + cos(pi p)) / 2 in place of 1 - p.

    Attributes:
      learning_rate: peak learning rate, at the end of the warm-up.
      decay_steps: step at which `end` is reached, warm-up included; usually the number of training
        steps. Later steps use `end`.
      warmup_steps: number of updates until the peak is reached; 0 for no warm-up.
      end: final learning rate.
    """

    learning_rate: float
    decay_steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self)
        _check_decay(self)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        return _decay(self, step, lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor, with the settings that T5 uses for fine-tuning.

    The defaults are the same as in T5X's T5 configurations of `adafactor.Adafactor`: relative step
    sizes, updates clipped at a root mean square of 1, no momentum and no weight decay. The second
    moment has decay 1 - t^-0.8, and is factored over the two largest axes if both have at least 128
    entries. The updates agree with T5X's on parameters of at most two axes, which are the only kind
    in T5. For stacked or fused parameters T5X has factoring rules of its own.

    Reference: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235.

    Attributes:
      schedule: learning rate as a function of the step, e.g. `Constant(1e-3)`. It is multiplied by
        the scale of each parameter if `multiply_by_parameter_scale` is True.
      decay_rate: exponent of the second moment's decay, between 0 and 1.
      clipping_threshold: maximum root mean square of one parameter's update before multiplication
        with the learning rate, at least 1; None for no clipping.
      multiply_by_parameter_scale: whether each update is scaled by the root mean square of its
        parameter (at least 1e-3).
      min_dim_size_to_factor: smallest size of an axis that is factored.
      epsilon: constant added to squared gradients.
      momentum: decay of a moving average of updates; None for no momentum, which saves the memory
        of the average.
      max_grad_norm: maximum global norm of the gradient, applied first; None for no clipping.
    """

    schedule: Schedule
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    min_dim_size_to_factor: int = 128
    epsilon: float = 1e-30
    momentum: float | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        _check_callable("Adafactor", self.schedule)
        _check_range("Adafactor.decay_rate", self.decay_rate, above=0.0, below=1.0)
        if self.clipping_threshold is not None and not self.clipping_threshold >= 1.0:
            raise ValueError(
                "Adafactor.clipping_threshold must be at least 1; got "
                f"{self.clipping_threshold}. Set it to 1.0, or to None for no clipping."
            )
        if self.min_dim_size_to_factor < 1:
            raise ValueError(
                "Adafactor.min_dim_size_to_factor must be positive; got "
                f"{self.min_dim_size_to_factor}. T5 uses 128."
            )
        _check_range("Adafactor.epsilon", self.epsilon, above=0.0)
        if self.momentum is not None:
            _check_range("Adafactor.momentum", self.momentum, above=0.0, below=1.0)
        if self.max_grad_norm is not None:
            _check_range("Adafactor.max_grad_norm", self.max_grad_norm, above=0.0)

    def build(self) -> optax.GradientTransformation:
        """Builds the optax transformation. Its state is float32 for parameters of any dtype."""
        adafactor = optax.adafactor(
            learning_rate=self.schedule,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=self.momentum,
            eps=self.epsilon,
        )
        return _finish(adafactor, self.max_grad_norm)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    As is common, the decay is multiplied by the learning rate and is not applied to norms, biases
    and other parameters of fewer than two axes (see `decay_mask`).

    Reference: "Decoupled Weight Decay Regularization", arXiv 1711.05101.

    Attributes:
      schedule: learning rate as a function of the step, e.g. `Cosine(3e-4, decay_steps=10_000)`.
      b1: decay of the first moment of the gradients.
      b2: decay of the second moment of the gradients.
      eps: constant added to the square root of the second moment.
      weight_decay: decay per step, as a multiple of the learning rate.
      max_grad_norm: maximum global norm of the gradient, applied first; None for no clipping.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        _check_callable("AdamW", self.schedule)
        _check_range("AdamW.b1", self.b1, at_least=0.0, below=1.0)
        _check_range("AdamW.b2", self.b2, at_least=0.0, below=1.0)
        _check_range("AdamW.eps", self.eps, above=0.0)
        _check_range("AdamW.weight_decay", self.weight_decay, at_least=0.0)
        if self.max_grad_norm is not None:
            _check_range("AdamW.max_grad_norm", self.max_grad_norm, above=0.0)

    def build(self) -> optax.GradientTransformation:
        """Builds the optax transformation. Its state is float32 for parameters of any dtype."""
        adamw = optax.adamw(
            self.schedule,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=decay_mask,
        )
        return _finish(adamw, self.max_grad_norm)


Optimizer: TypeAlias = Adafactor | AdamW


def decay_mask(params: Params) -> PyTree[bool]:
    """Returns which parameters weight decay applies to.

    Weight decay applies neither to parameters of fewer than two axes nor to parameters whose path
    contains a norm, a scale or a bias. The path matters because some of them have two axes: T5's
    relative position biases, and norms that are stacked over layers.

    Args:
      params: parameters, or their shapes.

    Returns:
      A tree of booleans with the same structure.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")
        exempt = any("norm" in name or "bias" in name for name in names) or names[-1] == "scale"
        return leaf.ndim >= 2 and not exempt

    return jax.tree_util.tree_map_with_path(decays, params)


def _finish(
    optimizer: optax.GradientTransformation, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """Adds global-norm clipping before the optimizer, and runs both in float32."""
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    return _in_float32(optax.chain(*clip, _layer_by_layer(optimizer)))


def _layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to each of several stacked layers separately.

    Adafactor then scales and clips by the root mean square over one layer instead of over all
    layers of a stack. If no layers are stacked, the state is the state of `inner`.
    """

    def init(params: Params) -> Any:
        stacks, rest = stacking.split(params)
        if not stacks:
            return inner.init(params)
        return [jax.vmap(inner.init)(stack) for stack in stacks], inner.init(rest)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacks, rest = stacking.split(updates)
        if not stacks:
            return inner.update(updates, state, params)
        stacks_params, rest_params = stacking.split(params)
        results = [
            jax.vmap(inner.update)(*arguments)
            for arguments in zip(stacks, state[0], stacks_params, strict=True)
        ]
        rest, rest_state = inner.update(rest, state[1], rest_params)
        updates = stacking.merge([stack for stack, _ in results], rest)
        return updates, ([of_stack for _, of_stack in results], rest_state)

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on float32 copies, so that its state never has a lower precision.

    optax takes the dtype of the state from the parameters. A second moment in bfloat16 would stop
    changing, since its decay per step is smaller than half a unit in the last place.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    def init(params: Params) -> Any:
        return inner.init(cast(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)


def _warmup(step: Int[Array, ""] | int, warmup_steps: int) -> Float[Array, ""]:
    if warmup_steps == 0:
        return jnp.float32(1.0)
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1.0) / warmup_steps)


def _decay(
    schedule: Linear | Cosine,
    step: Int[Array, ""] | int,
    shape: Callable[[Float[Array, ""]], Float[Array, ""]],
) -> Float[Array, ""]:
    """Returns the learning rate: a warm-up, then a decay.

    `shape` maps the progress of the decay, from 0 (at the peak) to 1 (at `end`), to the fraction of
    `learning_rate - end` that remains.
    """
    warmup_steps, peak = schedule.warmup_steps, jnp.float32(schedule.learning_rate)
    progress = (jnp.asarray(step, jnp.float32) - warmup_steps) / (
        schedule.decay_steps - warmup_steps
    )
    decayed = schedule.end + (peak - schedule.end) * shape(jnp.clip(progress, 0.0, 1.0))
    return jnp.where(progress < 0.0, peak * _warmup(step, warmup_steps), decayed)


def _check_schedule(schedule: Any) -> None:
    name = type(schedule).__name__
    _check_range(f"{name}.learning_rate", schedule.learning_rate, at_least=0.0)
    if schedule.warmup_steps < 0:
        raise ValueError(
            f"{name}.warmup_steps must not be negative; got {schedule.warmup_steps}. "
            "Set it to 0 for no warm-up."
        )


def _check_decay(schedule: Linear | Cosine) -> None:
    name = type(schedule).__name__
    if schedule.decay_steps <= schedule.warmup_steps:
        raise ValueError(
            f"{name}.decay_steps counts the warm-up too and must exceed warmup_steps; got "
            f"{schedule.decay_steps} and {schedule.warmup_steps}. Set decay_steps to the number "
            "of training steps, or shorten the warm-up."
        )
    _check_range(f"{name}.end", schedule.end, at_least=0.0)
    if schedule.end > schedule.learning_rate:
        raise ValueError(
            f"{name}.end must not exceed learning_rate; got {schedule.end} and "
            f"{schedule.learning_rate}. `end` is a rate, not a fraction of learning_rate."
        )


def _check_callable(name: str, schedule: Any) -> None:
    if not callable(schedule):
        raise ValueError(
            f"{name}.schedule must be a schedule; got {schedule!r}. "
            "Write Constant(learning_rate=...) for a fixed rate."
        )


def _check_range(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ValueError unless `value` is finite and within the given bounds."""
    ok = math.isfinite(value)
    wanted: list[str] = []
    if above is not None:
        ok, wanted = ok and value > above, [*wanted, f"above {above:g}"]
    if at_least is not None:
        ok, wanted = ok and value >= at_least, [*wanted, f"at least {at_least:g}"]
    if below is not None:
        ok, wanted = ok and value < below, [*wanted, f"below {below:g}"]
    if not ok:
        raise ValueError(
            f"{name} must be {' and '.join(wanted)}; got {value}. Set {name} to such a number."
        )
