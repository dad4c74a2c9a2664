"""The command line: `mergelaw`."""

from mergelaw.cli.app import main

__all__ = ["main"]
