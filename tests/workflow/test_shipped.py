"""Every shipped configuration plans its jobs with every shipped profile, and writes nothing."""

import subprocess
import sys

import pytest
from studies import ROOT, SNAKEFILE, environment

CONFIGURATIONS = sorted((ROOT / "config").glob("*.yaml"))
PROFILES = sorted(path for path in (ROOT / "profiles").iterdir() if path.is_dir())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_plans_its_jobs_with_a_profile(configuration, profile, tmp_path):
    # The study's cache is all that a dry run writes into the results folder, and these need none.
    words = ["--snakefile", SNAKEFILE, "--profile", profile, "--configfile", configuration]
    words += ["--dry-run", "--config", f"results={tmp_path / 'results'}"]
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "write_report" in run.stdout + run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != ".snakemake"] == []
