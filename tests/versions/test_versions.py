"""A stage whose sources change gets a new version, or a declaration that results stay the same."""

import json
import shutil

import pytest
import table

from mergelaw.artifacts.keys import STAGES


def test_no_stages_version_was_forgotten():
    recorded = json.loads(table.TABLE.read_text())
    now = table.current(STAGES)
    stale = table.forgotten(recorded, now)
    assert not stale, (
        f"sources changed without a new version: {stale}; raise it in artifacts/keys.py and run "
        'python tests/versions/table.py, or declare: python tests/versions/table.py --no-effect "..."'
    )
    assert {k: recorded[k] for k in now} == now, "run python tests/versions/table.py"


@pytest.fixture
def sources(tmp_path):
    shutil.copytree(table.SOURCES, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_changed_line_of_the_laws_wants_a_new_version_of_fits_and_reports_only(sources):
    before = table.current(STAGES, sources)
    path = table.path_of("mergelaw.laws.law", sources)
    path.write_text(path.read_text() + "\nMORE = 1\n")
    after = table.current(STAGES, sources)
    stale = table.forgotten(before, after)
    assert "fit" in stale and stale["fit"] == ["mergelaw.laws.law"]
    assert not stale.keys() & {"corpus", "base", "expert", "task_vector", "design", "evaluate"}
    raised = table.current(STAGES | {stage: 99 for stage in stale}, sources)
    assert table.forgotten(before, raised) == {}


def test_words_and_comments_change_nothing(sources):
    before = table.current(STAGES, sources)
    path = table.path_of("mergelaw.laws.law", sources)
    path.write_text("# A comment.\n\n" + path.read_text().replace('"""', '"""Other words. ', 1))
    assert table.current(STAGES, sources) == before


def test_a_changed_word_of_the_demos_documents_wants_a_new_version_of_the_corpora(sources):
    before = table.current(STAGES, sources)
    path = sources / "mergelaw" / "demo" / "facts.toml"
    path.write_text(path.read_text() + "\n# more\n")
    assert "corpus" in table.forgotten(before, table.current(STAGES, sources))


def test_every_stage_has_its_sources():
    assert table.ENTRIES.keys() == STAGES.keys()
    for entries in table.ENTRIES.values():
        assert all(table.path_of(module) for module in entries)
