"""How often do 90% intervals hold the truth? Simulated studies, a thousand for each setting.

The truth is a row of the paper's fitted laws (tests/data/paper_tables: table 3 Average, 4 Task
Arithmetic, 5 TIES). Measured are the paper's sizes up to 32B, k = 1..M; 72B is not. A study's
losses are the law's plus

- documents: what all cells share, and what each has of its own (always there);
- a circular design: three random circles of each base over a random landscape of pairs;
- misfit at each point, scatter of each base, where the setting has them.

"known": the analysis is given the covariance of all of these. "estimated": exhaustive studies are
given nothing, circular ones the documents' covariance and the circles; the rest is estimated.

Estimands: L_inf(7B), the law's floor; L(7B, M) from k in {1, 2, 4}, with known noise of that base
alone from its three points, else of the law over all sizes; L(72B, M) of the law; and, where there
is scatter, of a new base with what the law will miss of it.

    python benchmarks/interval_coverage.py > benchmarks/interval_coverage.md
"""

import argparse
import itertools
import math
import multiprocessing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from circles import design_variance
from mergelaw.evaluation.design import pair_counts, pattern
from mergelaw.laws.covariance import Part, circle_part
from mergelaw.laws.fit import Fit, fit
from mergelaw.laws.law import MERGING, MERGING_FIXED_N

TABLES = Path(__file__).parents[1] / "tests" / "data" / "paper_tables"
ROWS = [
    ("average", "algebra"), ("average", "code"), ("average", "biology"), ("ta", "discrete"),
    ("ta", "code"), ("ties", "analysis"), ("ties", "biology"), ("ties", "code"),
]  # fmt: skip
NAMES = {"L_star": "Lstar", "B": "B", "beta": "beta", "A0": "A0", "gamma": "gamma", "b": "b0"}
SIZES = np.array([0.5, 1.5, 3, 7, 14, 32])
N, UNMEASURED = 7.0, 72.0
FEW = (1, 2, 4)
CIRCLES = 3
# Standard deviations in nats per token.
SHARED, OWN = 0.002, 0.0005  # documents: common to all cells, and each cell's
ALONE = 0.001  # of each point, where the analysis is told nothing
CIRCLE = 0.002  # of one circle's estimate, mean over the levels it samples
MISFIT, SCATTER = 0.001, 0.002


@dataclass(frozen=True)
class Setting:
    row: tuple[str, str]
    pool: int
    design: str
    noise: str
    misfit: float
    scatter: float

    @cached_property
    def truth(self) -> dict[str, float]:
        (path,) = TABLES.glob(f"table*_{self.row[0]}_joint.csv")
        table = pd.read_csv(path).set_index("domain")
        return {name: float(table.loc[self.row[1], column]) for name, column in NAMES.items()}

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """N and k of the points, base by base."""
        k = np.arange(1, self.pool + 1)
        return np.repeat(SIZES, len(k)), np.tile(k, len(SIZES)).astype(float)

    @cached_property
    def shape(self) -> np.ndarray:
        """Covariance of one circle's estimates, scaled to the mean SD that is wanted."""
        patterns = [pattern("ring", k, self.pool) for k in range(1, self.pool + 1)]
        shape = design_variance(patterns, self.pool, 1)
        sampled = np.sqrt(np.diag(shape))[1 : self.pool - 2]
        return shape * (CIRCLE / sampled.mean()) ** 2

    @cached_property
    def documents(self) -> np.ndarray:
        points = len(self.grid[0])
        return SHARED**2 * np.ones((points, points)) + OWN**2 * np.eye(points)

    @property
    def circular(self) -> bool:
        return self.design == "circular"


def settings() -> list[Setting]:
    """Every pool and design for every row; known noise, misfit and scatter in all combinations."""
    made = []
    for number, row in enumerate(ROWS):
        for place, (pool, design) in enumerate(
            itertools.product((5, 7, 9), ("exhaustive", "circular"))
        ):
            bits = (number + place) % 8
            made.append(
                Setting(
                    row,
                    pool,
                    design,
                    ("known", "estimated")[bits & 1],
                    MISFIT * (bits >> 1 & 1),
                    SCATTER * (bits >> 2 & 1),
                )
            )
    return made


