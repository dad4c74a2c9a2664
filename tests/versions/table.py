"""Which sources each stage's result depends on, so that a stage's version is never forgotten.

`table.json` holds a digest of every module and the version that each stage had with it. A change of
a stage's sources wants its version raised in `artifacts/keys.py`, or a declaration that it does not
change results:

    python tests/versions/table.py                         # after raising versions
    python tests/versions/table.py --no-effect "reason"    # same results as before
"""

import ast
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[2] / "src"
TABLE = Path(__file__).with_name("table.json")

# The modules that make each stage's result; what they import counts too.
ENTRIES = {
    "corpus": ["mergelaw.data.documents"],
    "overlap": ["mergelaw.data.documents"],
    "base": ["mergelaw.models.pretrain"],
    "expert": ["mergelaw.models.finetune", "mergelaw.models.openrlhf"],
    "task_vector": ["mergelaw.merging.task_vector"],
    "design": ["mergelaw.evaluation.design"],
    "learn": ["mergelaw.decide.calibration"],
    "gradients": ["mergelaw.decide.gradients"],
    "evaluate": ["mergelaw.evaluation.shard"],
    "fit": ["mergelaw.laws.fits"],
    "report": ["mergelaw.report.page"],
    "merge": ["mergelaw.merging.export"],
}
# How artifacts are kept and errors worded changes no result.
LEFT_OUT = ("mergelaw.artifacts.", "mergelaw.errors")


def path_of(module: str, sources: Path = SOURCES) -> Path | None:
    """The file of a module or package of ours; None for anything else."""
    stem = sources.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def imports(tree: ast.AST) -> set[str]:
    """Names that a module imports, anywhere in it, as modules or as parts of them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("mergelaw.")}


def closure(entries: list[str], sources: Path = SOURCES) -> set[str]:
    """The modules that these ones import, directly or not, themselves included."""
    modules: set[str] = set()
    pending = list(entries)
    while pending:
        module = pending.pop()
        path = path_of(module, sources)
        if path is None or module in modules or module.startswith(LEFT_OUT):
            continue
        modules.add(module)
        pending += imports(ast.parse(path.read_text(encoding="utf-8")))
    return modules


def code_digest(path: Path) -> str:
    """Digest of a module's code: without docstrings, comment lines and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    code = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def data_files(modules: set[str], sources: Path = SOURCES) -> set[str]:
    """Data files in the packages of modules, relative to the sources: word lists, templates."""
    packages = {path.parent for module in modules if (path := path_of(module, sources))}
    return {
        path.relative_to(sources).as_posix()
        for package in packages - {sources / "mergelaw"}
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }


def current(versions: Mapping[str, int], sources: Path = SOURCES) -> dict[str, Any]:
    """The table as the sources are now."""
    stages = {}
    digests = {}
    for stage, entries in ENTRIES.items():
        modules = closure(entries, sources)
        digests |= {m: code_digest(path) for m in modules if (path := path_of(m, sources))}
        files = data_files(modules, sources)
        digests |= {f: hashlib.sha256((sources / f).read_bytes()).hexdigest()[:16] for f in files}
        stages[stage] = sorted(modules | files)
    return {
        "stages": {s: {"version": versions[s], "modules": found} for s, found in stages.items()},
        "modules": dict(sorted(digests.items())),
    }


def forgotten(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Stages whose sources changed while their version did not, with the changed modules."""
    stale = {}
    for stage, entry in now["stages"].items():
        before = recorded["stages"].get(stage)
        if before is None or before["version"] != entry["version"]:
            continue
        changed = [
            module
            for module in sorted({*before["modules"], *entry["modules"]})
            if recorded["modules"].get(module) != now["modules"].get(module)
            or (module in before["modules"]) != (module in entry["modules"])
        ]
        if changed:
            stale[stage] = changed
    return stale


def main(words: list[str]) -> None:
    """Record the sources; refuse stages whose version was forgotten."""
    from mergelaw.artifacts.keys import STAGES

    recorded = json.loads(TABLE.read_text()) if TABLE.exists() else {"stages": {}, "modules": {}}
    now = current(STAGES)
    stale = forgotten(recorded, now)
    declared = list(recorded.get("declared", []))
    if stale and words[:1] == ["--no-effect"] and len(words) == 2:
        declared.append({"stages": sorted(stale), "reason": words[1]})
    elif stale:
        sys.exit("\n".join(f"{s}: changed: {', '.join(m)}" for s, m in stale.items()))
    TABLE.write_text(json.dumps(now | {"declared": declared}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
