"""The command line: parse, call one engine function, render, exit code.

The engine is imported inside the commands, so that --help answers at once.
"""

import gc

# Some 100,000 objects are made by imports and all of them stay: looking for garbage among them
# every 700 allocations, as Python would, costs a fifth of the time that a command needs to start.
gc.set_threshold(50_000)

from pipeline.cli.entry import cli, main  # noqa: E402

__all__ = ["cli", "main"]
