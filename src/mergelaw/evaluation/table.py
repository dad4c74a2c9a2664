"""Tables of cells: what a shard publishes, and what laws, plans and reports read.

A row is a cell with its place in the design: a subset that stands on two circles has two rows and
one cell.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError
from mergelaw.evaluation.recipe import BASELINES

if TYPE_CHECKING:
    import pandas as pd

TABLE = "cells.parquet"


def row_of(
    recipe: Mapping[str, Any],
    entry: Mapping[str, Any],
    cell: Mapping[str, Any],
    base: str,
    vectors: Mapping[str, str],
) -> dict[str, Any]:
    """The row of a cell.

    Args:
        recipe: the shard's, with its labels.
        entry: k, replicate, place, experts, merge and domain, from ``shard.cells_of``.
        cell: the measurement, as stored.
        base, vectors: digests of the base and, by expert, of the task vectors.
    """
    import numpy as np

    labels = recipe["labels"]
    nll = np.frombuffer(base64.b64decode(cell["document_nll"]), "<f8")
    total = math.fsum(nll) if np.isfinite(nll).all() else math.nan
    kind = "baseline" if labels["method"] == BASELINES else "merge"
    return {
        "family": labels["family"],
        "base": labels["base"],
        "N": cell["non_embedding"] / 1e9,
        "N_total": cell["parameters"] / 1e9,
        "N_nominal": labels["N_nominal"],
        "method": labels["method"],
        "recipe": canonical_json(recipe["method"]),
        "seed": labels["seed"],
        "role": kind if entry["k"] else "base",
        **{name: entry[name] for name in ("k", "replicate", "place", "experts")},
        "weights": [1.0] * len(entry["experts"]),
        **{name: entry[name] for name in ("merge", "domain")},
        "held_out": recipe["domains"][entry["domain"]],
        "nll": total,
        "tokens": cell["tokens"],
        "ce": total / cell["tokens"],
        "bytes": cell["bytes"],
        "bits_per_byte": total / cell["bytes"] / math.log(2),
        "finite": math.isfinite(total),
        "document_nll": nll.tolist(),
        **{name: cell[name] for name in ("document_tokens", "long_documents", "dropped_tokens")},
        "dtype": recipe["evaluation"]["dtype"],
        **{name: cell[name] for name in ("merge_seconds", "eval_seconds", "device", "threads")},
        "cell": entry["cell"],
        "base_digest": base,
        "vector_digests": [vectors[expert] for expert in entry["experts"]],
    }


def write_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write rows as the table of a shard."""
    import pandas as pd

    table = pd.DataFrame(rows).astype({"N_nominal": "float64"})
    table.to_parquet(folder / TABLE, index=False)


def read_cells(shards: Sequence[Path]) -> "tuple[pd.DataFrame, Iterator[pd.DataFrame]]":
    """The rows of shards as one table, and again shard by shard with the columns per document."""
    return read_rows(shards), (read_rows([shard], documents=True) for shard in shards)


def read_rows(shards: Sequence[Path], documents: bool = False) -> "pd.DataFrame":
    """The rows of shards (their folders) as one table.

    The columns with a value per document are left out unless ``documents`` asks for them. Raises
    MergelawError for a table that cannot be read.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    tables = []
    for shard in shards:
        file = shard / TABLE
        try:
            columns = None
            if not documents:
                columns = [n for n in pq.read_schema(file).names if not n.startswith("document_")]
            tables.append(pd.read_parquet(file, columns=columns))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MergelawError(
                f"{file}: cannot be read ({reason}); delete {shard} and rerun"
            ) from None
    return pd.concat(tables, ignore_index=True)
