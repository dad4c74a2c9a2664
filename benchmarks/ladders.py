"""Forecasts of the largest models of published ladders from all smaller ones.

Two kinds of tables:

- The paper's (tests/data/paper_tables): 27 fitted laws, here as measured tables: the law at seven
  sizes and nine k plus noise, so large that a fit's R^2 is the published one. Forecast are 72B from
  the six smaller sizes, and k = 7, 8, 9 at 32B from k <= 6 there. Without noise every forecast must
  be exact.
- Measured ones, which are not ours to copy: CSV files in a folder, ``--tables``. A file with the
  columns N (billions of parameters), D (billions of tokens) and loss is fitted by
  L = E + A N^-alpha + B D^-beta; a file with N, k and loss is asked as any study is. Each of the
  larger sizes is forecast from all smaller ones. Files of the printed results, by repository:

  - chinchilla: epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv, D = FLOP / (6 N)
  - olmo: allenai/OLMo-ladder (Apache-2.0), src/scripts/paper/data/ladder-runs, the last
    c4_en-validation/CrossEntropyLoss of every run and of peteish7 and peteish13
  - olmo_k: the same runs of 190M to 3B, k = tokens over 20 N, 1 to 10
  - isoflop_*: Open-Athena/scaling-law-analysis, data/isoflops/transform/isoflops.csv, by experiment

    python benchmarks/ladders.py --tables FOLDER > benchmarks/ladders.md
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.laws.law import MERGING, Law
from scores import NOTHING, Forecast, ask, described, markdown, pooled, score

PAPER = Path(__file__).parents[1] / "tests" / "data" / "paper_tables"
NAMES = {"L_star": "Lstar", "B": "B", "beta": "beta", "A0": "A0", "gamma": "gamma", "b": "b0"}
SIZES = np.array([0.5, 1.5, 3, 7, 14, 32, 72])
K = np.arange(1, 10)
# So many of a table's largest sizes are forecast, each from all that are smaller ...
LARGEST = 6
# ... if these are so many different sizes; sizes within a tenth of each other are one.
LEAST = 4
APART = 1.1
EXPONENT = (0.0, 0.15, 0.3, 0.5, 0.9, 2.0)
TOKENS = Law(
    name="tokens",
    equation="L = E + A N^-alpha + B D^-beta",
    levels={"N": 3, "D": 3},
    linear=("E", "A", "B"),
    nonlinear={"alpha": EXPONENT, "beta": EXPONENT},
    basis=lambda N, D, alpha, beta: (1.0, N**-alpha, D**-beta),
)


def paper_tables(noisy: bool = True) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Method, domain and points of each of the paper's laws, with seeds of their own."""
    for path in sorted(PAPER.glob("table*_joint.csv")):
        method = path.stem.split("_")[1]
        for seed, row in enumerate(pd.read_csv(path).to_dict("records")):
            N, k = (axis.ravel() for axis in np.meshgrid(SIZES, K))
            law = {name: float(row[column]) for name, column in NAMES.items()}
            ce = MERGING.predict(law, N=N, k=k)
            noise = np.random.default_rng([seed, len(method)]).standard_normal(len(ce))
            ce = ce + noisy * noise * np.std(ce) * np.sqrt(1 - row["R2"])
            place = {"method": method, "family": "", "domain": row["domain"], "M": 9}
            yield (
                method,
                row["domain"],
                pd.DataFrame({"base": [f"{n:g}B" for n in N], "N": N, "k": k, "ce": ce, **place}),
            )


def along_N(points: pd.DataFrame, N: float) -> dict[str, Any]:
    """Score of the forecasts of one size from all smaller ones."""
    smaller, held_out = points[points["N"] < N / APART], points[points["N"] == N]
    last = smaller[smaller["N"] == smaller["N"].max()].groupby("k")["ce"].mean()
    forecasts = ask(smaller, held_out["k"], N=N)
    return score(forecasts, held_out["ce"], held_out["k"].map(last))


def along_k(points: pd.DataFrame, base: str, k: float) -> dict[str, Any]:
    """Score of the forecasts of all larger k at one base, from its k up to this one."""
    curve = points[points["base"] == base].sort_values("k")
    kept, rest = curve[curve["k"] <= k], curve[curve["k"] > k]
    forecasts = ask(kept, rest["k"], base=base)
    return score(forecasts, rest["ce"], np.full(len(rest), kept["ce"].iloc[-1]))


def largest_sizes(points: pd.DataFrame) -> list[float]:
    """Sizes to forecast: the largest that have enough smaller ones."""
    sizes = sorted(points["N"].unique())
    enough = [
        N for N in sizes if len({round(np.log(s) / np.log(APART)) for s in sizes if s < N}) >= LEAST
    ]
    return enough[-LARGEST:]


def tokens(table: pd.DataFrame, N: float) -> dict[str, Any]:
    """Score of forecasts of one size by the law in N and D, from all smaller ones."""
    smaller, held_out = table[table["N"] < N / APART], table[table["N"] == N]
    variables = {name: held_out[name].to_numpy() for name in ("N", "D")}
    forecasts: list[Forecast] = [NOTHING] * len(held_out)
    try:
        fitted = fit(TOKENS, smaller.rename(columns={"loss": "ce"}))
        ends = fitted.predict_interval(new=True, **variables)
        low, high = (np.nan, np.nan) if ends is None else ends
        values = fitted.predict(**variables)
        columns = np.broadcast_arrays(values, low, high)
        forecasts = [(float(v), float(a), float(b)) for v, a, b in zip(*columns, strict=True)]
    except MergelawError:
        pass
    logs = np.log(smaller[["N", "D"]].to_numpy())
    nearest = [
        np.argmin(((logs - np.log(row)) ** 2).sum(axis=1))
        for row in zip(*variables.values(), strict=True)
    ]
    return score(forecasts, held_out["loss"], smaller["loss"].to_numpy()[nearest])


def measured(path: Path) -> list[dict[str, Any]]:
    """Scores of a file's forecasts, one per size."""
    table = pd.read_csv(path).sort_values("N", ignore_index=True)
    if "D" in table:
        return [tokens(table, N) for N in largest_sizes(table)]
    points = table.rename(columns={"loss": "ce"}).assign(
        method="", family="", domain="", M=lambda t: t["k"].max()
    )
    points["base"] = points["N"].map("{:g}".format)
    sizes = sorted(points["N"].unique())
    scores = [along_N(points, N) for N in sizes[3:]]
    ks = sorted(points["k"].unique())
    return [*scores, *(along_k(points, f"{N:g}", ks[-2]) for N in sizes)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, help="folder of CSV files; see above")
    options = parser.parse_args(arguments)
    print("# Forecasts of published ladders' largest models\n")
    print(
        "90% intervals. Losses in 1e-3 nats: error is the forecasts' rms error, naive that of the "
        "last (or nearest) smaller model's loss, width the intervals' mean width.\n"
    )
    rows: list[dict[str, object]] = []
    scored: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for noisy in (False, True):
        for method, _, points in paper_tables(noisy):
            noise = "" if noisy else ", exact"
            scored.setdefault((f"paper, {method}{noise}", "72B"), []).append(along_N(points, 72.0))
            few = along_k(points, "32B", 6)
            scored.setdefault((f"paper, {method}{noise}", "32B, k = 7..9"), []).append(few)
    for path in sorted(options.tables.glob("*.csv")) if options.tables else ():
        scored[path.stem, "larger sizes"] = measured(path)
    for (name, what), scores in scored.items():
        rows.append({"table": name, "forecast": what, **described(pooled(scores))})
    print(markdown(rows))


if __name__ == "__main__":
    main()
