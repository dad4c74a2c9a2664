"""LoRA adapters as experts: the difference from the base, computed without the whole model.

An adapter of peft's (``adapter_config.json`` and ``adapter_model.safetensors``) says of some of the
base's tensors what to add: scale * B @ A, scale being alpha/r, or alpha/sqrt(r) with ``use_rslora``
(Hu et al. 2022, Kalajdzievski 2023). Tensors that it holds whole (``modules_to_save``, biases,
resized or targeted embeddings) replace the base's. What else an adapter can be is refused.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FLOATS,
    HEAD,
    Tensors,
    open_mapped,
    pickled,
    vocabulary_size,
)

if TYPE_CHECKING:
    from torch import Tensor

# Settings of peft's LoraConfig that the tensors themselves show, or that only training reads.
KNOWN = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
}
# Initialisations that leave the base's weights alone; the others (pissa, olora, corda, loftq, ...)
# take out of the base what the adapter then adds.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Elements of a product computed at a time. The sums over the rank are the library's, and their bits
# may depend on the shape that it is given: it is always the same one.
BLOCK = 1 << 18
EMBEDDING = {"lora_embedding_A", "lora_embedding_B"}
LOW_RANK = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.weight)?$"
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter that can be merged. Raises MergelawError for any other."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MergelawError(f"{path}: not a configuration of peft's; copy it again") from None
    advice = "merge it with peft's merge_and_unload and give that checkpoint"
    if kind != "LORA":
        raise MergelawError(f"{folder}: is a {kind} adapter, only LoRA is read; {advice}")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise MergelawError(
            f"{folder}: was started by {config['init_lora_weights']}, which changes the base too; "
            f"{advice}"
        )
    other = sorted(key for key, value in config.items() if value and key not in KNOWN)
    if other:
        raise MergelawError(
            f"{folder}: is a LoRA adapter with {other[0]}, not a plain one; {advice}"
        )
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise MergelawError(f"{folder / ADAPTER_WEIGHTS}: no such file{pickled(folder)}")
    return config


class Adapter:
    """What a LoRA adapter changes of a base: ``names``, and ``part`` of each, flat.

    Open for as long as ``stack`` is. Raises MergelawError for an adapter that does not fit.
    """

    def __init__(self, folder: Path, base: Tensors, stack: ExitStack):
        self.folder, self._base = Path(folder), base
        self._config = read_adapter_config(self.folder)
        self._file = open_mapped(self.folder / ADAPTER_WEIGHTS, stack)
        self._factors: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        # The last ones, for slices that share them.
        self._factors_of: tuple[str, Tensor, Tensor] | None = None
        self._block: tuple[str, int, Tensor] | None = None
        tied = HEAD not in base
        for key in sorted(self._file.keys()):
            if found := LOW_RANK.match(key):
                name = self._target(f"{found[1]}.weight", key)
                self._factors.setdefault(name, {})[found[2]] = key
            else:
                self._whole[self._target(key, key)] = key
        for name, factors in self._factors.items():
            self._check_factors(name, factors)
        for name in self._whole:
            self._check_whole(name)
        self._whole = {n: k for n, k in self._whole.items() if self._differs(n)}
        rows = vocabulary_size(base.config)
        for name in self.names:
            shape = base.shape(name)
            if tied and len(shape) == 2 and shape[0] == rows:
                raise MergelawError(
                    f"{self.folder}: changes {name!r}, which the base uses as its head as well; "
                    "merge it with peft's merge_and_unload and give that checkpoint"
                )

    @property
    def names(self) -> list[str]:
        return sorted(self._factors.keys() | self._whole.keys())

    def _target(self, key: str, shown: str) -> str:
        """The base's tensor that a tensor of the adapter is about."""
        plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        plain = plain.replace(".modules_to_save.default.", ".")
        for name in (plain, plain.removeprefix("model."), f"model.{plain}"):
            if name in self._base:
                return name
        raise MergelawError(
            f"{self.folder}: changes {shown!r}, for which the base has no tensor; give an adapter "
            "of this base"
        )

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def _check_factors(self, name: str, factors: dict[str, str]) -> None:
        if not ({"lora_A", "lora_B"} == factors.keys() or factors.keys() == EMBEDDING):
            raise MergelawError(
                f"{self.folder}: has half of the product for {name!r}; copy the adapter again"
            )
        shapes = [self._shape(key) for key in factors.values()]
        kinds = {self._file.get_slice(key).get_dtype() for key in factors.values()}
        fits = all(len(shape) == 2 for shape in shapes)
        if fits:
            left, right = self._sides(name)
            product = (left.shape[0], right.shape[1])
            fits = product == self._base.shape(name) and left.shape[1] == right.shape[0]
        if not fits:
            raise MergelawError(
                f"{self.folder}: its factors {' and '.join(str(list(s)) for s in shapes)} give no "
                f"tensor {name!r} of {list(self._base.shape(name))}; give an adapter of this base"
            )
        if not kinds <= FLOATS.keys() or self._base.dtype(name) not in FLOATS:
            raise MergelawError(
                f"{self.folder}: {name!r} is {', '.join(sorted(kinds))} here and "
                f"{self._base.dtype(name)} in the base; only float32, bfloat16 and float16 can be "
                "merged"
            )

    def _check_whole(self, name: str) -> None:
        theirs = self._shape(self._whole[name])
        kind = self._file.get_slice(self._whole[name]).get_dtype()
        if theirs != self._base.shape(name) or kind not in FLOATS:
            raise MergelawError(
                f"{self.folder}: its {name!r} is {kind} of shape {list(theirs)}, the base's is "
                f"{self._base.dtype(name)} of {list(self._base.shape(name))}; give an adapter that "
                "kept the vocabulary"
            )

    def _differs(self, name: str) -> bool:
        size = math.prod(self._base.shape(name))
        return any(
            self._replaced(name, start, min(start + BLOCK, size)).any()
            for start in range(0, size, BLOCK)
        )

    def _replaced(self, name: str, start: int, stop: int) -> "Tensor":
        theirs = self._file.get_tensor(self._whole[name]).view(-1)[start:stop].float()
        return theirs - self._base[name].view(-1)[start:stop].float()

    def _sides(self, name: str) -> tuple["Tensor", "Tensor"]:
        """(left, right) whose matrix product, times the scale, is added to the base's tensor."""
        if self._factors_of is not None and self._factors_of[0] == name:
            return self._factors_of[1:]
        by_kind = {
            kind.rpartition("_")[2]: self._file.get_tensor(key).float()
            for kind, key in self._factors[name].items()
        }
        a, b = by_kind["A"], by_kind["B"]
        straight, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        transposed = self._factors[name].keys() == EMBEDDING or bool(
            self._config.get("fan_in_fan_out")
        )
        if straight != turned:  # the flag is about most layers, the shape about this one
            transposed = self._base.shape(name) == turned
        sides = (a.T, b.T) if transposed else (b, a)
        self._factors_of = (name, *sides)
        return sides

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._config["lora_alpha"]
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def part(self, name: str, start: int, stop: int) -> "Tensor":
        """Elements ``start`` to ``stop`` of the flat fp32 difference from the base's tensor."""
        import torch

        if name not in self._factors:
            return self._replaced(name, start, stop)
        columns = self._base.shape(name)[1]
        rows = max(BLOCK // columns, 1)
        pieces = []
        for number in range(start // (rows * columns), -(-stop // (rows * columns))):
            first = number * rows * columns
            block = self._product(name, number, rows)
            pieces.append(block[max(start - first, 0) : stop - first])
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole + self._replaced(name, start, stop) if name in self._whole else whole

    def _product(self, name: str, number: int, rows: int) -> "Tensor":
        """The flat block ``number`` of so many rows."""
        if self._block is None or self._block[:2] != (name, number):
            left, right = self._sides(name)
            with one_thread():
                block = left[number * rows : (number + 1) * rows] @ right
            block *= self._scale(name, left.shape[1])
            self._block = name, number, block.view(-1)
        return self._block[2]


@contextmanager
def one_thread() -> Iterator[None]:
    """How a library splits a sum among threads may show in its last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
