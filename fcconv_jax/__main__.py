"""Runs the command line: ``python -m fcconv_jax``, and the entry point ``fcconv``."""

import sys


def main() -> None:
    """Runs it; Ctrl-C ends it without a traceback, during the imports too."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
