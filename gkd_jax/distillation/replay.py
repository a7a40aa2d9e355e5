"""Replay: training again on outputs that the student sampled at earlier steps.

Sampling takes most of the time of an on-policy step. "DistiLLM: Towards Streamlined Distillation
for Large Language Models", arXiv 2402.03898, keeps sampled outputs in a buffer, trains on draws
from it, and samples new outputs less often as training proceeds.

The buffer stores the outputs of the last K rollouts as arrays [B, K, ...]. Row b of the buffer
holds row b of each of these rollouts. Row b of a drawn batch is one of the K outputs in row b of
the buffer, chosen at random for each row. Rows therefore stay on their device and in their process,
nothing is copied to the host, and the draws do not depend on the number of devices or processes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Array, Int, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.objectives.mixing import FractionSchedule, host_generator

# Separates these draws from other uses of the same seed.
_REPLAY_STREAM = 0x6B64726570


@dataclasses.dataclass(frozen=True)
class FallingRefresh:
    """DistiLLM's schedule of the probability of sampling new outputs: 1 - step / num_steps.

    Attributes:
      num_steps: number of training steps.

    Raises:
      ValueError: `num_steps` is not a positive integer.
    """

    num_steps: int

    def __post_init__(self) -> None:
        if not (isinstance(self.num_steps, int) and self.num_steps >= 1):
            raise ValueError(
                "FallingRefresh.num_steps must be a whole number from 1 on; got "
                f"{self.num_steps!r}. Set it to the number of training steps."
            )

    def __call__(self, step: int) -> float:
        """Returns 1 - step / num_steps, and 0 after the last step."""
        return max(0.0, 1.0 - step / self.num_steps)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Settings of the replay buffer.

    `OutputMix` decides which steps are on-policy. In such a step, the student samples new outputs
    with probability `refresh`, or always while the buffer is not full. The step trains on the new
    outputs, which replace the oldest outputs in the buffer. If no outputs are sampled, the step
    trains on outputs from the buffer with their own prompts, and skips the prompts of the data's
    batch.

    Attributes:
      capacity: number of outputs in the buffer, over all devices. Whole rollouts are stored, so the
        capacity is rounded down to a multiple of a rollout's rows. In device memory and in every
        checkpoint, an output takes 5 bytes per token of the longest prompt, plus 8 bytes per token
        of the longest output, plus 4 bytes.
      refresh: probability of sampling new outputs, in [0, 1], or a schedule of the step such as
        `FallingRefresh`. With 1 no output is used again. With 0 no output is replaced once the
        buffer is full.

    Raises:
      ValueError: a setting is out of range.
    """

    capacity: int = 1000
    refresh: float | FractionSchedule = 0.5

    def __post_init__(self) -> None:
        if not (isinstance(self.capacity, int) and self.capacity >= 1):
            raise ValueError(
                f"Replay.capacity must be a whole number from 1 on; got {self.capacity!r}. Set it "
                "to the number of outputs to keep, at least a batch."
            )
        if not callable(self.refresh) or isinstance(self.refresh, type):
            _check_probability(self.refresh)

    def num_slots(self, num_rows: int) -> int:
        """Returns how many rollouts of `num_rows` outputs the buffer holds.

        Raises:
          ValueError: the capacity is smaller than one rollout.
        """
        if self.capacity < num_rows:
            raise ValueError(
                "Replay.capacity must hold the outputs of one rollout at least; got "
                f"{self.capacity}, and {num_rows} outputs a rollout (DatasetConfig.batch_size * "
                f"Rollout.num_samples). Set it to {num_rows} or more."
            )
        return self.capacity // num_rows

    def is_refreshed(self, step: int, *, seed: int) -> bool:
        """Decides whether a step samples new outputs.

        The decision depends on (seed, step) alone, so that all hosts agree.

        Raises:
          ValueError: the schedule returned a value outside [0, 1].
        """
        refresh = self.refresh(step) if callable(self.refresh) else self.refresh
        # `coin` is in (0, 1]: with a probability of 0 no step samples, with 1 every step does.
        coin = 1.0 - host_generator(_REPLAY_STREAM, seed=seed, step=step).random()
        return bool(coin <= _check_probability(refresh))


