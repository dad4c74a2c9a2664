"""How often do the 90% intervals of ``mergelaw plan loss`` hold the truth? Simulated studies.

A study is a table of points: 3, 4, 5 or 7 sizes, k = 1 to 9 of 9 experts. Its losses are

- a truth's mean loss: the merging law (average on algebra, TIES on biology and on code, tables 3
  and 5 of Wang et al., arXiv:2509.24244); the same floors and amplitudes with log k or k^-.6 in
  place of 1 / (k + b); the law with interference; and one that is none of the engine's forms,
  neither in k (two tails, 1/k and exp(-k/3)) nor in N (a power of N + 2);
- misfit at every point, and scatter common to a base's points: 0, .5 or 2 times the misfit;
- noise: "known" (independent, its standard error in the column se), "estimated" (independent, no
  column se), or "rings" (three circles of each base over a random landscape of pairs; the table
  carries the standard error over the three, as if it were that of independent points).

Asked are, each with ``new`` draws of misfit and scatter where these are part of what is asked:

- macro, joint law: L(2 N, 9), an unmeasured base of twice the largest size;
- the largest base's own fit: L(N, 16), beyond the pool; L_inf(N) where the truth has a floor; and
  L(N, 9) from k <= 6.

The oracle knows form, misfit, scatter and noise: the width of its interval is that of generalised
least squares at the true parameters.

    python benchmarks/interval_coverage.py --sets 1000 > benchmarks/interval_coverage.md

A run that was stopped goes on from its folder of answers.
"""

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from circles import design_variance
from mergelaw.evaluation.design import pair_counts, pattern
from scores import ask, markdown

LEVEL = 0.9
M = 9
K = np.arange(1, M + 1)
LADDERS = {
    3: (0.5, 3.0, 14.0),
    4: (0.5, 1.5, 7.0, 14.0),
    5: (0.5, 1.5, 3.0, 7.0, 14.0),
    7: (0.5, 1.0, 1.5, 3.0, 5.0, 7.0, 14.0),
}
CIRCLES = 3
# All settings get so many sets before any gets more.
ROUND = 5
# Standard deviations in nats per token: of each point's noise, or of one circle's estimate.
NOISE, CIRCLE, MISFIT = 0.0005, 0.001, 0.001
ROWS = {
    "average algebra": {"L_star": 0.181, "B": 0.115, "beta": 0.423, "A0": 0.0523, "b": 0.096},
    "ties biology": {"L_star": 0.608, "B": 0.604, "beta": 0.384, "A0": 0.373, "b": 1.16},
    "ties code": {"L_star": 0.187, "B": 0.108, "beta": 0.42, "A0": 0.12, "b": 1.2},
}
GAMMA = 0.05
Tail = Callable[[Any, float], Any]
TAILS: dict[str, Tail] = {
    "1/(k+b)": lambda k, b: 1 / (k + b),
    "log k": lambda k, b: -0.3 * np.log(k),
    "k^-.6": lambda k, b: k**-0.6,
    "interference": lambda k, b: 1 / (k + b) + 0.4 / (1 + 3 / k),
    "no form": lambda k, b: 0.6 / k + 0.4 * np.exp(-k / 3),
}


