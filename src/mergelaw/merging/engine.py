"""The merge engine: theta_0 + combine(transform(v_1), ..., transform(v_k)), written once.

:class:`Merger` overwrites the parameters of a resident model, so that a merge that is only
evaluated never becomes a file; :func:`write` makes one a checkpoint. Both accumulate in fp32, in
the order of the configuration, and round once to the dtype they write; methods work element by
element, so both give the same values.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import files
from mergelaw.artifacts.keys import digest
from mergelaw.errors import MergelawError
from mergelaw.merging.methods import Method
from mergelaw.merging.task_vector import TaskVector, pieces
from mergelaw.models.checkpoint import (
    COMPANIONS,
    COMPUTED,
    FLOATS,
    WEIGHTS,
    Tensors,
    Writer,
    open_mapped,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergelaw.merging.kernels import Sparse

# Elements worked on at a time where there are temporaries; no bit depends on it. On a processor
# they stay in each core's cache, a GPU is to have more to do than kernels to launch. Multiples of
# what masks are packed by.
SLICE = 1 << 18
GPU_SLICE = 1 << 24


def prepare(method: Method, vector: TaskVector, cache: Path | None = None) -> dict[str, float]:
    """``method.prepare`` of one expert, remembered in the folder ``cache``."""
    recipe = {"method": method.model_dump(by_alias=True), **_known_by(vector)}
    path = cache / f"{digest(recipe)[:32]}.json" if cache else None
    if path and path.exists():
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["recipe"] == recipe and entry["checksum"] == digest(entry["prepared"]):
                return entry["prepared"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged: it is made again
    prepared = method.prepare(vector.tensors)
    if path and prepared:
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"recipe": recipe, "prepared": prepared, "checksum": digest(prepared)}
        files.write_json(path, entry)
    return prepared


def _known_by(vector: TaskVector) -> dict[str, str]:
    """What is prepared depends on; an adapter's digest is not of the tensors it leaves alone."""
    sizes = {name: vector.size(name) for name in vector.names}
    return {"vector": vector.digest, "sizes": digest(sizes)}


