"""Task vectors: what an expert has learned, expert minus base, without loss.

``vector.safetensors`` holds, by the checkpoint's tensor names, the fp32 difference of each tensor.
Where base + difference (in fp32) is not the expert's bits - a difference of float32 cannot carry
all of them - the element's index and value are kept in ``exceptions.safetensors`` as
``{name}.index`` (int64) and ``{name}.value`` (fp32), and put back where an expert stands alone.
``statistics.json`` tells norms and counts per tensor.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw import lineage
from mergelaw.checkpoint import Tensors, Writer, pairs
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = "vector.safetensors"
EXCEPTIONS = "exceptions.safetensors"
STATISTICS = "statistics.json"


def difference(expert: "Tensor", base: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """(fp32 difference, flat indices of the exceptions, their fp32 values).

    Adding the difference to the base in fp32 and putting the exceptions in gives the expert's fp32
    bits, and so, rounded to the expert's own dtype, its bits there.
    """
    import torch

    wide, base = expert.float(), base.float()
    vector = wide - base
    wrong = (base + vector).view(torch.int32) != wide.view(torch.int32)
    index = wrong.view(-1).nonzero().view(-1)
    return vector, index, wide.reshape(-1)[index]


def write(base: Path, expert: Path, folder: Path) -> dict[str, Any]:
    """Write the task vector of ``expert`` over ``base`` (checkpoint folders) into ``folder``."""
    import torch
    from safetensors.torch import save_file

    exceptions, statistics = {}, {}
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Tensors(path)) for path in (base, expert))
        names = list(pairs(ours, theirs, str(expert)))
        layout = {name: ("F32", ours.shape(name)) for name in names}
        writer = stack.enter_context(Writer(folder / VECTOR, layout))
        for name in names:
            before, after = ours[name], theirs[name]
            for tensor, where in ((before, base), (after, expert)):
                if not torch.isfinite(tensor).all():
                    raise MergelawError(
                        f"{where}: tensor {name!r} holds NaN or Inf; train it again or leave it out"
                    )
            vector, index, value = difference(after, before)
            if not torch.isfinite(vector).all():
                raise MergelawError(
                    f"{expert}: tensor {name!r} differs from the base's by more than float32 "
                    "holds; such values cannot be merged"
                )
            writer.write(name, vector)
            if len(index):
                exceptions[f"{name}.index"], exceptions[f"{name}.value"] = index, value
            statistics[name] = {
                "elements": vector.numel(),
                "norm": norm_of(vector),
                "base_norm": norm_of(before),
                "zeros": int((vector == 0).sum()),
                "exceptions": len(index),
            }
    save_file(exceptions, folder / EXCEPTIONS)
    total = {key: sum(s[key] for s in statistics.values()) for key in ("elements", "exceptions")}
    norm = sum(s["norm"] ** 2 for s in statistics.values()) ** 0.5
    if norm == 0:
        raise MergelawError(f"{expert}: equals its base; an expert must differ from it")
    lineage.write_json(folder / STATISTICS, {"norm": norm, **total, "tensors": statistics})
    return {"norm": norm, **total}


def norm_of(tensor: "Tensor") -> float:
    """L2 norm in float64. numpy's sum, unlike torch's, has the same bits on any number of threads:
    the statistics are part of the digest, and that keys the masks of DARE."""
    import numpy as np

    flat = tensor.float().numpy().ravel()
    squares = (
        np.square(flat[i : i + (1 << 20)], dtype=np.float64) for i in range(0, len(flat), 1 << 20)
    )
    return sum(part.sum().item() for part in squares) ** 0.5


class TaskVector:
    """A task vector's tensors, mapped: flat fp32 by name. A context manager."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        self.digest: str = lineage.read(self.folder)["digest"]
        try:
            self._vector = safe_open(self.folder / VECTOR, framework="pt")
            self._exceptions = safe_open(self.folder / EXCEPTIONS, framework="pt")
            self.names: list[str] = sorted(self._vector.keys())
            stored = self._exceptions.keys()
            self.changed = {n.removesuffix(".index") for n in stored if n.endswith(".index")}
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise MergelawError(
                f"{self.folder}: corrupt ({reason}); delete the folder and run again"
            ) from None

    def __getitem__(self, name: str) -> "Tensor":
        return self._vector.get_tensor(name).view(-1)

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        for name in self.names:
            yield name, self[name]

    def exceptions(self, name: str) -> tuple["Tensor", "Tensor"] | None:
        """(flat indices, fp32 values) of the elements that the difference does not carry."""
        if name not in self.changed:
            return None
        get = self._exceptions.get_tensor
        return get(f"{name}.index"), get(f"{name}.value")

    def statistics(self) -> dict[str, Any]:
        return json.loads((self.folder / STATISTICS).read_text(encoding="utf-8"))
