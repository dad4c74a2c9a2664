"""Parameters of a loaded model by the names of the checkpoint's tensors."""

from typing import TYPE_CHECKING

from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import COMPUTED, Tensors

if TYPE_CHECKING:
    from torch import nn


def parameter_names(model: "nn.Module", base: Tensors) -> dict[str, str]:
    """The model's parameter name for each tensor name of the checkpoint ``base``.

    Tied parameters are listed once. Raises MergelawError if transformers fuses, splits or rescales
    the checkpoint's tensors when it loads them, as for some architectures.
    """
    import torch

    aliases: dict[int, list[str]] = {}
    parameters = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(alias)
        parameters[id(parameter)] = parameter
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for key, same in aliases.items():
        candidates = [c for n in same for c in (n, n.removeprefix(prefix), prefix + n)]
        name = next((c for c in candidates if c in base), None)
        parameter = parameters[key]
        if name is not None and COMPUTED.search(name):
            raise MergelawError(
                f"{base.folder}: parameter {name!r} has the name of a table that other models "
                "compute; such a model cannot be merged"
            )
        if name is None or tuple(parameter.shape) != base.shape(name):
            raise MergelawError(
                f"{base.folder}: parameter {same[0]!r} is not stored as such (transformers "
                "converts this architecture when it loads it); such a model cannot be merged"
            )
        stored = base[name].to(parameter.dtype).to(parameter.device)
        if not torch.equal(stored, parameter.data):
            raise MergelawError(
                f"{base.folder}: transformers loads tensor {name!r} with other values than the "
                "file holds; such a model cannot be merged"
            )
        names[name] = same[0]
    return names


def parameters_by_tensor(model: "nn.Module", base: Tensors) -> dict[str, "nn.Parameter"]:
    """The parameters of a model by the name of their tensor in the checkpoint ``base``."""
    return {name: model.get_parameter(a) for name, a in parameter_names(model, base).items()}
