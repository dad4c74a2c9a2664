"""Measurement of a shard: the cells of some of a base's merges, in one resident model."""

import base64
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelaw.artifacts import lineage
from mergelaw.data import documents as corpus
from mergelaw.data import tokenize as tokens
from mergelaw.errors import MergelawError
from mergelaw.evaluation import cells, cross_entropy
from mergelaw.evaluation.table import write_table
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.learned import read_coefficients, weights_of
from mergelaw.merging.task_vector import TaskVector, digest_of
from mergelaw.models import causal_lm
from mergelaw.models.checkpoint import Tensors, read_config, vocabulary_size
from mergelaw.models.size import count_parameters

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    recipe: Mapping[str, Any],
    subsets: Sequence[Sequence[Any]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    folder: Path,
    name: str,
    output: Path,
    coefficients: Path | None = None,
) -> dict[str, Any]:
    """Measure the cells that the store lacks and write the shard's table.

    ``recipe`` holds method, evaluation settings, domains (with ``held_out``) and labels,
    ``subsets`` rows (k, replicate, place, experts) of the design, with the experts' weights as a
    fifth value for a merge that the configuration names. The folders are the base, task vectors by
    expert, corpora by domain, the cell store (``folder``), the table (``output``), and learned
    ``coefficients``, which take the place of weights. ``name`` begins the file name of this
    process. Returns counts of cells and tokens, and seconds, for the lineage.
    """
    entries = cells_of(recipe, subsets, base, vectors, corpora, coefficients)
    sets = encode(recipe["evaluation"], base, corpora)
    facts: dict[str, Any] = {"cells": len(entries), "measured": 0}
    with cells.Store(folder, name, expected(entries, sets)) as store:
        missing = [entry for entry in entries if entry["cell"] not in store.known]
        if missing:
            started = time.perf_counter()
            measured = _measure(recipe, missing, base, vectors, sets, store)
            facts |= {"measured": measured, "seconds": round(time.perf_counter() - started, 3)}
    write_table(recipe, entries, store.known, output)
    return facts | {"tokens": sum(store.known[entry["cell"]]["tokens"] for entry in entries)}


