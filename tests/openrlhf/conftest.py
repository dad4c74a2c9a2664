"""These tests run OpenRLHF itself, in the environment that MERGELAW_OPENRLHF_PYTHON names.

`make test-openrlhf` makes it and runs them; `make test` leaves them out.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))
import studies

studies.PATIENCE = 1800  # DeepSpeed compiles for minutes, once


@pytest.fixture(scope="session", autouse=True)
def processor():
    """DeepSpeed on the processor; what it compiles at its first start is kept."""
    python = os.environ.get("MERGELAW_OPENRLHF_PYTHON")
    assert python, "run these tests by: make test-openrlhf"
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(python).parents[1] / "extensions"))
