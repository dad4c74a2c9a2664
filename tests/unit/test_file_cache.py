"""Values computed from files, remembered while the files stay as they are."""

import json
import os

import pytest

from mergelaw.artifacts.cache import FileCache


def test_values_are_computed_again_once_the_file_changes(tmp_path):
    path, file = tmp_path / "a.json", tmp_path / "new" / "digests.json"
    path.write_text("[1]")
    os.utime(path, ns=(1, 1))
    before = FileCache(file).sha256(path)
    cache = FileCache(file)
    assert cache.value(f"sha256 {path}", [path], lambda: pytest.fail("read again")) == before
    # Replaced under the same size and time.
    path.write_text("[2]")
    os.utime(path, ns=(1, 1))
    changed = FileCache(file).sha256(path)
    assert changed == FileCache().sha256(path) != before
    assert list(file.parent.iterdir()) == [file]
    name = f"sha256 {path}"
    for damage in ("", "[]", "{", json.dumps({name: [3, 2]}), json.dumps({name: 7})):
        file.write_text(damage)
        assert FileCache(file).sha256(path) == changed
        assert json.loads(file.read_text())[name][1] == changed
    with pytest.raises(FileNotFoundError):
        FileCache(file).sha256(tmp_path / "b.json")


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").write_text("x")
    cache = FileCache(tmp_path / "file" / "digests.json")
    assert cache.value("one", [tmp_path / "file"], lambda: 1) == 1