def landscape(pool: int, random: np.random.Generator) -> np.ndarray:
    """Effects of pairs of experts that sum to zero for each expert, in units of tau."""
    pairs = random.standard_normal((pool, pool))
    pairs += pairs.T
    np.fill_diagonal(pairs, 0)
    rows = pairs.sum(axis=1)
    own = (rows - rows.sum() / (2 * (pool - 1))) / (pool - 2)
    pairs -= own[:, None] + own
    np.fill_diagonal(pairs, 0)
    return pairs * math.sqrt(2 * pool * (pool - 3) / (pairs**2).sum())


def circle(pairs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """What the pairs add to the estimates of E[L|k], k = 1..M, on a random circle."""
    pool = len(pairs)
    placed = random.permutation(pool)
    turned = (np.arange(pool)[:, None] + np.arange(1, pool)) % pool
    apart = pairs[placed[:, None], placed[turned]].sum(axis=0)
    counts = np.array([pair_counts(pattern("ring", k, pool), pool) for k in range(1, pool + 1)])
    return counts @ apart / (2 * pool * np.arange(1, pool + 1) ** 2)


@dataclass
class Study:
    """One simulated study: losses, what the analysis is told, and what is true."""

    setting: Setting
    loss: np.ndarray
    parts: list[Part]
    scattered: np.ndarray  # of each size
    new: float  # what the law will miss of the unmeasured base at k = M

    @classmethod
    def draw(cls, setting: Setting, pairs: list, scale: float, random) -> "Study":
        at, k = setting.grid
        points, levels = len(k), setting.pool
        loss = MERGING.predict(setting.truth, N=at, k=k)
        told: list[Part] = []
        if setting.noise == "known" or setting.circular:
            loss = loss + SHARED * random.standard_normal() + OWN * random.standard_normal(points)
            told = [Part(setting.documents, weigh=False)]
        else:
            loss = loss + ALONE * random.standard_normal(points)
        if setting.circular:
            for size, own in enumerate(pairs):
                block = slice(size * levels, (size + 1) * levels)
                means = scale * np.array([circle(own, random) for _ in range(CIRCLES)])
                loss[block] += means.mean(axis=0)
                matrix, freedom = setting.shape / CIRCLES, math.inf
                if setting.noise == "estimated":
                    part = circle_part(means, setting.shape)
                    matrix, freedom = part.matrix, part.freedom
                whole = np.zeros((points, points))
                whole[block, block] = matrix
                told.append(Part(whole, freedom))
        scattered = setting.scatter * random.standard_normal(len(SIZES))
        loss = loss + np.repeat(scattered, levels)
        loss = loss + setting.misfit * random.standard_normal(points)
        new = setting.scatter * random.standard_normal()
        new += setting.misfit * random.standard_normal()
        return cls(setting, loss, told, scattered, new)

    def fit(self, kept: np.ndarray, one_base: bool = False) -> Fit:
        at, k = self.setting.grid
        parts = [part.select(kept) for part in self.parts]
        known = self.setting.noise == "known"
        return fit(
            MERGING_FIXED_N if one_base else MERGING,
            {"N": at[kept], "k": k[kept], "ce": self.loss[kept]},
            covariance=parts or None,
            misfit=self.setting.misfit if known else None,
            scatter=(0.0 if one_base else self.setting.scatter) if known else None,
        )

    def questions(self):
        """Estimand, fit, variables, truth and whether it is of a new base."""
        own, (at, k) = self.setting, self.setting.grid
        true = lambda at, k: float(MERGING.predict(own.truth, N=at, k=k))  # noqa: E731
        whole = self.fit(np.ones(len(k), dtype=bool))
        yield "L_inf(7B)", whole, {"N": N, "k": math.inf}, true(N, math.inf), False
        yield "L(72B,M)", whole, {"N": UNMEASURED, "k": own.pool}, true(UNMEASURED, own.pool), False
        if own.scatter:
            new = true(UNMEASURED, own.pool) + self.new
            yield "L(72B,M) of a new base", whole, {"N": UNMEASURED, "k": own.pool}, new, True
        few = np.isin(k, FEW)
        if own.noise == "known":
            base = float(self.scattered[list(SIZES).index(N)])
            three = self.fit(few & (at == N), one_base=True)
            yield "L(7B,M) from 1,2,4", three, {"k": own.pool}, true(N, own.pool) + base, False
        else:
            some = self.fit(few)
            variables = {"N": N, "k": own.pool}
            yield "L(7B,M) from 1,2,4", some, variables, true(N, own.pool), False


def cover(work: tuple[Setting, int, int]) -> pd.DataFrame:
    """Shares of intervals that held, and their mean widths, by estimand."""
    setting, sets, seed = work
    random = np.random.default_rng(seed)
    pairs = [landscape(setting.pool, random) for _ in SIZES]
    patterns = [pattern("ring", k, setting.pool) for k in range(1, setting.pool + 1)]
    unit = design_variance(patterns, setting.pool, 1)
    scale = math.sqrt(np.trace(setting.shape) / np.trace(unit)) if setting.circular else 0.0
    records = []
    for _ in range(sets):
        study = Study.draw(setting, pairs, scale, random)
        for name, fitted, variables, true, new in study.questions():
            low, high = fitted.predict_interval(new=new, **variables)
            held = bool(low <= true <= high)
            records.append({"estimand": name, "held": held, "width": float(high - low)})
    table = pd.DataFrame(records).groupby("estimand", sort=False)
    return table.agg(held=("held", "mean"), width=("width", "mean")).reset_index()


def described(setting: Setting) -> dict[str, str]:
    return {
        "method, domain": " ".join(setting.row),
        "b": f"{setting.truth['b']:.2g}",
        "gamma": f"{setting.truth['gamma']:.2g}",
        "M": str(setting.pool),
        "design": setting.design,
        "sigma": setting.noise,
        "misfit": f"{setting.misfit:g}",
        "scatter": f"{setting.scatter:g}",
    }


def report(table: pd.DataFrame, sets: int) -> str:
    """Markdown: the bars' figures, then a row for each setting and estimand."""
    held, error = table["held"], math.sqrt(0.09 / sets)
    lines = [
        "# Coverage of 90% intervals",
        "",
        f"{sets} data sets a setting; a share's standard error is {error:.1%}. Standard deviations "
        "and widths in 1e-3 nats per token.",
        "",
        f"Noise: documents {SHARED * 1e3:g} shared and {OWN * 1e3:g} of each cell ({ALONE * 1e3:g} "
        f"of each point where the analysis is told nothing); circular: {CIRCLES} rings a base, SD "
        f"{CIRCLE * 1e3:g} each.",
        "",
        f"- settings (rows of the table): {len(table)}",
        f"- within 85-95%: {((held >= 0.85) & (held <= 0.95)).mean():.1%}",
        f"- pooled: {held.mean():.1%}",
        f"- least: {held.min():.1%}, most: {held.max():.1%}",
        "",
    ]
    pooled = table.groupby(["estimand", "design", "sigma"])["held"].agg(["mean", "min", "max"])
    lines += ["| estimand | design | sigma | mean | least | most |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(place)} | {mean:.1%} | {least:.1%} | {most:.1%} |"
        for place, mean, least, most in pooled.itertuples(name=None)
    ]
    columns = [c for c in table if c not in ("held", "width")]
    lines += ["", f"| {' | '.join(columns)} | held | width |", "|---" * (len(columns) + 2) + "|"]
    for record in table.to_dict("records"):
        record["misfit"], record["scatter"] = (
            f"{1e3 * float(record[name]):g}" for name in ("misfit", "scatter")
        )
        told = " | ".join(str(record[column]) for column in columns)
        lines.append(f"| {told} | {record['held']:.1%} | {1e3 * record['width']:.2g} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=1000, help="for each setting")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    made = settings()
    work = [(s, arguments.datasets, arguments.seed + i) for i, s in enumerate(made)]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        tables = pool.map(cover, work, chunksize=1)
    rows = [
        pd.DataFrame({**described(setting), **table.to_dict("list")})
        for setting, table in zip(made, tables, strict=True)
    ]
    print(report(pd.concat(rows, ignore_index=True), arguments.datasets))


if __name__ == "__main__":
    main()