def _check_probability(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(
            "Replay.refresh must be a probability from 0 (kept outputs only, once the buffer is "
            f"full) to 1 (new outputs only), or a schedule; got {value!r}. Set Replay.refresh "
            "inside that range (a schedule in gin: @FallingRefresh() with brackets)."
        )
    return float(value)


class ReplayBuffer:
    """Buffer of the last rollouts' outputs, with arrays on devices and bookkeeping on the host.

    The buffer is saved with the training state: `attach` returns the arrays and `host_part` the
    bookkeeping. Neither depends on the mesh or on the number of processes.
    """

    def __init__(
        self,
        settings: Replay,
        rollout: PyTree[jax.ShapeDtypeStruct],
        partitioner: Partitioner,
        *,
        seed: int,
    ):
        """Creates an empty buffer.

        Args:
          settings: capacity, and how often new outputs are sampled.
          rollout: shapes and dtypes of the batches to store.
          partitioner: shards the buffer over devices like a batch.
          seed: the run's seed.

        Raises:
          ValueError: the capacity is smaller than one rollout.
        """
        self.settings = settings
        self.num_rows = jax.tree.leaves(rollout)[0].shape[0]
        self.num_slots = settings.num_slots(self.num_rows)
        self.steps: list[int] = []
        self.num_written = 0
        self._seed = seed
        self._partitioner = partitioner
        self.abstract: PyTree[jax.ShapeDtypeStruct] = jax.tree.map(self._abstract_leaf, rollout)
        self._arrays: Any = None

    def _abstract_leaf(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (leaf.shape[0], self.num_slots, *leaf.shape[1:])
        sharding = self._partitioner.batch_sharding
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    @property
    def arrays(self) -> Batch:
        """The stored outputs, [B, K, ...]; zeros where nothing has been written yet."""
        if self._arrays is None:
            shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self.abstract)]
            zeros = _jit_zeros(tuple(shapes), self._partitioner)()
            self._arrays = jax.tree.unflatten(jax.tree.structure(self.abstract), zeros)
        return self._arrays

    def add(self, outputs: Batch, step: int) -> None:
        """Stores the outputs that the student sampled in a step, in place of the oldest outputs."""
        slot = self.num_written % self.num_slots
        self._arrays = _jit_write(self._partitioner)(self.arrays, outputs, np.int32(slot))
        self.steps[slot : slot + 1] = [step]
        self.num_written += 1

    def is_used(self, step: int) -> bool:
        """Returns whether an on-policy step trains on stored outputs."""
        is_full = self.num_written >= self.num_slots
        return is_full and not self.settings.is_refreshed(step, seed=self._seed)

    def draw_slots(self, step: int) -> Int[np.ndarray, " B"]:
        """Returns, for each row of the step's batch, the slot that the row is taken from."""
        generator = host_generator(_REPLAY_STREAM, seed=self._seed, step=step, use=1)
        return generator.integers(self.num_slots, size=self.num_rows, dtype=np.int32)

    def draw(self, step: int) -> tuple[Batch, tuple[np.float32, np.float32]]:
        """Draws a batch of stored outputs.

        Returns:
          The batch, and its staleness as (sum, weight) over rows. The staleness of a row is the
          number of steps between sampling and use.
        """
        slots = self.draw_slots(step)
        batch = _jit_draw(self._partitioner)(self.arrays, slots)
        age = step - np.asarray(self.steps)[slots]
        return batch, (np.float32(age.sum()), np.float32(len(age)))

    def attach(self, state: Any) -> dict[str, PyTree[Any]]:
        """Returns the tree to save in a checkpoint: the state's fields, and the arrays 'replay'."""
        return _fields(state) | {"replay": _to_saved(self.arrays)}

    def attach_abstract(self, abstract_state: Any) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
        """Returns the tree of `attach` with shapes, dtypes and shardings in place of arrays."""
        return _fields(abstract_state) | {"replay": _to_saved(self.abstract)}

    def host_part(self) -> dict[str, Any]:
        """Returns the bookkeeping that a checkpoint stores as JSON beside the arrays."""
        return {"steps": list(self.steps), "num_written": self.num_written}

    def restore(self, arrays: Mapping[str, Any], host: Mapping[str, Any]) -> None:
        """Restores the buffer from what `attach` and `host_part` returned."""
        self._arrays = _from_saved(arrays)
        self.steps, self.num_written = list(host["steps"]), host["num_written"]


def _fields(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


# Fields of a batch that have another name in checkpoints, so that checkpoints of earlier versions
# can be restored.
_SAVED_NAMES = {"source_id": "component"}


def _to_saved(batch: Any) -> dict[str, Any]:
    """Returns the fields of a batch by their names in a checkpoint."""
    return {_SAVED_NAMES.get(name, name): value for name, value in _fields(batch).items()}


def _from_saved(saved: Mapping[str, Any]) -> Batch:
    """Builds a batch from the result of `_to_saved`."""
    names = {field.name: _SAVED_NAMES.get(field.name, field.name)
             for field in dataclasses.fields(Batch)}  # fmt: skip
    return Batch(**{name: saved[saved_name] for name, saved_name in names.items()})


@functools.cache
def _jit_zeros(
    shapes: tuple[tuple[tuple[int, ...], Any], ...], partitioner: Partitioner
) -> Callable[[], Sequence[Array]]:
    def zeros() -> list[Array]:
        return [jnp.zeros(shape, dtype) for shape, dtype in shapes]

    return jax.jit(zeros, out_shardings=partitioner.batch_sharding)


@functools.cache
def _jit_write(partitioner: Partitioner) -> Callable[[Batch, Batch, Any], Batch]:
    def write(stored: Batch, outputs: Batch, slot: Array) -> Batch:
        return jax.tree.map(lambda old, new: old.at[:, slot].set(new), stored, outputs)

    return jax.jit(write, donate_argnums=0, out_shardings=partitioner.batch_sharding)


@functools.cache
def _jit_draw(partitioner: Partitioner) -> Callable[[Batch, Any], Batch]:
    def draw(stored: Batch, slots: Array) -> Batch:
        take = jax.vmap(lambda row, slot: row[slot])
        return jax.tree.map(lambda leaf: take(leaf, slots), stored)

    return jax.jit(draw, out_shardings=partitioner.batch_sharding)
