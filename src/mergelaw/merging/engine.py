"""The merge engine: theta_0 + rule(kept(v_1), ..., kept(v_k)).

:class:`Merger` overwrites the parameters of a resident model, so that evaluating a merge writes no
file; :func:`write_merge` writes a checkpoint. Both compute in fp32, in the order of the
configuration, and round once to the dtype of the result. Both give the same values.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import files, lineage
from mergelaw.artifacts.keys import digest
from mergelaw.errors import MergelawError
from mergelaw.merging.methods import Method
from mergelaw.merging.task_vector import TaskVector, pieces
from mergelaw.models.checkpoint import COMPANIONS, INDEX, Writer, open_mapped
from mergelaw.models.parameters import open_arranged, parameters_by_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergelaw.merging.kernels import Rule

# Elements merged at a time; no bit depends on it. On a processor temporaries stay in each core's
# cache, on a GPU most of them in its second cache; with fewer, launches would cost more than they
# compute (benchmarks/gpu.md). Multiples of 8, for packed masks.
SLICE = 1 << 18
GPU_SLICE = 1 << 22
SHARD = "5GB"  # the largest file of a written merge

Weights = Sequence[float] | Mapping[str, Sequence[float]]
"""One weight for each expert: the same for every tensor, or by the tensor's name."""


