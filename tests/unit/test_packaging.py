"""What is said in several places is the same everywhere."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mergelaw
from mergelaw.errors import MergelawError
from mergelaw.workflow import deploy

ROOT = Path(__file__).parents[2]


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned():
    kinds = ("", "-dev", "-openrlhf", "-peers")
    for name in (f"requirements{kind}.txt" for kind in kinds):
        for line in pins(name):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), f"{name}: {line}"


def test_the_wheel_holds_the_package_and_the_workflow(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        top, _, rest = name.partition("/")
        if name.startswith("src/"):
            assert rest in names
        elif top in deploy.PARTS and name != "results/.gitignore":
            assert f"mergelaw/deploy/{name}" in names


def test_the_demo_is_laid_out_once_and_over_nothing_else(tmp_path):
    deploy.deploy(tmp_path / "demo")
    assert (tmp_path / "demo" / "slurm" / "profile.v9+.yaml").exists()
    mark = tmp_path / "demo" / "config" / "config.yaml"
    mark.write_text("name: mine")
    deploy.deploy(tmp_path / "demo")
    assert mark.read_text() == "name: mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(MergelawError, match="other: exists and holds something else"):
        deploy.deploy(tmp_path / "other")


def test_every_requirement_is_within_the_packages_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name.lower(): r.specifier for r in map(Requirement, project["dependencies"])}
    locked = dict(pin.split("==") for pin in pins("requirements.txt"))
    for name, version in locked.items():
        if name.lower() in ranges:
            assert ranges[name.lower()].contains(version), name
    assert ranges.keys() <= {name.lower() for name in locked}


def conda_pins(name: str) -> tuple[list[str], list[str]]:
    """(what conda installs, what pip does) of an environment file."""
    found = yaml.safe_load((ROOT / "envs" / name).read_text())["dependencies"]
    (nested,) = [item["pip"] for item in found if isinstance(item, dict)]
    return [item for item in found if isinstance(item, str)], nested


def test_the_conda_environment_has_the_pins_of_requirements_and_mergelaw_itself():
    _, nested = conda_pins("main.yaml")
    assert nested == [*pins("requirements.txt"), "--editable ${MERGELAW_ROOT}"]


def test_the_environments_of_openrlhf_have_its_version_and_the_same_pins():
    from mergelaw.models import openrlhf

    conda, nested = conda_pins("openrlhf.yaml")
    assert f"openrlhf[ring]=={openrlhf.VERSION}" in nested
    assert "python=3.11" in conda and "flash-attn=2.8.3" in conda
    makefile = (ROOT / "Makefile").read_text()
    (line,) = re.findall(r"pip install -q --no-deps --no-build-isolation (.*)", makefile)
    tried = {*pins("requirements-openrlhf.txt"), *line.split()}
    assert {pin.replace("[ring]", "") for pin in nested} <= tried


def test_every_rule_that_runs_mergelaw_names_its_environment():
    for file in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^(?=rule )", file.read_text(), flags=re.MULTILINE)[1:]:
            assert "mergelaw " not in rule or '"../envs/main.yaml"' in rule, rule


def test_pip_expands_where_mergelaw_lies(tmp_path, monkeypatch):
    """The conda environment's last line, from a copy of the file elsewhere."""
    _, nested = conda_pins("main.yaml")
    (tmp_path / "requirements.txt").write_text(nested[-1] + "\n")
    from pip._internal.network.session import PipSession
    from pip._internal.req.req_file import parse_requirements

    monkeypatch.setenv("MERGELAW_ROOT", str(ROOT))
    (found,) = parse_requirements(str(tmp_path / "requirements.txt"), PipSession())
    assert found.requirement == str(ROOT) and found.is_editable


def test_the_packages_names_exist_and_cost_nothing_until_they_are_used():
    assert all(getattr(mergelaw, name) is not None for name in mergelaw.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mergelaw.nonsense  # noqa: B018
    program = "import sys, mergelaw; print(*{'torch', 'numpy', 'pandas'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "\n"


def test_every_import_is_a_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {Requirement(r).name.lower().replace("-", "_") for r in project["dependencies"]}
    named |= {
        "yaml",
        "ruamel",
        "vl_convert",
        "markupsafe",
    }  # PyYAML, ruamel.yaml, ..., Jinja2's own
    sources = set((ROOT / "src").rglob("*.py")) - set((ROOT / "src").rglob("openrlhf_inside.py"))
    imported = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"mergelaw"} <= named
    assert {"pyyaml", "ruamel.yaml", "vl_convert_python", "jinja2"} <= named
