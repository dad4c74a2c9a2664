"""Task vectors: expert minus base, in fp32 and without loss.

``vector.safetensors`` holds the fp32 difference of each tensor by the checkpoint's names. Where
base + difference in fp32 does not give the expert's bits, ``exceptions.safetensors`` holds the flat
index (``{name}.index``, int64) and the expert's value (``{name}.value``, fp32); a merge of this
expert alone restores them. ``statistics.json`` has norms and counts per tensor.

``storage: derived`` does not store the difference but recomputes it, with the same bits, from base
and expert, which must be kept; ``derived.json`` has the digest of the file not stored. An adapter's
task vector (:mod:`mergelaw.models.lora`) is always stored.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import files, lineage
from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import Tensors, Writer, is_adapter, mergeable, open_mapped
from mergelaw.models.compare import check_trust, compare, equals_base, kinship, matrices
from mergelaw.models.lora import merge_adapter
from mergelaw.models.parameters import open_arranged

if TYPE_CHECKING:
    from torch import Tensor

VECTOR = "vector.safetensors"
EXCEPTIONS = "exceptions.safetensors"
STATISTICS = "statistics.json"
DERIVED = "derived.json"

# Elements processed at a time, so that a large tensor need not be in memory. A multiple of SQUARES;
# no bit of a result depends on it.
PIECE = 1 << 22
SQUARES = 1 << 20


def difference(expert: "Tensor", base: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Subtract base from expert: (fp32 difference, flat indices of exceptions, their fp32 values).

    Base + difference in fp32, with the exceptions restored, gives the expert's fp32 bits and,
    rounded to the expert's dtype, the expert's bits.
    """
    import torch

    wide, base = expert.float(), base.float()
    vector = wide - base
    wrong = (base + vector).view(torch.int32) != wide.view(torch.int32)
    index = wrong.view(-1).nonzero().view(-1)
    return vector, index, wide.reshape(-1)[index]


class Expert:
    """An expert with its base; ``names`` are the tensors to merge, ``sizes`` their elements.

    ``folder`` is a checkpoint or an adapter, open until ``stack`` closes; ``notes`` are for users.
    Raises MergelawError for an expert that does not fit its base.
    """

    def __init__(
        self,
        folder: Path,
        base: Tensors,
        stack: ExitStack,
        vocabulary: str,
        trust: Sequence[str] = (),
    ):
        self.folder, self._base = folder, base
        self._tensors: Tensors | dict[str, Tensor]
        if is_adapter(folder):
            check_trust(trust, {}, folder)
            self._tensors, self.notes = merge_adapter(base, folder, vocabulary)
            self.names = mergeable(base)
        else:
            self._tensors = stack.enter_context(open_arranged(folder))
            self.names, self.notes = compare(base, self._tensors, vocabulary, trust)
        self.sizes = {name: math.prod(base.shape(name)) for name in self.names}
        self.matrices = matrices(base, self.names)

    def sides(self, name: str, start: int, stop: int) -> tuple["Tensor", "Tensor"]:
        """The flat elements ``start`` to ``stop`` of expert and base that both of them have."""
        side = self._tensors if name in self._tensors else self._base
        theirs, ours = (tensors[name].view(-1)[start:stop] for tensors in (side, self._base))
        both = min(len(theirs), len(ours))
        return theirs[:both], ours[:both]

    def base_part(self, name: str, start: int, stop: int) -> "Tensor":
        return self._base[name].view(-1)[start:stop]

    def part(self, name: str, start: int, stop: int, device: Any = None) -> "Tensor":
        """The flat fp32 difference of elements ``start`` to ``stop``; zero in missing rows."""
        theirs, ours = self.sides(name, start, stop)
        return padded(theirs.to(device).float() - ours.to(device).float(), stop - start)


def padded(vector: "Tensor", size: int) -> "Tensor":
    import torch

    missing = size - len(vector)
    return torch.cat([vector, vector.new_zeros(missing)]) if missing else vector


def pieces(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, PIECE):
        yield start, min(start + PIECE, size)


