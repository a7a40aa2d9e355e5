"""Checkpoints of a run: saved asynchronously, verified before they are restored."""

import re
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from gkd_jax.checkpoints import layout
from gkd_jax.checkpoints.manifest import MANIFEST, CorruptCheckpointError, verify_manifest
from gkd_jax.common.array_types import PyTree
from gkd_jax.common.growing_files import children, is_in_bucket
from gkd_jax.common.moved import load_moved
from gkd_jax.devices.processes import process_zero_decides

_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")


class CheckpointManager:
    """Saves, verifies, restores and deletes the checkpoints of one run.

    Each checkpoint is a folder `checkpoint_<step>` in the run's directory. `save` copies the
    arrays to the host and returns; a background thread then writes them, writes the manifest of
    digests, and deletes checkpoints that are no longer kept. A checkpoint is complete only if it
    has its manifest. The process may therefore be killed at any time: a partly written checkpoint
    is recognized and ignored. All processes of a run must make the same calls, on a directory that
    they share.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int | None = 2,
        keep_every: int | None = None,
        best_mode: str = "max",
        read_only: bool = False,
    ):
        """Opens a directory of checkpoints; creates it if it does not exist.

        Args:
          directory: local directory, or a bucket path such as gs://bucket/run.
          keep: number of latest checkpoints to keep; None keeps all. The checkpoint with the best
            metric is kept in addition.
          keep_every: number of steps. Checkpoints whose step is a multiple of this number are kept
            in addition. None keeps no additional checkpoints.
          best_mode: 'max' if the highest metric is the best, 'min' if the lowest is.
          read_only: if True, the directory is not created, and `save` raises an error.

        Raises:
          ValueError: a setting is invalid, or the directory is not writable.
          FileNotFoundError: `read_only` is set and the directory does not exist.
        """
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(
                    f"CheckpointManager.{name} must be at least 1; got {value}. Set it to None to "
                    f"{'keep all' if name == 'keep' else 'keep no others'}."
                )
        if best_mode not in ("max", "min"):
            raise ValueError(
                f"CheckpointManager.best_mode must be 'max' or 'min'; got {best_mode!r}. Set it to "
                "'min' for a loss."
            )
        self.directory = layout.absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._sign = 1.0 if best_mode == "max" else -1.0
        self._read_only = read_only
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._restored_step: int | None = None
        self._corrupt: set[int] = set()
        self._metrics: dict[int, float | None] = {}
        if read_only and not is_in_bucket(directory) and not self.directory.is_dir():
            raise FileNotFoundError(
                f"there is no directory {self.directory}. Set MODEL_DIR to that of a run."
            )
        if not read_only and jax.process_index() == 0:
            layout.check_writable(self.directory)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree[Any],
        host: Mapping[str, Any] | None = None,
        *,
        metric: float | None = None,
    ) -> bool:
        """Starts saving a checkpoint, after waiting for the previous save to complete.

        The state may be donated or modified as soon as the call returns.

        Args:
          step: number of updates made.
          state: any tree of arrays, sharded or not.
          host: JSON values that a resumed run needs beside the arrays, such as the position of
            the data iterator and fingerprints.
          metric: value that decides which checkpoint is the best; a checkpoint with None or NaN
            is never the best.

        Returns:
          Whether a save was started. False if the run was restored from the checkpoint of this
          step, which therefore need not be saved again.

        Raises:
          ValueError: the manager is read-only, `host` is not JSON, or the directory already has a
            checkpoint of this step or of a later one.
          Exception: the previous save failed. The exception of that save is raised here.
        """
        if self._read_only:
            raise ValueError(
                f"the checkpoint manager of {self.directory} is read-only. Set read_only=False "
                "to save."
            )
        self.wait()
        header = layout.Header(
            kind="state",
            step=step,
            shapes=layout.shapes_of(state),
            metric=None if metric is None or np.isnan(metric) else float(metric),
            host=dict(host or {}),
        ).dump()
        nested = layout.to_nested(state)
        go_on = process_zero_decides(lambda: self._make_room(step))
        self._corrupt = {other for other in self._corrupt if other < step}
        if not go_on:
            logging.info("checkpoint %d is the one restored from: not saved again", step)
            return False
        folder = self.folder(step)
        if jax.process_index() == 0:
            layout.begin(folder)
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._checkpointer.save(folder / layout.ARRAYS, args=ocp.args.PyTreeSave(nested))
        self._thread = threading.Thread(
            target=self._finish, args=(step, header), name=f"checkpoint_{step}"
        )
        self._thread.start()
        return True

    def wait(self, *, alone: bool = False) -> None:
        """Waits until the last save is complete.

        Args:
          alone: if True, this process does not ask the others whether their part of the save
            succeeded. Set this if the other processes may not be calling `wait`.

        Raises:
          Exception: the last save failed. The exception of that save is raised here.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if jax.process_count() > 1 and not alone:
            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if error is None and np.any(failed):
                error = RuntimeError("saving a checkpoint failed on another process: see its log")
        if error is not None:
            raise error

    def close(self, *, alone: bool = False) -> None:
        """Waits for the last save, like `wait`, and stops Orbax's threads.

        The manager can still be used afterwards.
        """
        try:
            self.wait(alone=alone)
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of the checkpoint of a step, whether or not it exists."""
        return self.directory / f"checkpoint_{step}"

    def all_steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending; excludes a save in progress."""
        return [step for step in self._step_folders() if self._is_complete(step)]

    def latest_step(self) -> int | None:
        """Returns the step of the last complete checkpoint; None if no save was ever completed.

        This method does not verify digests. `restore` verifies them, and therefore may use an
        earlier step.

        Raises:
          CorruptCheckpointError: there are checkpoints, but all have lost their manifest.
        """
        steps = self.all_steps()
        if steps:
            return steps[-1]
        damaged = [step for step in self._step_folders() if not self._is_unfinished(step)]
        if damaged:
            raise self._none_left(dict.fromkeys(damaged, f"{MANIFEST} is missing."))
        return None

    def best_step(self) -> int | None:
        """Returns the step with the best metric, or None if no checkpoint has a metric.

        If several steps have the same best metric, this is the earliest of them.
        """
        return self._best(self.all_steps())

    def restore(
        self, abstract_state: PyTree[Any], *, step: int | None = None
    ) -> tuple[PyTree[Any], dict[str, Any], int]:
        """Verifies and restores a checkpoint.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with the requested shardings, on any
            mesh.
          step: step to restore; None restores the last intact checkpoint, with a warning for each
            later one that is unfinished or corrupt.

        Returns:
          The state in the containers of `abstract_state`, the host values given to `save`, and
          the step.

        Raises:
          FileNotFoundError: there is no checkpoint, or none of `step`.
          CorruptCheckpointError: the checkpoint of `step` is corrupt. If `step` is None: all
            checkpoints are corrupt.
          ValueError: the checkpoint's arrays differ from `abstract_state`, or the checkpoint has
            another format version.
        """
        self.wait()
        chosen = self.choose(step)
        folder = self.folder(chosen)
        header = layout.read_header(folder)
        layout.check_shapes(
            header.shapes, layout.shapes_of(abstract_state), folder=folder, dtypes=True
        )
        nested = layout.read_arrays(folder, layout.to_nested(abstract_state))
        self._restored_step = chosen
        return layout.from_nested(nested, abstract_state), header.host, chosen

    def choose(self, step: int | None = None) -> int:
        """Verifies checkpoints and returns the step that `restore` would restore.

        Raises:
          FileNotFoundError, CorruptCheckpointError: as in `restore`.
        """
        # Only process 0 verifies digests, because this reads every byte of a checkpoint. All
        # processes use the step that process 0 chose.
        chosen = process_zero_decides(lambda: self._choose(step))
        if step is None:
            self._corrupt |= {s for s in self.all_steps() if s > chosen}
        return chosen

    def _choose(self, step: int | None) -> int:
        if step is not None:
            return self._verify_asked(step)
        bad: dict[int, str] = {}
        unfinished = []
        for candidate in reversed(self._step_folders()):
            if self._is_unfinished(candidate):
                unfinished.append(candidate)
                continue
            try:
                verify_manifest(self.folder(candidate))
            except CorruptCheckpointError as error:
                bad[candidate] = str(error)
                continue
            for skipped in unfinished:
                logging.warning(
                    "checkpoint %s is unfinished (its process was stopped while saving): using "
                    "step %d instead", self.folder(skipped), candidate,
                )  # fmt: skip
            for skipped, reason in bad.items():
                logging.warning(
                    "checkpoint %s is CORRUPT: %s Using step %d instead",
                    self.folder(skipped), reason, candidate,
                )  # fmt: skip
            return candidate
        if bad:
            raise self._none_left(bad)
        raise FileNotFoundError(
            f"there is no complete checkpoint in {self.directory}. Set MODEL_DIR to the directory "
            "of a run that has saved one."
        )

    def _verify_asked(self, step: int) -> int:
        folder = self.folder(step)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no checkpoint {folder}; there are steps {self.all_steps()}. "
                "Choose one of those."
            )
        try:
            verify_manifest(folder)
        except CorruptCheckpointError as error:
            others = [other for other in self.all_steps() if other != step]
            raise CorruptCheckpointError(
                f"the checkpoint of step {step} cannot be used: {error} Copy it again from its "
                f"source, or choose another step of {others}."
            ) from error
        return step

    def _none_left(self, bad: Mapping[int, str]) -> CorruptCheckpointError:
        reasons = " ".join(f"Step {step}: {reason}" for step, reason in sorted(bad.items()))
        return CorruptCheckpointError(
            f"no checkpoint in {self.directory} can be used. {reasons} Restore the files from a "
            "copy, or set MODEL_DIR to a new directory to start from scratch."
        )

    def _step_folders(self) -> list[int]:
        matches = (_STEP_FOLDER.fullmatch(child.name) for child in children(self.directory))
        return sorted(int(match[1]) for match in matches if match)

    def _is_complete(self, step: int) -> bool:
        return (self.folder(step) / MANIFEST).exists()

    def _is_unfinished(self, step: int) -> bool:
        return layout.is_unfinished(self.folder(step))

    def _make_room(self, step: int) -> bool:
        """Deletes unfinished checkpoints of `step` and later steps, and renames corrupt ones.

        Returns:
          Whether to save `step`. False if a checkpoint of `step` exists and the run was restored
          from that checkpoint.
        """
        later = [s for s in self._step_folders() if s >= step]
        usable = [s for s in later if self._is_complete(s) and s not in self._corrupt]
        if usable == [step] and step == self._restored_step:
            return False
        if usable:
            raise ValueError(
                f"{self.directory} has checkpoints of steps {usable}; got step {step} to save, "
                "which would mix two runs. Set MODEL_DIR to a new directory, or delete them."
            )
        for other in later:
            if self._is_unfinished(other):
                layout.delete(self.folder(other))
            else:
                self._set_aside(other)
        return True

    def _set_aside(self, step: int) -> None:
        number = 0
        while (target := self.directory / f"corrupt_checkpoint_{step}.{number}").exists():
            number += 1
        self.folder(step).rename(target)
        logging.warning("moved the corrupt checkpoint %s to %s", self.folder(step), target)

    def _finish(self, step: int, header: str) -> None:
        """Waits until the arrays are written, then completes the checkpoint and deletes old ones.

        This runs in a background thread.
        """
        try:
            assert self._checkpointer is not None
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                layout.finish(self.folder(step), header)
                self._prune()
                logging.info("saved checkpoint %s", self.folder(step))
        except BaseException as error:  # Raised again by the next `save` or `wait`.
            logging.exception("saving checkpoint %s failed", self.folder(step))
            error.add_note(f"while saving the checkpoint {self.folder(step)}")
            self._error = error

    def _prune(self) -> None:
        steps = self.all_steps()
        kept = set(steps if self._keep is None else steps[-self._keep :])
        kept |= {s for s in steps if self._keep_every and s % self._keep_every == 0}
        best = self._best(steps)
        for step in self._step_folders():
            stale = self._is_unfinished(step) and step < steps[-1]
            if stale or (step in steps and step not in kept | {best}):
                layout.delete(self.folder(step))

    def _best(self, steps: list[int]) -> int | None:
        measured = {s: m for s in steps if (m := self._metric(s)) is not None}
        return max(measured, key=lambda s: (self._sign * measured[s], -s), default=None)

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            self._metrics[step] = layout.read_header(self.folder(step)).metric
        return self._metrics[step]


def newest_step(model_dir: str) -> int | None:
    """Returns the step of the newest complete checkpoint of a run; None if it has none.

    Raises:
      ValueError: there are checkpoints, but all have lost their manifest.
    """
    if not is_in_bucket(model_dir) and not epath.Path(model_dir).is_dir():
        return None
    with CheckpointManager(model_dir, read_only=True) as manager:
        return manager.latest_step()


def __getattr__(name: str) -> Any:
    return load_moved(__name__, name)
