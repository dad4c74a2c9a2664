"""The benchmark for GPUs, tried on the processor, and what it may import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu


def test_every_section_runs_on_the_processor(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections.keys() == gpu.SECTIONS.keys()
    assert all(section["rows"] for section in sections.values())
    assert all(row["the same bits twice"] for row in sections["accuracy"]["rows"])
    assert "| tiny | average |" in (tmp_path / "gpu.md").read_text()


def test_a_section_that_fails_says_why_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(card):
        yield {"a": 1}
        raise RuntimeError("out of memory\nand more")

    def fine(card):
        yield {"b": 2}

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken, "fine": fine})
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["broken"]["rows"] == [{"a": 1}]
    assert sections["broken"]["reason"] == "failed: RuntimeError: out of memory"
    assert sections["fine"]["rows"] == [{"b": 2}]
    assert "failed: RuntimeError" in (tmp_path / "gpu.md").read_text()


def test_no_section_begins_after_its_time(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--minutes", "-1", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert all("not begun" in section["reason"] for section in sections.values())


ENGINE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others}:
            raise AssertionError(f"imports {{name}}")

sys.meta_path.insert(0, Refuse())
for module in {modules}:
    importlib.import_module(module)
"""


@pytest.mark.parametrize(
    "module", ["mergelaw.merging.export", "mergelaw.merging.kernels", "mergelaw.evaluation.shard"]
)
def test_merging_and_evaluation_need_the_engine_packages_only(module):
    others = {"snakemake", "trl", "datasets", "altair", "vl_convert", "statsmodels", "typer"}
    code = ENGINE.format(others=others, modules=[module])
    subprocess.run([sys.executable, "-c", code], check=True)
