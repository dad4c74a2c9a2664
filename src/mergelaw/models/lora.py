"""Adapters as experts: merged tensors of base and adapter, computed by peft.

The base is loaded in fp32 on the processor (4 bytes a parameter); peft loads the adapter into it
and merges it. Adapters that peft cannot merge, or whose merge does not fit the base, are refused.
"""

import json
import re
import warnings
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.errors import MergelawError, first_line
from mergelaw.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Tensors,
    open_mapped,
    pickled,
    read_config,
)
from mergelaw.models.compare import check_rows, equals_base
from mergelaw.models.parameters import parameter_names
from mergelaw.models.tokenizers import compare_tokenizers

if TYPE_CHECKING:
    from torch import Tensor, nn

# Kinds of adapters that peft merges from the adapter's file alone, without running other code.
KINDS = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "VERA", "LN_TUNING")
# Initialisations that change the base's weights too (pissa, olora, corda, loftq, ...) are refused.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings with which no single model equals base and adapter, or that need more files.
UNMERGEABLE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
ADVICE = "merge it with peft's merge_and_unload and give that checkpoint"
PEFT_ERRORS = (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError)
# Architectures that a model's name tells.
FAMILIES = ("llama", "mistral", "mixtral", "qwen", "gemma")
UNTIE = "give a base, and an adapter of it, whose head is a tensor of its own"


def read_adapter_config(folder: Path) -> Any:
    """The PeftConfig of an adapter. Raises MergelawError if it cannot be merged."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MergelawError(f"{path}: not a configuration of peft's; copy it again") from None
    if kind not in KINDS:
        raise MergelawError(f"{folder}: is a {kind} adapter, which is not supported; {ADVICE}")
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        raise MergelawError(
            f"{folder}: was started by {settings['init_lora_weights']}, which changes the base "
            f"too; {ADVICE}"
        )
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise MergelawError(f"{folder / ADAPTER_WEIGHTS}: no such file{pickled(folder)}")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    supported = {field.name for field in fields(config_class)} - {*UNMERGEABLE}
    for key in sorted(settings.keys() - supported):
        if settings[key]:
            raise MergelawError(
                f"{folder}: is a {kind} adapter with {key}, which is not supported; {ADVICE}"
            )
    # Weights are read later, so no initialisation is needed; compare_named_base checks the base.
    unused = {"peft_type", "init_lora_weights", "init_weights"}
    unused |= {"auto_mapping", "base_model_name_or_path"}
    chosen = {key: value for key, value in settings.items() if key in supported - unused}
    with suppress(TypeError, ValueError, KeyError):
        return config_class(**chosen)
    raise MergelawError(f"{path}: peft cannot read its settings; copy it again")


def merge_adapter(
    base: Tensors, folder: Path, vocabulary: str = "refuse"
) -> tuple[dict[str, "Tensor"], list[str]]:
    """Merge an adapter into its base with peft: fp32 tensors by the base's names, and notes.

    With ``vocabulary`` ``common_rows`` the base is resized to the rows of the adapter's embeddings.
    Raises MergelawError for an adapter that does not fit.
    """
    import torch
    from peft import set_peft_model_state_dict

    from mergelaw.models.causal_lm import load

    model = load(base.folder, "float32")
    names = {alias: name for name, alias in parameter_names(model, base).items()}
    wrapped, tensors, notes = wrap(model, base.folder, folder, vocabulary)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads change the order of sums and so the last bits
    try:
        set_peft_model_state_dict(wrapped, tensors)
        merged = wrapped.merge_and_unload()
    except PEFT_ERRORS as error:
        raise cannot_merge(folder, base.folder, error) from None
    finally:
        torch.set_num_threads(threads)
    result = {}
    for alias, parameter in merged.named_parameters():
        if alias not in names:
            raise MergelawError(
                f"{folder}: changes {alias!r}, for which the base has no tensor of its own; {UNTIE}"
            )
        result[names[alias]] = parameter.detach()
    return result, notes


def inspect_adapter(model: Any, base: Path, folder: Path, vocabulary: str = "refuse") -> list[str]:
    """Check an adapter; ``model`` is the base on the meta device. Returns notes for users."""
    _, tensors, notes = wrap(model, base, folder, vocabulary)
    trained = [name for name in tensors if "lora_A" not in name and "lora_embedding_A" not in name]
    # What LoRA adds is B times A, and a training begins with B = 0.
    if all("lora_" in name and "_B" in name and not tensors[name].any() for name in trained):
        raise equals_base(folder)
    return notes


def wrap(
    model: Any, base: Path, folder: Path, vocabulary: str
) -> tuple[Any, dict[str, "Tensor"], list[str]]:
    """The base's model with an adapter that has no values yet, its tensors, and notes."""
    from peft import get_peft_model

    config, tensors = read_adapter_config(folder), read_weights(folder)
    notes = compare_named_base(model, base, folder)
    notes += resize(model, base, folder, tensors, vocabulary)
    try:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        with warnings.catch_warnings():  # the checks below say what matters of them
            warnings.simplefilter("ignore")
            wrapped: Any = get_peft_model(model, config)
        check_ties(wrapped, ends, folder)
        check_weights(wrapped, tensors, folder)
    except PEFT_ERRORS as error:
        raise cannot_merge(folder, base, error) from None
    return wrapped, tensors, notes


