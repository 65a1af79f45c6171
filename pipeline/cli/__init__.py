"""The command line: parse, call one engine function, render, exit code.

The engine is imported inside the commands, so that --help answers at once.
"""

from pipeline.cli.entry import cli, main

__all__ = ["cli", "main"]
