"""Text of fits and studies, from the values that laws.json holds."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mergelaw.laws.law import LAWS, MERGING, VARIANCE
from mergelaw.laws.points import MACRO

# The state of a law, in a sentence.
STATES = {"holds": "holds", "doubtful": "is doubtful", "fails": "fails"}
# Names are listed if they are at most so many, else counted.
FEW = 4
# A warning of at least so many fits is given once for all of them.
REPEATED = 3


def fit_text(fit: Mapping[str, Any], equation: str, skip: Collection[str] = ()) -> str:
    """One fit, as values of ``Fit.to_dict``: verdict, parameters, quality, forms and warnings.

    ``skip`` holds warnings that are given elsewhere.
    """
    width = max(map(len, fit["parameters"]))
    state, reasons = fit["verdict"]["state"], fit["verdict"]["reasons"]
    lines = [equation, f"  The law {STATES[state]}{':' if reasons else '.'}"]
    lines += [f"  - {reason}" for reason in reasons]
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
    if len(fit["rivals"]) > 1 and fit["aicc"] is not None:
        lines += _forms(fit["rivals"])
    warnings = [text for text in fit["warnings"] if text not in skip]
    if state == "fails":  # a law that is only doubtful has its doubts as reasons
        warnings += fit["doubts"]
    return "\n".join([*lines, *(f"  ! {text}" for text in warnings)])


def _forms(rivals: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The forms of a law side by side: AICc, errors out of sample, share in forecasts."""
    yield (
        f"  {'form':<13}{'AICc':>8}{'one left out':>14}{'largest k left out':>20}"
        f"{'share in forecasts':>20}"
    )
    for rival in rivals:
        texts = [
            "-" if rival[name] is None else format(rival[name], form)
            for name, form in (("above", "+.1f"), ("loo", ".2g"), ("left_out", ".2g"))
        ]
        share = "-" if rival["weight"] is None else format(rival["weight"], ".0%")
        form = rival["law"].removesuffix("_fixed_N")
        yield f"  {form:<13}{texts[0]:>8}{texts[1]:>14}{texts[2]:>20}{share:>20}"


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
    every = Counter((fit["law"], text) for fit in laws["fits"] for text in fit["warnings"])
    repeated = {pair: count for pair, count in every.items() if count >= REPEATED}
    warnings = [
        *laws["warnings"],
        *(
            f"{count} fits {'over sizes' if law == MERGING.name else 'of one base'}: {text}"
            for (law, text), count in repeated.items()
        ),
    ]
    for heading, texts in (("Missing", laws["missing"]), ("Warnings", warnings)):
        if texts:
            lines += [f"{heading}:", *(f"  {text}" for text in texts), ""]
    for pooled in laws["pooled"]:
        lines += [_place(pooled, "domains together"), f"  {pooled_text(pooled)}", ""]
    for fit in sorted(laws["fits"], key=_macro_first):
        skip = [text for law, text in repeated if law == fit["law"]]
        lines += [_place(fit, fit["domain"], _base(fit))]
        lines += [fit_text(fit, LAWS[fit["law"]].equation, skip)]
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
        lines += ["Not fitted:", *(f"  {text}" for text in refusals(laws["refused"]))]
    return "\n".join(lines).rstrip() + "\n"


def refusals(refused: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fits that were not possible as sentences, one for each reason: which, and why."""
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for fit in refused:
        reasons.setdefault(fit["reason"], []).append(fit)
    sentences = []
    for reason, fits in reasons.items():
        names = [
            ", ".join(listed) if len(listed) <= FEW else f"{len(listed)} {name}s"
            for name in ("method", "base", "domain")
            if (listed := list(dict.fromkeys(str(fit[name] or "") for fit in fits))) != [""]
        ]
        count = f"{len(fits)} fits" if len(fits) > 1 else "1 fit"
        sentences.append(f"{count} ({'; '.join(names)}): {reason}" if any(names) else reason)
    return sentences


def _floor_lines(floor: Mapping[str, Any]) -> tuple[str, str]:
    steps = []
    for step in floor["k_within"]:
        needed = "no number" if step["k"] is None else f"{step['k']}"
        beyond = "" if step["reachable"] else ", more than this pool has"
        steps.append(f"{step['nats']:g} nats: {needed}{beyond}")
    losses = []
    for kind in ("asymptotic", "reachable"):
        ends = floor[f"{kind}_interval"]
        suffix = "" if ends is None or ends[0] == ends[1] else f" (90%: {interval(ends)})"
        losses.append("none" if floor[kind] is None else f"{floor[kind]:.5g}{suffix}")
    return (
        f"  {floor['base']}: floor {losses[0]}, L({floor['M']}) with all experts {losses[1]}"
        + (", measured" if floor["measured"] else ""),
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