@dataclass(frozen=True)
class Setting:
    sizes: int
    truth: str
    noise: str
    scatter: float  # in misfits
    row: str

    @property
    def ladder(self) -> np.ndarray:
        return np.array(LADDERS[self.sizes])

    @property
    def base(self) -> float:
        """The base whose own fit is asked: the largest."""
        return float(self.ladder[-1])

    def parameters(self) -> np.ndarray:
        return np.array([*ROWS[self.row].values(), GAMMA])

    def mean(self, N: Any, k: Any, parameters: np.ndarray | None = None) -> Any:
        """Mean loss at N and k; k may be infinite."""
        values = self.parameters() if parameters is None else parameters
        floor, B, beta, A0, b, gamma = values
        shift = 2.0 if self.truth == "no form" else 0.0
        return floor + B * (N + shift) ** -beta + A0 * N**-gamma * TAILS[self.truth](k, b)

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(self.ladder, M), np.tile(K, self.sizes).astype(float)

    @cached_property
    def circle(self) -> np.ndarray:
        """Covariance of one circle's estimates at k = 1..M, its mean SD that of ``CIRCLE``."""
        shape = design_variance([pattern("ring", int(k), M) for k in K], M, 1)
        return shape * (CIRCLE / np.sqrt(np.diag(shape))[1 : M - 2].mean()) ** 2

    def covariance(self, N: np.ndarray) -> np.ndarray:
        """Covariance of the points' losses, base by base."""
        same = np.equal.outer(N, N)
        independent = MISFIT**2 + NOISE**2 * (self.noise != "rings")
        matrix = (self.scatter * MISFIT) ** 2 * same + independent * np.eye(len(N))
        if self.noise == "rings":
            blocks = len(N) // M
            matrix = matrix + np.kron(np.eye(blocks), self.circle / CIRCLES)
        return matrix


def settings() -> list[Setting]:
    """Sizes, truths, noises and scatters, every pair of them; the rows by turns."""
    made = []
    cross = itertools.product(LADDERS, TAILS, ("known", "estimated", "rings"), (0.0, 0.5, 2.0))
    noises, scatters = ("known", "estimated", "rings"), (0.0, 0.5, 2.0)
    for sizes, truth, noise, scatter in cross:
        place = sum(map(lambda v, w: w.index(v), (noise, scatter), (noises, scatters)))
        place += list(LADDERS).index(sizes) + list(TAILS).index(truth)
        if place % 3 == 0:
            made.append(Setting(sizes, truth, noise, scatter, list(ROWS)[len(made) % len(ROWS)]))
    return made


def landscape(random: np.random.Generator) -> np.ndarray:
    """Effects of pairs of experts that sum to zero for each expert, in units of tau."""
    pairs = random.standard_normal((M, M))
    pairs += pairs.T
    np.fill_diagonal(pairs, 0)
    rows = pairs.sum(axis=1)
    each = (rows - rows.sum() / (2 * (M - 1))) / (M - 2)
    pairs -= each[:, None] + each
    np.fill_diagonal(pairs, 0)
    return pairs * math.sqrt(2 * M * (M - 3) / (pairs**2).sum())


