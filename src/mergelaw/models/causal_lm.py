"""Load and save causal language models and tokenizers with transformers.

Code that comes with a checkpoint is never run.
"""

from pathlib import Path
from typing import Any

from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import COMPANIONS, WRAPPERS, read_config


def load(folder: Path, dtype: str, device_map: Any = None) -> Any:
    """The model of a checkpoint folder, in ``dtype``.

    Raises MergelawError if it does not load, or if a parameter would start at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping={r"^module\.": "", **{rf"{name}\.": "" for name in WRAPPERS}},
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        architecture = read_config(folder)["model_type"]
        raise MergelawError(
            f"{folder}: transformers cannot load this {architecture} model "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise MergelawError(
            f"{folder}: has no tensor for parameter {missing[0]!r}, so transformers would start it "
            "at random; copy the checkpoint again, or fix its config.json"
        )
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder. Raises MergelawError if it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign tokenizer raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MergelawError(
            f"{folder}: transformers cannot load its tokenizer ({reason}); copy the tokenizer's "
            "files into the checkpoint"
        ) from None


def save(model: Any, folder: Path, dtype: str) -> None:
    """Write configuration and weights, converted to ``dtype``."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy a checkpoint's other files, such as the tokenizer; existing files are not replaced."""
    for name in COMPANIONS:
        if (base / name).exists() and not (folder / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
