"""From adapters and files of documents to a ranked answer, by three commands."""

import subprocess
import sys

from studies import SNAKEMAKE, TINY, environment, records, write_jsonl

import models
from mergelaw.config import load

DOMAINS = ("law", "medicine", "code", "sums")


def command(folder, *words: str) -> str:
    run = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def cells(folder) -> list[str]:
    """All measured cells."""
    return [line for f in folder.glob("results/cells/*/*.jsonl") for line in f.open()]


def test_adapters_and_files_become_a_ranked_answer(tmp_path):
    base = models.write_checkpoint(tmp_path / "base", dtype="float32", **TINY)
    for rank, domain in enumerate(DOMAINS, 2):  # ranks differ, so the adapters do
        models.write_adapter(base, tmp_path / "adapters" / f"our-{domain}-lora", r=rank)
        write_jsonl(tmp_path / "data" / f"{domain}.jsonl", records(domain))
    python = (sys.executable, "-c", "from mergelaw.cli.app import main; main()")
    words = ("init", "--base", "base", "--experts", "adapters", "--data", "data", "-o", "our.yaml")
    assert "4 experts (4 with a domain), 4 domains" in command(tmp_path, *python, *words)
    assert "4 experts, 4 domains" in command(tmp_path, *python, "config", "check", "our.yaml")
    (tmp_path / "few.yaml").write_text("include: our.yaml\nsampling: {k: [1, 2, 4]}\n")
    command(tmp_path, *SNAKEMAKE, "--configfile", "few.yaml")
    answer = command(tmp_path, *python, "best", "few.yaml")
    assert "write it: mergelaw merge few.yaml" in answer
    measured = cells(tmp_path)
    limits = [f"--require={name}" for name in DOMAINS[:3]] + ["--at-most=3", "--method=ties"]
    command(tmp_path, *python, "select", "few.yaml", *limits)
    proposed = load(tmp_path / "few.select.yaml").merges.values()
    assert [merge.write for merge in proposed] == [False]
    command(tmp_path, *SNAKEMAKE, "--configfile", "few.select.yaml")
    assert len(cells(tmp_path)) == len(measured) + len(proposed) * len(DOMAINS)
    answer = command(tmp_path, *python, "select", "few.select.yaml", *limits)
    assert "Every merge within the limits is measured" in answer
    assert f"Of {len(proposed)} earlier proposals" in answer