def cannot_merge(folder: Path, base: Path, error: Exception) -> MergelawError:
    reason = first_line(error)
    return MergelawError(f"{folder}: peft cannot merge it into {base} ({reason}); {ADVICE}")


def compare_named_base(model: Any, base: Path, folder: Path) -> list[str]:
    """Refuse an adapter whose configuration names a base of another architecture.

    Returns a note if it names another folder, or a hub id that does not occur in the base's path.
    Raises MergelawError.
    """
    settings = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    named, kind = settings.get("base_model_name_or_path") or "", model.config.model_type
    ours = type(model).__name__
    theirs = str((settings.get("auto_mapping") or {}).get("base_model_class") or ours)
    fits = len({re.sub(r"(?:For|LMHead|Model).*", "", name) for name in (ours, theirs)}) == 1
    place, resolved = Path(named), Path(base).resolve()
    if named and (place / "config.json").is_file():
        fits &= read_config(place)["model_type"] == kind
        same = place.resolve() == resolved
    else:
        if words := [word for word in FAMILIES if word in place.name.lower()]:
            fits &= any(word in kind for word in words)
        same = place.name.lower() in str(resolved).lower()
    if not fits:
        raise MergelawError(
            f"{folder}: was trained on {named or theirs} by its configuration, but the base "
            f"{base} is a {kind} model; give an adapter of this base"
        )
    note = f"{folder}: was trained on {named} by its configuration; check that {base} is that model"
    return [] if same else [note]


def read_weights(folder: Path) -> dict[str, "Tensor"]:
    """The adapter's tensors."""
    with ExitStack() as stack:
        file = open_mapped(Path(folder) / ADAPTER_WEIGHTS, stack)
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def resize(
    model: Any, base: Path, folder: Path, tensors: dict[str, "Tensor"], vocabulary: str
) -> list[str]:
    """Resize the model's embeddings to the adapter's rows, if ``vocabulary`` allows it."""
    embedding = model.get_input_embeddings()
    alias = next(name for name, module in model.named_modules() if module is embedding)
    keys = (f"base_model.model.{alias}.{kind}weight" for kind in ("", "base_layer."))
    held = next((tensors[key] for key in keys if key in tensors), embedding.weight)
    rows = len(embedding.weight), len(held)
    check_rows(rows, folder, vocabulary)
    notes = compare_tokenizers(base, folder, rows)
    if rows[0] != rows[1]:
        model.resize_token_embeddings(len(held), mean_resizing=False)
    return notes


def check_ties(wrapped: Any, ends: tuple[Any, Any], folder: Path) -> None:
    """Refuse an adapter of only the embedding or only the head if the base ties the two."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return
    saved = [m for m in wrapped.modules() if isinstance(m, ModulesToSaveWrapper)]
    alone = [module for module in saved if module.original_module in ends]
    for name, module in wrapped.named_modules():
        adapted = isinstance(module, BaseTunerLayer) and not isinstance(
            module, TrainableTokensLayer
        )
        if (adapted and module.get_base_layer() in ends) or [module] == alone:
            raise MergelawError(
                f"{folder}: changes {name.removeprefix('base_model.model.')!r} alone, but the base "
                f"ties embedding and head; {UNTIE}"
            )


def check_weights(wrapped: "nn.Module", tensors: dict[str, "Tensor"], folder: Path) -> None:
    """Refuse a weights file with missing tensors, additional tensors or other shapes."""
    from peft import get_peft_model_state_dict

    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    allowed = needed | get_peft_model_state_dict(wrapped, save_embedding_layers=True)
    if missing := needed.keys() - tensors.keys():
        needed_by = type(getattr(wrapped, "base_model", wrapped).model).__name__
        raise MergelawError(
            f"{folder}: its weights lack {min(missing)!r}, but have {min(tensors)!r}; give an "
            f"adapter of a {needed_by}, or {ADVICE}"
        )
    for name, tensor in sorted(tensors.items()):
        if name not in allowed or allowed[name].shape != tensor.shape:
            shape = list(allowed[name].shape) if name in allowed else "not part of it"
            raise MergelawError(
                f"{folder}: its tensor {name!r} is {list(tensor.shape)}, with this base it would "
                f"be {shape}; give an adapter of this base, or {ADVICE}"
            )
