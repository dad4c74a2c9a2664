"""The cell store: what was measured is kept, what was damaged is said and left out."""

import base64
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from mergelaw.evaluation import cells
from mergelaw.evaluation.cells import Store


def cell(number: int, nll=None, **changes) -> dict:
    """A cell of two documents with three scored tokens."""
    losses = np.array([number / 3, 1.0] if nll is None else nll, "<f8")
    whole = {
        "cell": f"c{number}",
        "document_nll": base64.b64encode(losses.tobytes()).decode(),
        "document_tokens": [1, 2],
        "tokens": 3,
        "bytes": 7,
        "long_documents": 0,
        "dropped_tokens": 0,
        "parameters": 20,
        "non_embedding": 10,
        "merge_seconds": 0.1,
        "eval_seconds": 0.2,
        "device": "cpu",
        "threads": 1,
        "text": "é\n",
    }
    return whole | changes


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
        "import json, os, sys, pathlib; from mergelaw.evaluation.cells import Store\n"
        "writer = Store(pathlib.Path(sys.argv[1]), 'shard')\n"
        "writer.append([json.loads(sys.argv[2])]); writer._file.write(b'half a line'); os._exit(9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(cell(1))]
    run = subprocess.run(command, check=False)
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
    assert Store(tmp_path, wanted={"c2": {}, "c9": {}}).known == {"c2": cell(2)}
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
import json, pathlib, sys
from mergelaw.evaluation.cells import Store
with Store(pathlib.Path(sys.argv[1]), "other") as other, other.claim("ab" * 8, True) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
    other.append([json.loads(sys.argv[2])])
"""
    run = [sys.executable, "-c", program, "", json.dumps(cell(1))]
    for ends in ("measures", "dies"):
        (folder := tmp_path / ends).mkdir()
        run[3] = str(folder)
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


# What a cell is checked against


@pytest.mark.parametrize(
    "changes",
    [
        {"document_nll": "AAAA"},
        {"document_nll": 3},
        {"nll": [1.0, 2.0, 3.0]},
        {"nll": [1.0, -0.5]},
        {"document_tokens": [1, 3]},
        {"document_tokens": [4, -1]},
        {"document_tokens": "12"},
        {"tokens": 4},
        {"tokens": 0},
        {"bytes": 0},
        {"bytes": math.inf},
        {"bytes": None},
        {"parameters": 10**400},
        {"non_embedding": -1},
        {"merge_seconds": math.nan},
        {"device": None},
        {"threads": "1"},
    ],
    ids=str,
)
def test_a_cell_that_cannot_have_been_measured_is_not_used(tmp_path, capsys, changes):
    """Forged with the right checksum."""
    with Store(tmp_path, "shard") as writer:
        writer.append([cell(1), cell(2, **changes)])
    for wanted in (None, {"c1": {}, "c2": {}}):
        assert list(Store(tmp_path, wanted=wanted).known) == ["c1"]
        assert f"{writer.path}:2: damaged cell; it is measured again" in capsys.readouterr().err


@pytest.mark.parametrize("nll", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_a_loss_that_is_no_number_is_a_measurement(tmp_path, nll):
    with Store(tmp_path, "shard") as writer:
        writer.append([cell(1, nll)])
    assert list(read(tmp_path)) == ["c1"]


EXPECTED = {"document_tokens": [1, 2], "tokens": 3, "bytes": 7, "merge": "m", "set": "s"}


@pytest.mark.parametrize(
    "changes",
    [{"merge": "x"}, {"set": "x"}, {"bytes": 8}, {"tokens": 4, "document_tokens": [2, 2]}],
    ids=str,
)
def test_a_cell_of_something_else_is_measured_again(tmp_path, capsys, changes):
    with Store(tmp_path, "shard") as writer:
        writer.append(
            [cell(1, merge="m", set="s"), cell(2, **({"merge": "m", "set": "s"} | changes))]
        )
    wanted = {"c1": EXPECTED, "c2": EXPECTED}
    assert list(Store(tmp_path, wanted=wanted).known) == ["c1"]
    assert f"{writer.path}:2: cell with another" in capsys.readouterr().err


def test_a_cell_of_an_earlier_version_is_used(tmp_path, capsys):
    """It carries no digests of what it was measured from; the rest is compared."""
    write(tmp_path, 1)
    assert Store(tmp_path, wanted={"c1": EXPECTED}).known == {"c1": cell(1)}
    assert not Store(tmp_path, wanted={"c1": EXPECTED | {"bytes": 8}}).known


# The index


def test_a_shard_reads_its_own_cells_and_not_all_of_the_store(tmp_path, monkeypatch):
    path = write(tmp_path, *range(200))
    summed: list[str] = []
    checksum = cells.checksum
    monkeypatch.setattr(cells, "checksum", lambda text: summed.append(text) or checksum(text))
    assert list(Store(tmp_path, wanted={"c7": {}, "c150": {}}).known) == ["c7", "c150"]
    assert len(summed) == 2
    # Without an index, as in a store of an earlier version: the same cells, none of the others.
    path.with_suffix(cells.INDEX).unlink()
    summed.clear()
    assert list(Store(tmp_path, wanted={"c7": {}, "c150": {}}).known) == ["c7", "c150"]
    assert len(summed) == 2


def damaged_indexes(index: bytes) -> list[bytes]:
    lines = index.splitlines(keepends=True)
    first, size = lines[0].split()
    wrong = b"%s %d\n" % (first, int(size) + 1)
    return [
        b"", b"junk", b"\xff\n", lines[0][:-2], index[:-1], index[:-3], b"".join(lines[1:]),
        b"".join(reversed(lines)), wrong + b"".join(lines[1:]), index + lines[0], index + b"c9 9\n",
        b"c1 -5\n" + index, b"".join(lines[:1]), b"c1\n", index.replace(b"c2", b"c1"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(15))
def test_a_wrong_index_hides_no_cell(tmp_path, number):
    """Torn, cut, forged, or of another file: nothing is measured again for it."""
    path = write(tmp_path, 1, 2, 3)
    index = path.with_suffix(cells.INDEX)
    index.write_bytes(damaged_indexes(index.read_bytes())[number])
    wanted = {f"c{n}": {} for n in (1, 2, 3)}
    assert Store(tmp_path, wanted=wanted).known == {f"c{n}": cell(n) for n in (1, 2, 3)}


def test_other_weights_are_another_merge():
    """Without weights all are 1."""

    def merge(weights):
        return cells.identities("b", ["v", "w"], {"method": "average"}, {}, {"d": "s"}, weights)

    assert merge(None) == merge([1.0, 1.0]) != merge([1.0, 2.0]) != merge([2.0, 1.0])
