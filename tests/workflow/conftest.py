"""Two small studies, run once for all tests (and all workers); tests work on copies."""

import pytest
from studies import Place, make_ready, make_trained, once


@pytest.fixture(scope="session")
def ready(tmp_path_factory) -> Place:
    return once(tmp_path_factory, "ready", make_ready)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Place:
    return once(tmp_path_factory, "trained", make_trained)
