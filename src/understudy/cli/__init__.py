"""The command line: thin commands over the Python API. Bad input is one line on stderr and exit code 2."""

from understudy.cli.main import main

__all__ = ["main"]
