"""Handling of NaN and infinity in training: stops the run or skips the step; writes the batch."""

import collections
import dataclasses
import io
import json
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from gkd_jax.common.array_types import Array, Bool, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.data.vocabularies import Vocabulary
from gkd_jax.experiment.experiment import Experiment

# Waiting for each step would leave the devices idle between steps. A step is therefore checked only
# after this many later steps have been started. The number is the same on all processes, so that
# all of them check the same step.
STEPS_UNDER_WAY = 2
# Maximum number of batches to write. If a run skips many steps, the first batches show the cause.
_MOST_DUMPS = 10
FOLDER = "non_finite"


@dataclasses.dataclass(frozen=True)
class _Started:
    step: int
    batch: Batch
    non_finite: Array


class NonFiniteSteps:
    """Checks the steps of a run for NaN and infinity, with a delay of `STEPS_UNDER_WAY` steps.

    If the loss or gradient of a step is not finite, its batch is written to files, and the run
    stops or goes on, as set in `Experiment.non_finite`.
    """

    def __init__(self, experiment: Experiment, vocabulary: Vocabulary):
        self._experiment = experiment
        self._settings = experiment.non_finite
        self._vocabulary = vocabulary
        self._started: collections.deque[_Started] = collections.deque()
        self._in_a_row = 0
        self._num_dumps = 0

    def add(self, step: int, batch: Batch, non_finite: Array) -> None:
        """Records a step that was started, and checks an earlier one.

        Args:
          step: number of the step, counted from 0.
          batch: batch that the step trains on.
          non_finite: 1 if the loss or the gradient of the step is not finite, else 0. The array may
            not be computed yet.

        Raises:
          FloatingPointError: the earlier step was not finite, and the run has to stop.
        """
        # Stored distributions are dropped because they may be large. Their entries in the store can
        # be looked up by `example_id`.
        batch = dataclasses.replace(batch, stored_teacher=None, teacher_tokens=None)
        self._started.append(_Started(step, batch, non_finite))
        if len(self._started) > STEPS_UNDER_WAY:
            self._check(self._started.popleft())

    def finish(self) -> None:
        """Checks all steps that were started. Raises the errors of `add`."""
        while self._started:
            self._check(self._started.popleft())

    def _check(self, started: _Started) -> None:
        if not bool(started.non_finite):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        try:
            kept = self._dump(started)
        except Exception as error:  # Libraries for buckets raise errors of their own.
            kept = f" Its batch could not be written: {error}."
        step = started.step + 1
        what = "the loss or its gradient is"
        if self._settings.action == "stop":
            raise FloatingPointError(not_finite(what, step, kept=kept))
        most = self._settings.most_in_a_row
        if self._in_a_row > most:
            raise FloatingPointError(
                not_finite(
                    f"{what}, as before it those of {most} steps in a row "
                    "(NonFinite.most_in_a_row), which were skipped,", step, kept=kept,
                )
            )  # fmt: skip
        logging.warning("step %d is skipped: %s not finite.%s", step, what, kept)

    def _dump(self, started: _Started) -> str:
        """Writes this process's rows of the batch; returns a sentence that names the files."""
        if self._num_dumps >= _MOST_DUMPS:
            return ""
        self._num_dumps += 1
        folder = epath.Path(self._experiment.model_dir) / FOLDER
        name = f"step_{started.step + 1}.process_{jax.process_index()}"
        rows = self._experiment.partitioner.local_rows(started.batch)
        arrays = {name: value for name, value in vars(rows).items() if value is not None}
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # np.savez needs a seekable file, which objects in a bucket are not.
        np.savez(content, **arrays)
        (folder / f"{name}.npz").write_bytes(content.getvalue())
        (folder / f"{name}.jsonl").write_text("".join(self._lines(rows)))
        return f" Its batch is in {folder / name}.jsonl, its arrays in {name}.npz."

    def _lines(self, rows: Batch) -> list[str]:
        decode, lines = self._vocabulary.decode, []
        for row in range(len(rows.example_id)):
            line = {
                "example_id": int(rows.example_id[row]),
                "inputs": decode(rows.inputs[row][rows.inputs_mask[row]].tolist()),
                "targets": decode(rows.targets[row][rows.loss_weights[row] > 0].tolist()),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return lines


@jax.jit
def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether all entries of all arrays are finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def check_means(means: Mapping[str, float], step: int) -> None:
    """Checks the means of metrics up to a step.

    Raises:
      FloatingPointError: a mean is NaN or infinite.
    """
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(not_finite(f"{', '.join(bad)} is", step))


def not_finite(what: str, step: int, *, kept: str = "") -> str:
    """Returns the message of the error that ends a run with values that are not finite."""
    return (
        f"training stopped at step {step}: {what} not finite. The checkpoints saved before are "
        "intact. Lower the learning rate, or set max_grad_norm; an infinite divergence means that "
        f"one model gives probability 0 where the other does not.{kept}"
    )
