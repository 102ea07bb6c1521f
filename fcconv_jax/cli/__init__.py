"""The command line ``fcconv``: a file for each command."""

from . import (
    compare,
    convert,
    explain,
    export,
    inspect,
    plan,
    restore,
    slide,
    tune,
    verify,
)
from .app import app as app
from .app import main as main

# In the order in which --help lists them.
COMMANDS = (
    *(plan, convert, restore, verify, compare, export),
    *(inspect, explain, slide, tune),
)
