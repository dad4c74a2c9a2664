"""Tensors of a checkpoint as the parameters that transformers makes of them.

transformers renames tensors when it loads them, ignores some, and joins the experts of a mixture.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.errors import MergelawError, first_line
from mergelaw.models.checkpoint import COMPUTED, Tensors, missing_tensors, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

# Tensors of a mixture of experts that are stored expert by expert.
BY_EXPERT = re.compile(r"\.experts\.\d+\.")
# Conversions that only put flat tensors one behind the other.
JOINS = {"MergeModulelist", "Concatenate"}


def build(folder: Path) -> Any:
    """The model of a checkpoint's configuration without values, on the meta device.

    Raises MergelawError if transformers has no such architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = read_config(folder)["model_type"]
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a foreign configuration raises anything
        reason = first_line(error)
        raise MergelawError(
            f"{folder}: transformers cannot build this {kind} model ({reason}); fix its "
            "config.json, or give a model that transformers knows"
        ) from None


def open_arranged(folder: Path, model: Any = None) -> Tensors:
    """The tensors of a checkpoint, those of a mixture's experts joined as transformers does.

    ``model`` is the checkpoint's model, if it is built already.
    """
    tensors = Tensors(folder)
    if any(BY_EXPERT.search(name) for name in tensors.names()):
        parameters_of(model or build(folder), tensors)
    return tensors


def values_of(model: Any) -> dict[str, "Tensor"]:
    """Parameters and saved floating buffers of a model by name, tied ones once."""
    state = model.state_dict(keep_vars=True)
    unique = {id(value): name for name, value in reversed(state.items())}
    return {n: v for n, v in state.items() if unique[id(v)] == n and v.is_floating_point()}


def parameters_of(model: Any, tensors: Tensors) -> dict[str, str]:
    """The model's parameter for each tensor that transformers loads, by transformers' own rules.

    Experts that transformers joins are joined in ``tensors``. Raises MergelawError for a tensor
    that transformers rearranges.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(state.items())}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    placed: dict[str, str] = {}
    joined = defaultdict(list)
    for name in sorted(tensors.names(), key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key in state and pattern is not None:
            joined[key].append((name, pattern))
        elif key in state:
            placed[name] = first[id(state[key])]
    for key, parts in joined.items():
        (converter,) = {
            id(c): c for c in converters for _, p in parts if p in c.source_patterns
        }.values()
        names = joined_order(model, converter, key, parts, tensors)
        tensors.join(key, names, tuple(state[key].shape))
        placed[key] = first[id(state[key])]
    return placed


def joined_order(
    model: Any, converter: Any, key: str, parts: list[tuple[str, str]], tensors: Tensors
) -> list[str]:
    """The names of the tensors that make up a parameter, in the order of its flat values."""
    import torch

    refusal = MergelawError(
        f"{tensors.folder}: transformers rearranges the values of {parts[0][0]!r} when it loads "
        "this architecture; such a model cannot be merged"
    )
    if not {type(operation).__name__ for operation in converter.operations} <= JOINS:
        raise refusal
    # transformers' own operations, on numbers of rows in place of rows.
    converter, total, rows = deepcopy(converter), 0, {}
    for name, pattern in parts:
        *lead, _ = tensors.shape(name)
        rows[name] = torch.arange(total, total + prod(lead)).view(*lead, 1)
        total += prod(lead)
        converter.add_tensor(key, name, pattern, rows[name])
    try:
        result = converter.convert(key, model=model, config=model.config)[key]
    except (ValueError, RuntimeError, TypeError, KeyError):
        raise refusal from None
    order = (result[0] if isinstance(result, list) else result).reshape(-1).tolist()
    starts = {int(numbers[(0,) * numbers.dim()]): name for name, numbers in rows.items()}
    names = [starts[number] for number in order if number in starts]
    if order != [n for name in names for n in rows[name].reshape(-1).tolist()]:
        raise refusal
    return names


def parameter_names(model: "nn.Module", base: Tensors) -> dict[str, str]:
    """The model's parameter name for each tensor name of the checkpoint ``base``.

    Tied parameters are listed once, saved buffers too. Raises MergelawError if the parameters do
    not have the values that the checkpoint stores.
    """
    import torch

    values = values_of(model)
    names = names_by_parameter(base, values, parameters_of(model, base))
    for key, name in names.items():
        stored = base[name].to(values[key].dtype).to(values[key].device)
        if not torch.equal(stored, values[key].data):
            raise MergelawError(
                f"{base.folder}: transformers loads tensor {name!r} with other values than the "
                "file holds; such a model cannot be merged"
            )
    return {names[key]: key for key in values}


def names_by_parameter(
    base: Tensors, values: "Mapping[str, Tensor]", loaded: Mapping[str, str]
) -> dict[str, str]:
    """The tensor of ``base`` for each parameter; ``loaded`` is the reverse (``parameters_of``).

    Raises MergelawError unless every parameter has a tensor of its shape.
    """
    names: dict[str, str] = {}
    for name, key in loaded.items():
        if key in values:
            names.setdefault(key, name)
    if missing := sorted(values.keys() - names.keys()):
        raise missing_tensors(base.folder, missing)
    for key, name in names.items():
        if (shape := tuple(values[key].shape)) != base.shape(name):
            raise MergelawError(
                f"{base.folder}: tensor {name!r} is {list(base.shape(name))}, but by config.json "
                f"it would be {list(shape)}; copy the checkpoint again, or fix its config.json"
            )
        if COMPUTED.search(name):
            raise MergelawError(
                f"{base.folder}: parameter {name!r} has the name of a table that other models "
                "compute; such a model cannot be merged"
            )
    return names


def parameters_by_tensor(model: "nn.Module", base: Tensors) -> dict[str, "nn.Parameter"]:
    """The parameters (and saved buffers) of a model by the name of their tensor in ``base``."""
    values = values_of(model)
    result = {name: values[key] for name, key in parameter_names(model, base).items()}
    return result  # type: ignore[return-value]
