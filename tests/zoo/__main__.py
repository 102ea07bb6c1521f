"""``python tests/zoo``: see :mod:`zoo.table`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[0] = str(Path(__file__).parents[1])

from zoo.table import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