def cells_of(
    recipe: Mapping[str, Any],
    subsets: Sequence[Sequence[Any]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    coefficients: Path | None = None,
) -> list[dict[str, Any]]:
    """The shard's cells: place in the design, domain, identities and digests."""
    base_digest = lineage.read(base)["digest"]
    digests = {expert: digest_of(path) for expert, path in vectors.items()}
    sets = {d: lineage.read(corpora[d])["files"][corpus.DOCUMENTS] for d in recipe["domains"]}
    learned = {} if coefficients is None else read_coefficients(coefficients)
    entries = []
    for k, replicate, place, experts, *free in subsets:
        members = [digests[expert] for expert in experts]
        method = recipe["method"] if experts else None
        weights = free[0] if free else None
        if learned and experts:
            weights = weights_of(learned[tuple(experts)])
        merge, by_domain = cells.identities(
            base_digest, members, method, recipe["evaluation"], sets, weights
        )
        row = {"k": k, "replicate": replicate, "place": place, "experts": list(experts)}
        row |= {"weights": free[0] if free else [1.0] * len(experts), "written": bool(free)}
        row |= {"merged_by": weights or [1.0] * len(experts)}
        row |= {"merge": merge, "base_digest": base_digest, "vector_digests": members}
        entries += [
            row | {"domain": domain, "cell": cell, "set": sets[domain]}
            for domain, cell in by_domain.items()
        ]
    return entries


def encode(
    settings: Mapping[str, Any], base: Path, corpora: Mapping[str, Path]
) -> dict[str, tokens.Encoded]:
    """The evaluation documents by domain, in tokens of a model's folder."""
    tokenizer, sets = causal_lm.load_tokenizer(base), {}
    limits = settings["max_tokens"], settings["long_documents"]
    rows = vocabulary_size(read_config(base))
    for domain, folder in corpora.items():
        documents, where = corpus.read_split(folder), f"evaluation documents of {domain}"
        sets[domain] = tokens.encode(
            tokenizer, documents, *limits, where, settings["protocol"], rows
        )
    return sets


def expected(
    entries: Sequence[Mapping[str, Any]], sets: Mapping[str, tokens.Encoded]
) -> dict[str, dict[str, Any]]:
    """Values that the cells of entries must have, by identity: digests, tokens and bytes."""
    counts = {domain: counts_of(encoded) for domain, encoded in sets.items()}
    return {
        entry["cell"]: counts[entry["domain"]] | {name: entry[name] for name in cells.ORIGIN}
        for entry in entries
    }


def counts_of(encoded: tokens.Encoded) -> dict[str, Any]:
    """Tokens and bytes of an evaluation set, as cells hold them."""
    scored = [0] * encoded.documents
    for window in encoded.windows:
        scored[window.document] += window.stop - window.start
    return {
        "document_tokens": scored,
        "tokens": sum(scored),
        "bytes": encoded.scored_bytes,
        "long_documents": encoded.long_documents,
        "dropped_tokens": encoded.dropped_tokens,
    }


def _measure(
    recipe: Mapping[str, Any],
    missing: Sequence[Mapping[str, Any]],
    base: Path,
    vectors: Mapping[str, Path],
    sets: Mapping[str, tokens.Encoded],
    store: cells.Store,
) -> int:
    """Measure the missing cells into the store; returns how many were measured here."""
    settings = recipe["evaluation"]
    model = load_model(base, settings["dtype"])
    needed = {entry["domain"]: sets[entry["domain"]] for entry in missing}
    batches = _batches(model, needed, settings["batch_tokens"])
    experts = {expert for entry in missing for expert in entry["experts"]}
    pool = {expert: TaskVector(path) for expert, path in vectors.items() if expert in experts}
    # A merge's cells are measured together; a merge on two circles is measured once.
    merges: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for entry in missing:
        merges[entry["merge"]][entry["cell"]] = entry
    method, room = method_of(recipe["method"]), memory_for_vectors(model.device)
    measured = 0
    with Merger(model, base, pool, method, room, store.folder / "prepared") as merger:
        # Merges claimed by another process come last, when most of them have been measured.
        for wait in (False, True):
            for merge, group in merges.items():
                if group.keys() <= store.known.keys():
                    continue
                with store.claim(merge, wait) as claimed:
                    left = [e for e in group.values() if claimed and e["cell"] not in store.known]
                    if left:
                        store.append(_measure_merge(merger, model, left, sets, batches))
                        measured += len(left)
    return measured


def _batches(
    model: Any, sets: Mapping[str, tokens.Encoded], batch_tokens: int
) -> dict[str, list[cross_entropy.Batch]]:
    """Batches on the model's device by domain. Raises MergelawError for unfit documents."""
    for domain, encoded in sets.items():
        causal_lm.check_windows(model, encoded.windows, f"evaluation documents of {domain}")
    return {
        domain: cross_entropy.batches(encoded.windows, batch_tokens, model.device)
        for domain, encoded in sets.items()
    }


def _measure_merge(
    merger: Merger,
    model: Any,
    entries: Sequence[Mapping[str, Any]],
    sets: Mapping[str, tokens.Encoded],
    batches: Mapping[str, Sequence[cross_entropy.Batch]],
) -> list[cells.Cell]:
    """Merge in the resident model and measure some of the merge's cells."""
    import torch

    started = time.perf_counter()
    merger.merge(entries[0]["experts"], entries[0]["merged_by"])
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    facts = {
        "merge_seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if on_gpu else model.device.type,
        "threads": torch.get_num_threads(),
        **count_parameters(model),
    }
    measured = []
    for entry in entries:
        encoded, parts = sets[entry["domain"]], batches[entry["domain"]]
        started = time.perf_counter()
        nll = cross_entropy.nll(model, parts, encoded.documents)
        seconds = time.perf_counter() - started
        measured.append(
            {
                "cell": entry["cell"],
                **{name: entry[name] for name in cells.ORIGIN},
                "document_nll": base64.b64encode(nll.astype("<f8").tobytes()).decode(),
                **counts_of(encoded),
                "eval_seconds": seconds,
                **facts,
            }
        )
    return measured


def measure_model(
    folder: Path,
    settings: Mapping[str, Any],
    corpora: Mapping[str, Path],
    adapter: Path | None = None,
) -> "pd.DataFrame":
    """Losses of a model's folder on every document: domain, document_nll, document_tokens.

    ``settings`` is the evaluation's recipe, ``corpora`` the folders of evaluation documents;
    ``adapter`` is the folder of an adapter that peft adds to the model.
    """
    import pandas as pd

    sets, model = encode(settings, folder, corpora), load_model(folder, settings["dtype"])
    if adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings():  # of transformers, about itself
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    rows = []
    for domain, batches in _batches(model, sets, settings["batch_tokens"]).items():
        nll = cross_entropy.nll(model, batches, sets[domain].documents)
        counts = counts_of(sets[domain])["document_tokens"]
        rows.append({"domain": domain, "document_nll": nll.tolist(), "document_tokens": counts})
    return pd.DataFrame(rows)


def load_model(base: Path, dtype: str) -> Any:
    """Load a base for evaluation, on the processor, on a GPU, or with its layers over several GPUs.

    Raises MergelawError if the job's GPUs cannot hold it.
    """
    import torch

    if not torch.cuda.is_available():
        return causal_lm.load(base, dtype, device_map="cpu").eval()
    check_gpu_memory(base, dtype)
    count = torch.cuda.device_count()
    model = causal_lm.load(base, dtype, device_map="auto" if count > 1 else "cuda").eval()
    # transformers would silently leave layers on the processor or on disk.
    if count > 1 and {"cpu", "disk"} & set(map(str, model.hf_device_map.values())):
        raise MergelawError(
            f"{base}: the job's {count} GPUs cannot hold its layers; give the job more GPUs, or "
            "evaluate in bfloat16"
        )
    return model


def check_gpu_memory(base: Path, dtype: str) -> None:
    """Raise MergelawError if the job's GPUs cannot hold a model, before it is loaded."""
    import torch

    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    with Tensors(base) as tensors:
        count = sum(math.prod(tensors.shape(name)) for name in tensors.names())
    needed = count * getattr(torch, dtype).itemsize
    if needed > sum(free):
        raise MergelawError(
            f"{base}: takes {needed / 1e9:.1f} GB in {dtype}, but the job's {len(free)} GPUs have "
            f"{sum(free) / 1e9:.1f} GB free; give the job more GPUs, or evaluate in bfloat16"
        )


def memory_for_vectors(device: Any) -> int:
    """Bytes for base and prepared vectors: half of the free memory, or half of the job's share.

    Without SLURM, the share is that of the job's cores, because other jobs may use the others.
    """
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free: int = psutil.virtual_memory().available
    cores = os.cpu_count() or 1
    share = free * min(torch.get_num_threads(), cores) // cores
    allotted = int(os.environ.get("SLURM_MEM_PER_NODE", 0)) << 20
    return min(free, allotted or share) // 2
