"""SIGTERM: a run finishes its current step, saves its state, and exits with status 143."""

import contextlib
import signal
import sys
import threading
from pathlib import Path


class Terminated(SystemExit):
    """Raised after SIGTERM, once the state is saved; uncaught it exits with status 143.

    Attributes:
      step: number of meta-updates in the saved state.
    """

    def __init__(self, folder: Path, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step
        print(
            f"metaopt: terminated; {folder} is saved after step {step}; give the command again "
            "to go on.",
            file=sys.stderr,
        )


class Signals:
    """The signals that a process has received.

    Attributes:
      terminated: whether SIGTERM was received.
    """

    def __init__(self):
        self.terminated = False


@contextlib.contextmanager
def sigterm_noted():
    """Makes SIGTERM only set `Signals.terminated`, so that the run can finish its current step.

    Schedulers send SIGTERM some time before they kill a process. Only the main thread can set
    handlers; other threads leave the signal as it is.

    Yields:
      The `Signals`.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number, frame):
        signals.terminated = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)
