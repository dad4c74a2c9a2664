"""Task vectors: what an expert has learned, expert minus base, without loss.

``vector.safetensors`` holds, by the checkpoint's tensor names, the fp32 difference of each tensor.
Where base + difference (in fp32) is not the expert's bits - a difference of float32 cannot carry
all of them - the element's index and value are kept in ``exceptions.safetensors`` as
``{name}.index`` (int64) and ``{name}.value`` (fp32), and put back where an expert stands alone.
``statistics.json`` tells norms and counts per tensor.

A *derived* task vector leaves ``vector.safetensors`` out and keeps its digest in ``derived.json``:
the difference is taken again, with the same bits, wherever it is needed, from base and expert,
which have to stay. Of an adapter (:mod:`mergelaw.models.lora`) every task vector is derived.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import files, lineage
from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import Tensors, Writer, is_adapter, mergeable, open_mapped, pairs
from mergelaw.models.lora import Adapter

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = "vector.safetensors"
EXCEPTIONS = "exceptions.safetensors"
STATISTICS = "statistics.json"
DERIVED = "derived.json"

# Elements worked on at a time, so that a tensor of a large model need not be in memory. A multiple
# of what norms are summed over; no bit depends on it.
PIECE = 1 << 22
SQUARES = 1 << 20


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


class Whole:
    """An expert that is a checkpoint of its own; ``names`` are its mergeable tensors.

    Open for as long as ``stack`` is. Raises MergelawError for an expert that does not fit.
    """

    def __init__(self, folder: Path, base: Tensors, stack: ExitStack, vocabulary: str):
        self._base, self._expert = base, stack.enter_context(Tensors(folder))
        self.names = list(pairs(base, self._expert, str(folder), vocabulary))

    def sides(self, name: str, start: int, stop: int) -> tuple["Tensor", "Tensor"]:
        """(expert, base): the flat elements ``start`` to ``stop`` that both have.

        One may have more, where the vocabulary was resized.
        """
        theirs, ours = (side[name].view(-1)[start:stop] for side in (self._expert, self._base))
        both = min(len(theirs), len(ours))
        return theirs[:both], ours[:both]

    def part(self, name: str, start: int, stop: int, device: Any = None) -> "Tensor":
        """Elements ``start`` to ``stop`` of the flat fp32 difference; zero beyond the expert."""
        theirs, ours = self.sides(name, start, stop)
        return padded(theirs.to(device).float() - ours.to(device).float(), stop - start)


def padded(vector: "Tensor", size: int) -> "Tensor":
    import torch

    missing = size - len(vector)
    return torch.cat([vector, vector.new_zeros(missing)]) if missing else vector


def opened(base: Tensors, expert: Path, stack: ExitStack, vocabulary: str) -> "Whole | Adapter":
    if is_adapter(expert):
        return Adapter(expert, base, stack)
    return Whole(expert, base, stack, vocabulary)


def pieces(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, PIECE):
        yield start, min(start + PIECE, size)


def write(
    base: Path,
    expert: Path,
    folder: Path,
    storage: str = "materialised",
    vocabulary: str = "refuse",
) -> dict[str, Any]:
    """Write the task vector of ``expert`` over ``base`` (folders) into ``folder``.

    ``expert`` is a checkpoint or an adapter; ``vocabulary`` as in :func:`checkpoint.pairs`.
    """
    statistics: dict[str, dict[str, Any]] = {}
    derived = storage == "derived" or is_adapter(expert)
    with ExitStack() as stack:
        ours = stack.enter_context(Tensors(base))
        source = opened(ours, expert, stack, vocabulary)
        layout = {name: ("F32", ours.shape(name)) for name in source.names}
        writer = stack.enter_context(Writer(None if derived else folder / VECTOR, layout))
        exceptions = stack.enter_context(Exceptions(folder / EXCEPTIONS))

        def vectors(name: str, of: dict[str, Any]) -> Iterator["Tensor"]:
            import torch

            squares, before = [], []
            for start, stop in pieces(of["elements"]):
                plain = ours[name].view(-1)[start:stop]
                if isinstance(source, Whole):
                    sides = source.sides(name, start, stop)
                    vector, index, value = difference(*sides)
                    if not torch.isfinite(vector).all():
                        raise unusable(base, expert, name, *sides)
                    vector = padded(vector, stop - start)
                    if len(index):
                        exceptions.add(name, index + start, value)
                        of["exceptions"] += len(index)
                else:
                    vector = source.part(name, start, stop)
                    if not torch.isfinite(vector).all():
                        raise unusable(base, expert, name, vector, plain)
                of["zeros"] += int((vector == 0).sum())
                squares += squares_of(vector)
                before += squares_of(plain)
                yield vector
            of["norm"], of["base_norm"] = (math.fsum(s) ** 0.5 for s in (squares, before))

        for name in source.names:
            of = {"elements": math.prod(ours.shape(name)), "zeros": 0, "exceptions": 0}
            writer.write_pieces(name, vectors(name, of))
            statistics[name] = of
    norm = math.fsum(s["norm"] ** 2 for s in statistics.values()) ** 0.5
    if norm == 0:
        raise MergelawError(f"{expert}: equals its base; an expert must differ from it")
    total = {key: sum(s[key] for s in statistics.values()) for key in ("elements", "exceptions")}
    files.write_json(folder / STATISTICS, {"norm": norm, **total, "tensors": statistics})
    if derived:
        of_source = {"vector": writer.digest, "vocabulary": vocabulary}
        files.write_json(folder / DERIVED, of_source)
    return {"norm": norm, **total, "storage": "derived" if derived else "materialised"}


def unusable(
    base: Path, expert: Path, name: str, theirs: "Tensor", ours: "Tensor"
) -> MergelawError:
    """Why a difference is not finite."""
    import torch

    for folder, values in ((base, ours), (expert, theirs)):
        if not torch.isfinite(values).all():
            return MergelawError(
                f"{folder}: tensor {name!r} holds NaN or Inf; train it again or leave it out"
            )
    return MergelawError(
        f"{expert}: tensor {name!r} differs from the base's by more than float32 holds; such "
        "values cannot be merged"
    )


def squares_of(flat: "Tensor") -> list[float]:
    """Sums of squares in float64. numpy's sum, unlike torch's, has the same bits on any number of
    threads: the statistics are part of the digest, and that keys the masks of DARE."""
    import numpy as np

    values = flat.float().numpy()
    return [
        np.square(values[i : i + SQUARES], dtype=np.float64).sum().item()
        for i in range(0, len(values), SQUARES)
    ]


class Exceptions:
    """Writes ``exceptions.safetensors``, whose layout is known only at the end, by way of the disk.

    A fine-tune in float32 can have as many of them as a large tensor has elements.
    """

    def __init__(self, path: Path):
        self._path, self._scratch = path, path.with_suffix(".scratch")
        self._kept: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> "Exceptions":
        self._file = self._scratch.open("w+b")
        return self

    def add(self, name: str, index: "Tensor", value: "Tensor") -> None:
        """More of a tensor's: flat indices (int64) and their values (fp32)."""
        self._kept.setdefault(name, []).append((self._file.tell(), len(index)))
        self._file.write(index.numpy().data)
        self._file.write(value.numpy().data)

    def _read(self, name: str, kind: str) -> Iterator["Tensor"]:
        import torch

        for place, count in self._kept[name]:
            self._file.seek(place if kind == "index" else place + 8 * count)
            data = bytearray(self._file.read((8 if kind == "index" else 4) * count))
            yield torch.frombuffer(data, dtype=torch.int64 if kind == "index" else torch.float32)

    def __exit__(self, error: object, *exc: object) -> None:
        try:
            if error is None:
                counts = {name: sum(c for _, c in kept) for name, kept in self._kept.items()}
                layout = {f"{n}.index": ("I64", (c,)) for n, c in sorted(counts.items())}
                layout |= {f"{n}.value": ("F32", (c,)) for n, c in sorted(counts.items())}
                with Writer(self._path, layout) as writer:
                    for name in layout:
                        tensor, _, kind = name.rpartition(".")
                        writer.write_pieces(name, self._read(tensor, kind))
        finally:
            self._file.close()
            self._scratch.unlink()


