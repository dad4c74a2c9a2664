"""Hugging Face checkpoints: tensors of memory-mapped safetensors files, whole or sharded."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.data.sources import is_pointer
from mergelaw.errors import MergelawError, first_line, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
# Names that wrappers of training libraries add to a tensor's name.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPED = re.compile(rf"^(?:module\.)+|(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
# Files of a peft adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Tables that models compute from their configuration. Only older libraries wrote them into
# checkpoints, and transformers does not read them back.
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)"
    r"|attention\.(bias|masked_bias))$"
)
# The other files of a usable model folder.
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
    """The tensors of a checkpoint folder by name, memory-mapped. A context manager.

    Like transformers, it reads ``model.safetensors`` before an index. Names are without wrappers
    such as ``_orig_mod.``. Raises MergelawError for a folder without safetensors weights or with an
    adapter beside them, for a quantised checkpoint, and for a corrupt or incomplete file, which the
    message names.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if self.config.get("quantization_config"):
            raise MergelawError(
                f"{self.folder}: is quantised; give the checkpoint before quantisation, or remove "
                "quantization_config from its config.json if the weights are plain"
            )
        if (self.folder / ADAPTER_CONFIG).exists():
            raise MergelawError(
                f"{self.folder}: holds an adapter beside a whole model; remove "
                f"{ADAPTER_CONFIG} to use the model, or {WEIGHTS} and {INDEX} to use the adapter"
            )
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}  # mapped file and its name for each tensor
        self._parts: dict[str, list[str]] = {}  # stored tensors that make up one tensor
        self._shapes: dict[str, tuple[int, ...]] = {}  # of those
        self._last: tuple[str, Any] = "", None  # the last one that was read
        self._open()
        if self.ties and HEAD in self:
            # Some trainers save the tied head a second time.
            shape = self.shape(HEAD)
            twins = [n for n in self._files if n != HEAD and self.shape(n) == shape]
            if any(same_bits(self[HEAD], self[n]) for n in twins):
                del self._files[HEAD]

    @property
    def ties(self) -> bool:
        """True if head and embedding may be one tensor (the default of transformers)."""
        return bool(self.config.get("tie_word_embeddings", True))

    def _open(self) -> None:
        index = self.folder / INDEX
        listed = None
        if index.exists() and not (self.folder / WEIGHTS).is_file():
            listed = read_index(index)
        for file in sorted(set(listed.values())) if listed is not None else [WEIGHTS]:
            path = self.folder / file
            if not path.is_file():
                raise MergelawError(f"{path}: no such file{pickled(self.folder)}")
            opened = open_mapped(path, self._stack)
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if listed is not None and listed.get(name, file) != file:
                    raise MergelawError(
                        f"{path}: has tensor {name!r}, which {index.name} lists in "
                        f"{listed[name]}; copy the checkpoint again"
                    )
                if (bare := WRAPPED.sub("", name)) in self._files:
                    raise MergelawError(
                        f"{path}: has tensor {bare!r} twice, as {name!r} too; remove one"
                    )
                self._files[bare] = opened, name
        if listed is not None:
            stored = {name for _, name in self._files.values()}
            if missing := listed.keys() - stored:
                raise MergelawError(
                    f"{index}: lists tensor {min(missing)!r}, no file has it; copy it again"
                )

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def wrapped(self) -> bool:
        """True if stored names have wrappers, which transformers does not know."""
        return any(name != stored for name, (_, stored) in self._files.items())

    def names(self) -> list[str]:
        pieces = {part for parts in self._parts.values() for part in parts}
        return sorted([*(self._files.keys() - pieces), *self._parts])

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._parts

    def join(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Make one tensor of stored ones, whose flat values follow each other."""
        kinds = {self.dtype(part) for part in parts}
        if len(kinds) > 1:
            raise MergelawError(
                f"{self.folder}: tensors {parts[0]!r} to {parts[-1]!r} are "
                f"{', '.join(sorted(kinds))}; save them in one dtype"
            )
        self._parts[name], self._shapes[name] = parts, shape

    def stored(self) -> Iterator[tuple[str, str, int]]:
        """The stored tensors: name, the tensor that it is a part of, and its first flat element."""
        for name in self.names():
            start = 0
            for part in self._parts.get(name, [name]):
                yield part, name, start
                start += math.prod(self.shape(part))

    def __getitem__(self, name: str) -> "Tensor":
        import torch
        from safetensors import SafetensorError

        if name in self._parts:
            if self._last[0] != name:
                flat = torch.cat([self[part].reshape(-1) for part in self._parts[name]])
                self._last = name, flat.view(self._shapes[name])
            joined: Tensor = self._last[1]
            return joined
        file, stored = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(stored)
            return tensor
        except (SafetensorError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            reason = first_line(error)
            raise MergelawError(
                f"{self.folder}: tensor {name!r} cannot be read ({reason}); copy it again"
            ) from None

    def _slice(self, name: str) -> Any:
        file, stored = self._files[name]
        return file.get_slice(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it: F32, BF16, F16, I64, ..."""
        return str(self._slice(self._parts.get(name, [name])[0]).get_dtype())

    def float_dtype(self) -> str:
        """The common dtype of the floating tensors as torch names it; float32 if they differ."""
        kinds = {self.dtype(name) for name in self.names()} & FLOATS.keys()
        return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors, by their present name, and drop all others."""
        files, parts, shapes = self._files, self._parts, self._shapes
        self._parts = {names[name]: pieces for name, pieces in parts.items() if name in names}
        self._shapes = {names[name]: shape for name, shape in shapes.items() if name in names}
        kept = {part: part for pieces in self._parts.values() for part in pieces} | dict(names)
        self._files = {new: files[name] for name, new in kept.items() if name in files}


def read_index(path: Path) -> dict[str, str]:
    """Read which file of a sharded checkpoint holds each tensor."""
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        outside = [file for file in listed.values() if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MergelawError(f"{path}: not an index of weights; copy it again") from None
    if outside:
        raise MergelawError(f"{path}: {outside[0]!r} leaves the folder; fix the index")
    return listed


def open_mapped(path: Path, stack: ExitStack) -> Any:
    """Map a safetensors file until ``stack`` closes. Raises MergelawError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = first_line(error)
        if path.is_file() and is_pointer(path):
            reason = "a pointer of Git LFS, so run git lfs pull"
        raise MergelawError(f"{path}: corrupt or half-copied ({reason}); copy it again") from None


def pickled(folder: Path) -> str:
    """End of an error message about missing safetensors: what to do."""
    others = [p.name for kind in ("*.bin", "*.pth", "*.pt") for p in sorted(folder.glob(kind))]
    if others:
        return (
            f"; only safetensors are read, not {others[0]} (a pickle can run code): load it with "
            "transformers and save it again"
        )
    return "; give a whole checkpoint, in safetensors"


def missing_tensors(folder: Path, parameters: Sequence[str]) -> MergelawError:
    """The error for a checkpoint without tensors for some parameters of its model."""
    more = f" and {len(parameters) - 1} more" if parameters[1:] else ""
    return MergelawError(
        f"{folder}: has no tensor for parameter {parameters[0]!r}{more}, so transformers would "
        "start it at random; copy the checkpoint again, or fix its config.json"
    )


def is_adapter(folder: Path) -> bool:
    """True for a folder that holds a peft adapter and no whole model."""
    has = {file: (Path(folder) / file).exists() for file in (ADAPTER_CONFIG, WEIGHTS, INDEX)}
    return has[ADAPTER_CONFIG] and not has[WEIGHTS] and not has[INDEX]


def files(folder: Path) -> list[str]:
    """The names of a checkpoint's or adapter's files, without a trainer's states and logs."""
    ours = {*COMPANIONS, ADAPTER_CONFIG, INDEX}
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and (path.name in ours or path.suffix == ".safetensors")
    )


