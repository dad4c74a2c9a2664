"""Two small studies, run once for all tests (and all workers); tests work on copies."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from studies import Place, make_ready, make_trained


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Place]) -> Place:
    root = factory.getbasetemp()
    folder = (root.parent if root.name.startswith("popen-") else root) / name
    with FileLock(f"{folder}.lock"):
        config = folder / "done.yaml"
        if not config.exists():
            place = make(folder)
            config.write_bytes((folder / "study.yaml").read_bytes())
            return place
    import yaml

    return Place(folder, yaml.safe_load(config.read_text()))


@pytest.fixture(scope="session")
def ready(tmp_path_factory) -> Place:
    return once(tmp_path_factory, "ready", make_ready)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Place:
    return once(tmp_path_factory, "trained", make_trained)
