"""How much do circular designs gain over independent draws? Measured on an exhaustive table.

Where the cross-entropy of every subset of the experts is known, the estimate of E[L|k] that any
design would have given is a matter of looking up: this draws each design many times and compares
the variances of the estimates, all from as many subsets: M, the number of experts.

    python benchmarks/sampling_variance.py --table results
"""

import argparse
import glob
import sys
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.evaluation.design import pattern

COLUMNS = ["base", "method", "k", "experts", "domain", "ce"]


def read_table(paths: list[str]) -> pd.DataFrame:
    """The rows with k > 0 of Parquet files, of globs of them and of results folders."""
    files: list[str] = []
    for path in paths:
        found = f"{path}/evals/**/*.parquet" if Path(path).is_dir() else path
        matches = sorted(glob.glob(found, recursive=True))  # noqa: PTH207 (Path.glob: no absolute)
        if not matches:
            raise MergelawError(f"--table {path}: no file {found}; give files of CE rows")
        files += matches
    table = pd.concat([pd.read_parquet(file, columns=COLUMNS) for file in files])
    table["experts"] = table["experts"].map(tuple)
    return table[table["k"] > 0].drop_duplicates()  # studies in one folder share their merges


def losses_by_bitmask(rows: pd.DataFrame, where: str) -> tuple[np.ndarray, int]:
    """Macro CE (nats per token, unweighted mean over domains) of each subset, and M.

    Args:
        rows: CE rows of one base and one method, k = 0 left out.
        where: what to call them in an error message.

    Returns:
        (2^M,) with NaN at 0, indexed by the bitmask of the experts' positions in sorted order.

    Raises:
        MergelawError: not exactly one CE for every domain and every subset with k in 2..M-2.
    """
    names = sorted({name for experts in rows["experts"] for name in experts})
    bit = {name: 1 << position for position, name in enumerate(names)}
    pool = len(names)
    masks = rows["experts"].map(lambda experts: sum(bit[name] for name in experts))
    cells = rows.assign(mask=masks).groupby("mask")["ce"]
    domains = rows["domain"].nunique()
    complete = cells.mean()[(cells.count() == domains) & (cells.size() == domains)]
    measured = [sum(mask.bit_count() == k for mask in complete.index) for k in range(pool + 1)]
    for k in range(2, pool - 1):
        if measured[k] != comb(pool, k):
            raise MergelawError(
                f"{where}: not exhaustive, {measured[k]} of the {comb(pool, k)} subsets of k = {k}"
                f" have one CE for each of {domains} domains; measure them with design: exhaustive"
            )
    if pool < 5:
        raise MergelawError(f"{where}: {pool} experts leave nothing to sample; 5 is the least")
    losses = np.full(1 << pool, np.nan)
    losses[complete.index] = complete
    return losses, pool


def variance_iid(losses: np.ndarray, pool: int, k: int, draws: int, rng) -> float:
    """Variance over draws of the mean loss of M independent uniform subsets of size k."""
    order = np.argsort(rng.random((draws, pool, pool)), axis=2)[:, :, :k]
    return losses[(1 << order).sum(axis=2)].mean(axis=1).var(ddof=1)


def variance_circle(losses: np.ndarray, pool: int, places, draws: int, rng) -> float:
    """Variance over random circles of the mean loss of a pattern's M rotations."""
    circles = np.argsort(rng.random((draws, pool)), axis=1)
    rotated = (np.arange(pool)[:, None] + np.asarray(places)) % pool
    return losses[(1 << circles[:, rotated]).sum(axis=2)].mean(axis=1).var(ddof=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", nargs="+", required=True, help="Parquet files, globs, results/")
    parser.add_argument("--draws", type=int, default=1500, help="random draws of each design")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(arguments.seed)
    for (base, method), rows in read_table(arguments.table).groupby(["base", "method"]):
        losses, pool = losses_by_bitmask(rows, f"base {base}, method {method}")
        print(
            f"base {base}, method {method}: variance of the estimate of E[L|k] (macro CE) from"
            f" {pool} subsets of {pool} experts, iid over one circle, {arguments.draws} draws each"
        )
        print(f"{'k':>4}{'SD iid (nats)':>16}{'iid/ring':>12}{'iid/difference':>16}")
        for k in range(2, pool - 1):
            iid = variance_iid(losses, pool, k, arguments.draws, rng)
            ring, difference = (
                variance_circle(losses, pool, pattern(design, k, pool), arguments.draws, rng)
                for design in ("ring", "difference")
            )
            print(f"{k:>4}{iid**0.5:>16.6f}{iid / ring:>12.3g}{iid / difference:>16.3g}")


if __name__ == "__main__":
    try:
        main()
    except MergelawError as error:
        sys.exit(f"error: {error}")
