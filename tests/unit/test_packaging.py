"""What is said in several places is the same everywhere."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-peers.txt"):
        for line in pins(name):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), f"{name}: {line}"


def test_the_conda_environment_has_the_pins_of_requirements():
    environment = yaml.safe_load((ROOT / "envs" / "main.yaml").read_text())
    (nested,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert nested == pins("requirements.txt")


def test_every_command_of_the_readme_exists():
    from typer.main import get_command

    from mergelaw.cli import app

    known = set(get_command(app).commands)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    used = re.findall(r"^mergelaw ([a-z-]+)", "\n".join(blocks), re.MULTILINE)
    assert used and set(used) <= known


def test_the_readme_configuration_and_python_run(tmp_path):
    from mergelaw import config

    text = (ROOT / "README.md").read_text()
    (study,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert config.parse(yaml.safe_load(study)).pool().keys() == {"medicine", "law", "support"}
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
