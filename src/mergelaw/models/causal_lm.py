"""Load and save causal language models and tokenizers with transformers.

Code that comes with a checkpoint is never run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelaw.data.tokenize import Window
from mergelaw.errors import MergelawError, first_line, out_of_memory
from mergelaw.models.checkpoint import COMPANIONS, WRAPPERS, missing_tensors, read_config


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
        if out_of_memory(error):
            raise
        architecture = read_config(folder)["model_type"]
        raise MergelawError(
            f"{folder}: transformers cannot load this {architecture} model ({first_line(error)})"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise missing_tensors(folder, missing)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder. Raises MergelawError if it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign tokenizer raises anything
        if out_of_memory(error):
            raise
        reason = first_line(error)
        raise MergelawError(
            f"{folder}: transformers cannot load its tokenizer ({reason}); copy the tokenizer's "
            "files into the checkpoint"
        ) from None


def check_windows(model: Any, windows: Sequence[Window], where: str) -> None:
    """:func:`check_length` of the longest window; notes are printed."""
    for note in check_length(model, max(len(window.ids) for window in windows), where):
        print(f"mergelaw: {note}", file=sys.stderr)


def check_length(model: Any, longest: int, where: str) -> list[str]:
    """Refuse documents of more tokens than a model has positions; it may be on the meta device.

    Returns a note if the positions are relative, so that it was only made for fewer tokens. Raises
    MergelawError.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return []
    advice = f"set max_tokens: {limit}, with long_documents: split or truncate"
    embedding = model.get_input_embeddings()
    # Some tables of positions begin with two other rows.
    embedded = [(m, m.num_embeddings) for m in model.modules() if hasattr(m, "num_embeddings")]
    tables = [n for m, n in embedded if m is not embedding and n in (limit, limit + 2)]
    if tables or any(limit in b.shape for b in model.buffers() if b.dim() > 1):
        raise MergelawError(
            f"{where}: the longest has {longest} tokens, but the model has {limit} positions; "
            f"{advice}"
        )
    return [
        f"{where}: the longest has {longest} tokens, but the model was made for {limit} "
        f"(max_position_embeddings), so its loss beyond them may be high; {advice}"
    ]


def check_packing(model: Any, base: Path) -> None:
    """Refuse a model in which one document of a packed sequence changes the next one's logits.

    Recurrent layers do that. A model without values is judged by its class. Raises MergelawError.
    """
    import torch

    layers = getattr(model.config.get_text_config(), "layer_types", None) or []
    recurrent = any("attention" not in kind or "linear" in kind for kind in layers)
    leaks = getattr(model, "_is_stateful", False) or recurrent
    if not leaks and model.device.type != "meta":
        size = 8
        ids = torch.arange(2 * size, device=model.device)[None] % len(
            model.get_input_embeddings().weight
        )
        positions = torch.arange(size, device=model.device).repeat(2)[None]
        with torch.inference_mode():
            first, second = (
                model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, size:]
                for packed in (ids, torch.cat([ids[:, :size].flip(1), ids[:, size:]], 1))
            )
        leaks = not torch.allclose(first, second, rtol=1e-3, atol=1e-4)
    if leaks:
        raise MergelawError(
            f"{base}: a {model.config.model_type} model carries one document of a packed sequence "
            "into the next; set 'packing: false'"
        )


def save(model: Any, folder: Path, dtype: str) -> None:
    """Write configuration and weights, converted to ``dtype``."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy a checkpoint's other files, such as the tokenizer; existing files are not replaced."""
    for name in COMPANIONS:
        if (base / name).exists() and not (folder / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
