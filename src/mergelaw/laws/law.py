"""Laws: the expected loss of a merge as a function of the base's size and the number of experts.

A law is declared by its basis: linear coefficients times functions of the variables, with a few
nonlinear parameters within bounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergelaw.errors import MergelawError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """A law: the sum of linear coefficients times basis functions.

    Attributes:
        levels: the variables, each with the number of distinct values that a fit needs.
        linear: the coefficients' names, in the order of the basis; >= 0 unless in ``signed``.
        nonlinear: starting values of each nonlinear parameter, ascending; the ends are bounds.
        basis: maps variables and nonlinear parameters, by name, to the basis functions: arrays over
            the points, or numbers. It must broadcast (the solver tries many parameters at once) and
            accept complex numbers (derivatives use complex steps).
        fixed: columns that must not vary within a table.
        response: the column that the law describes; a variance may be 0, a loss may not.
    """

    name: str
    equation: str
    levels: Mapping[str, int]
    linear: tuple[str, ...]
    nonlinear: Mapping[str, tuple[float, ...]]
    basis: Callable[..., tuple[Any, ...]]
    fixed: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()
    response: str = "ce"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, linear ones first."""
        return (*self.linear, *self.nonlinear)

    def predict(self, parameters: Mapping[str, float], **variables: ArrayLike) -> Array:
        """Loss (nats per token) at the law's variables, broadcast against each other."""
        if set(variables) != set(self.levels):
            raise MergelawError(
                f"law {self.name} is a function of {', '.join(self.levels)}, "
                f"not of {', '.join(variables) or 'nothing'}: pass those"
            )
        values = np.broadcast_arrays(*map(np.asarray, variables.values()))
        arrays = {n: array.astype(float) for n, array in zip(variables, values, strict=True)}
        columns = self.basis(**arrays, **{name: parameters[name] for name in self.nonlinear})
        total = np.zeros(values[0].shape)
        for name, column in zip(self.linear, columns, strict=True):
            total = total + parameters[name] * column
        return total


EXPONENT = (0.0, 0.2, 0.5, 1.2, 2.5, 5.0)
OFFSET = (0.0, 0.3, 1.0, 3.0, 8.0, 20.0)


def _laws_in_k(
    name: str,
    text: str,
    terms: Callable[..., tuple[Any, ...]],
    nonlinear: Mapping[str, tuple[float, ...]],
    extra: tuple[str, ...] = (),
) -> tuple[Law, Law]:
    """One dependence on k as two laws: over all sizes, and for one base (name + "_fixed_N").

    ``terms`` maps k and the nonlinear parameters to the basis functions of the amplitude, {A} in
    ``text``, and of the ``extra`` coefficients.
    """

    def joint_basis(N: Any, k: Any, beta: Any, gamma: Any, **others: Any) -> tuple[Any, ...]:
        tail, *rest = terms(k, **others)
        return (1.0, N**-beta, N**-gamma * tail, *rest)

    levels = 2 + len(nonlinear) + len(extra)
    joint = Law(
        name=name,
        equation=f"E[L|N,k] = L_star + B N^-beta + {text.format(A='A0 N^-gamma')}",
        levels={"N": 3, "k": levels},
        linear=("L_star", "B", "A0", *extra),
        nonlinear={"beta": EXPONENT, "gamma": EXPONENT, **nonlinear},
        basis=joint_basis,
    )
    one_base = Law(
        name=f"{name}_fixed_N",
        equation=f"E[L|k] = L_inf + {text.format(A='A')}",
        levels={"k": levels},
        linear=("L_inf", "A", *extra),
        nonlinear=nonlinear,
        basis=lambda k, **others: (1.0, *terms(k, **others)),
        fixed=("N",),
    )
    return joint, one_base


# The merging law first, E[L | N, k] of Wang et al., arXiv:2509.24244; then its rivals, which a few
# points hardly distinguish from it.
JOINT, FIXED_N = zip(
    _laws_in_k("merging", "{A} / (k + b)", lambda k, b: (1.0 / (k + b),), {"b": OFFSET}),
    _laws_in_k("inverse", "{A} / k", lambda k: (1.0 / k,), {}),
    _laws_in_k(
        "power", "{A} k^-a", lambda k, a: (k**-a,), {"a": (0.05, 0.3, 0.6, 1.0, 1.6, 2.5, 5.0)}
    ),
    _laws_in_k(
        "exponential",
        "{A} exp(-c k)",
        lambda k, c: (np.exp(-c * k),),
        {"c": (0.02, 0.1, 0.3, 0.7, 1.2, 2.0, 4.0)},
    ),
    _laws_in_k("logarithmic", "{A} (-log k)", lambda k: (-np.log(k),), {}),
    _laws_in_k("root", "{A} k^-0.5", lambda k: (k**-0.5,), {}),
    # A bounded loss that grows with k; the paper's law for TIES with lambda = 1.
    _laws_in_k(
        "interference",
        "{A} / (k + b) + D k / (k + q)",
        # k / (k + q), written so that k can be infinite
        lambda k, b, q: (1.0 / (k + b), 1.0 / (1.0 + q / k)),
        {"b": OFFSET, "q": (0.1, 0.5, 2.0, 8.0, 20.0)},
        ("D",),
    ),
    strict=True,
)
MERGING, INVERSE, POWER, EXPONENTIAL, *_, INTERFERENCE = JOINT
MERGING_FIXED_N, INVERSE_FIXED_N, *_, INTERFERENCE_FIXED_N = FIXED_N

# Variance of the loss over random k-subsets of a pool of M. For a loss that is quadratic along
# equal-weight means the additive part and the pair part of the experts' effects are uncorrelated.
# Sampling k of M without replacement gives each its factor; both vanish at k = M, where only the
# documents' noise V0, about 0, remains.
VARIANCE = Law(
    name="variance",
    equation="Var[L|k] = V0 + G (M-k)/(k(M-1)) + P (k-1)(M-k)(M-k-1)/(k^3 (M-1)(M-2)(M-3))",
    levels={"k": 3, "M": 1},
    linear=("V0", "G", "P"),
    nonlinear={},
    basis=lambda k, M: (
        1.0,
        (M - k) / (k * (M - 1)),
        (k - 1) * (M - k) * (M - k - 1) / (k**3 * (M - 1) * (M - 2) * np.maximum(M - 3, 1)),
    ),
    response="variance",
)
LAWS = {law.name: law for law in (*JOINT, *FIXED_N, VARIANCE)}
RIVALS = {laws[0].name: laws[1:] for laws in (JOINT, FIXED_N)}
# The laws without k, a constant for each base: what a law that holds must beat.
_FLAT = (
    Law(
        name="flat",
        equation="E[L|N,k] = L_star + B N^-beta",
        levels={"N": 3, "k": 2},
        linear=("L_star", "B"),
        nonlinear={"beta": EXPONENT},
        basis=lambda N, k, beta: (1.0, N**-beta),
    ),
    Law(
        name="flat_fixed_N",
        equation="E[L|k] = L_inf",
        levels={"k": 2},
        linear=("L_inf",),
        nonlinear={},
        basis=lambda k: (1.0,),
    ),
)
FLAT = {JOINT[0].name: _FLAT[0], FIXED_N[0].name: _FLAT[1]}
# The merging law with b = 0: its lower AICc does not speak against the merging law.
NESTED = (INVERSE.name, INVERSE_FIXED_N.name)
