"""What the command line does before any stage does its own."""

import json
import subprocess
import sys

import pytest

from mergelaw.cli.app import arguments
from mergelaw.errors import MergelawError


def test_a_file_of_arguments_stands_for_them(tmp_path):
    file = tmp_path / "a b.json"
    words = ["--recipe", '{"a": "é"}', "--output", "x y"]
    file.write_text(json.dumps(words))
    assert arguments(f"@{file}") == words
    assert arguments("--threads") == ["--threads"]


@pytest.mark.parametrize("text", [None, "", "{}", '"a"', "[1]", "\x00"])
def test_what_is_no_file_of_arguments_is_refused(tmp_path, text):
    file = tmp_path / "arguments.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(MergelawError, match=r"arguments.json: not a file of arguments"):
        arguments(f"@{file}")


def test_there_is_room_for_more_than_a_command_line_takes(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps([w for i in range(9999) for w in ("--evals", f"evals/none@{i:08}")]))
    program = "from mergelaw.cli.app import main; main()"
    run = [sys.executable, "-c", program, "fit", f"@{file}"]
    ended = subprocess.run(run, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == "mergelaw: error: fit: needs --evals and --output, or --points; give those\n"
    )
