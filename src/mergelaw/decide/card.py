"""Model card of a written merge: its parts and their licences, rule, weights, measured losses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.artifacts import lineage
from mergelaw.decide.measured import Array, by_base
from mergelaw.decide.tables import Table
from mergelaw.merging.export import experts_of
from mergelaw.merging.methods import Method, method_of
from mergelaw.merging.methods.learned import COEFFICIENTS, Learned
from mergelaw.models.hub import read_card

UNKNOWN = "not stated"


def write_card(
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    rows: pd.DataFrame | None,
    folder: Path,
    confirmed: pd.DataFrame | None = None,
    note: str = "",
) -> None:
    """Write README.md into the folder of a merge. It holds no text of any document.

    Args:
        recipe: method, experts in canonical order, weights.
        base, vectors: folders of the base and of the experts' task vectors.
        rows: evaluation rows of the base and the merge, with the columns per document; None if the
            merge is not measured.
        confirmed: the same on documents that no choice has seen, if any.
        note: what the table of losses does not say.
    """
    experts = experts_of(recipe, vectors)
    parts = {"base": _part(base)} | {name: _part(path) for name, path in experts.items()}
    weights = recipe["weights"] or [1.0] * len(experts)
    shares = {"base": ""} | {n: f"{w:g}" for n, w in zip(experts, weights, strict=True)}
    licences = {part["licence"] for part in parts.values()}
    head = {
        "library_name": "peft" if "lora" in recipe else "transformers",
        "tags": ["merge", "mergelaw"],
        "base_model": [part["hub"] for part in parts.values() if part["hub"]],
        "license": licences.pop() if len(licences) == 1 and UNKNOWN not in licences else None,
    }
    method = method_of(recipe["method"])
    if isinstance(method, Learned):
        shares |= dict.fromkeys(experts, f"learned by part: {COEFFICIENTS}")
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items() if value),
        "---",
        f"# {recipe['method']['method']} of {', '.join(experts)}",
        "",
        f"A merge of {len(experts)} experts of one base, written by mergelaw "
        f"{lineage.versions()['mergelaw']}. `lineage.json` has the digests of all its parts.",
        "",
        "## Parts",
        "",
        *Table(
            ["part", "from", "licence, as its card states it", "weight"],
            [[name, p["from"], p["licence"], shares[name]] for name, p in parts.items()],
        ).markdown(),
        "",
        *_rule(method),
        "## Measured losses",
        "",
        *([note, ""] if note else []),
        *_losses(rows),
        *(["", "## On documents that no choice has seen", ""] if confirmed is not None else []),
        *(_losses(confirmed) if confirmed is not None else []),
    ]
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _rule(method: Method) -> list[str]:
    """A merge's rule and its parameters, as lines of the card."""
    settings = method.recipe()
    rule = settings.pop("method")
    lines = ["## Rule", "", f"`{(method.__doc__ or rule).splitlines()[0]}`"]
    return [*lines, *([f"with `{json.dumps(settings)}`"] if settings else []), ""]


def _part(artifact: Path) -> dict[str, str]:
    """Origin and licence of a model: its hub id or folder's name, or its training."""
    entry = lineage.read(artifact.resolve())
    if "checkpoint" not in entry["recipe"]:
        corpora = [name for name in entry["inputs"] if name.startswith("corpora:")]
        domains = ", ".join(name.removeprefix("corpora:") for name in corpora)
        text = f"trained by the study on {domains}"
        return {"from": text, "licence": UNKNOWN, "hub": ""}
    source = json.loads(entry["facts"]["sources"][0])
    licence = read_card(source).get("license_name") or read_card(source).get("license")
    hub = source.get("hub") or ""
    return {
        "from": f"{hub} at {source.get('commit')}" if hub else Path(source["path"]).name,
        "licence": ", ".join(licence) if isinstance(licence, list) else str(licence or UNKNOWN),
        "hub": hub,
    }


def _losses(rows: pd.DataFrame | None) -> list[str]:
    """Losses by domain with intervals, as lines of the card."""
    if rows is None:
        return ["The study did not measure this merge."]
    if not rows["finite"].all():
        return ["A loss of this merge or of its base is not finite."]
    (measured,), _ = by_base(rows, lambda models: rows)
    (merge,) = measured.merges
    documents, base = measured.documents([merge, measured.reference]), measured.reference
    counts = [len(tokens) for tokens in documents.tokens]

    def line(name: str, shares: Array) -> list[str]:
        loss = documents.difference({merge.identity: shares})
        against = documents.difference({merge.identity: shares, base.identity: -shares})
        return [name, f"{float(base.losses @ shares):.4f}", loss.text(sign=""), against.text()]

    every = [
        line(domain + (" (held out)" if domain in measured.held_out else ""), one)
        for domain, one in zip(measured.domains, np.eye(len(measured.domains)), strict=True)
    ]
    return [
        "Cross-entropy in nats per token, with 90% intervals over documents; "
        + " to ".join(map(str, sorted({min(counts), max(counts)})))
        + " documents a domain.",
        "",
        *Table(
            ["domain", "base", "this merge", "difference"],
            [*every, line("**macro**", measured.counted)],
        ).markdown(),
    ]
