"""Watchdog: a run that hangs prints the stacks of all threads, on each process, and ends."""

import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from gkd_jax.common.growing_files import is_in_bucket
from gkd_jax.training import interruption

# Time between printing the stacks and ending the process. If one process ends, the others are ended
# too, so the first process must wait until the others have printed their stacks.
_SECONDS_TO_TELL = 10.0


def _end() -> None:
    os._exit(interruption.EXIT_STATUS)


class Watchdog:
    """Ends the process if `beat` has not been called for some time.

    If one of several processes hangs, the others wait for it, so that all of them print their
    stacks and end. The exit status is the same as after an interruption: the same command resumes
    the run from the last checkpoint.
    """

    _active: ClassVar["Watchdog | None"] = None

    def __init__(
        self, seconds: float | None, folder: str, *, end: Callable[[], None] = _end
    ) -> None:
        """Creates a watchdog, which is active inside its context.

        Args:
          seconds: maximum time between two beats; None disables the watchdog.
          folder: folder of `stacks.process_<n>.txt`, to which the stacks are written in addition to
            standard error. A folder in a bucket is not used, because access to the bucket may
            be the reason why the run hangs.
          end: function that ends the process.
        """
        self._seconds = seconds
        name = f"stacks.process_{jax.process_index()}.txt"
        self._path = None if is_in_bucket(folder) else pathlib.Path(folder) / name
        self._end = end
        self._last_beat = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None and Watchdog._active is None:
            Watchdog._active = self
            self._last_beat = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if Watchdog._active is self:
            Watchdog._active = None
            self._stopped.set()
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        while True:
            last = self._last_beat
            left = last + self._seconds - time.monotonic()
            if left > 0:
                if self._stopped.wait(left):
                    return
                continue
            self._tell()
            if self._stopped.wait(_SECONDS_TO_TELL):
                return
            if self._last_beat == last:
                self._end()
                return
            print("it goes on: the process does not end", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        also = "" if self._path is None else f", also in {self._path}"
        print(
            f"nothing has happened for {self._seconds:g} seconds (Experiment.hang_seconds): the "
            f"stacks of this process's threads follow{also}. It ends with status "
            f"{interruption.EXIT_STATUS}; the same command goes on from the last checkpoint. Set "
            "HANG_SECONDS higher if a step, an evaluation's batch or a compilation takes as long.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"they could not be written to {self._path}: {error}", file=sys.stderr)


def beat() -> None:
    """Tells the active watchdog, if there is one, that the run makes progress."""
    if Watchdog._active is not None:
        Watchdog._active._last_beat = time.monotonic()