def write(
    base: Path,
    expert: Path,
    folder: Path,
    storage: str = "materialised",
    vocabulary: str = "refuse",
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the task vector of ``expert`` (a checkpoint or adapter) over ``base`` into ``folder``.

    ``vocabulary`` and ``trust`` as in :func:`compare.compare`. Returns facts for the lineage.
    Raises MergelawError for an expert that does not fit, equals its base, or holds NaN or Inf.
    """
    statistics: dict[str, dict[str, Any]] = {}
    derived = storage == "derived" and not is_adapter(expert)
    with ExitStack() as stack:
        ours = stack.enter_context(open_arranged(base))
        source = Expert(expert, ours, stack, vocabulary, trust)
        layout = {name: ("F32", ours.shape(name)) for name in source.names}
        writer = stack.enter_context(Writer(None if derived else folder / VECTOR, layout))
        for name in source.names:
            statistics[name] = {}
            writer.write_pieces(name, measured(source, base, name, statistics[name]))
        write_exceptions(source, statistics, folder / EXCEPTIONS)
    norm = math.fsum(s["norm"] ** 2 for s in statistics.values()) ** 0.5
    if norm == 0:
        raise equals_base(expert)
    notes = [*source.notes, *kinship_of(source, statistics, trust)]
    for note in notes:
        print(f"mergelaw: {note}", file=sys.stderr)
    total = {key: sum(s[key] for s in statistics.values()) for key in ("elements", "exceptions")}
    files.write_json(folder / STATISTICS, {"norm": norm, **total, "tensors": statistics})
    if derived:
        described = {"vector": writer.digest, "vocabulary": vocabulary, "trust": list(trust)}
        files.write_json(folder / DERIVED, described)
    stored = "derived" if derived else "materialised"
    facts = {"norm": norm, **total, "storage": stored}
    return facts | ({"notes": notes} if notes else {})


def kinship_of(
    source: Expert, statistics: dict[str, dict[str, Any]], trust: Sequence[str]
) -> list[str]:
    """:func:`compare.kinship` of an expert; removes ``expert_norm`` from ``statistics``."""
    norms = {name: values.pop("expert_norm") for name, values in statistics.items()}
    rows = [(statistics[n]["base_norm"], norms[n], statistics[n]["norm"]) for n in source.matrices]
    return kinship(rows, source.folder, trust)


def measured(
    expert: Expert, base: Path, name: str, statistics: dict[str, Any]
) -> Iterator["Tensor"]:
    """Yield the pieces of a tensor's difference; ``statistics`` is complete after the last."""
    import torch

    size = expert.sizes[name]
    zeros = exceptions = 0
    squares, before, after = [], [], []
    for start, stop in pieces(size):
        theirs, ours = expert.sides(name, start, stop)
        vector, index, _ = difference(theirs, ours)
        if not torch.isfinite(vector).all():
            raise unusable(base, expert.folder, name, theirs, ours)
        vector = padded(vector, stop - start)
        exceptions += len(index)
        zeros += int((vector == 0).sum())
        squares += squares_of(vector)
        before += squares_of(expert.base_part(name, start, stop))
        after += squares_of(theirs)
        yield vector
    norms = {"norm": math.fsum(squares) ** 0.5, "base_norm": math.fsum(before) ** 0.5}
    norms["expert_norm"] = math.fsum(after) ** 0.5
    statistics |= {"elements": size, "zeros": zeros, "exceptions": exceptions, **norms}


def write_exceptions(
    expert: Expert, statistics: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Write ``exceptions.safetensors`` piece by piece, because they may not fit in memory."""
    counts = {name: s["exceptions"] for name, s in sorted(statistics.items()) if s["exceptions"]}
    layout = {f"{name}.index": ("I64", (count,)) for name, count in counts.items()}
    layout |= {f"{name}.value": ("F32", (count,)) for name, count in counts.items()}

    def exceptions(name: str, values: bool) -> Iterator["Tensor"]:
        for start, stop in pieces(expert.sizes[name]):
            _, index, value = difference(*expert.sides(name, start, stop))
            yield value if values else index + start

    with Writer(path, layout) as writer:
        for tensor in layout:
            name, _, kind = tensor.rpartition(".")
            writer.write_pieces(tensor, exceptions(name, kind == "value"))


def unusable(
    base: Path, expert: Path, name: str, theirs: "Tensor", ours: "Tensor"
) -> MergelawError:
    """The error for a difference that is not finite, with its cause."""
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
    """Sums of squares of SQUARES elements each, in float64.

    numpy's sum, unlike torch's, has the same bits on any number of threads. A task vector's digest,
    which keys DARE's masks, covers these statistics.
    """
    import numpy as np

    values = flat.float().numpy()
    return [
        np.square(values[i : i + SQUARES], dtype=np.float64).sum().item()
        for i in range(0, len(values), SQUARES)
    ]


def digest_of(folder: Path, record: Mapping[str, Any] | None = None) -> str:
    """Digest of a task vector's files as if materialised, with any storage.

    ``record`` is its lineage, if already read.
    """
    files = dict((record or lineage.read(folder))["files"])
    if DERIVED in files:
        files[VECTOR] = json.loads((folder / DERIVED).read_text(encoding="utf-8"))["vector"]
        del files[DERIVED]
    return lineage.content_digest(files)


class TaskVector:
    """A task vector's tensors, mapped or derived: flat fp32 by name. A context manager.

    ``names`` are the base's mergeable tensors; ``digest`` is :func:`digest_of`; ``changed`` are the
    tensors with exceptions. Raises MergelawError for a damaged task vector.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        record = lineage.read(self.folder)
        self.digest = digest_of(self.folder, record)
        self._stack = ExitStack()
        self._expert: Expert | None = None
        self._last: tuple[str, Any] = "", None
        with self._stack:
            if DERIVED in record["files"]:
                self._expert = self._derive(record)
                self.names = self._expert.names
            else:
                self._vector = self._open(VECTOR)
                self.names = sorted(self._vector.keys())
            self._exceptions = self._open(EXCEPTIONS)
            self._stack = self._stack.pop_all()
        stored = self._exceptions.keys()
        self.changed = {n.removesuffix(".index") for n in stored if n.endswith(".index")}

    def _open(self, file: str) -> Any:
        try:
            return open_mapped(self.folder / file, self._stack)
        except MergelawError as error:
            raise MergelawError(
                f"{self.folder}: corrupt ({error}); delete the folder and rerun"
            ) from None

    def _derive(self, record: Mapping[str, Any]) -> Expert:
        """Open base and expert after comparing them with the lineage."""
        places = {}
        for name in ("base", "expert"):
            places[name] = Path(os.path.normpath(self.folder / record["inputs"][name]["path"]))
            if not (places[name] / lineage.LINEAGE).exists():
                raise MergelawError(
                    f"{places[name]}: is gone, and the task vector {self.folder} is derived from "
                    "it; make it again, or delete the task vector and set storage: materialised"
                )
            if lineage.used(places[name])["digest"] != record["inputs"][name]["digest"]:
                raise MergelawError(
                    f"{places[name]}: is not what the task vector {self.folder} was derived from; "
                    "delete the task vector and rerun"
                )
        described = json.loads((self.folder / DERIVED).read_text(encoding="utf-8"))
        base = self._stack.enter_context(open_arranged(places["base"]))
        options = described["vocabulary"], described.get("trust", ())
        return Expert(places["expert"], base, self._stack, *options)

    def __enter__(self) -> "TaskVector":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def part(self, name: str, start: int, stop: int, device: Any = None) -> "Tensor":
        """Elements ``start`` to ``stop`` of a tensor, on ``device`` (None: the processor)."""
        if self._expert is not None:
            return self._expert.part(name, start, min(stop, self.size(name)), device)
        if name != self._last[0]:  # opening a tensor takes as long as reading a slice
            self._last = name, self._vector.get_tensor(name).view(-1)
        values: Tensor = self._last[1][start:stop].to(device)
        return values

    def size(self, name: str) -> int:
        if self._expert is not None:
            return self._expert.sizes[name]
        return math.prod(self._vector.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> "Tensor":
        return self.part(name, 0, self.size(name))

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        for name in self.names:
            yield name, self[name]

    def exceptions(self, name: str) -> tuple["Tensor", "Tensor"] | None:
        """(flat indices, fp32 values) of a tensor's exceptions; None without any."""
        if name not in self.changed:
            return None
        get = self._exceptions.get_tensor
        return get(f"{name}.index"), get(f"{name}.value")

    def statistics(self) -> dict[str, Any]:
        """The content of ``statistics.json``."""
        text = (self.folder / STATISTICS).read_text(encoding="utf-8")
        return dict(json.loads(text))
