"""When a run stops before its last step: a signal from outside, or the end of its time."""

import contextlib
import signal
import sys
import threading
from pathlib import Path


class Terminated(SystemExit):
    """SIGTERM came and the run's state is saved; uncaught it ends the process with status 143.

    Attributes: step: meta-updates that the saved state has taken.
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
    """Attributes: terminated: whether SIGTERM has come."""

    def __init__(self):
        self.terminated = False


@contextlib.contextmanager
def sigterm_noted():
    """Within it SIGTERM only sets `Signals.terminated`, so that a generation can be finished.

    Schedulers send it some time before they kill. Handlers belong to the main thread; in others
    nothing is changed.
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
