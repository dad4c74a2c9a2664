"""Costs of a study's jobs by the size of the base, from the lineage of its laws."""

from pathlib import Path

import pandas as pd

from mergelaw.artifacts import lineage
from mergelaw.errors import MergelawError
from mergelaw.evaluation import read_rows


def measured_costs(laws: Path) -> pd.DataFrame:
    """Mean seconds that a study's jobs took, one row per base.

    Columns: N (billions), training (an expert; NaN if the study trained none), merging and
    evaluation (a merge), serving (evaluating a million tokens).

    Raises:
        MergelawError: the laws were not fitted to evaluations, or inputs are gone.
    """
    laws = laws if laws.is_dir() else laws.parent
    if not (laws / lineage.LINEAGE).is_file():
        raise MergelawError(f"{laws}: has no lineage, which says what jobs cost")
    shards = [laws / entry["path"] for entry in lineage.read(laws)["inputs"].values()]
    if not shards:
        raise MergelawError(f"{laws}: fitted to a table of points, which says nothing of costs")
    base = ["base", "N"]
    tables = {shard: read_rows([shard]) for shard in shards}
    rows = pd.concat(tables.values(), ignore_index=True)
    cells = rows[rows["role"] == "merge"].drop_duplicates([*base, "cell"])
    by_base = cells.groupby(base)
    # A merge is evaluated on every domain.
    merges = cells.groupby([*base, "method", "merge"])["eval_seconds"].sum()
    costs = {
        "merging": by_base["merge_seconds"].mean(),
        "evaluation": merges.groupby(base).mean(),
        "serving": by_base["eval_seconds"].sum() / by_base["tokens"].sum() * 1e6,
    }
    trainings = [
        (*table[base].iloc[0], seconds)
        for shard, table in tables.items()
        for seconds in _training_seconds(shard).items()
    ]
    seconds = pd.DataFrame(
        [(name, N, expert, spent) for name, N, (expert, spent) in trainings],
        columns=[*base, "expert", "training"],
    ).drop_duplicates([*base, "expert"])
    table = pd.DataFrame(costs).join(seconds.groupby(base)["training"].mean()).reset_index()
    columns = ["N", "training", "merging", "evaluation", "serving"]
    return table[columns].astype(float).sort_values("N", ignore_index=True)


def _training_seconds(shard: Path) -> dict[Path, float]:
    """Wall seconds of the trainings whose experts an evaluation merged, by expert."""
    seconds = {}
    for entry in lineage.read(shard)["inputs"].values():
        vector = lineage.read(shard / entry["path"])
        if vector["stage"] == "task_vector":
            expert = (shard / entry["path"] / vector["inputs"]["expert"]["path"]).resolve()
            model = lineage.read(expert)
            if "training" in model["recipe"]:
                seconds[expert] = float(model["wall_seconds"])
    return seconds