def circle(pairs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """What the pairs add to the estimates of E[L|k], k = 1..M, on a random circle."""
    placed = random.permutation(M)
    turned = (np.arange(M)[:, None] + np.arange(1, M)) % M
    apart = pairs[placed[:, None], placed[turned]].sum(axis=0)
    counts = np.array([pair_counts(pattern("ring", int(k), M), M) for k in K])
    return counts @ apart / (2 * M * K**2)


@dataclass
class Study:
    """A simulated study: its points, and each base's scatter by size."""

    setting: Setting
    points: pd.DataFrame
    scattered: dict[float, float]
    missed: dict[tuple[float, int], float]

    @classmethod
    def draw(cls, setting: Setting, pairs: Sequence[np.ndarray], random: Any) -> "Study":
        N, k = setting.grid
        scatter = setting.scatter * MISFIT * random.standard_normal(setting.sizes)
        misfit = MISFIT * random.standard_normal(len(N))
        columns: dict[str, Any] = {}
        if setting.noise == "rings":
            unit = design_variance([pattern("ring", int(level), M) for level in K], M, 1)
            scale = math.sqrt(np.trace(setting.circle) / np.trace(unit))
            rings = scale * np.array(
                [[circle(own, random) for _ in range(CIRCLES)] for own in pairs]
            )
            noise = rings.mean(axis=1).ravel()
            columns["se"] = (rings.std(axis=1, ddof=1) / math.sqrt(CIRCLES)).ravel()
        else:
            noise = NOISE * random.standard_normal(len(N))
            if setting.noise == "known":
                columns["se"] = NOISE
        ce = setting.mean(N, k) + np.repeat(scatter, M) + misfit + noise
        place = {"method": "", "family": "", "domain": "macro", "M": M}
        names = [f"{size:g}B" for size in N]
        points = pd.DataFrame(
            {**place, "base": names, "N": N, "k": k.astype(int), "ce": ce, **columns}
        )
        missed = dict(zip(zip(N, k.astype(int), strict=True), misfit, strict=True))
        return cls(setting, points, dict(zip(setting.ladder, scatter, strict=True)), missed)

    def asked(
        self, random: Any
    ) -> Iterator[tuple[pd.DataFrame, dict[str, Any], dict[str, tuple[float, float]]]]:
        """Points, size, and k and the true loss by estimand."""
        setting, N = self.setting, self.setting.base
        base, scatter = {"base": f"{N:g}B"}, self.scattered[N]
        new = MISFIT * random.standard_normal() * np.array([1, 1])
        new[0] += setting.scatter * MISFIT * random.standard_normal()
        yield self.points, {"N": 2 * N}, {"L(2N, 9)": (9, setting.mean(2 * N, 9) + new[0])}
        own = {"L(N, 16)": (16, setting.mean(N, 16) + scatter + new[1])}
        if setting.truth != "log k":
            own["L_inf(N)"] = (math.inf, setting.mean(N, math.inf) + scatter)
        yield self.points, base, own
        few = self.points[self.points["k"] <= 6]
        held_out = setting.mean(N, 9) + scatter + self.missed[N, 9]
        yield few, base, {"L(N, 9) from k <= 6": (9, held_out)}


def oracle(setting: Setting) -> dict[str, float]:
    """Widths of the intervals of generalised least squares at the true parameters, by estimand."""
    N, k = setting.grid
    best = setting.parameters()

    def gradient(function: Callable[[np.ndarray], Any]) -> np.ndarray:
        steps = 1e-6 * np.eye(len(best))
        return np.array([(function(best + s) - function(best - s)) / 2e-6 for s in steps])

    widths = {}
    own = setting.base
    for name, chosen, target, local in (
        ("L(2N, 9)", N > 0, (2 * own, 9.0), False),
        ("L(N, 16)", own == N, (own, 16.0), True),
        ("L(N, 9) from k <= 6", (own == N) & (k <= 6), (own, 9.0), True),
        ("L_inf(N)", own == N, (own, math.inf), True),
    ):
        if setting.truth == "log k" and math.isinf(target[1]):
            continue
        used = [0, 3, 4] if local else list(range(6))  # floor, amplitude and b; or all
        tangent = gradient(lambda p, c=chosen: setting.mean(N[c], k[c], p)).T[:, used]
        aim = gradient(lambda p, t=target: setting.mean(*t, p))[used]
        whole = setting.covariance(N)
        if local:  # the base's scatter is part of the truth
            whole = whole - (setting.scatter * MISFIT) ** 2 * np.equal.outer(N, N)
        inverse = np.linalg.inv(whole[np.ix_(chosen, chosen)])
        length = np.where((size := np.linalg.norm(tangent, axis=0)) > 0, size, 1)
        information = (tangent / length).T @ inverse @ (tangent / length)
        variance = (aim / length) @ np.linalg.pinv(information, rcond=1e-12) @ (aim / length)
        if math.isfinite(target[1]):  # a new point, and for L(2N, 9) a new base
            variance += MISFIT**2 + (0 if local else (setting.scatter * MISFIT) ** 2)
        widths[name] = 2 * ndtri((1 + LEVEL) / 2) * math.sqrt(variance)
    return widths


def cover(work: tuple[Setting, int, int, Path]) -> pd.DataFrame:
    """Answers of a setting's data sets: set, estimand, answered, held and width, one row each.

    Those that the file has are not asked again.
    """
    setting, sets, seed, path = work
    columns = ["set", "estimand", "answered", "held", "width"]
    answers = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
    random = np.random.default_rng(seed)
    pairs = [landscape(random) for _ in range(setting.sizes)]
    for number in range(answers["set"].nunique(), sets):
        random = np.random.default_rng([seed, number])
        records = []
        for points, size, estimands in Study.draw(setting, pairs, random).asked(random):
            intervals = ask(points, [k for k, _ in estimands.values()], **size)
            for (name, (_, truth)), (_, low, high) in zip(
                estimands.items(), intervals, strict=True
            ):
                answered = not math.isnan(low)
                held = float(low <= truth <= high) if answered else math.nan
                records.append((number, name, answered, held, high - low))
        rows = pd.DataFrame(records, columns=columns)
        answers = pd.concat([answers, rows]) if len(answers) else rows
    answers.to_csv(path, index=False)
    return answers


def simulate(sets: int, chosen: Sequence[Setting], folder: Path, jobs: int = 1) -> pd.DataFrame:
    """Coverage and median width of all settings, a row per setting and estimand."""
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(jobs) as workers:
        for least in range(0, sets, ROUND):
            work = [
                (setting, min(least + ROUND, sets), place, folder / f"{place}.csv")
                for place, setting in enumerate(chosen)
            ]
            workers.map(cover, work, chunksize=1)
    return collect(chosen, folder)


def collect(chosen: Sequence[Setting], folder: Path) -> pd.DataFrame:
    """Coverage and median width of the answers in a folder, beside the oracle's width."""
    columns = ("sizes", "truth", "noise", "scatter", "row")
    tables = []
    for place, setting in enumerate(chosen):
        groups = pd.read_csv(folder / f"{place}.csv").groupby("estimand", sort=False)
        table = groups.agg(
            sets=("set", "nunique"),
            answered=("answered", "mean"),
            held=("held", "mean"),
            width=("width", "median"),
        ).reset_index()
        place_of = {name: getattr(setting, name) for name in columns}
        tables.append(table.assign(oracle=table["estimand"].map(oracle(setting)), **place_of))
    return pd.concat(tables, ignore_index=True)


def report(table: pd.DataFrame) -> str:
    """Markdown: the bars' figures, shares by what was crossed, and a row for every setting."""
    held, many, sets = table["held"], table["sizes"] >= 5, table["sets"].min()

    def between(rows: pd.Series) -> str:
        answered = held[rows].dropna()
        share = ((answered >= 0.85) & (answered <= 0.95)).mean()
        enough = (answered >= 0.85).mean()
        return (
            f"{share:.0%} of {len(answered)} within 85-95%, {enough:.0%} at least 85%, "
            f"least {answered.min():.0%}"
        )

    lines = [
        "# Coverage of 90% intervals\n",
        f"{sets} data sets a setting or more; a share's standard error is "
        f"{math.sqrt(0.09 / sets):.1%}. Widths (medians) in 1e-3 nats per token.\n",
        f"- settings from five sizes on: {between(many)}",
        f"- settings with three and four: {between(~many)}\n",
    ]
    for column in ("estimand", "sizes", "truth", "noise", "scatter"):
        rows = []
        for name, group in table.groupby(column, sort=False):
            shares = group["held"]
            rows.append(
                {
                    column: name,
                    "answered": f"{group['answered'].mean():.0%}",
                    "held": f"{shares.mean():.0%}",
                    "least": f"{shares.min():.0%}",
                    "most": f"{shares.max():.0%}",
                    "width / oracle's": f"{(group['width'] / group['oracle']).median():.2g}",
                }
            )
        lines.append(markdown(rows))
    rows = [
        {
            **{
                name: record[name]
                for name in ("estimand", "sizes", "truth", "noise", "scatter", "row")
            },
            "answered": f"{record['answered']:.0%}",
            "held": f"{record['held']:.1%}",
            "width": f"{1e3 * record['width']:.2g}",
            "oracle": f"{1e3 * record['oracle']:.2g}",
        }
        for record in table.to_dict("records")
    ]
    return "\n".join([*lines, markdown(rows)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000, help="data sets a setting")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--answers", type=Path, default=Path("interval_coverage"), help="folder")
    options = parser.parse_args(argv)
    print(report(simulate(options.sets, settings(), options.answers, options.jobs)))


if __name__ == "__main__":
    main()
