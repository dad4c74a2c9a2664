"""From adapters and files of documents to a ranked answer, by three commands."""

import subprocess
import sys

from studies import SNAKEMAKE, TINY, environment, records, write_jsonl

import models

DOMAINS = ("law", "medicine", "code", "sums")


def command(folder, *words: str) -> str:
    run = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_adapters_and_files_become_a_ranked_answer(tmp_path):
    base = models.write_checkpoint(tmp_path / "base", dtype="float32", **TINY)
    for domain in DOMAINS:
        models.write_adapter(base, tmp_path / "adapters" / f"our-{domain}-lora", r=2)
        write_jsonl(tmp_path / "data" / f"{domain}.jsonl", records(domain))
    python = (sys.executable, "-c", "from mergelaw.cli.app import main; main()")
    words = ("init", "--base", "base", "--experts", "adapters", "--data", "data", "-o", "our.yaml")
    assert "4 experts (4 with a domain), 4 domains" in command(tmp_path, *python, *words)
    assert "4 experts, 4 domains" in command(tmp_path, *python, "config", "check", "our.yaml")
    command(tmp_path, *SNAKEMAKE, "--configfile", "our.yaml")
    answer = command(tmp_path, *python, "best", "our.yaml")
    assert "write it: mergelaw merge our.yaml" in answer
