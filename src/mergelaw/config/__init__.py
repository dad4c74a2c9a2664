"""The configuration of a study."""

from mergelaw.config.schema import Config, load, parse, read

__all__ = ["Config", "load", "parse", "read"]
