"""Laws: how the expected loss of a merge depends on the base's size and the number of experts.

A law is declared by its basis: linear coefficients times functions of the variables with a few
nonlinear parameters in boxes. Fitting is variable projection (Golub and Pereyra 1973): for given
nonlinear parameters the best coefficients are a non-negative least-squares problem with one
solution, so only the nonlinear parameters are searched, from a grid of starts that the law brings.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from mergelaw.errors import MergelawError
from mergelaw.points import MACRO, points

Array = NDArray[np.float64]

# Of the grid of starts, so many are descended from besides the local minima.
BEST_STARTS = 4
# Parts of the loss smaller than this share of it are rounding errors.
ROUNDING = 1e-14
# Below this ratio of the largest to the smallest N, exponents follow the bases' training budgets.
LADDER = 100
# A nonlinear parameter with a standard error over this share of its box has a flat profile.
FLAT = 0.1


@dataclass(frozen=True)
class Law:
    """A law as the sum of linear coefficients times basis functions.

    Attributes:
        name: the law's name in files and on the command line.
        equation: the law for people to read.
        levels: the variables, each with the number of different values that a fit needs.
        linear: the coefficients' names, in the order of the basis; >= 0 unless in ``signed``.
        nonlinear: the nonlinear parameters' starts, ascending; first and last are its box.
        basis: (variables and nonlinear parameters by name) to the basis functions, each an array
            over the points or a number. Written in operations that take complex numbers: the
            derivatives are taken by a complex step.
        fixed: columns that must not vary within a fit's table.
        signed: linear coefficients of either sign.
    """

    name: str
    equation: str
    levels: Mapping[str, int]
    linear: tuple[str, ...]
    nonlinear: Mapping[str, tuple[float, ...]]
    basis: Callable[..., tuple[Any, ...]]
    fixed: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, linear ones first."""
        return (*self.linear, *self.nonlinear)

    def predict(self, parameters: Mapping[str, float], **variables: ArrayLike) -> Array:
        """Loss (nats per token) at the variables, broadcast against each other.

        Raises:
            MergelawError: the variables are not the law's.
        """
        if set(variables) != set(self.levels):
            raise MergelawError(
                f"law {self.name} is a function of {', '.join(self.levels)}, "
                f"not of {', '.join(variables) or 'nothing'}: pass those"
            )
        arrays = dict(
            zip(variables, np.broadcast_arrays(*map(np.asarray, variables.values())), strict=True)
        )
        arrays = {name: array.astype(float) for name, array in arrays.items()}
        columns = self.basis(**arrays, **{name: parameters[name] for name in self.nonlinear})
        shape = next(iter(arrays.values())).shape
        total = np.zeros(shape)
        for name, column in zip(self.linear, columns, strict=True):
            total = total + parameters[name] * column
        return total


# E[L | N, k] of Wang et al., arXiv:2509.24244: floor L_star + B N^-beta, tail A0 N^-gamma / (k + b)
MERGING = Law(
    name="merging",
    equation="E[L|N,k] = L_star + B N^-beta + A0 N^-gamma / (k + b)",
    levels={"N": 3, "k": 3},
    linear=("L_star", "B", "A0"),
    nonlinear={
        "beta": (0.0, 0.2, 0.5, 1.2, 2.5, 5.0),
        "gamma": (0.0, 0.2, 0.5, 1.2, 2.5, 5.0),
        "b": (0.0, 0.3, 1.0, 3.0, 8.0, 20.0),
    },
    basis=lambda N, k, beta, gamma, b: (1.0, N**-beta, N**-gamma / (k + b)),
)
MERGING_FIXED_N = Law(
    name="merging_fixed_N",
    equation="E[L|k] = L_inf + A / (k + b)",
    levels={"k": 3},
    linear=("L_inf", "A"),
    nonlinear={"b": (0.0, 0.1, 0.3, 1.0, 3.0, 8.0, 20.0)},
    basis=lambda k, b: (1.0, 1.0 / (k + b)),
    fixed=("N",),
)
LAWS = {law.name: law for law in (MERGING, MERGING_FIXED_N)}


