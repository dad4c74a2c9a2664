"""Points for planning: read a table, choose a method and domain, find the size of a question."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.points import MACRO, TOO_MANY_BILLIONS, read_points

# Sizes that differ by less than this share count as one size.
SAME_SIZE = 0.02


def read(source: Path) -> tuple[pd.DataFrame, list[str]]:
    """Points of a folder that ``mergelaw fit`` wrote, a file in it, or a table (``read_points``).

    Returns:
        The points, with M; and sentences on assumptions.

    Raises:
        MergelawError: there are no points, or they cannot be read.
    """
    folder = source.parent if source.name == "laws.json" else source
    if folder.is_dir():
        source = folder / "points.parquet"
        if not source.is_file():
            raise MergelawError(
                f"{folder}: holds no points.parquet; give a folder that `mergelaw fit` wrote, or "
                "a table of points"
            )
    table, notes = read_points(source)
    return table, list(map(str, notes))


def choose(
    points: pd.DataFrame,
    method: str | None = None,
    domain: str | None = None,
    family: str | None = None,
    every: str = "",
) -> pd.DataFrame:
    """Points of one method, family and domain: the named ones, or the only ones.

    Args:
        points: as returned by ``read``.
        method, domain, family: names; the default domain is the macro-average, if there is one.
        every: a column of which all values are kept.

    Raises:
        MergelawError: a name is unknown, or missing where there are several.
    """
    for column, name in (("family", family), ("domain", domain), ("method", method)):
        names = sorted(points[column].unique())
        if name is None and column == "domain" and MACRO in names:
            name = MACRO
        if name is None and len(names) > 1 and column != every:
            raise MergelawError(
                f"points of more than one {column}: {', '.join(names)}; name one with --{column}"
            )
        if name is not None:
            if name not in names:
                raise MergelawError(f"no points of {column} {name}; choose from {', '.join(names)}")
            points = points[points[column] == name]
    return points.sort_values(["N", "base", "k"], ignore_index=True)


def base_points(points: pd.DataFrame, base: str) -> pd.DataFrame:
    """Points of one base, by its name, sorted by k. Raises MergelawError if there is none."""
    chosen = points[points["base"] == base]
    if chosen.empty:
        names = ", ".join(points["base"].unique())
        raise MergelawError(f"no points of base {base}; choose from {names}")
    return chosen.sort_values("k", ignore_index=True)


def at_size(
    points: pd.DataFrame, N: float | None, base: str | None
) -> tuple[pd.DataFrame, float, str | None]:
    """The size that a question is about, by N or by a base's name; by default the only one.

    Returns:
        The points, without other bases of the named base's size; N (billions); and the name of the
        nearest base, if one is within 2% of N.

    Raises:
        MergelawError: N and base are both given; neither is and several sizes are measured; no such
            base or size exists; or several bases are as near.
    """
    if base is not None:
        if N is not None:
            raise MergelawError("--base and --N both name a size; give one of them")
        N = float(base_points(points, base)["N"].iloc[0])
        points = points[(points["base"] == base) | (points["N"] != N)]
    bases = points[["base", "N"]].drop_duplicates().sort_values("base")
    if N is None and len(set(bases["N"])) > 1:
        names = ", ".join(points["base"].unique())
        raise MergelawError(f"several sizes are measured; give --N, or --base: {names}")
    N = check_size(float(bases["N"].iloc[0]) if N is None else N)
    distance = (bases["N"] / N - 1).abs()
    near = bases["base"][(distance <= SAME_SIZE) & (distance == distance.min())].to_list()
    if len(near) > 1:
        raise MergelawError(f"N = {N:g} is the size of {', '.join(near)}; name one with --base")
    return points, N, near[0] if near else None


def check_size(N: float) -> float:
    """N, if it can be billions of parameters. Raises MergelawError if not."""
    if not 0 < N < TOO_MANY_BILLIONS:
        raise MergelawError(f"N = {N:g} is no size; give it in billions of parameters")
    return N


def without_errors(points: pd.DataFrame) -> list[str]:
    """A warning on means over some subsets that have no standard errors."""
    if "subsets" not in points:
        return []
    every = [math.comb(int(M), int(k)) for M, k in zip(points["M"], points["k"], strict=True)]
    uncertain = points["se"].to_numpy() > 0 if "se" in points else np.zeros(len(points), dtype=bool)
    levels = points["k"][(points["subsets"].to_numpy() < np.array(every, dtype=float)) & ~uncertain]
    if levels.empty:
        return []
    return [
        f"points at {levels.nunique()} values of k are means over some subsets and have no "
        "standard errors: the intervals leave out the sampling error, which moves b most; "
        "measure three circles or more"
    ]
