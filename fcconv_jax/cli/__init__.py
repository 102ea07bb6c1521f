"""The command line ``fcconv``: plan, convert, restore, verify, inspect, explain."""

from .commands import app as app
from .commands import main as main
