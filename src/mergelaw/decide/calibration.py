"""The loss of calibration documents as a function of a resident merge's coefficients.

A gradient of the coefficients is that of the model's parameters, turned tensor by tensor into inner
products with the task vectors: one forward and one backward pass. Where task vectors are kept
in memory, a tensor's gradient is freed as soon as its products are taken; where they are read from
files, the gradients of all batches are summed first, so that the files are read once.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelaw.artifacts.files import write_json
from mergelaw.data.documents import read_split
from mergelaw.data.tokenize import Window, encode
from mergelaw.decide.learned import Array, Kind, block, learn
from mergelaw.errors import MergelawError
from mergelaw.evaluation.cross_entropy import batches, nll, token_losses
from mergelaw.evaluation.shard import load_model, memory_for_vectors
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.learned import COEFFICIENTS, FEWEST
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models.causal_lm import load_tokenizer
from mergelaw.models.checkpoint import read_config, vocabulary_size
from mergelaw.models.size import size_of_architecture

if TYPE_CHECKING:
    from torch import Tensor

BACKWARD = 3  # forward passes that a gradient costs
HELD_OUT = 3  # one of so many documents is held out, of three of similar length the second


class Documents:
    """Windows of several domains as batches on ``device``; their loss is the mean over domains."""

    def __init__(self, domains: Sequence[Sequence[Window]], batch_tokens: int, device: Any):
        windows = [replace(w, document=d) for d, part in enumerate(domains) for w in part]
        self.batches = batches(windows, batch_tokens, device)
        self.scored = np.array([sum(w.stop - w.start for w in part) for part in domains])
        self.tokens = sum(len(window.ids) for window in windows)

    def loss(self, model: Any) -> float:
        """Mean over domains of the loss, in nats per token."""
        return float((nll(model, self.batches, len(self.scored)) / self.scored).mean())

    def backward(self, model: Any) -> float:
        """Loss as above; adds its gradient to the parameters', batch by batch."""
        import torch

        weights, total = 1 / (self.scored * len(self.scored)), 0.0
        for batch in self.batches:
            parts = [
                (losses * torch.from_numpy(weights[domains]).to(losses)).sum()
                for domains, losses in token_losses(model, batch)
            ]
            loss = torch.stack(parts).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total


def divide(
    domains: Mapping[str, Sequence[Sequence[Window]]], batch_tokens: int, device: Any
) -> dict[Kind, Documents]:
    """Calibration documents by kind; each domain's are given as one list of windows a document."""

    def length(document: Sequence[Window]) -> int:
        return sum(len(window.ids) for window in document)

    ordered = [sorted(domain, key=length) for domain in domains.values()]

    def documents(kept: Callable[[int], bool]) -> Documents:
        parts = [
            [window for n, document in enumerate(domain) if kept(n) for window in document]
            for domain in ordered
        ]
        return Documents(parts, batch_tokens, device)

    return {
        "fit": documents(lambda n: n % HELD_OUT != 1),
        "held": documents(lambda n: n % HELD_OUT == 1),
        "all": documents(lambda n: True),
    }


class Calibration(ExitStack):
    """The objective of ``learned.learn``; leaving the context removes its hooks from the model.

    ``documents`` are those of ``divide``. ``passes`` counts forward passes over all documents, of
    which a gradient is three.
    """

    def __init__(
        self,
        model: Any,
        merger: Merger,
        experts: Sequence[str],
        documents: Mapping[Kind, Documents],
    ):
        super().__init__()
        self._model, self._merger, self._experts = model, merger, experts
        self.tensors, self.passes = list(merger.parameters), 0.0
        self._documents = documents
        self._losses: dict[tuple[Kind, bytes], float] = {}
        self._gradients: dict[tuple[Kind, bytes], tuple[float, Array]] = {}
        self._products: dict[str, Tensor] = {}
        model.requires_grad_(False)
        for name, parameter in merger.parameters.items():
            parameter.requires_grad_(True)
            self.callback(parameter.requires_grad_, False)
            if merger.resident:
                hook: Any = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._take, name)
                )
                self.callback(hook.remove)

    def _take(self, name: str, parameter: Any) -> None:
        """Turn a tensor's gradient, if it has one, into inner products and free it."""
        if parameter.grad is not None:
            products = self._merger.products(self._experts, name, parameter.grad)
            self._products[name] = self._products.get(name, 0.0) + products
            parameter.grad = None

    def merge(self, coefficients: Array) -> None:
        """Make the model the merge with these coefficients, (M, T)."""
        weights = dict(zip(self.tensors, coefficients.T.tolist(), strict=True))
        self._merger.merge(self._experts, weights)

    def loss(self, coefficients: Array, kind: Kind) -> float:
        """Loss in nats per token; infinite where it is not finite."""
        key = kind, coefficients.tobytes()
        if key not in self._losses:
            self.merge(coefficients)
            loss = self._documents[kind].loss(self._model)
            self._losses[key] = loss if math.isfinite(loss) else math.inf
            self._count(1, kind)
        return self._losses[key]

    def gradient(self, coefficients: Array, kind: Kind) -> tuple[float, Array]:
        """Loss and its gradient, (M, T). The loss is infinite where one of them is not finite."""
        key = kind, coefficients.tobytes()
        if key not in self._gradients:
            self.merge(coefficients)
            self._products.clear()
            loss = self._documents[kind].backward(self._model)
            for name, parameter in self._merger.parameters.items():
                self._take(name, parameter)
            gradient = np.zeros(coefficients.shape)
            for column, name in enumerate(self.tensors):
                if name in self._products:
                    gradient[:, column] = self._products[name].cpu().numpy()
            finite = math.isfinite(loss) and bool(np.isfinite(gradient).all())
            self._gradients[key] = loss if finite else math.inf, gradient
            self._count(BACKWARD, kind)
        return self._gradients[key]

    def _count(self, passes: int, kind: Kind) -> None:
        documents = self._documents
        self.passes += passes * documents[kind].tokens / documents["all"].tokens


