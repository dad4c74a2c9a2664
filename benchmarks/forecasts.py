"""Forecasts and standard errors against measured tables.

Forecasts along k and along N are scored on any study's points:

    python benchmarks/forecasts.py --points results/laws/NAME@KEY

Where every subset of the pool is measured, every sampling design can be replayed too. First

    snakemake --profile profiles/local --configfile config/demo_exhaustive.yaml

then

    python benchmarks/forecasts.py --config config/demo_exhaustive.yaml > benchmarks/forecasts.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from ladders import along_k, along_N
from mergelaw import config
from mergelaw.artifacts import lineage
from mergelaw.evaluation import read_rows
from mergelaw.evaluation.design import pattern, rotations
from mergelaw.laws.points import MACRO, points
from mergelaw.planning import choose, forecast, read
from mergelaw.planning.forecast import END_POINT, THREE_POINT
from mergelaw.workflow.study import Study
from scores import described, markdown, pooled

DRAWS = 1200
LEVEL = 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("config/demo_exhaustive.yaml"))
    parser.add_argument("--points", type=Path, help="a folder of laws or a table, instead")
    options = parser.parse_args(arguments)
    if options.points is not None:
        curves, _ = read(options.points)
        print("# Forecasts of measured tables\n")
        schemes(curves)
        sizes(curves)
        return
    study = Study(config.load(options.config))
    shards = [study.results / artifact.path for artifact in study.evals.values()]
    missing = [path for path in shards if not (path / lineage.LINEAGE).exists()]
    if missing:
        sys.exit(f"{len(missing)} of {len(shards)} shards are not measured: run the workflow first")
    rows = read_rows(shards)
    experts = list(study.config.pool())
    curves = points(rows)[0].assign(M=len(experts))
    print(f"# Forecasts against every subset: {study.config.name}\n")
    print(
        f"{len(study.config.bases)} bases, {len(experts)} experts, "
        f"{2 ** len(experts) - 1} subsets each, {len(study.config.domains)} evaluation domains. "
        "Made by\n"
    )
    print("    snakemake --profile profiles/local --configfile config/demo_exhaustive.yaml")
    print("    python benchmarks/forecasts.py --config config/demo_exhaustive.yaml\n")
    schemes(curves)
    sizes(curves)
    pools = {
        (method, base): Table(own, experts)
        for (base, method), own in rows[rows["role"] == "merge"].groupby(
            ["base", "method"], sort=False
        )
    }
    standard_errors(pools)


# ---- schemes


def schemes(curves: pd.DataFrame) -> None:
    print("## Schemes\n")
    print(
        "Macro loss. Errors are forecast minus measured, in percent of the whole gain "
        "L(1) - L(M); naive is staying at the scheme's last point. Intervals are 90%, from the "
        "scheme's record at the other three bases.\n"
    )
    scored: list[dict[str, object]] = []
    for scheme in (THREE_POINT, END_POINT):
        rows: list[dict[str, object]] = []
        for method in curves["method"].unique():
            for domain in curves["domain"].unique():
                own = choose(curves, method=method, domain=domain)
                for base in own["base"].unique():
                    told = pd.DataFrame(forecast(own, scheme, base=base).table)
                    measured = own[own["base"] == base].sort_values("k")["ce"]
                    gain = measured.iloc[0] - measured.iloc[-1]
                    errors = told["error"] / gain
                    width = ((told["high"] - told["low"]) / gain).mean()
                    scored.append(
                        {
                            "scheme": scheme,
                            "method": method,
                            "macro": domain == MACRO,
                            "held": told["held"].astype(float).mean(),
                            "width": width,
                        }
                    )
                    if domain != MACRO:
                        continue
                    naive = told["naive error"] / gain
                    worst = int(errors.abs().argmax())
                    place = f"(k = {told['k'][worst]:g})"
                    rows.append(
                        {
                            "method": method,
                            "base": base,
                            "worst error, %": f"{100 * errors[worst]:+.2f} {place}",
                            "at the largest k, %": f"{100 * errors.iloc[-1]:+.2f}",
                            "naive at the largest k, %": f"{100 * naive.iloc[-1]:+.1f}",
                            "rms, %": f"{100 * np.sqrt(np.mean(errors**2)):.2f}",
                            "naive rms, %": f"{100 * np.sqrt(np.mean(naive**2)):.1f}",
                            "intervals held": f"{int(told['held'].sum())} of {len(told)}",
                        }
                    )
        print(f"### {scheme}\n")
        print(markdown(rows))
    print("### Share of 90% intervals that held, and their mean width in percent of the gain\n")
    own = pd.DataFrame(scored)
    print(
        markdown(
            [
                {
                    "scheme": scheme,
                    "method": method,
                    "macro": f"{group[group['macro']]['held'].mean():.2f}",
                    "domains": f"{group[~group['macro']]['held'].mean():.3f}",
                    "width, macro": f"{100 * group[group['macro']]['width'].mean():.1f}",
                    "width, domains": f"{100 * group[~group['macro']]['width'].mean():.1f}",
                }
                for (scheme, method), group in own.groupby(["scheme", "method"], sort=False)
            ]
        )
    )


# ---- along N


def sizes(curves: pd.DataFrame) -> None:
    print("## The largest base from all smaller ones\n")
    print(
        "Every method, domain and k. 90% intervals; losses in 1e-3 nats: error is the forecasts' "
        "rms error, naive that of the next smaller base's loss, width the intervals' median "
        "width. The next table forecasts the largest k of each base from its smaller ones.\n"
    )
    size, most = [], []
    for (method, domain), group in curves.groupby(["method", "domain"], sort=False):
        macro = "macro" if domain == MACRO else "domains"
        own = choose(group)
        size.append((method, macro, along_N(own, own["N"].max())))
        for base, curve in own.groupby("base"):
            most.append((method, macro, along_k(own, str(base), sorted(curve["k"])[-2])))
    for scored in (size, most):
        names = dict.fromkeys((method, macro) for method, macro, _ in scored)
        print(
            markdown(
                {"method": name[0], "of": name[1]}
                | described(pooled([s for method, macro, s in scored if (method, macro) == name]))
                for name in names
            )
        )


class Table:
    """Macro losses of all subsets of a base's pool by one method, (subsets,), and their ``k``."""

    def __init__(self, rows: pd.DataFrame, experts: list[str]):
        wide = rows.pivot_table(index="merge", columns="domain", values="ce")
        members = rows.drop_duplicates("merge").set_index("merge")["experts"].loc[wide.index]
        sets = np.array([np.isin(experts, list(names)) for names in members])
        order = np.argsort(sets @ (1 << np.arange(len(experts))))
        assert len(sets) == 2 ** len(experts) - 1, "not every subset is measured"
        self.experts, self.k = experts, sets[order].sum(axis=1)
        self.macro = wide.to_numpy()[order].mean(axis=1)

    def at(self, subsets: Sequence[Sequence[int]]) -> np.ndarray:
        """Places of subsets in the table."""
        return np.array([sum(1 << i for i in subset) - 1 for subset in subsets])

    def circle(self, random: np.random.Generator, ks: Sequence[int]) -> np.ndarray:
        """Places (k, M) of the rotations of ring's patterns on a random circle."""
        M = len(self.experts)
        circle = list(random.permutation(M))
        return np.array([self.at(rotations(circle, pattern("ring", k, M))) for k in ks])


