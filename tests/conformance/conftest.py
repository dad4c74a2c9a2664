"""mergekit runs in an environment of its own, which `make peers` sets up."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def peers() -> Path:
    """The folder of the programs of the peers' environment."""
    folder = Path(os.environ.get("PEERS", ROOT / ".venv-peers")).absolute() / "bin"
    if not (folder / "mergekit-yaml").exists():
        pytest.fail(f"no mergekit in {folder}: run `make test-conformance`, or name PEERS=FOLDER")
    return folder