def write(
    recipe: Mapping[str, Any],
    subsets: Sequence[Sequence[str]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    folder: Path,
    state: Path,
) -> dict[str, Any]:
    """Learn coefficients of merges, and write ``coefficients.parquet`` and ``searches.parquet``.

    ``recipe`` holds the method and the evaluation's settings, ``subsets`` the experts of each merge
    in canonical order. The folders are the base, task vectors by expert, calibration documents by
    domain, and ``state``, which keeps learned merges if the process is killed. Returns facts for
    the lineage. Raises MergelawError for a domain with too few documents.
    """
    import pandas as pd

    if not corpora:
        raise MergelawError(
            "learn: no domain has calibration documents; give the domains' sources more documents, "
            "or set calibration_documents"
        )
    settings, tokenizer = recipe["evaluation"], load_tokenizer(base)
    embedding_rows = vocabulary_size(read_config(base))
    domains = {
        name: windows_of(tokenizer, embedding_rows, name, path, settings)
        for name, path in corpora.items()
    }
    model = load_model(base, settings["dtype"])
    pool = {expert: TaskVector(path) for expert, path in vectors.items()}
    method, room = method_of(recipe["method"]), memory_for_vectors(model.device)
    save_memory(model, base, settings, room)
    documents = divide(domains, settings["batch_tokens"], model.device)
    coefficients, searches, passes = [], [], 0.0
    with Merger(model, base, pool, method, room) as merger:
        for number, experts in enumerate(subsets):
            file, members = state / f"{number}.json", {name: pool[name] for name in experts}
            if not file.exists():
                with Calibration(model, merger, experts, documents) as objective:
                    write_json(file, _learn_one(objective, members, recipe["method"]))
            one = json.loads(file.read_text(encoding="utf-8"))
            coefficients += [(number, *row) for row in one["coefficients"]]
            searches += [(number, *row) for row in one["searches"]]
            passes += one["passes"]
            text = f"learned {number + 1} of {len(subsets)} merges, {', '.join(experts)}"
            print(f"mergelaw: {text}: {one['choice']}", file=sys.stderr, flush=True)
    columns = ["merge", "expert", "tensor", "block", "coefficient", "norm"]
    pd.DataFrame(coefficients, columns=columns).to_parquet(folder / COEFFICIENTS, index=False)
    columns = ["merge", "by", "coefficients", "step", "held_out_loss", "chosen"]
    pd.DataFrame(searches, columns=columns).to_parquet(folder / "searches.parquet", index=False)
    return {
        "merges": len(subsets),
        "forward_passes": round(passes, 1),
        "documents": {name: len(documents) for name, documents in domains.items()},
    }


def _learn_one(
    objective: Calibration, vectors: Mapping[str, TaskVector], method: Mapping[str, Any]
) -> dict[str, Any]:
    """Learn one merge: rows of its coefficients and searches, passes and the choice, as JSON."""
    tensors = objective.tensors
    statistics = [vector.statistics()["tensors"] for vector in vectors.values()]
    norms = np.array([[entry[name]["norm"] for name in tensors] for entry in statistics])
    learned = learn(objective, tensors, norms, method["by"], method["gradients"])
    chosen = learned.chosen
    trials = [(one, step, loss) for one in learned.searches for step, loss in enumerate(one.losses)]
    return {
        "coefficients": [
            (expert, name, block(name), learned.coefficients[i, t], norms[i, t])
            for i, expert in enumerate(vectors)
            for t, name in enumerate(tensors)
        ],
        "searches": [
            (
                one.by,
                one.parts.count,
                step,
                loss if math.isfinite(loss) else None,
                one is chosen and step == one.steps,
            )
            for one, step, loss in trials
        ],
        "passes": objective.passes,
        "choice": f"by {chosen.by}, {chosen.steps} steps, held-out loss "
        f"{chosen.losses[chosen.steps]:.4f}, the average's {learned.searches[0].losses[0]:.4f}",
    }


def save_memory(model: Any, base: Path, settings: Mapping[str, Any], room: float) -> None:
    """Recompute activations in backward passes, layer by layer, where they may fill ``room`` bytes.

    transformers does so in training mode alone, which also turns dropout on.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    size = size_of_architecture(read_config(base))
    tokens = max(settings["batch_tokens"], settings["max_tokens"])
    if size is not None and size.activations(tokens, settings["dtype"]) < room / 2:
        return
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def windows_of(
    tokenizer: Any, rows: int | None, domain: str, folder: Path, settings: Mapping[str, Any]
) -> list[list[Window]]:
    """The windows of each of a domain's calibration documents."""
    where, limits = f"calibration documents of {domain}", settings["max_tokens"]
    how = settings["long_documents"], where, settings["protocol"]
    encoded = encode(tokenizer, read_split(folder), limits, *how, rows)
    by_document: dict[int, list[Window]] = {}
    for window in encoded.windows:
        by_document.setdefault(window.document, []).append(window)
    if len(by_document) < FEWEST:
        raise MergelawError(
            f"{where}: {len(by_document)} with tokens to score, of which a third is held out; give "
            f"at least {FEWEST} (calibration_documents)"
        )
    return list(by_document.values())