def stored(path: Path, write: Callable[[Path], None]) -> Path:
    """A file that is written once for all processes, and again if it is damaged.

    The first process writes it while the others wait. It is read only if its size or time is not
    that of its seal.
    """
    from filelock import FileLock

    seal = path.with_suffix(".sha256")

    def is_whole() -> bool:
        if not (path.exists() and seal.exists()):
            return False
        digest, *stamp = seal.read_text(errors="replace").split() or [""]
        return stamp == list(map(str, lineage.stamp(path))) or digest == files.file_digest(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not is_whole():
            scratch = path.with_suffix(f".{files.unique()}")
            try:
                write(scratch)
                digest = files.file_digest(scratch)
                scratch.replace(path)
                seal.write_text(" ".join(map(str, [digest, *lineage.stamp(path)])))
            finally:
                scratch.unlink(missing_ok=True)
    return path


def thresholds(method: Method, vector: TaskVector, cache: Path | None = None) -> dict[str, float]:
    """``method.thresholds`` of one expert, cached in the folder ``cache``."""
    if cache is None or type(method).thresholds is Method.thresholds:
        return method.thresholds(vector.tensors)
    recipe = {"method": method.recipe(), "vector": vector.digest}

    def write(path: Path) -> None:
        path.write_text(json.dumps(method.thresholds(vector.tensors)), encoding="utf-8")

    path = stored(cache / f"{digest(recipe)[:32]}.json", write)
    return dict(json.loads(path.read_text(encoding="utf-8")))


class Prepared:
    """A task vector with the values that a method drops set to zero, read slice by slice."""

    def __init__(self, method: Method, vector: TaskVector, cache: Path | None = None):
        self.vector, self._masks = vector, method.masks()
        self._least = thresholds(method, vector, cache)
        self._file: Any = None

    @property
    def whole(self) -> bool:
        """True if no value is dropped."""
        return not self._least and self._masks is None

    def store_masks(self, cache: Path, stack: ExitStack) -> None:
        """Draw masks once, into a file of one bit a value that is mapped until ``stack`` closes."""
        masks, vector = self._masks, self.vector
        if masks is None:
            return
        recipe = {"masks": masks.identity, "vector": vector.digest, "bits": "little"}
        sizes = {name: vector.size(name) for name in vector.names}

        def write(path: Path) -> None:
            layout = {name: ("U8", (-(-size // 8),)) for name, size in sizes.items()}
            with Writer(path, layout) as writer:
                for name, size in sizes.items():
                    drawn = (masks.bits(vector.digest, name, a, b - a) for a, b in pieces(size))
                    writer.write_pieces(name, drawn)

        self._file = open_mapped(stored(cache / f"{digest(recipe)[:32]}.safetensors", write), stack)

    def part(self, name: str, start: int, stop: int, device: Any = None) -> "Tensor":
        """Elements ``start`` (a multiple of 8) to ``stop`` of a tensor; dropped ones are zero."""
        from mergelaw.merging.kernels import drop

        values, least = self.vector.part(name, start, stop, device), self._least.get(name, 0.0)
        if self._masks is None:
            return drop(values, least)
        if self._file is None:
            which = self.vector.digest, name, start, stop - start
            bits = self._masks.bits(*which, values.device)
        else:
            bits = self._file.get_tensor(name)[start // 8 : -(-stop // 8)]
        return drop(values, least, bits, self._masks.scale)


def prepare(
    method: Method, vectors: Mapping[str, TaskVector], cache: Path | None = None
) -> dict[str, Prepared]:
    """Prepare the task vectors of a pool. Raises MergelawError if their bases differ."""
    names = {name: vector.names for name, vector in vectors.items()}
    first = next(iter(names), None)
    for name in names:
        if names[name] != names[first]:  # type: ignore[index]
            raise MergelawError(
                f"{vectors[name].folder}: has other tensors than the task vector of {first}; give "
                "task vectors of the same base"
            )
    return {name: Prepared(method, vector, cache) for name, vector in vectors.items()}


def keeps_expert(rule: "Rule", vectors: Sequence[Prepared]) -> bool:
    """True if the vectors are a single expert, neither trimmed nor scaled."""
    return len(vectors) == 1 and vectors[0].whole and rule.plain().scale == 1


def rule_of(
    method: Method, weights: Weights | None, experts: Sequence[str], name: str | None
) -> "Rule":
    """The rule for one tensor. A tensor without weights keeps the base's values."""
    if isinstance(weights, Mapping):
        weights = weights.get(name or "", [0.0] * len(experts))
    return method.rule(weights or [1.0] * len(experts))


class Merger:
    """Writes merges of ``vectors`` by ``method`` into the parameters of ``model``.

    ``model`` is the base, loaded from the checkpoint ``base``; ``vectors`` are the pool by expert
    name; ``cache`` is a folder for thresholds and masks. If base and vectors fit into ``memory``
    bytes on the parameters' device, they stay there and the parameters become views of one flat
    buffer; otherwise they are streamed from their mapped files, slice by slice. ``parameters`` are
    those that merges change, by the name of their tensor.
    """

    def __init__(
        self,
        model: "nn.Module",
        base: Path,
        vectors: Mapping[str, TaskVector],
        method: Method,
        memory: int,
        cache: Path | None = None,
    ):
        self._method, self._prepared = method, prepare(method, vectors, cache)
        self._stack = ExitStack()
        self._base = self._stack.enter_context(open_arranged(base, model))
        # Without tensors that transformers ignores.
        parameters = parameters_by_tensor(model, self._base)
        names = next((set(vector.names) for vector in vectors.values()), set())
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in parameters.items() if name in names
        }
        size = sum(parameter.numel() for parameter in self.parameters.values())
        kinds = {(p.device, p.dtype) for p in self.parameters.values()}
        self.resident = len(kinds) == 1 and 4 * size * (len(vectors) + 3) <= memory
        if self.resident:
            self._hold(*kinds.pop(), size)
        elif cache:
            for prepared in self._prepared.values():
                prepared.store_masks(cache, self._stack)

    def _hold(self, device: Any, dtype: Any, size: int) -> None:
        """Load base and vectors into flat buffers, and make the parameters views of another one."""
        import torch

        def buffer(kind: Any) -> "Tensor":
            return torch.empty(size, dtype=kind, device=device)

        self._out, self._flat_base = buffer(dtype), buffer(torch.float32)
        self._flat = {expert: buffer(torch.float32) for expert in self._prepared}
        self._places: dict[str | None, slice] = {None: slice(0, size)}
        start = 0
        for name, parameter in self.parameters.items():
            count = parameter.numel()
            place = self._places[name] = slice(start, start + count)
            start += count
            self._flat_base[place] = self._base[name].view(-1).float().to(device)
            self._out[place] = parameter.data.view(-1)
            parameter.data = self._out[place].view(parameter.shape)
            for expert, prepared in self._prepared.items():
                self._flat[expert][place] = prepared.part(name, 0, count, device)

    def __enter__(self) -> "Merger":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _slices(
        self, experts: Sequence[str], name: str | None = None
    ) -> Iterator[tuple[slice, "Tensor", "Tensor", list["Tensor"]]]:
        """Flat slices (place, result, base, vectors) that cover one tensor, or all, once."""
        if self.resident:
            whole = self._places[name]
            out, base = self._out[whole], self._flat_base[whole]
            flat = [self._flat[expert][whole] for expert in experts]
            for start, stop in slices(out):
                place = slice(start, stop)
                yield place, out[place], base[place], [vector[place] for vector in flat]
            return
        for tensor in self.parameters if name is None else [name]:
            base, out = self._base[tensor].view(-1), self.parameters[tensor].data.view(-1)
            for start, stop in slices(out):
                parts = [self._prepared[e].part(tensor, start, stop, out.device) for e in experts]
                place = slice(start, stop)
                yield place, out[place], base[place].to(out.device), parts

    def merge(self, experts: Sequence[str], weights: Weights | None = None) -> None:
        """Make the model the merge of ``experts`` (in canonical order); without any, the base."""
        from mergelaw.merging import kernels

        by_tensor = experts and isinstance(weights, Mapping)
        for name in self.parameters if by_tensor else [None]:
            rule = rule_of(self._method, weights, experts, name) if experts else None
            for _, out, base, vectors in self._slices(experts, name):
                if rule is None:
                    out.copy_(base)
                else:
                    kernels.merge(base, vectors, rule, out)
        if len(experts) == 1:
            alone = self._prepared[experts[0]]
            for name in alone.vector.changed:
                if keeps_expert(rule_of(self._method, weights, experts, name), [alone]):
                    put_exceptions(alone.vector, name, self.parameters[name].data.view(-1))

    def products(self, experts: Sequence[str], name: str, gradient: "Tensor") -> "Tensor":
        """Inner products of a gradient of tensor ``name`` with task vectors: float64, (experts,).

        Sums are in fp32 within a slice and in float64 across slices.
        """
        import torch

        flat = gradient.reshape(-1)
        total = torch.zeros(len(experts), dtype=torch.float64, device=flat.device)
        for place, _, _, vectors in self._slices(experts, name):
            part = flat[place].float()
            total += torch.stack([torch.dot(vector, part) for vector in vectors])
        return total


def slices(out: "Tensor") -> Iterator[tuple[int, int]]:
    import torch

    size = SLICE * torch.get_num_threads() if out.device.type == "cpu" else GPU_SLICE
    for start in range(0, len(out), size):
        yield start, min(start + size, len(out))


def put_exceptions(vector: TaskVector, name: str, out: "Tensor", first: int = 0) -> None:
    """Write the exceptions of an expert, where base + difference is inexact, into its tensor.

    ``out`` holds the flat elements from ``first`` on.
    """
    if exceptions := vector.exceptions(name):
        index, value = exceptions
        inside = (index >= first) & (index < first + len(out))
        out[index[inside].to(out.device) - first] = value[inside].to(out)


def write_merge(
    base: Path,
    vectors: Mapping[str, TaskVector],
    method: Method,
    weights: Weights | None,
    folder: Path,
) -> None:
    """Write the merge of ``vectors`` (in canonical order) into ``folder`` as a checkpoint.

    The checkpoint has the base's dtypes, files of at most 5 GB, and the base's config, tokenizer
    and chat template. One tensor at a time is in memory. Raises MergelawError if a value overflows.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    prepared = prepare(method, vectors)
    with open_arranged(base) as tensors:
        places = {part: (name, first) for part, name, first in tensors.stored()}
        shapes = {part: tensors[part].to("meta") for part in sorted(places)}
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
        for file, names in split.filename_to_tensors.items():
            layout = {name: (tensors.dtype(name), tensors.shape(name)) for name in names}
            with Writer(folder / file, layout) as writer:
                for name in names:
                    before, (whole, first) = tensors[name], places[name]
                    rule = rule_of(method, weights, list(vectors), whole)
                    parts = list(prepared.values())
                    writer.write(name, merged_tensor(before, parts, rule, whole, first))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.write_json(folder / INDEX, index)
    for name in COMPANIONS:
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())


def merged_tensor(
    before: "Tensor", vectors: Sequence[Prepared], rule: "Rule", name: str, first: int = 0
) -> "Tensor":
    """A tensor of the base, merged, in its dtype: elements of tensor ``name`` from ``first`` on.

    Raises MergelawError if a value overflows.
    """
    import torch

    from mergelaw.merging import kernels

    if name not in vectors[0].vector.names:
        return before
    out, flat = torch.empty_like(before).view(-1), before.view(-1)
    odd = first % 8  # masks are packed into bytes
    for start, stop in slices(out):
        cut = first + start - odd, first + stop
        parts = [vector.part(name, *cut)[odd:] for vector in vectors]
        kernels.merge(flat[start:stop], parts, rule, out[start:stop])
    if keeps_expert(rule, vectors):
        put_exceptions(vectors[0].vector, name, out, first)
    if not torch.isfinite(out).all():
        raise MergelawError(
            f"the merge overflows {out.dtype} in tensor {name!r}; lower lambda or the weights, or "
            "use a base in bfloat16 or float32"
        )
    return out.view(before.shape)