# ---- standard errors


def standard_errors(pools: dict[tuple[str, str], Table]) -> None:
    print("## Standard errors of E[L|k] from 3 and 5 circles\n")
    print(
        f"Macro loss, ring, k = 2..7, {DRAWS} circles drawn from each table. Coverage of 90% "
        "intervals over k, and the mean standard error over the true standard deviation, of the "
        "spread between circles with Student's t.\n"
    )
    rows: list[dict[str, object]] = []
    for (method, base), own in pools.items():
        M = len(own.experts)
        ks = range(2, M - 1)
        truth = np.array([own.macro[own.k == k].mean() for k in ks])
        random = np.random.default_rng(0)
        circles = np.array([own.circle(random, ks) for _ in range(DRAWS)])  # (draws, k, M)
        means = own.macro[circles].mean(axis=2)
        actual = np.sqrt(np.mean((means - truth) ** 2, axis=0))
        row: dict[str, object] = {"method": method, "base": base}
        for R in (3, 5):
            groups = means[: DRAWS // R * R].reshape(-1, R, len(ks))
            errors = groups.std(axis=1, ddof=1) / np.sqrt(R)
            reach = t.ppf((1 + LEVEL) / 2, R - 1) * errors
            inside = np.abs(groups.mean(axis=1) - truth) <= reach
            row[f"{R}: covered"] = f"{inside.mean():.2f}"
            row[f"{R}: SE / SD"] = f"{(errors.mean(axis=0) / (actual / np.sqrt(R))).mean():.2f}"
        rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    main()
