"""The README's own study: its configuration and commands, on tiny models in the places it names."""

import re
import subprocess

from studies import ROOT, TINY, environment, records, write_jsonl

import models
from mergelaw.workflow.deploy import deploy

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_study_runs_by_its_commands(tmp_path):
    place = tmp_path / "place"
    deploy(place)
    (study,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (place / "ours.yaml").write_text(study)
    (place / "data").mkdir()
    for domain in ("law", "medicine"):
        write_jsonl(place / "data" / f"{domain}.jsonl", records(domain, 220))
    base = models.write_checkpoint(place / "models" / "base", dtype="float32", **TINY)
    for seed, expert in enumerate(("lawyer", "doctor", "coder")):
        models.write_expert(base, place / "models" / expert, 0.05, seed)
    lines = re.findall(r"^(?:mergelaw|snakemake) .*ours\.yaml.*$", README, re.MULTILINE)
    asked = re.findall(r"`(mergelaw plan [^`]*ours\.yaml[^`]*)`", README)
    assert len(lines) == 4 and len(asked) == 1
    for line in [*lines, *asked]:
        run = subprocess.run(
            line, shell=True, cwd=place, env=environment(), capture_output=True, text=True
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"
    assert re.search(r"(stop at k = \d|use all 3 experts)", run.stdout)
    (report,) = place.glob("results/reports/ours@*/report.html")
    assert "<html" in report.read_text()
