"""Runs the command line: ``python -m fcconv_jax``, and the entry point ``fcconv``."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from types import FrameType


def main() -> None:
    """Runs it; Ctrl-C ends it without a traceback, during the imports too."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside an import.

    There extension modules turn it into other errors, or crash: NumPy's and JAX's do.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            again = threading.Timer(0.02, _thread.interrupt_main)
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
