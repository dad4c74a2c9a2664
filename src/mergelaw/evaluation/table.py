"""Tables of cells: written by shards, read by laws, plans and reports.

A row is a cell with its place in the design: a subset on two circles has two rows and one cell.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError, first_line
from mergelaw.evaluation.recipe import BASELINES

if TYPE_CHECKING:
    import pandas as pd

TABLE = "cells.parquet"
COLUMNS = [
    "family", "base", "N", "N_total", "N_nominal", "method", "recipe", "seed", "role", "k",
    "replicate", "place", "experts", "weights", "merge", "domain", "held_out", "nll", "tokens",
    "ce", "bytes", "bits_per_byte", "finite", "document_nll", "document_tokens", "long_documents",
    "dropped_tokens", "dtype", "merge_seconds", "eval_seconds", "device", "threads", "cell",
    "base_digest", "vector_digests",
]  # fmt: skip


def write_table(
    recipe: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    cells: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> None:
    """Write a shard's table: one row for each of ``entries``, from ``shard.cells_of``.

    ``recipe`` is the shard's, with its labels; ``cells`` holds the measurements by identity.
    """
    import numpy as np
    import pandas as pd

    rows = []
    for entry in entries:
        cell, domain, labels = cells[entry["cell"]], entry["domain"], recipe["labels"]
        nll = np.frombuffer(base64.b64decode(cell["document_nll"]), "<f8")
        total = math.fsum(nll) if np.isfinite(nll).all() else math.nan
        kind = "baseline" if labels["method"] == BASELINES else "merge"
        kind = "written" if entry["written"] else kind
        derived = {
            "N": cell["non_embedding"] / 1e9,
            "N_total": cell["parameters"] / 1e9,
            "recipe": canonical_json(recipe["method"]),
            "role": kind if entry["k"] else "base",
            "held_out": recipe["domains"][domain],
            "nll": total,
            "ce": total / cell["tokens"],
            "bits_per_byte": total / cell["bytes"] / math.log(2),
            "finite": math.isfinite(total),
            "document_nll": nll.tolist(),
            "dtype": recipe["evaluation"]["dtype"],
        }
        rows.append({**labels, **entry, **cell, **derived})
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"N_nominal": "float64"})
    table.to_parquet(folder / TABLE, index=False)


def read_cells(shards: Sequence[Path]) -> "tuple[pd.DataFrame, Iterator[pd.DataFrame]]":
    """The rows of all shards as one table, and one table per shard with per-document columns."""
    return read_rows(shards), (read_rows([shard], documents=True) for shard in shards)


def read_rows(
    shards: Sequence[Path], documents: bool = False, merges: Sequence[str] | None = None
) -> "pd.DataFrame":
    """The rows of shards (their folders) as one table.

    ``documents`` adds the columns per document; ``merges`` selects rows by the merge's identity.
    Raises MergelawError for an unreadable table.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    tables = []
    for shard in shards:
        file = shard / TABLE
        try:
            names = pq.read_schema(file).names
            columns = [n for n in names if documents or not n.startswith("document_")]
            filters = None if merges is None else [("merge", "in", set(merges))]
            tables.append(pd.read_parquet(file, columns=columns, filters=filters))
        except (OSError, ValueError) as error:
            raise MergelawError(
                f"{file}: cannot be read ({first_line(error)}); delete {shard} and rerun"
            ) from None
    return pd.concat(tables, ignore_index=True)
