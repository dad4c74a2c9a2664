"""The loss of calibration documents as a function of a resident merge's coefficients.

A gradient of the coefficients is that of the model's parameters, turned tensor by tensor into inner
products with the task vectors. So it costs one forward and one backward pass, and no copy of
gradients or task vectors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelaw.data.tokenize import Window
from mergelaw.decide.learned import Array, Kind
from mergelaw.evaluation.cross_entropy import batches, nll, token_losses
from mergelaw.merging.engine import Merger

if TYPE_CHECKING:
    from torch import Tensor

BACKWARD = 3  # forward passes that a gradient costs
HELD_OUT = 3  # one of so many documents is held out, of three of similar length the second
FEWEST = 4  # documents of a domain


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
        """The same loss; batch by batch its gradient is added to the parameters'."""
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


class Calibration(ExitStack):
    """The objective of ``learned.learn``; leaving the context removes its hooks from the model.

    ``domains`` holds each domain's documents, one list of windows a document. ``passes`` counts
    forward passes over all documents, of which a gradient is three.
    """

    def __init__(
        self,
        model: Any,
        merger: Merger,
        experts: Sequence[str],
        domains: Mapping[str, Sequence[Sequence[Window]]],
        batch_tokens: int,
    ):
        super().__init__()
        self._model, self._merger, self._experts = model, merger, experts
        self.tensors, self.passes = list(merger.parameters), 0.0

        def length(document: Sequence[Window]) -> int:
            return sum(len(window.ids) for window in document)

        ordered = [sorted(domain, key=length) for domain in domains.values()]

        def documents(kept: Callable[[int], bool]) -> Documents:
            parts = [
                [window for n, document in enumerate(domain) if kept(n) for window in document]
                for domain in ordered
            ]
            return Documents(parts, batch_tokens, model.device)

        self._documents: dict[Kind, Documents] = {
            "fit": documents(lambda n: n % HELD_OUT != 1),
            "held": documents(lambda n: n % HELD_OUT == 1),
            "all": documents(lambda n: True),
        }
        self._losses: dict[tuple[Kind, bytes], float] = {}
        self._gradients: dict[tuple[Kind, bytes], tuple[float, Array]] = {}
        self._products: dict[str, Tensor] = {}
        model.requires_grad_(False)
        for name, parameter in merger.parameters.items():
            parameter.requires_grad_(True)
            self.callback(parameter.requires_grad_, False)
            hook: Any = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._take(name)
            )
            self.callback(hook.remove)

    def _take(self, name: str) -> Callable[[Any], None]:
        """Hook that turns a tensor's gradient into inner products and frees it."""

        def take(parameter: Any) -> None:
            products = self._merger.products(self._experts, name, parameter.grad)
            self._products[name] = self._products.get(name, 0.0) + products
            parameter.grad = None

        return take

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
