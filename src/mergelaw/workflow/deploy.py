"""Lay the workflow out in a folder, and run the demo there."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mergelaw.errors import MergelawError

PARTS = ("workflow", "rules", "envs", "profiles", "config", "results")


def source() -> Path:
    """The folder of the workflow: inside an installed package, or a checkout's root."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "deploy"
    return installed if installed.is_dir() else package.parents[1]


def run_command(study: Path | str) -> str:
    """The command that runs a study from the present folder, a checkout or another one."""
    root = Path() if Path("workflow/Snakefile").is_file() else source()
    words = [] if root == Path() else ["--snakefile", str(root / "workflow" / "Snakefile")]
    words += ["--profile", str(root / "profiles" / "local"), "--configfile", str(study)]
    return shlex.join(["snakemake", *words])


def deploy(folder: Path) -> None:
    """Copy workflow, rules, profiles and configurations into a new or empty folder.

    A folder that already has them is not changed. Raises MergelawError if it holds anything else.
    """
    if (folder / "workflow" / "Snakefile").exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise MergelawError(f"{folder}: exists and holds something else; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part == "results":
            (folder / part).mkdir()
            shutil.copyfile(source() / part / "README.md", folder / part / "README.md")
        else:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source() / part, folder / part, ignore=ignored)
    (folder / "slurm").symlink_to("profiles/slurm")  # for `snakemake --profile slurm`


def run_demo(folder: Path) -> int:
    """Run the demo in a folder with this environment's Snakemake; return its exit status."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local"]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PATH": programs}).returncode
