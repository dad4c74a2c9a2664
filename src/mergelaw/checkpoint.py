"""Hugging Face checkpoints as tensors in mapped safetensors files, whole or sharded."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
# Everything else that makes a folder usable as a model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Tensors:
    """The tensors of a checkpoint folder by name, mapped, not read.

    Names are those of the files. A context manager; raises MergelawError for a folder without
    safetensors weights, or with a corrupt or half-copied file (named).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        index = self.folder / INDEX
        listed: dict[str, str] | None = None
        if index.exists():
            try:
                listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                outside = [file for file in listed.values() if Path(file).name != file]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise MergelawError(f"{index}: not an index of weights; copy it again") from None
            if outside:
                raise MergelawError(f"{index}: {outside[0]!r} leaves the folder; mend the index")
            files = sorted(set(listed.values()))
        else:
            files = [WEIGHTS]
        for file in files:
            path = self.folder / file
            if not path.is_file():
                others = sorted(p.name for p in self.folder.glob("*.bin"))
                hint = f"; only safetensors are read, not {others[0]}" if others else ""
                raise MergelawError(f"{path}: no such file{hint}; give a whole checkpoint")
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise MergelawError(
                    f"{path}: corrupt or half-copied ({reason}); copy it again"
                ) from None
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if listed is not None and listed.get(name, file) != file:
                    raise MergelawError(
                        f"{path}: has tensor {name!r}, which {index.name} lists in "
                        f"{listed[name]}; copy the checkpoint again"
                    )
                self._where[name] = opened
        if listed is not None and listed.keys() - self._where.keys():
            missing = min(listed.keys() - self._where.keys())
            raise MergelawError(f"{index}: lists tensor {missing!r}, no file has it; copy it again")
        if self.config.get("tie_word_embeddings", True) and HEAD in self._where:
            # Some trainers save the tied head a second time. A configuration that does not say
            # whether it is tied leaves that to the architecture.
            shape = self.shape(HEAD)
            twins = [n for n in self._where if n != HEAD and self.shape(n) == shape]
            if any(same_bits(self[HEAD], self[n]) for n in twins):
                del self._where[HEAD]

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> "Tensor":
        from safetensors import SafetensorError

        try:
            return self._where[name].get_tensor(name)
        except (SafetensorError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise MergelawError(
                f"{self.folder}: tensor {name!r} cannot be read ({reason}); copy it again"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def float_dtype(self) -> str:
        """The dtype of the floating tensors in torch's words; float32 where they differ."""
        kinds = {self.dtype(name) for name in self.names()} & FLOATS.keys()
        return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"

    def dtype(self, name: str) -> str:
        """As the file spells it: F32, BF16, F16, I64, ..."""
        return self._where[name].get_slice(name).get_dtype()


class Writer:
    """One safetensors file written tensor by tensor, so that only one need be in memory.

    ``layout`` gives dtype (as the file spells it) and shape by name; tensors come in its order.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[str, tuple[int, ...]]]):
        self._layout = layout
        self._names = iter(layout)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in layout.items():
            if dtype not in BYTES:
                raise MergelawError(
                    f"tensor {name!r} is {dtype}; only {', '.join(BYTES)} can be written"
                )
            size = math.prod(shape) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: "Tensor") -> None:
        import torch

        assert name == next(self._names), f"{name} is out of order"
        assert tuple(tensor.shape) == self._layout[name][1]
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self._file.close()
        if kind is None:
            assert next(self._names, None) is None, "a tensor is missing"


BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MergelawError(f"{path}: no such file; give a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError):
        raise MergelawError(f"{path}: not JSON; copy the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise MergelawError(f"{path}: names no 'model_type'; give a Hugging Face checkpoint")
    return config


def same_bits(left: "Tensor", right: "Tensor") -> bool:
    import torch

    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


def pairs(base: Tensors, expert: Tensors, where: str) -> Iterator[str]:
    """The names of the floating tensors of an expert, after it was found to fit its base.

    Raises MergelawError that names the first tensor that does not fit.
    """
    for field in ("model_type", "vocab_size"):
        ours, theirs = base.config.get(field), expert.config.get(field)
        if ours != theirs:
            raise MergelawError(
                f"{where}: {field} is {theirs}, the base's is {ours}; "
                "an expert must be a fine-tune of its base"
            )
    for name in base.names():
        if name not in expert:
            raise MergelawError(f"{where}: has no tensor {name!r}; the base has it")
        ours, theirs = base.shape(name), expert.shape(name)
        if ours != theirs:
            raise MergelawError(
                f"{where}: tensor {name!r} has shape {list(theirs)}, the base's has {list(ours)}"
            )
    for name in expert.names():
        if name not in base:
            raise MergelawError(f"{where}: has a tensor {name!r} that the base has not")
    for name in base.names():
        kinds = base.dtype(name), expert.dtype(name)
        if all(kind in FLOATS for kind in kinds):
            yield name
        elif kinds[0] != kinds[1] or not same_bits(base[name], expert[name]):
            raise MergelawError(
                f"{where}: tensor {name!r} is {kinds[1]} (the base's {kinds[0]}) and differs; "
                "only float32, bfloat16 and float16 can be merged"
            )
