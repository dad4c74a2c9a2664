"""Values computed from files, remembered while the files stay as they are."""

import json
import os

import pytest

from mergelaw.artifacts.cache import FileCache


def test_values_are_computed_again_once_the_file_changes(tmp_path):
    path, file = tmp_path / "a.json", tmp_path / "new" / "digests.jsonl"
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
    name, whole = f"sha256 {path}", file.read_text()
    torn = json.dumps([name, [[[str(path), 3, 1, 1]], "0" * 64]])
    flipped = whole.replace(changed, changed[::-1])
    for damage in ("", "[]", "{", torn, f"{'0' * 16} {torn}\n", flipped, whole[:-9]):
        file.write_text(damage)
        assert FileCache(file).sha256(path) == changed
        cache = FileCache(file)
        assert cache.value(name, [path], lambda: pytest.fail("read again")) == changed
    with pytest.raises(FileNotFoundError):
        FileCache(file).sha256(tmp_path / "b.json")


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").write_text("x")
    cache = FileCache(tmp_path / "file" / "digests.json")
    assert cache.value("one", [tmp_path / "file"], lambda: 1) == 1


def test_jobs_that_write_at_the_same_time_keep_all_values(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    first, second = (FileCache(tmp_path / "digests.jsonl") for _ in range(2))
    first.value("one", [path], lambda: 1)
    second.value("two", [path], lambda: 2)
    first.value("three", [path], lambda: 3)
    cache = FileCache(tmp_path / "digests.jsonl")
    for name, value in (("one", 1), ("two", 2), ("three", 3)):
        assert cache.value(name, [path], lambda: pytest.fail("computed again")) == value
