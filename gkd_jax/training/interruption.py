"""SIGTERM, as clusters send it before they take a machine back: the run saves and ends."""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75
"""Of a process that saved and ended so: the same command goes on. EX_TEMPFAIL of sysexits.h."""


class InterruptedRunError(Exception):
    """The run was told to stop, and has saved."""


# Over several processes each call must have a greater number, in all runs of a process.
_calls = itertools.count()


class Interruption:
    """Whether the run was told to stop; to be asked between steps.

    While it is entered, SIGTERM does not end the process. Within another one it is the same as
    that: what was told in a study's run, its next run would not know. Over several processes JAX
    has them agree on when to stop, whichever of them was told; all must ask equally often.
    """

    _outermost: ClassVar["Interruption | None"] = None

    def __init__(self) -> None:
        self._told = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "Interruption":
        if Interruption._outermost is not None:
            return Interruption._outermost
        Interruption._outermost = self
        # Over several processes JAX's own notifier waits for the signal. Only the main thread may
        # set a handler: elsewhere, as in a notebook's worker, the signal ends the process.
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
        """Whether to save and end now."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
        return self._told.is_set()


def stopped(step: int, num_steps: int) -> InterruptedRunError:
    """The error that ends the run, with the message for its log."""
    kept = "which is saved" if step else "when there was nothing to save"
    return InterruptedRunError(
        f"stopped by SIGTERM after step {step} of {num_steps}, {kept}. Give the same command again "
        f"to go on (this exit status, {EXIT_STATUS}, asks for it)."
    )
