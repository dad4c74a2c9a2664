"""Studies on a real SLURM: ``make test-slurm`` starts one around these tests."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "workflow"))

import studies
from clones import Clone, make_finished
from studies import once

studies.PATIENCE = 1200  # a job takes its time, and a few wait for each other


@pytest.fixture(scope="session", autouse=True)
def slurm() -> None:
    if "SLURM_CONF" not in os.environ:
        pytest.exit("there is no SLURM around these tests; start them by make test-slurm", 1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Clone:
    """A study that was run on this machine, for faults to happen to a part of it."""
    place = once(tmp_path_factory, "finished", make_finished)
    return Clone(place.folder, place.config)
