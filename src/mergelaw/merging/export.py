"""Merges as checkpoints, with a configuration that makes mergekit merge the same way."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mergelaw.artifacts import lineage
from mergelaw.merging.engine import Weights, write_merge
from mergelaw.merging.methods import Method, method_of
from mergelaw.merging.methods.learned import COEFFICIENTS, read_coefficients
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models.checkpoint import Tensors, is_adapter

HEADER = "# The same merge by mergekit, from this folder: mergekit-yaml mergekit.yaml OUT\n"


def export(
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    folder: Path,
    output: Path,
    coefficients: Path | None = None,
) -> dict[str, Any]:
    """Write a merge into ``folder``, and ``mergekit.yaml`` where mergekit has the same rule.

    Args:
        recipe: method, experts in canonical order, weights.
        base: folder of the base.
        vectors: folders of the experts' task vectors, by expert.
        output: where ``folder`` will be moved to; paths in the YAML are relative to it.
        coefficients: folder of learned coefficients, which take the place of weights.

    Returns:
        Facts for the lineage.
    """
    import yaml

    method, names = method_of(recipe["method"]), recipe["experts"]
    weights: Weights | None = recipe["weights"]
    if coefficients is not None:
        weights = read_coefficients(coefficients, names)
        (folder / COEFFICIENTS).write_bytes((coefficients / COEFFICIENTS).read_bytes())
    write_merge(base, {n: TaskVector(vectors[n]) for n in names}, method, weights, folder)
    paths = {n: vectors[n] / lineage.read(vectors[n])["inputs"]["expert"]["path"] for n in names}
    adapters = [name for name, path in paths.items() if is_adapter(path)]
    with Tensors(base) as tensors:
        dtype = tensors.float_dtype()
    start, *places = (os.path.relpath(path, output) for path in (base, *paths.values()))
    experts = dict(zip(names, places, strict=True))
    same = mergekit_recipe(start, experts, method, weights, dtype, adapters)
    if same is not None:
        text = HEADER + yaml.safe_dump(same, sort_keys=False)
        (folder / "mergekit.yaml").write_text(text, encoding="utf-8")
    return {"mergekit": same is not None}


def mergekit_recipe(
    base: str,
    experts: Mapping[str, str],
    method: Method,
    weights: Weights | None,
    dtype: str,
    adapters: Collection[str] = (),
) -> dict[str, Any] | None:
    """The merge as mergekit's configuration; None if mergekit has no such rule.

    ``base`` and ``experts`` (by name) are paths or hub ids, ``dtype`` is the result's, ``adapters``
    names the experts that are adapters.
    """
    rule = method.mergekit()
    if rule is None:
        return None

    def weight(place: int) -> Any:
        if not isinstance(weights, Mapping):
            return weights[place] if weights else 1.0
        # mergekit takes the first filter that is a part of the tensor's name.
        names = sorted(weights, key=lambda name: (-len(name), name))
        by_tensor = [{"filter": name, "value": weights[name][place]} for name in names]
        return [*by_tensor, {"value": 0.0}]

    def reference(path: str) -> dict[str, Any]:
        # As a mapping: in a plain string mergekit takes what follows an @ for a revision.
        return {"model": {"path": path}}

    models: list[dict[str, Any]] = []
    for place, (name, path) in enumerate(experts.items()):
        model = reference(base) | {"lora": {"path": path}} if name in adapters else reference(path)
        models.append({"model": model, "parameters": {"weight": weight(place)}})
    recipe = {
        "merge_method": rule["merge_method"],
        "models": models,
        "parameters": rule["parameters"],
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if rule["merge_method"] != "linear":
        recipe["base_model"] = reference(base)
    return recipe