class Writer:
    """Writes one safetensors file in pieces, so that only one piece at a time is in memory.

    ``layout`` gives safetensors dtype and shape by name, in the order of writing. Without a
    ``file`` it only computes ``digest``, the SHA-256 of the file's bytes.
    """

    def __init__(self, file: Path | None, layout: Mapping[str, tuple[str, tuple[int, ...]]]):
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
        self._hash = hashlib.sha256()
        self._file = file.open("wb") if file else None
        self._put = self._file.write if self._file else self._hash.update
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: "Tensor") -> None:
        self.write_pieces(name, [tensor])

    def write_pieces(self, name: str, pieces: "Iterable[Tensor]") -> None:
        """Write the next tensor as pieces of its flat values."""
        import torch

        assert name == next(self._names), f"{name} is out of order"
        count = 0
        for piece in pieces:
            flat = piece.detach().cpu().contiguous().view(-1)
            count += flat.numel()
            self._put(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        assert count == math.prod(self._layout[name][1]), f"{name} is of another size"

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._file:
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
        missing = f"{path}: no such file" if path.parent.is_dir() else f"{folder}: no such folder"
        raise MergelawError(f"{missing}; give a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise MergelawError(f"{path}: not JSON ({reason}); copy the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise MergelawError(f"{path}: names no 'model_type'; give a Hugging Face checkpoint")
    return config


def same_bits(left: "Tensor", right: "Tensor") -> bool:
    import torch

    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


def mergeable(base: Tensors) -> list[str]:
    """The names of a base's learned floating tensors."""
    return [n for n in base.names() if base.dtype(n) in FLOATS and not COMPUTED.search(n)]


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary size; multimodal models have it in their text configuration."""
    text = config.get("text_config") or {}
    size: int | None = config.get("vocab_size", text.get("vocab_size"))
    return size