def masks(
    method: Method, vector: TaskVector, cache: Path | None, stack: ExitStack
) -> "Callable[[str], Tensor | None]":
    """``method.mask`` of one expert by tensor name, remembered in the folder ``cache``.

    There it is a file, an eighth of a byte for each parameter, that is mapped until ``stack`` is
    closed; without a ``cache`` the masks are in memory.
    """
    import torch

    from mergelaw.merging.kernels import packed_size

    drawn = method.drawn()
    if drawn is None:
        return lambda name: None

    def of(name: str) -> "Iterator[Tensor]":
        for start, stop in pieces(vector.size(name)):
            mask = method.mask(vector.digest, name, start, stop - start)
            assert mask is not None
            yield mask

    if cache is None:
        held = {n: torch.cat([torch.empty(0, dtype=torch.uint8), *of(n)]) for n in vector.names}
        return held.get
    recipe = {"masks": drawn, **_known_by(vector)}
    path = cache / f"{digest(recipe)[:32]}.safetensors"
    known = path.with_suffix(".sha256")
    if not (
        path.exists() and known.exists() and known.read_bytes() == files.file_digest(path).encode()
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{files.unique()}")
        layout = {name: ("U8", (packed_size(vector.size(name)),)) for name in vector.names}
        try:
            with Writer(scratch, layout) as writer:
                for name in vector.names:
                    writer.write_pieces(name, of(name))
            known.write_text(files.file_digest(scratch))
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    return open_mapped(path, stack).get_tensor


class Merger:
    """Writes merges of ``vectors`` by ``method`` into the parameters of ``model``.

    ``model`` is the base, loaded from the checkpoint ``base``; ``vectors`` are the pool by expert
    name. Where base and prepared vectors fit ``memory`` bytes on the parameters' device, they are
    held there and the parameters become views of one flat buffer; otherwise they are streamed from
    their mapped files, slice by slice.
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
        import torch

        self.vectors, self.method = vectors, method
        self._prepared = {name: prepare(method, vector, cache) for name, vector in vectors.items()}
        self._masks: dict[str, Callable[[str], Tensor | None]] = {}
        self._stack = ExitStack()
        self._base = self._stack.enter_context(Tensors(base))
        self._parameters = parameters_by_tensor(model, self._base)
        for expert, vector in vectors.items():
            for name in vector.names:
                if name not in self._parameters and vector[name].any():
                    raise MergelawError(
                        f"{vector.folder}: {expert} changes tensor {name!r}, which is no parameter "
                        "of the base as transformers loads it; such a model cannot be merged"
                    )
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        devices = {(p.device, p.dtype) for p in self._parameters.values()}
        self.resident = len(devices) == 1 and 4 * sum(sizes.values()) * (len(vectors) + 3) <= memory
        if not self.resident:
            for name, vector in vectors.items():
                self._masks[name] = masks(method, vector, cache, self._stack)
            return
        (device, dtype), starts, end = next(iter(devices)), {}, 0
        for name, size in sizes.items():
            starts[name], end = end, end + size
        self._out = torch.empty(end, dtype=dtype, device=device)
        self._flat_base = torch.empty(end, dtype=torch.float32, device=device)
        self._flat = {
            name: torch.zeros(end, dtype=torch.float32, device=device) for name in vectors
        }
        for name, parameter in self._parameters.items():
            place = slice(starts[name], starts[name] + sizes[name])
            self._flat_base[place] = self._base[name].view(-1).float().to(device)
            self._out[place] = parameter.data.view(-1)
            parameter.data = self._out[place].view(parameter.shape)
            for expert in vectors:
                if name in vectors[expert].names:
                    values = self._transformed(expert, name, 0, sizes[name])
                    self._flat[expert][place] = values.dense()
        self._starts = starts

    def __enter__(self) -> "Merger":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _transformed(
        self, expert: str, name: str, start: int, stop: int, mask: "Tensor | None" = None
    ) -> "Sparse":
        vector = self.vectors[expert]
        values = vector.part(name, start, stop, self._parameters[name].device)
        prepared = self._prepared[expert]
        return self.method.transform(values, prepared, vector.digest, name, start, mask)

    def _slices(
        self, experts: Sequence[str]
    ) -> Iterator[tuple["Tensor", "Tensor", list["Sparse"]]]:
        """(part of the result, base, vectors), flat, that cover every parameter once."""
        from mergelaw.merging.kernels import Sparse, packed_size

        if self.resident:
            size = slice_size(self._out, True)
            for start in range(0, len(self._out), size):
                place = slice(start, start + size)
                vectors = [Sparse(self._flat[expert][place]) for expert in experts]
                yield self._out[place], self._flat_base[place], vectors
            return
        for name, parameter in self._parameters.items():
            base, out = self._base[name].view(-1), parameter.data.view(-1)
            holders = [expert for expert in experts if name in self.vectors[expert].names]
            kept = {expert: self._masks[expert](name) for expert in holders}
            size = slice_size(out, all(self.vectors[expert].mapped for expert in holders))
            for start in range(0, len(out), size):
                stop = min(start + size, len(out))
                place = slice(start // 8, start // 8 + packed_size(stop - start))
                vectors = [
                    self._transformed(
                        expert, name, start, stop, None if mask is None else mask[place]
                    )
                    for expert, mask in kept.items()
                ]
                yield out[start:stop], base[start:stop].to(out.device), vectors

    def merge(self, experts: Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Make the model the merge of ``experts`` (in canonical order); none: the base."""
        from mergelaw.merging import kernels

        weights = weights or [1.0] * len(experts)
        rule = self.method.rule(weights) if experts else None
        for out, base, vectors in self._slices(experts):
            if not vectors or not rule:
                out.copy_(base)
            elif in_one_pass(out):
                kernels.merge(base, vectors, rule, out)
            else:
                out.copy_(base.float() + kernels.combine(vectors, rule))
        if len(experts) == 1 and self.method.keeps_single(weights[0]):
            self._restore(experts[0])

    def _restore(self, expert: str) -> None:
        """Put in what the difference does not carry: one expert alone is that expert."""
        for name in self.vectors[expert].changed:
            index, value = self.vectors[expert].exceptions(name)  # type: ignore[misc]
            flat = self._parameters[name].data.view(-1)
            flat[index.to(flat.device)] = value.to(flat)


def in_one_pass(out: "Tensor") -> bool:
    """Whether a merge into ``out`` is compiled, and needs no temporaries."""
    import torch

    return out.device.type == "cpu" and out.dtype == torch.float32


def slice_size(out: "Tensor", mapped: bool) -> int:
    """Elements worked on at a time; ``mapped``: vectors lie in memory as they are."""
    import torch

    if out.device.type != "cpu":
        return GPU_SLICE
    if mapped and in_one_pass(out):
        return max(len(out), 1)
    return SLICE * torch.get_num_threads()


def parameters_by_tensor(model: "nn.Module", base: Tensors) -> dict[str, "nn.Parameter"]:
    """The parameters of a model by the name of their tensor in the checkpoint.

    Tied parameters stand once. Raises MergelawError where transformers loads the checkpoint into
    other tensors than its files hold.
    """
    import torch

    aliases: dict[int, list[str]] = {}
    by_id = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(alias)
        by_id[id(parameter)] = parameter
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, nn.Parameter] = {}
    for key, names in aliases.items():
        candidates = [c for n in names for c in (n, n.removeprefix(prefix), prefix + n)]
        name = next((c for c in candidates if c in base), None)
        parameter = by_id[key]
        if name is not None and COMPUTED.search(name):
            raise MergelawError(
                f"{base.folder}: parameter {name!r} has the name of a table that other models "
                "compute; such a model cannot be merged"
            )
        if name is None or tuple(parameter.shape) != base.shape(name):
            raise MergelawError(
                f"{base.folder}: parameter {names[0]!r} is not stored as such (transformers "
                "converts this architecture when it loads it); such a model cannot be merged"
            )
        stored = base[name].to(parameter.dtype).to(parameter.device)
        if not torch.equal(stored, parameter.data):
            raise MergelawError(
                f"{base.folder}: transformers loads tensor {name!r} with other values than the "
                "file holds; such a model cannot be merged"
            )
        found[name] = parameter
    return found


