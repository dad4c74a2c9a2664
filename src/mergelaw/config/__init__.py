"""Configuration of a study: one YAML file, composed of the stages' recipes and checked as a whole.

Profiles, not configurations, describe hardware.
"""

from mergelaw.config.load import load, parse, read, read_files
from mergelaw.config.messages import describe
from mergelaw.config.study import Config

__all__ = ["Config", "describe", "load", "parse", "read", "read_files"]
