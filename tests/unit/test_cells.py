"""The cell store: what was measured is kept, what was damaged is said and left out."""

import json
import os
import subprocess
import sys

import pytest

from mergelaw.evaluation import cells
from mergelaw.evaluation.cells import Store


def cell(number: int) -> dict:
    return {"cell": f"c{number}", "nll": number / 3, "text": "é\n"}


def read(folder) -> dict:
    return Store(folder).known


def write(folder, *numbers, name="shard"):
    with Store(folder, name) as writer:
        for number in numbers:
            writer.append([cell(number)])
    return writer.path


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert read(tmp_path / "nowhere") == {}


def test_what_was_appended_is_read_back(tmp_path):
    folder = tmp_path / "a" / "cells"
    write(folder, 1, 2)
    write(folder, 3)
    assert read(folder) == {f"c{n}": cell(n) for n in (1, 2, 3)}


def test_a_writer_without_cells_leaves_no_file(tmp_path):
    with Store(tmp_path / "cells", "shard"):
        pass
    assert not (tmp_path / "cells").exists()


def test_each_writer_has_a_file_of_its_own(tmp_path):
    with Store(tmp_path, "shard") as first, Store(tmp_path, "shard") as second:
        for number in range(4):
            (first, second)[number % 2].append([cell(number)])
        assert first.path != second.path
        assert len(read(tmp_path)) == 4
    with pytest.raises(FileExistsError):
        taken = Store(tmp_path, "shard")
        taken.path = first.path
        taken.append([cell(9)])


def test_cells_are_in_the_file_when_append_returns(tmp_path):
    # A second process sees them while the first one is still open.
    with Store(tmp_path, "shard") as writer:
        for number in range(3):
            writer.append([cell(number), cell(number + 10)])
            look = "import sys, pathlib; from mergelaw.evaluation import cells; print(*cells.Store(pathlib.Path(sys.argv[1])).known)"
            run = [sys.executable, "-c", look, str(tmp_path)]
            seen = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
            assert len(seen) == 2 * (number + 1)
            assert seen[-2:] == [f"c{number}", f"c{number + 10}"]


def test_every_append_is_synced(tmp_path, monkeypatch):
    synced = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or plain(fd))
    path = write(tmp_path, 1, 2)
    sizes = [len(line) for line in path.read_bytes().splitlines(keepends=True)]
    assert synced[-2:] == [sizes[0], sum(sizes)]
    assert len(synced) == 3  # the folder too, with its new file


def test_a_process_killed_after_an_append_has_kept_it(tmp_path):
    program = (
        "import os, sys, pathlib; from mergelaw.evaluation.cells import Store\n"
        "writer = Store(pathlib.Path(sys.argv[1]), 'shard')\n"
        "writer.append([{'cell': 'c1'}]); writer._file.write(b'half a line'); os._exit(9)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert run.returncode == 9
    assert list(read(tmp_path)) == ["c1"]


def test_a_torn_last_line_is_ignored_wherever_it_tears(tmp_path, capsys):
    path = write(tmp_path, 1, 2)
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(first, len(content) - 1):
        path.write_bytes(content[:size])
        assert list(read(tmp_path)) == ["c1"]
    path.write_bytes(content[:-1])  # whole, but for its newline
    assert list(read(tmp_path)) == ["c1", "c2"]
    assert capsys.readouterr().err == ""


def test_every_flipped_byte_in_the_middle_is_named_and_its_cell_left_out(tmp_path, capsys):
    path = write(tmp_path, 1, 2, 3)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    stop = content.index(b"\n", start)
    for place in range(start, stop):
        for mask in (0x01, 0x80):
            flipped = bytearray(content)
            flipped[place] ^= mask
            path.write_bytes(bytes(flipped))
            assert list(read(tmp_path)) == ["c1", "c3"]
            assert f"{path}:2: damaged cell" in capsys.readouterr().err
    # A lost newline takes both neighbours along, and says so.
    path.write_bytes(content[:stop] + b"#" + content[stop + 1 :])
    assert list(read(tmp_path)) == ["c1"]
    assert f"{path}:2: damaged cell" in capsys.readouterr().err


def test_a_damaged_file_takes_nothing_from_others(tmp_path, capsys):
    write(tmp_path, 1, name="a").write_bytes(b"\x00\xff junk\n" * 3)
    write(tmp_path, 2, name="b")
    capsys.readouterr()
    assert list(read(tmp_path)) == ["c2"]
    assert capsys.readouterr().err.count("damaged cell") == 3


def test_a_line_that_says_no_cell_is_damage(tmp_path, capsys):
    path = write(tmp_path, 1)
    for text in ("3", "[]", "{}", json.dumps({"cell": None})):
        path.write_text(f"{cells.checksum(text)} {text}\n")
        assert read(tmp_path) == {}
        assert "damaged cell" in capsys.readouterr().err


def test_only_what_is_wanted_is_kept_in_memory(tmp_path, capsys):
    write(tmp_path, 1, 2, 3).open("ab").write(b"junk\n")
    assert Store(tmp_path, wanted={"c2", "c9"}).known == {"c2": cell(2)}
    assert "damaged cell" in capsys.readouterr().err


def test_what_others_append_is_known_after_a_refresh(tmp_path, capsys):
    with Store(tmp_path, "mine") as mine, Store(tmp_path, "theirs") as theirs:
        mine.append([cell(1)])
        theirs.append([cell(2)])
        assert list(mine.known) == ["c1"]
        mine.refresh()
        assert set(mine.known) == {"c1", "c2"}
        theirs.append([cell(3), cell(4)])
        whole = theirs.path.read_bytes()
        theirs.path.write_bytes(whole[:-9])  # seen while it is being written
        mine.refresh()
        assert set(mine.known) == {"c1", "c2", "c3"}
        theirs.path.write_bytes(whole + b"junk\n")
        mine.refresh()
        assert set(mine.known) == {"c1", "c2", "c3", "c4"}
        assert f"{theirs.path}:4: damaged cell" in capsys.readouterr().err


def test_a_merge_is_claimed_by_one_process_at_a_time(tmp_path):
    program = """
import pathlib, sys
from mergelaw.evaluation.cells import Store
with Store(pathlib.Path(sys.argv[1]), "other") as other, other.claim("ab" * 8, True) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
    other.append([{"cell": "c1"}])
"""
    run = [sys.executable, "-c", program, str(tmp_path)]
    for ends in ("measures", "dies"):
        (folder := tmp_path / ends).mkdir()
        run[-1] = str(folder)
        with (
            subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
            Store(folder, "mine") as store,
        ):
            assert other.stdout.readline() == b"True\n"
            with store.claim("ab" * 8, False) as claimed:
                assert not claimed
            with store.claim("cd" * 8, False) as claimed:
                assert claimed
            if ends == "dies":
                other.kill()
            else:
                other.stdin.write(b"\n")
                other.stdin.flush()
            with store.claim("ab" * 8, True) as claimed:
                assert claimed
                assert set(store.known) == ({"c1"} if ends == "measures" else set())
