"""Writing a merge out, for the workflow and for people."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelaw.artifacts import lineage

MERGEKIT_NOTE = "# The same merge by mergekit, from this folder: mergekit-yaml mergekit.yaml OUT\n"


def write_merge(
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    folder: Path,
    output: Path,
) -> dict[str, Any]:
    """Write a merge into ``folder``, and mergekit's YAML where mergekit merges the same way.

    Args:
        recipe: method, experts in order, weights.
        base, vectors: folders of the base and of the experts' task vectors.
        output: where ``folder`` will be; paths in the YAML are relative to it.
    """
    import yaml

    from mergelaw.merging import engine
    from mergelaw.merging.methods import method_of
    from mergelaw.merging.task_vector import TaskVector
    from mergelaw.models.checkpoint import Tensors, is_adapter

    method, weights = method_of(recipe["method"]), recipe["weights"]
    ordered = {name: TaskVector(vectors[name]) for name in recipe["experts"]}
    engine.write(base, ordered, method, weights, folder)
    experts = {}
    for name in recipe["experts"]:
        source = lineage.read(vectors[name])["inputs"]["expert"]["path"]
        experts[name] = vectors[name] / source
    adapters = [name for name, path in experts.items() if is_adapter(path)]
    with Tensors(base) as tensors:
        dtype = tensors.float_dtype()
    places = {name: os.path.relpath(path, output) for name, path in experts.items()}
    same = engine.mergekit_recipe(
        os.path.relpath(base, output), places, method, weights, dtype, adapters
    )
    if same is not None:
        text = MERGEKIT_NOTE + yaml.safe_dump(same, sort_keys=False)
        (folder / "mergekit.yaml").write_text(text)
    return {"mergekit": same is not None}
