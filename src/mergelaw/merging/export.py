"""Merges as checkpoints, with mergekit's configuration of the same merge, or as one adapter."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import lineage
from mergelaw.errors import MergelawError
from mergelaw.merging.engine import Weights, merged_tensor, prepare, rule_of, write_merge
from mergelaw.merging.methods import Method, method_of
from mergelaw.merging.methods.learned import COEFFICIENTS, read_coefficients, weights_of
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models.causal_lm import load
from mergelaw.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensors, is_adapter
from mergelaw.models.parameters import open_arranged, parameters_by_tensor

if TYPE_CHECKING:
    from torch import Tensor

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
    weights = _weights(recipe, coefficients, folder)
    write_merge(base, {n: TaskVector(vectors[n]) for n in names}, method, weights, folder)
    paths = experts_of(recipe, vectors)
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


def _weights(recipe: Mapping[str, Any], coefficients: Path | None, folder: Path) -> Weights | None:
    """Weights of a merge; learned ones are written into its folder too."""
    weights: Weights | None = recipe["weights"]
    if coefficients is not None:
        table = read_coefficients(coefficients)[tuple(recipe["experts"])]
        table.to_parquet(folder / COEFFICIENTS, index=False)
        weights = weights_of(table)
    return weights


def experts_of(recipe: Mapping[str, Any], vectors: Mapping[str, Path]) -> dict[str, Path]:
    """Folders of the experts that task vectors were made from."""
    places = {name: lineage.read(vectors[name])["inputs"]["expert"] for name in recipe["experts"]}
    return {name: vectors[name] / place["path"] for name, place in places.items()}


def export_adapter(
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    folder: Path,
    rank: int,
    coefficients: Path | None = None,
) -> dict[str, float]:
    """Write a merge of adapters as one LoRA adapter, and return its relative errors by module.

    Each matrix is the merged difference's truncated singular value decomposition, which no other
    matrix of that rank is closer to in the Frobenius norm. Rules without signs or drops are exact
    if ``rank`` is at least the sum of the experts' ranks. Other arguments are those of ``export``.
    Raises MergelawError if an expert is no adapter, or for a change that LoRA cannot hold.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    paths = experts_of(recipe, vectors)
    for name, path in paths.items():
        if not is_adapter(path):
            raise MergelawError(
                f"merge: expert {name!r} is a whole model, not an adapter; drop --lora"
            )
    method, weights = method_of(recipe["method"]), _weights(recipe, coefficients, folder)
    prepared = list(prepare(method, {name: TaskVector(vectors[name]) for name in paths}).values())
    model, factors, errors, layers = load(base, "float32"), {}, {}, set()
    places = {id(parameter): name for name, parameter in model.named_parameters()}
    with open_arranged(base, model) as tensors:
        for name, parameter in parameters_by_tensor(model, tensors).items():
            before = tensors[name].float()
            rule = rule_of(method, weights, list(paths), name)
            change = merged_tensor(before, prepared, rule, name) - before
            module, _, kind = places[id(parameter)].rpartition(".")
            if not change.any():
                continue
            layer = type(model.get_submodule(module)).__name__
            if kind != "weight" or layer not in ("Linear", "Conv1D"):
                raise MergelawError(
                    f"merge: the experts change {name!r}, which is no matrix of a linear layer, so "
                    "no LoRA adapter holds the merge; drop --lora"
                )
            layers.add(layer)
            change = change.T if layer == "Conv1D" else change
            B, A = truncated(change, rank)
            factors[f"base_model.model.{module}.lora_A.weight"] = A
            factors[f"base_model.model.{module}.lora_B.weight"] = B
            errors[module] = float((change - B @ A).norm() / change.norm())
    settings = json.loads((next(iter(paths.values())) / ADAPTER_CONFIG).read_text("utf-8"))
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(errors),
        fan_in_fan_out="Conv1D" in layers,
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(factors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return errors


def truncated(matrix: "Tensor", rank: int) -> tuple["Tensor", "Tensor"]:
    """Factors (rows, rank) and (rank, columns) of the closest matrix of a rank.

    The singular vectors are those of a random subspace after four power iterations, so a large
    matrix takes seconds. A rank beyond the matrix's is filled with zeros.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        most = min(2 * rank + 10, *matrix.shape)
        U, S, V = torch.svd_lowrank(matrix, q=most, niter=4)
    root = S[:rank].sqrt()
    B, A = torch.zeros(len(matrix), rank), torch.zeros(rank, matrix.shape[1])
    B[:, : len(root)], A[: len(root)] = U[:, :rank] * root, (V[:, :rank] * root).T
    return B, A


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
