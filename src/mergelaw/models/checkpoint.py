"""Hugging Face checkpoints as tensors in mapped safetensors files, whole or sharded."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts.files import file_digest
from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
# What peft writes of an adapter, in the place of config and weights.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Tables that models compute of their configuration, and that only older libraries wrote into
# checkpoints. Nothing is learned in them, and transformers does not read them back.
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)"
    r"|attention\.(bias|masked_bias))$"
)
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
        if self.config.get("quantization_config"):
            raise MergelawError(
                f"{self.folder}: is quantised; give the checkpoint before quantisation"
            )
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self._open()

    def _open(self) -> None:
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
                raise MergelawError(f"{path}: no such file{pickled(self.folder)}")
            opened = open_mapped(path, self._stack)
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


def open_mapped(path: Path, stack: ExitStack) -> Any:
    """A safetensors file, mapped, until ``stack`` is closed. Names a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MergelawError(f"{path}: corrupt or half-copied ({reason}); copy it again") from None


def pickled(folder: Path) -> str:
    """What to do where there are no safetensors, as the end of a message."""
    others = [p.name for kind in ("*.bin", "*.pth", "*.pt") for p in sorted(folder.glob(kind))]
    if others:
        return (
            f"; only safetensors are read, not {others[0]} (a pickle can run code): load it with "
            "transformers and save it again"
        )
    return "; give a whole checkpoint, in safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's, and no whole model."""
    has = {file: (Path(folder) / file).exists() for file in (ADAPTER_CONFIG, WEIGHTS, INDEX)}
    return has[ADAPTER_CONFIG] and not has[WEIGHTS] and not has[INDEX]


def files(folder: Path) -> list[str]:
    """The names of the files that make up a checkpoint or an adapter.

    A trainer leaves more in its folders: optimizer states, pickles, logs.
    """
    ours = {*COMPANIONS, ADAPTER_CONFIG, INDEX}
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and (path.name in ours or path.suffix == ".safetensors")
    )


class Writer:
    """One safetensors file written piece by piece, so that only one piece need be in memory.

    ``layout`` gives dtype (as the file spells it) and shape by name; tensors come in its order.
    Without a ``file`` nothing is written, and ``digest`` is the SHA-256 that the file would have.
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
        """The next tensor, piece by piece of its flat values."""
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
    """The names of the floating tensors of an expert, after it was found to fit its base.

    An expert whose vocabulary has another size is refused, or, with ``common_rows``, taken as far
    as both have rows. Raises MergelawError that names the first tensor that does not fit.
    """
    ours, theirs = base.config["model_type"], expert.config["model_type"]
    if ours != theirs:
        raise MergelawError(
            f"{where}: model_type is {theirs}, the base's is {ours}; "
            "an expert must be a fine-tune of its base"
        )
    rows = vocabulary_size(base.config), vocabulary_size(expert.config)
    if rows[0] != rows[1] and vocabulary == "refuse":
        raise MergelawError(
            f"{where}: vocab_size is {rows[1]}, the base's is {rows[0]}; give an expert that kept "
            "the vocabulary, or set vocabulary: common_rows to merge the rows that both have"
        )
    if rows[0] != rows[1]:
        same_tokens(base.folder, expert.folder, min(filter(None, rows), default=0), where)
    found = [{n for n in side.names() if not COMPUTED.search(n)} for side in (base, expert)]
    for name in sorted(found[0] - found[1]):
        raise MergelawError(f"{where}: has no tensor {name!r}; the base has it")
    for name in sorted(found[1] - found[0]):
        raise MergelawError(f"{where}: has a tensor {name!r} that the base has not")
    for name in sorted(found[0]):
        shapes = base.shape(name), expert.shape(name)
        resized = rows[0] != rows[1] and tuple(s[:1] for s in shapes) == ((rows[0],), (rows[1],))
        if shapes[0] != shapes[1] and not (resized and shapes[0][1:] == shapes[1][1:]):
            raise MergelawError(
                f"{where}: tensor {name!r} has shape {list(shapes[1])}, "
                f"the base's has {list(shapes[0])}"
            )
    for name in sorted(found[0]):
        kinds = base.dtype(name), expert.dtype(name)
        if all(kind in FLOATS for kind in kinds):
            yield name
        elif kinds[0] != kinds[1] or not same_bits(base[name], expert[name]):
            raise MergelawError(
                f"{where}: tensor {name!r} is {kinds[1]} (the base's {kinds[0]}) and differs; "
                "only float32, bfloat16 and float16 can be merged"
            )


def mergeable(base: Tensors) -> list[str]:
    """The floating tensors of a base that hold what was learned."""
    return [n for n in base.names() if base.dtype(n) in FLOATS and not COMPUTED.search(n)]


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Models of several modalities keep it with their text's configuration."""
    text = config.get("text_config") or {}
    return config.get("vocab_size", text.get("vocab_size"))