@dataclass(frozen=True)
class Fit:
    """A law fitted to a table.

    Attributes:
        law: the law.
        parameters: its parameters; losses in nats per token, N in the table's unit.
        r2: share of the losses' variance about their mean that the fit explains; NaN if they have
            none.
        rmse: root mean squared residual (nats per token).
        n_points: number of points.
        residuals: measured minus fitted (nats per token), in the order of the table's rows.
        warnings: sentences on what not to believe, and what to do.
    """

    law: Law
    parameters: dict[str, float]
    r2: float
    rmse: float
    n_points: int
    residuals: Array
    warnings: tuple[str, ...]

    def predict(self, **variables: ArrayLike) -> Array:
        """Fitted loss (nats per token) at the law's variables, by name."""
        return self.law.predict(self.parameters, **variables)

    def summary(self) -> str:
        """The fit in a few lines of text."""
        values = "  ".join(f"{name} = {value:.5g}" for name, value in self.parameters.items())
        return "\n".join(
            [
                self.law.equation,
                f"  {values}",
                f"  R^2 = {self.r2:.5f}  RMSE = {self.rmse:.3g} nats  {self.n_points} points",
                *(f"  ! {warning}" for warning in self.warnings),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; an undefined R^2 is None."""
        return {
            "law": self.law.name,
            "parameters": dict(self.parameters),
            "r2": None if math.isnan(self.r2) else self.r2,
            "rmse": self.rmse,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(self.warnings),
        }


def fit(law: Law, table: pd.DataFrame | Mapping[str, ArrayLike]) -> Fit:
    """Fit a law by ordinary least squares; no starting values are needed.

    Args:
        law: one of ``LAWS``, or a law of your own.
        table: the law's variables by name (N > 0 in billions of parameters, k >= 1) and the loss
            ``ce`` (nats per token, > 0), one value per point.

    Raises:
        MergelawError: values are missing or impossible, there are fewer points than parameters, or
            too few levels of a variable.
    """
    variables, loss = _checked(law, table)
    # One order of the points, whatever the table's: sums of floats then have one value.
    order = np.lexsort((loss, *reversed(variables.values())))
    ordered = loss[order]
    size = float(np.linalg.norm(ordered))
    problem = _Problem(law, {n: v[order] for n, v in variables.items()}, ordered / size)
    state = problem.minimum()

    parameters = dict(
        zip(law.parameters, [*(state.coefficients * size), *state.theta], strict=True)
    )
    parameters = {name: float(value) for name, value in parameters.items()}
    residuals = np.empty_like(loss)
    residuals[order] = state.residuals * size
    squares = state.squares * size**2
    variance = float(np.sum((ordered - ordered.mean()) ** 2))
    # Losses that differ by rounding alone have no variance to explain.
    explained = 1 - squares / variance if variance > (1e-12 * size) ** 2 else math.nan
    return Fit(
        law=law,
        parameters=parameters,
        r2=explained,
        rmse=math.sqrt(squares / len(loss)),
        n_points=len(loss),
        residuals=residuals,
        warnings=tuple(_warnings(problem, state)),
    )


def _checked(
    law: Law, table: pd.DataFrame | Mapping[str, ArrayLike]
) -> tuple[dict[str, Array], Array]:
    """The law's variables and the loss as arrays of floats, or one line on what is wrong."""
    for name in (*law.levels, "ce"):
        if name not in table:
            raise MergelawError(f"law {law.name} needs a column {name}: add it to the table")
    columns = {name: np.asarray(table[name], dtype=float) for name in (*law.levels, "ce")}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise MergelawError(f"column {name} has values that are not finite: drop those points")
        if (values <= 0).any():
            raise MergelawError(f"column {name} has the value {values.min():g}: it must be above 0")
    loss = columns.pop("ce")
    if "k" in columns and (columns["k"] < 1).any():
        raise MergelawError(
            f"column k has the value {columns['k'].min():g}: a law is fitted to merges, k >= 1"
        )
    for name in law.fixed:
        if name in table and len(np.unique(np.asarray(table[name]))) > 1:
            raise MergelawError(
                f"law {law.name} is for one value of {name} and the table has several: "
                f"fit them one by one, or fit a law of {name}"
            )
    for name, levels in law.levels.items():
        found = np.unique(columns[name])
        if len(found) < levels:
            listed = ", ".join(f"{value:g}" for value in found)
            raise MergelawError(
                f"law {law.name} needs {levels} different values of {name}, the table has "
                f"{len(found)} ({listed}): measure more, or fit a law without {name}"
            )
    if len(loss) < len(law.parameters):
        raise MergelawError(
            f"law {law.name} has {len(law.parameters)} parameters and the table {len(loss)} "
            "points: measure more levels of " + " or ".join(law.levels)
        )
    return columns, loss


@dataclass(frozen=True)
class _State:
    """Where a search is: nonlinear parameters, their best coefficients, and what they leave."""

    theta: Array
    coefficients: Array
    residuals: Array
    orthonormal: Array
    squares: float


class _Problem:
    """Least squares in the nonlinear parameters of a law, the linear ones projected out.

    Columns of the basis are scaled to unit length before they are solved for, so neither the unit
    of N nor its distance from 1 (2.7e-5 billions, say) matters.
    """

    def __init__(self, law: Law, variables: Mapping[str, Array], loss: Array) -> None:
        self.law = law
        self.variables = variables
        self.loss = loss
        self.lower = np.array([box[0] for box in law.nonlinear.values()])
        self.upper = np.array([box[-1] for box in law.nonlinear.values()])
        self.signed = np.array([name in law.signed for name in law.linear])

    def columns(self, theta: Array) -> NDArray[Any]:
        """The basis at ``theta``, points by coefficients."""
        out = np.empty((len(self.loss), len(self.law.linear)), dtype=theta.dtype)
        named = dict(zip(self.law.nonlinear, theta, strict=True))
        for j, column in enumerate(self.law.basis(**self.variables, **named)):
            out[:, j] = column
        return out

    def project(self, theta: Array) -> _State:
        """The best coefficients at ``theta``."""
        columns = self.columns(theta)
        lengths = np.sqrt(np.einsum("ij,ij->j", columns, columns))
        unit = columns / lengths
        used = self.signed.copy()
        if used.any():
            q = np.linalg.qr(unit[:, self.signed]).Q
            rest = unit[:, ~self.signed] - q @ (q.T @ unit[:, ~self.signed])
            used[~self.signed] = nnls(rest, self.loss - q @ (q.T @ self.loss))[0] > ROUNDING
        else:
            used = nnls(unit, self.loss)[0] > ROUNDING
        # Once it is known which coefficients are above 0, the rest is plain least squares.
        q, r = np.linalg.qr(unit[:, used])
        coefficients = np.zeros(len(used))
        coefficients[used] = np.linalg.solve(r, q.T @ self.loss) / lengths[used]
        residuals = self.loss - columns @ coefficients
        return _State(theta, coefficients, residuals, q, float(residuals @ residuals))

    def jacobian(self, state: _State) -> Array:
        """Derivatives of the fitted losses by the nonlinear parameters (Kaufman 1975).

        The part that the coefficients take up is projected out, so its product with the residuals
        is the exact gradient.
        """
        step = 1e-30
        out = np.empty((len(self.loss), len(state.theta)))
        for j in range(len(state.theta)):
            theta = state.theta.astype(complex)
            theta[j] += 1j * step
            out[:, j] = self.columns(theta).imag @ state.coefficients / step
        q = state.orthonormal
        return out - q @ (q.T @ out)

    def descend(self, state: _State) -> _State:
        """Levenberg-Marquardt on the residual vector, with parameters on their bounds held there.

        Bounds are an active set: a step that leaves the box is cut at its side, and a parameter
        stays there while the gradient points outwards.
        """
        damping = 1e-3
        rounding = len(self.loss) * np.finfo(float).eps ** 2
        for _ in range(100):
            jacobian = self.jacobian(state)
            ascent = jacobian.T @ state.residuals
            normal = jacobian.T @ jacobian
            diagonal = np.diag(normal)
            outwards = ((state.theta <= self.lower) & (ascent <= 0)) | (
                (state.theta >= self.upper) & (ascent >= 0)
            )
            # A parameter without any effect (its coefficient is 0) has nowhere to go either.
            free = np.flatnonzero(~outwards & (diagonal > 0))
            slope = np.abs(ascent[free]) / np.sqrt(diagonal[free])
            if state.squares <= rounding or not (slope > 1e-14 * math.sqrt(state.squares)).any():
                return state
            while True:
                damped = normal[np.ix_(free, free)] + damping * np.diag(diagonal[free])
                theta = state.theta.copy()
                theta[free] += np.linalg.solve(damped, ascent[free])
                theta = np.clip(theta, self.lower, self.upper)
                trial = self.project(theta)
                if trial.squares < state.squares:
                    break
                damping *= 10
                if damping > 1e8:
                    return state
            gain = 1 - trial.squares / state.squares
            state, damping = trial, max(damping / 10, 1e-15)
            if gain < 1e-13:
                return state
        return state

    def minimum(self) -> _State:
        """The best state of descents from the law's grid of starts.

        Started from are the grid points that no neighbour improves on, and the best few, for a
        narrow valley may run across the grid.
        """
        axes = list(self.law.nonlinear.values())
        states = [self.project(np.array(theta)) for theta in itertools.product(*axes)]
        squares = np.array([state.squares for state in states])
        starts = set(np.argsort(squares, kind="stable")[:BEST_STARTS])
        table = np.pad(squares.reshape([len(axis) for axis in axes]), 1, constant_values=np.inf)
        inner = tuple(slice(1, -1) for _ in axes)
        lowest = np.ones(table[inner].shape, dtype=bool)
        for axis in range(len(axes)):
            lowest &= table[inner] < np.roll(table, 1, axis)[inner]
            lowest &= table[inner] <= np.roll(table, -1, axis)[inner]
        starts.update(np.flatnonzero(lowest))
        found = (self.descend(states[start]) for start in sorted(starts))
        return min(found, key=lambda state: state.squares)


def _warnings(problem: _Problem, state: _State) -> Iterable[str]:
    """What somebody who reads the parameters has to know."""
    law = problem.law
    for name, value in zip(law.linear, state.coefficients, strict=True):
        if value == 0 and name not in law.signed:
            yield f"{name} is on its bound 0: the points ask for less; leave out its term"
    jacobian = problem.jacobian(state)
    lengths = np.linalg.norm(jacobian, axis=0)
    on_bound = (state.theta <= problem.lower) | (state.theta >= problem.upper)
    idle = lengths <= ROUNDING
    for name, value, bound, no_effect in zip(
        law.nonlinear, state.theta, on_bound, idle, strict=True
    ):
        if no_effect:
            yield f"{name} has no effect on the fitted losses: do not read its value"
        elif bound:
            direction = "less" if value <= law.nonlinear[name][0] else "more"
            yield (
                f"{name} is on its bound {value:g}: the points ask for {direction}; take it as "
                "given, not as measured"
            )
    freedom = len(problem.loss) - len(law.parameters)
    free = np.flatnonzero(~on_bound & ~idle)
    if freedom == 0:
        yield (
            "as many parameters as points: the fit passes through them and cannot show its error; "
            "measure more levels of " + " or ".join(law.levels)
        )
    elif len(free):
        scaled = jacobian[:, free] / lengths[free]
        spread = np.sqrt(np.diag(np.linalg.pinv(scaled.T @ scaled))) / lengths[free]
        errors = spread * math.sqrt(state.squares / freedom)
        for j, error in zip(free, errors, strict=True):
            if error > FLAT * (problem.upper[j] - problem.lower[j]):
                name = list(law.nonlinear)[j]
                yield (
                    f"{name} is hardly determined (standard error about {error:.2g}): many values "
                    "fit as well; measure more levels of " + " or ".join(law.levels)
                )
    if "N" in law.levels:
        sizes = np.unique(problem.variables["N"])
        ratio = sizes[-1] / sizes[0]
        if ratio < LADDER:
            yield (
                f"the ladder spans a factor of {ratio:.3g} in N, less than {LADDER}: its exponents "
                "reflect the bases' training budgets and are not to be extrapolated"
            )
        if len(sizes) == 3:
            yield (
                "three sizes fix L_star, B and beta without a check of the floor's form: "
                "add a size before extrapolating in N"
            )


@dataclass(frozen=True)
class StudyFit:
    """A fit and its place in a study.

    Attributes:
        method, family, domain: what was fitted.
        base, N: the base and its size (billions) if the law is for one, else None.
        fit: the fit.
        floors: per base the pool's size M, the asymptotic floor (k to infinity), and the reachable
            one, the fitted loss of the merge of all M experts (nats per token).
    """

    method: str
    family: str
    domain: str
    base: str | None
    N: float | None
    fit: Fit
    floors: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fit with its place, as values that strict JSON can hold."""
        place = {
            "method": self.method,
            "family": self.family,
            "domain": self.domain,
            "base": self.base,
            "N": self.N,
        }
        return {**place, **self.fit.to_dict(), "floors": list(self.floors)}


@dataclass(frozen=True)
class StudyFits:
    """All fits of a study, the points they rest on, and what could not be fitted, with reasons."""

    points: pd.DataFrame
    fits: tuple[StudyFit, ...]
    refused: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def fit_study(rows: pd.DataFrame) -> StudyFits:
    """Fit every method and family, per evaluation domain and macro: jointly, and base by base.

    Args:
        rows: evaluation rows, as ``points`` takes them, with the column ``experts``.

    Raises:
        MergelawError: the rows lack a column or hold no merge. A fit that cannot be made is no
            error; it is among ``refused``.
    """
    table, warnings = points(rows)
    pools = _pools(rows)
    fits: list[StudyFit] = []
    refused: list[dict[str, Any]] = []

    def attempt(law: Law, group: pd.DataFrame, base: str | None) -> None:
        first = group.iloc[0]
        size = None if base is None else float(first["N"])
        method, family, domain = first["method"], first["family"], first["domain"]
        try:
            fitted = fit(law, group)
        except MergelawError as reason:
            refused.append(
                {
                    "method": method,
                    "family": family,
                    "domain": domain,
                    "base": base,
                    "law": law.name,
                    "reason": str(reason),
                }
            )
            return
        bases = group[["base", "N"]].drop_duplicates().sort_values(["N", "base"])
        floors = tuple(
            {
                "base": name,
                "N": float(N),
                "M": pools[method, family, name],
                "asymptotic": _at(fitted, N, math.inf),
                "reachable": _at(fitted, N, pools[method, family, name]),
            }
            for name, N in zip(bases["base"], bases["N"], strict=True)
        )
        fits.append(StudyFit(method, family, domain, base, size, fitted, floors))

    for _, group in table.groupby(["method", "family", "domain"]):
        attempt(MERGING, group, None)
        for _, own in group.groupby(["N", "base"]):
            attempt(MERGING_FIXED_N, own, str(own["base"].iloc[0]))
    return StudyFits(table, tuple(fits), tuple(refused), tuple(warnings))


def _at(fitted: Fit, N: float, k: float) -> float:
    """Fitted loss at a size and a number of experts, whether or not the law has N."""
    values = {"N": N, "k": k}
    return float(fitted.predict(**{name: values[name] for name in fitted.law.levels}))


def _pools(rows: pd.DataFrame) -> dict[tuple[str, str, str], int]:
    """Number of different experts in a base's merges, by (method, family, base)."""
    place = ["method", "family", "base"]
    merges = rows[rows["role"] == "merge"].drop_duplicates([*place, "merge"])
    experts = merges[[*place, "experts"]].explode("experts").drop_duplicates()
    return dict(Counter(experts[place].itertuples(index=False, name=None)))


def write_fits(rows: pd.DataFrame, output: Path, missing: list[str]) -> dict[str, Any]:
    """Fit a study and write it: laws.json, parameters.parquet, points.parquet and summary.txt.

    Args:
        rows: evaluation rows, as ``fit_study`` takes them.
        output: the folder to write into; made if it is not there.
        missing: shards of the plan that could not be read, for people to know.

    Returns:
        Counts of points, fits, refused fits and missing shards.

    Raises:
        MergelawError: as ``fit_study``.
    """
    study = fit_study(rows)
    output.mkdir(parents=True, exist_ok=True)
    laws = {
        "units": {"ce": "nats per token", "N": "billions of non-embedding parameters"},
        "laws": {law.name: law.equation for law in LAWS.values()},
        "fits": [fitted.to_dict() for fitted in study.fits],
        "refused": list(study.refused),
        "warnings": list(study.warnings),
        "missing": missing,
    }
    text = json.dumps(laws, ensure_ascii=False, allow_nan=False, indent=1)
    (output / "laws.json").write_text(text + "\n", encoding="utf-8")
    _parameters(study).to_parquet(output / "parameters.parquet", index=False)
    study.points.to_parquet(output / "points.parquet", index=False)
    (output / "summary.txt").write_text(_summary(study, missing), encoding="utf-8")
    return {
        "points": len(study.points),
        "fits": len(study.fits),
        "refused": len(study.refused),
        "missing": len(missing),
    }


def _parameters(study: StudyFits) -> pd.DataFrame:
    """One row per fit, a column per parameter of any law."""
    columns = ["method", "family", "domain", "law", "base", "N"]
    names = dict.fromkeys(name for law in LAWS.values() for name in law.parameters)
    records = []
    for fitted in study.fits:
        values = fitted.to_dict()
        records.append(
            {
                **{column: values[column] for column in columns},
                **{name: values["parameters"].get(name) for name in names},
                **{name: values[name] for name in ("r2", "rmse", "n_points", "warnings")},
            }
        )
    table = pd.DataFrame(records, columns=[*columns, *names, "r2", "rmse", "n_points", "warnings"])
    return table.astype(dict.fromkeys(["N", *names, "r2", "rmse"], float))


def _summary(study: StudyFits, missing: list[str]) -> str:
    """The study for a terminal: macro first, a paragraph per fit."""
    lines = ["Losses in nats per token, N in billions of non-embedding parameters.", ""]
    for heading, sentences in (("Missing", missing), ("Warnings", study.warnings)):
        if sentences:
            lines += [f"{heading}:", *(f"  {sentence}" for sentence in sentences), ""]
    for item in sorted(study.fits, key=lambda f: (f.domain != MACRO, f.domain, f.method)):
        where = "all sizes" if item.base is None else f"{item.base} (N = {item.N:g})"
        lines += [f"{item.method}, {item.family}, {item.domain}, {where}", item.fit.summary()]
        lines += [
            f"  {floor['base']}: floor {floor['asymptotic']:.5g}, "
            f"reachable with these {floor['M']} experts {floor['reachable']:.5g}"
            for floor in item.floors
        ]
        lines.append("")
    if study.refused:
        lines.append("Not fitted:")
        lines += [
            f"  {r['method']}, {r['family']}, {r['domain']}, {r['base'] or 'all sizes'}: "
            f"{r['reason']}"
            for r in study.refused
        ]
    return "\n".join(lines).rstrip() + "\n"
