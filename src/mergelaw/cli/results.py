"""Current results of a study, found from its configuration."""

import json
from pathlib import Path

from mergelaw.cli.study import DEFAULT, load_study
from mergelaw.errors import MergelawError


def find_laws(path: Path | None = None) -> tuple[Path, list[str]]:
    """The fitted laws of a study.

    Args:
        path: a configuration (.yaml), a folder of laws or a table of points; None is
            config/config.yaml.

    Returns:
        The folder of the configuration's laws, as they are now; laws of a part of the study if
        there are no others, with a warning. A folder or a table is returned as it is.

    Raises:
        MergelawError: there is no such file, or its laws are not fitted yet.
    """
    path = path or DEFAULT
    if path.suffix not in (".yaml", ".yml"):
        return path, []
    if path == DEFAULT and not path.is_file():
        raise MergelawError(
            f"there is no {DEFAULT} here; name a configuration, a folder of laws or a table of "
            "points"
        )
    study = load_study(path)
    if study.made(study.laws):
        return study.results / study.laws.path, []
    partial = study.results / "partial" / study.config.name / "laws"
    if (partial / "laws.json").is_file():
        missing = json.loads((partial / "laws.json").read_text(encoding="utf-8"))["missing"]
        return partial, [
            f"{partial}: a part of the study, {len(missing)} of {len(study.evals)} shards were "
            "missing when it was fitted; the answer may change"
        ]
    others = sorted((study.results / "laws").glob(f"{study.config.name}@*"))
    hint = f"; laws of another configuration or version are in {others[-1]}" if others else ""
    raise MergelawError(
        f"{path}: its laws are not fitted yet; run `snakemake --profile profiles/local "
        f"--configfile {path}`{hint}"
    )