def same_tokens(base: Path, expert: Path, common: int, where: str) -> None:
    """Raise MergelawError where the first ``common`` rows are not of the same tokens.

    Added tokens may be renamed: a chat format puts its own in reserved places.
    """
    found = []
    for folder in (base, expert):
        path = folder / "tokenizer.json"
        if not path.exists():
            return  # nothing to compare
        try:
            vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise MergelawError(f"{path}: not a tokenizer; copy the checkpoint again") from None
        if isinstance(vocabulary, dict):
            tokens = vocabulary
        else:  # a unigram model: pairs of token and score
            tokens = {entry[0]: row for row, entry in enumerate(vocabulary)}
        found.append({i: token for token, i in tokens.items() if i < common})
    ours, theirs = found
    for row in sorted(ours.keys() & theirs.keys()):
        if ours[row] != theirs[row]:
            raise MergelawError(
                f"{where}: token {row} is {theirs[row]!r}, the base's is {ours[row]!r}; rows of "
                "other tokens cannot be merged"
            )


# -- from outside ------------------------------------------------------------------------------

# Of a hub's repository: nothing in subfolders (pickles, other formats), and the weights once.
WANTED = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS, ADAPTER_CONFIG)
UNWANTED = ("*/*", "consolidated*.safetensors")


def link_known(
    known: Mapping[str, Any], sources: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Link a checkpoint that is found to be the one meant into ``folder``; what to remember of it.

    ``known``: the SHA-256 of its files, or the hub's commit; ``sources``: where it lies.
    """
    source = locate(sources)
    link(source, folder)
    for name, digest in known.get("files", {}).items():
        path = folder / name
        if path.exists() and file_digest(path) != digest:
            raise MergelawError(f"{source / name}: changed since the run began; run again")
    commit = {"commit": source.name} if "hub" in sources else {}  # the revision may be a branch
    return {"sources": [canonical_json({**sources, **commit})]}


def link(source: Path, folder: Path) -> None:
    """Make ``folder`` a checkpoint, or an adapter, by links to the files of ``source``."""
    if is_adapter(source):
        from mergelaw.models.lora import read_adapter_config

        read_adapter_config(source)
    else:
        Tensors(source).__exit__()  # whole, and of a kind that we read
    for name in files(source):
        (folder / name).symlink_to((source / name).resolve())


def locate(checkpoint: Mapping[str, Any]) -> Path:
    """The local folder of a checkpoint; a hub id is fetched, or found in the hub's cache.

    Of a hub id the folder's name is the commit.
    """
    if checkpoint.get("path") is not None:
        folder = Path(checkpoint["path"])
        if not folder.is_dir():
            raise MergelawError(f"{folder}: no such folder; give a local Hugging Face checkpoint")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, revision = checkpoint["hub"], checkpoint["revision"]
    try:
        return Path(
            snapshot_download(
                hub,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )
    except GatedRepoError:
        raise MergelawError(
            f"{hub}: is gated; accept its licence on its page and log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise MergelawError(f"{hub}: has no revision {revision!r}; name a commit of it") from None
    except RepositoryNotFoundError:
        raise MergelawError(
            f"{hub}: no such model on the hub, or a private one; check the id, or log in with "
            "'hf auth login'"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MergelawError(
            f"{hub} at {revision}: not in the hub's cache and cannot be fetched ({reason}); "
            "check id, revision and network, or download it before"
        ) from None
