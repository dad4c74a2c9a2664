"""Hugging Face checkpoints: tensors of memory-mapped safetensors files, whole or sharded."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
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

    Raises MergelawError for a folder without safetensors weights, for a quantised checkpoint, and
    for a corrupt or incomplete file, which the message names.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if self.config.get("quantization_config"):
            raise MergelawError(
                f"{self.folder}: is quantised; give the checkpoint before quantisation"
            )
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}  # mapped file and its name for each tensor
        self._open()
        if self.ties and HEAD in self:
            # Some trainers save the tied head a second time.
            shape = self.shape(HEAD)
            twins = [n for n in self._files if n != HEAD and self.shape(n) == shape]
            if any(same_bits(self[HEAD], self[n]) for n in twins):
                del self._files[HEAD]

    @property
    def ties(self) -> bool:
        """True if head and embedding may be one tensor; without the setting the model decides."""
        return bool(self.config.get("tie_word_embeddings", True))

    def _open(self) -> None:
        index = self.folder / INDEX
        listed = read_index(index) if index.exists() else None
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
                self._files[name] = opened, name
        if listed is not None and listed.keys() - self._files.keys():
            missing = min(listed.keys() - self._files.keys())
            raise MergelawError(f"{index}: lists tensor {missing!r}, no file has it; copy it again")

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> "Tensor":
        from safetensors import SafetensorError

        file, stored = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(stored)
            return tensor
        except (SafetensorError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise MergelawError(
                f"{self.folder}: tensor {name!r} cannot be read ({reason}); copy it again"
            ) from None

    def _slice(self, name: str) -> Any:
        file, stored = self._files[name]
        return file.get_slice(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it: F32, BF16, F16, I64, ..."""
        return str(self._slice(name).get_dtype())

    def float_dtype(self) -> str:
        """The common dtype of the floating tensors as torch names it; float32 if they differ."""
        kinds = {self.dtype(name) for name in self.names()} & FLOATS.keys()
        return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"

    def rename_tied(self, base: "Tensors") -> None:
        """Give a tied embedding the name that ``base`` stores it under (its own or the head's)."""
        missing = [name for name in base.names() if name not in self]
        extra = [name for name in self.names() if name not in base]
        renamed = len(missing) == len(extra) == 1 and HEAD in missing + extra
        if renamed and self.ties and base.ties and base.shape(*missing) == self.shape(*extra):
            self._files[missing[0]] = self._files.pop(extra[0])


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
        reason = str(error).splitlines()[0]
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


def pairs(base: Tensors, expert: Tensors, where: str, vocabulary: str = "refuse") -> Iterator[str]:
    """Check that an expert fits its base, then yield the names of its floating tensors.

    With ``vocabulary`` ``common_rows`` an expert may have another vocabulary size. Raises
    MergelawError for the first tensor that does not fit; its message begins with ``where``.
    """
    ours, theirs = base.config["model_type"], expert.config["model_type"]
    if ours != theirs:
        raise MergelawError(
            f"{where}: model_type is {theirs}, the base's is {ours}; "
            "an expert must be a fine-tune of its base"
        )
    rows = vocabulary_size(base.config), vocabulary_size(expert.config)
    if rows[0] != rows[1]:
        check_vocabulary(base.folder, expert.folder, rows, where, vocabulary)
    expert.rename_tied(base)
    names, others = ({n for n in side.names() if not COMPUTED.search(n)} for side in (base, expert))
    if names - others:
        raise MergelawError(f"{where}: has no tensor {min(names - others)!r}; the base has it")
    if others - names:
        raise MergelawError(f"{where}: has a tensor {min(others - names)!r} that the base has not")
    for name in sorted(names):
        shapes = base.shape(name), expert.shape(name)
        resized = rows[0] != rows[1] and tuple(s[:1] for s in shapes) == ((rows[0],), (rows[1],))
        if shapes[0] != shapes[1] and not (resized and shapes[0][1:] == shapes[1][1:]):
            raise MergelawError(
                f"{where}: tensor {name!r} has shape {list(shapes[1])}, "
                f"the base's has {list(shapes[0])}"
            )
    for name in sorted(names):
        kinds = base.dtype(name), expert.dtype(name)
        if all(kind in FLOATS for kind in kinds):
            yield name
        elif kinds[0] != kinds[1] or not same_bits(base[name], expert[name]):
            raise MergelawError(
                f"{where}: tensor {name!r} is {kinds[1]} (the base's {kinds[0]}) and differs; "
                "only float32, bfloat16 and float16 can be merged"
            )


def mergeable(base: Tensors) -> list[str]:
    """The names of a base's learned floating tensors."""
    return [n for n in base.names() if base.dtype(n) in FLOATS and not COMPUTED.search(n)]


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The vocabulary size; multimodal models have it in their text configuration."""
    text = config.get("text_config") or {}
    size: int | None = config.get("vocab_size", text.get("vocab_size"))
    return size


def check_vocabulary(
    base: Path, expert: Path, rows: tuple[int | None, int | None], where: str, vocabulary: str
) -> None:
    """Refuse an expert with another vocabulary size, or with other tokens in the common rows.

    ``rows``: the two sizes, the base's first. Chat formats may rename added tokens (reserved rows).
    """
    if vocabulary == "refuse":
        raise MergelawError(
            f"{where}: vocab_size is {rows[1]}, the base's is {rows[0]}; give an expert that kept "
            "the vocabulary, or set vocabulary: common_rows to merge the rows that both have"
        )
    common = min(filter(None, rows), default=0)
    ours, theirs = (read_tokens(folder, common) for folder in (base, expert))
    for row in sorted(ours.keys() & theirs.keys()):
        if ours[row] != theirs[row]:
            raise MergelawError(
                f"{where}: token {row} is {theirs[row]!r}, the base's is {ours[row]!r}; rows of "
                "other tokens cannot be merged"
            )


def read_tokens(folder: Path, limit: int) -> dict[int, str]:
    """The first ``limit`` tokens by row; empty for a folder without tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MergelawError(f"{path}: not a tokenizer; copy the checkpoint again") from None
    if isinstance(vocabulary, dict):
        return {row: token for token, row in vocabulary.items() if row < limit}
    # A unigram model: pairs of token and score.
    return {row: entry[0] for row, entry in enumerate(vocabulary[:limit])}