def write(
    base: Path,
    vectors: Mapping[str, TaskVector],
    method: Method,
    weights: Sequence[float] | None,
    folder: Path,
) -> None:
    """Write the merge of ``vectors`` (in canonical order) into ``folder`` as a checkpoint.

    In the base's dtypes, rounded once; config, tokenizer and chat template are the base's. One
    tensor at a time is in memory.
    """
    import torch

    from mergelaw.merging.kernels import combine

    rule = method.rule(weights or [1.0] * len(vectors))
    prepared = {name: prepare(method, vector) for name, vector in vectors.items()}
    with Tensors(base) as tensors:
        layout = {name: (tensors.dtype(name), tensors.shape(name)) for name in tensors.names()}
        with Writer(folder / WEIGHTS, layout) as writer:
            for name in tensors.names():
                before = tensors[name]
                holders = {e: v for e, v in vectors.items() if name in v.names}
                if tensors.dtype(name) not in FLOATS or not holders:
                    writer.write(name, before)
                    continue
                out = torch.empty_like(before).view(-1)
                flat = before.view(-1)
                for start in range(0, len(out), SLICE):
                    stop = min(start + SLICE, len(out))
                    parts = [
                        method.transform(
                            vector.part(name, start, stop),
                            prepared[expert],
                            vector.digest,
                            name,
                            start,
                        )
                        for expert, vector in holders.items()
                    ]
                    out[start:stop] = flat[start:stop].float() + combine(parts, rule)
                if len(vectors) == 1 and method.keeps_single(weights[0] if weights else 1.0):
                    (vector,) = vectors.values()
                    if name in vector.changed:
                        index, value = vector.exceptions(name)  # type: ignore[misc]
                        out[index] = value.to(out.dtype)
                if not torch.isfinite(out).all():
                    raise MergelawError(
                        f"the merge overflows {out.dtype} in tensor {name!r}; lower lambda or the "
                        "weights, or use a base in bfloat16 or float32"
                    )
                writer.write(name, out.view(before.shape))
    for name in COMPANIONS:
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())


def mergekit_recipe(
    base: str,
    experts: Mapping[str, str],
    method: Method,
    weights: Sequence[float] | None,
    dtype: str,
    adapters: Collection[str] = (),
) -> dict[str, Any] | None:
    """The merge as mergekit's YAML would say it, None where mergekit has no such rule.

    ``base`` and ``experts`` (by name) are paths or hub ids, ``dtype`` is that of the result;
    ``adapters`` names the experts that are LoRA adapters.
    """
    rule = method.mergekit()
    if rule is None:
        return None
    weights = weights or [1.0] * len(experts)

    def reference(path: str) -> dict[str, Any]:
        # Spelled out: in a plain string mergekit takes what follows an @ for a revision.
        return {"model": {"path": path}}

    models: list[dict[str, Any]] = []
    for (name, path), weight in zip(experts.items(), weights, strict=True):
        model = reference(base) | {"lora": {"path": path}} if name in adapters else reference(path)
        models.append({"model": model, "parameters": {"weight": weight}})
    recipe = {
        "merge_method": rule["merge_method"],
        "models": models,
        "parameters": rule["parameters"],
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if rule["merge_method"] != "linear":
        recipe["base_model"] = reference(base)
    return recipe
