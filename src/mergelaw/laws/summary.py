"""Text of fits and studies, from the values that laws.json holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergelaw.laws.law import LAWS, VARIANCE
from mergelaw.laws.points import MACRO


def fit_text(fit: Mapping[str, Any], equation: str) -> str:
    """One fit, as values of ``Fit.to_dict``: parameters, quality, hold-out, rivals and warnings."""
    width = max(map(len, fit["parameters"]))
    lines = [equation, f"  The law {verdict_text(fit['verdict'])}."]
    for name, value in fit["parameters"].items():
        ends = [
            interval(fit[kind][name])
            for kind in ("intervals", "experts_intervals")
            if name in fit[kind]
        ]
        suffix = f"   90%: {'   experts like these: '.join(ends)}" if ends else ""
        suffix += "   (on its bound: not used)" if name in fit["on_bound"] else ""
        lines.append(f"  {name:<{width}} = {value:<10.5g}{suffix}".rstrip())
    r2 = math.nan if fit["r2"] is None else fit["r2"]
    noise = "" if fit["misfit"] is None else f"  misfit {fit['misfit']:.2g}"
    noise += f"  scatter over N {fit['scatter']:.2g}" if fit["scatter"] > 0 else ""
    lines.append(
        f"  R^2 = {r2:.5f}  RMSE = {fit['rmse']:.3g} nats  {fit['n_points']} points{noise}"
    )
    for name, forecast in fit["left_out"].items():
        same = forecast["same"]
        suffix = "" if same is None else f'; "same as the last point" misses it by {same:.3g}'
        lines.append(
            f"  with {name} = {forecast['value']:g} held out, the law misses it by "
            f"{forecast['error']:.3g} nats{suffix}"
        )
    rivals = [rival for rival in fit["rivals"] if rival["above"] is not None]
    if len(fit["rivals"]) > 1 and fit["aicc"] is not None:
        ranking = ", ".join(f"{rival['law']} {rival['above']:+.1f}" for rival in rivals)
        lines.append(f"  AICc above the best: {ranking}")
        forms = ", ".join(
            f"{rival['law']} {_number(rival['weight'], '.0%')}"
            for rival in fit["rivals"]
            if rival["weight"]
        )
        errors = ", ".join(
            f"{rival['law']} {_number(rival['loo'])} / {_number(rival['left_out'])}"
            for rival in rivals
        )
        lines.append(f"  errors with one point / the largest k left out: {errors}")
        lines.append(f"  share in forecasts: {forms}") if forms else None
    return "\n".join([*lines, *(f"  ! {text}" for text in (*fit["warnings"], *fit["doubts"]))])


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A verdict in words: "holds", or "is doubtful" or "fails" with its first reason."""
    if not verdict["reasons"]:
        return str(verdict["state"])
    verb = {"doubtful": "is doubtful", "fails": "fails"}[verdict["state"]]
    return f"{verb}: {verdict['reasons'][0]}"


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else format(value, form)


def pooled_text(pooled: Mapping[str, Any]) -> str:
    """A pooled fit in one line: means over domains, their spread, and errors out of sample."""
    values = ", ".join(
        f"{name} = {one['mean']:.4g} (90%: {interval(one['interval'], '.4g')}) "
        f"+- {one['between']:.2g}"
        for name, one in pooled["parameters"].items()
    )
    text = f"{len(pooled['domains'])} domains, mean and spread between domains: {values}"
    scores = pooled["out_of_sample"].items()
    errors = ", ".join(f"{error:.2g} {way}" for way, error in scores)
    return f"{text}; the largest k is forecast to {errors} (nats, rms)"


def study_text(laws: Mapping[str, Any]) -> str:
    """All fits of a study, as the content of laws.json, macro first."""
    kinds = laws["intervals"]
    lines = [
        "Losses in nats per token, N in billions of non-embedding parameters. Intervals are 90% "
        f"intervals for the mean over subsets of {kinds['intervals']}; where every subset was "
        f"measured, intervals for {kinds['experts_intervals']} follow.",
        "",
    ]
    for heading, texts in (("Missing", laws["missing"]), ("Warnings", laws["warnings"])):
        if texts:
            lines += [f"{heading}:", *(f"  {text}" for text in texts), ""]
    for pooled in laws["pooled"]:
        lines += [_place(pooled, "domains together"), f"  {pooled_text(pooled)}", ""]
    for fit in sorted(laws["fits"], key=_macro_first):
        lines += [_place(fit, fit["domain"], _base(fit)), fit_text(fit, LAWS[fit["law"]].equation)]
        lines += [line for floor in fit["floors"] for line in _floor_lines(floor)]
        lines.append("")
    if laws["variances"]:
        lines += ["Variance over the subsets of this pool", VARIANCE.equation]
        for fit in sorted(laws["variances"], key=_macro_first):
            values = "  ".join(f"{name} = {v:.3g}" for name, v in fit["parameters"].items())
            r2 = math.nan if fit["r2"] is None else fit["r2"]
            lines.append(f"  {_place(fit, fit['domain'], _base(fit))}: {values}  R^2 = {r2:.4f}")
        lines.append("")
    if laws["refused"]:
        lines.append("Not fitted:")
        for fit in laws["refused"]:
            place = _place(fit, fit["domain"], fit["base"] or "all sizes")
            lines.append(f"  {place}: {fit['reason']}")
    return "\n".join(lines).rstrip() + "\n"


def _floor_lines(floor: Mapping[str, Any]) -> tuple[str, str]:
    steps = []
    for step in floor["k_within"]:
        needed = "no number" if step["k"] is None else f"{step['k']}"
        beyond = "" if step["reachable"] else ", more than this pool has"
        steps.append(f"{step['nats']:g} nats: {needed}{beyond}")
    losses = []
    for kind in ("asymptotic", "reachable"):
        ends = floor[f"{kind}_interval"]
        suffix = "" if ends is None else f" (90%: {interval(ends)})"
        losses.append(f"{floor[kind]:.5g}{suffix}")
    return (
        f"  {floor['base']}: floor {losses[0]}, L({floor['M']}) with all experts {losses[1]}",
        f"    experts whose mean comes within {'; '.join(steps)}",
    )


def interval(ends: Sequence[float | None], form: str = ".5g") -> str:
    """An interval, as in "0.976 to 0.98"; an open end is inf."""
    low, high = ((-math.inf, math.inf)[i] if end is None else end for i, end in enumerate(ends))
    return f"{low:{form}} to {high:{form}}"


def _macro_first(fit: Mapping[str, Any]) -> tuple[bool, str, str]:
    return fit["domain"] != MACRO, fit["domain"], fit["method"]


def _base(fit: Mapping[str, Any]) -> str:
    base = fit["base"] or "all sizes"
    # A points table may name a base after its size.
    return base if not fit["base"] or base.startswith("N=") else f"{base} (N = {fit['N']:g})"


def _place(fit: Mapping[str, Any], *others: str) -> str:
    """Place of a fit in its study, without the parts that a points table does not name."""
    return ", ".join(name for name in (fit["method"], fit["family"], *others) if name)
