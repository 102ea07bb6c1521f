"""Runs the command line: ``python -m fcconv_jax``."""

from .cli import main

if __name__ == "__main__":
    main()
