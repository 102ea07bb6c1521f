"""The command line ``fcconv``: plan, convert, restore, verify, hlo, inspect, ..."""

from .commands import app as app
from .commands import main as main
from .hlo import hlo as hlo
