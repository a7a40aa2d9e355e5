"""Handling of SIGTERM, which clusters send before they reclaim a machine: a run saves and ends."""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75
"""Exit status of an interrupted run that has saved and can be resumed by the same command. It is
EX_TEMPFAIL of sysexits.h."""


class InterruptedRunError(Exception):
    """The run was interrupted by SIGTERM and has saved a checkpoint."""


# Numbers for `reached_preemption_sync_point`, which needs an increasing number from each process.
_calls = itertools.count()


class Interruption:
    """Context manager that turns SIGTERM into a request to stop. A run checks it between steps.

    Inside the context SIGTERM does not end the process. Entering a nested context returns the
    outermost one, so that a signal during one run of a study also stops the study. With several
    processes, JAX makes all of them stop after the same step, even if only one of them got the
    signal. All processes must therefore call `is_due` equally often.
    """

    _outermost: ClassVar["Interruption | None"] = None

    def __init__(self) -> None:
        self._told = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "Interruption":
        if Interruption._outermost is not None:
            return Interruption._outermost
        Interruption._outermost = self
        # With several processes JAX's own notifier handles the signal. Only the main thread may set
        # a handler. In another thread, such as a notebook's worker, no handler is set, and the
        # signal ends the process.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if Interruption._outermost is not self:
            return
        Interruption._outermost = None
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def is_due(self) -> bool:
        """Returns whether the run should save and end now."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
        return self._told.is_set()


def stopped(step: int, num_steps: int) -> InterruptedRunError:
    """Returns the error that ends an interrupted run, with the message for its log."""
    kept = "which is saved" if step else "when there was nothing to save"
    return InterruptedRunError(
        f"stopped by SIGTERM after step {step} of {num_steps}, {kept}. Give the same command again "
        f"to go on (this exit status, {EXIT_STATUS}, asks for it)."
    )