def digest_of(folder: Path, known: Mapping[str, Any] | None = None) -> str:
    """What a task vector is: the digest of its files as materialised, however it is kept.

    ``known`` is its lineage, where it was read already.
    """
    files = dict((known or lineage.read(folder))["files"])
    if DERIVED in files:
        files[VECTOR] = json.loads((folder / DERIVED).read_text(encoding="utf-8"))["vector"]
        del files[DERIVED]
    return lineage.content_digest(files)


class TaskVector:
    """A task vector's tensors, mapped or derived: flat fp32 by name. A context manager.

    ``names`` are those of the tensors that it changes; of any other of the base's it is zero.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        known = lineage.read(self.folder)
        self.digest = digest_of(self.folder, known)
        self._stack = ExitStack()
        self._source: Whole | Adapter | None = None
        self._last: tuple[str, Any] = "", None
        with self._stack:
            if DERIVED in known["files"]:
                self._derive(known)
            else:
                self._vector = self._open(VECTOR)
                self.names: list[str] = sorted(self._vector.keys())
            self._exceptions = self._open(EXCEPTIONS)
            self._stack = self._stack.pop_all()
        stored = self._exceptions.keys()
        self.changed = {n.removesuffix(".index") for n in stored if n.endswith(".index")}

    def _open(self, file: str) -> Any:
        try:
            return open_mapped(self.folder / file, self._stack)
        except MergelawError as error:
            raise MergelawError(
                f"{self.folder}: corrupt ({error}); delete the folder and run again"
            ) from None

    def _derive(self, known: Mapping[str, Any]) -> None:
        """Open base and expert, which have to be those that it was made from."""
        places = {}
        for name in ("base", "expert"):
            places[name] = Path(os.path.normpath(self.folder / known["inputs"][name]["path"]))
            if not (places[name] / lineage.LINEAGE).exists():
                raise MergelawError(
                    f"{places[name]}: is gone, and the task vector {self.folder} is derived from "
                    "it; make it again, or delete the task vector and set storage: materialised"
                )
            # The base is an input of whoever merges and verified as such, the expert is not.
            read = lineage.read if name == "base" else lineage.verified
            if read(places[name])["digest"] != known["inputs"][name]["digest"]:
                raise MergelawError(
                    f"{places[name]}: is not what the task vector {self.folder} was derived from; "
                    "delete the task vector and run again"
                )
        described = json.loads((self.folder / DERIVED).read_text(encoding="utf-8"))
        base = self._stack.enter_context(Tensors(places["base"]))
        vocabulary = described["vocabulary"]
        self._source = opened(base, places["expert"], self._stack, vocabulary)
        # Methods are to see an adapter as the whole expert that it makes of its base.
        self.names = mergeable(base)
        self._sizes = {name: math.prod(base.shape(name)) for name in self.names}

    def __enter__(self) -> "TaskVector":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def part(self, name: str, start: int, stop: int, device: Any = None) -> "Tensor":
        """Elements ``start`` to ``stop`` of a tensor, on ``device`` (None: the processor)."""
        import torch

        if self._source is None:
            if name != self._last[0]:  # opening a tensor costs as much as reading a slice
                self._last = name, self._vector.get_tensor(name).view(-1)
            return self._last[1][start:stop].to(device)
        stop = min(stop, self.size(name))
        if isinstance(self._source, Whole):
            return self._source.part(name, start, stop, device)
        if name in self._source.names:
            return self._source.part(name, start, stop).to(device)
        return torch.zeros(stop - start, device=device)

    @property
    def mapped(self) -> bool:
        """Whether its values are in a file, and not derived when they are asked for."""
        return self._source is None

    def size(self, name: str) -> int:
        if self._source is not None:
            return self._sizes[name]
        return math.prod(self._vector.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> "Tensor":
        if self._source is None:
            return self._vector.get_tensor(name).view(-1)
        return self.part(name, 0, self.size(name))

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
