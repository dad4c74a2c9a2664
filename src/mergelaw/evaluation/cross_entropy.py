"""Cross-entropy of a resident model on tokenised documents, in nats per scored token.

Windows of similar length share a batch and are padded on the right. Under causal attention no
scored token sees the padding, so no mask is needed. Batches depend only on the evaluation set, so a
cell has the same bits whatever else is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelaw.data.tokenize import Window

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PADDING = 0.05  # largest share of padding among the tokens of a set
LOGITS = 1 << 26  # logits widened to fp32 at a time


@dataclass(frozen=True)
class Batch:
    """Padded windows and their scored tokens."""

    ids: "Tensor"  # token ids, (rows, longest)
    keep: list[int]  # time steps whose logits are needed, ascending
    scored: "np.ndarray"  # scored tokens: indices into the flattened (rows, len(keep)), ascending
    targets: "Tensor"  # scored tokens: their ids
    documents: "np.ndarray"  # scored tokens: their documents' indices


def cut(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Cut lengths (descending) into few batches: ranges [start, stop).

    A batch has at most ``batch_tokens`` tokens, padding included, or a single row. Padding is at
    most ``PADDING`` of the set's tokens.
    """

    def cuts(share: float) -> list[tuple[int, int]]:
        """Greedy batches with at most ``share`` padding each."""
        ranges, start, tokens = [], 0, 0
        for stop, length in enumerate(lengths):
            size = lengths[start] * (stop - start + 1)
            if stop > start and (size > batch_tokens or size - tokens - length > share * size):
                ranges.append((start, stop))
                start, tokens = stop, 0
            tokens += length
        return [*ranges, (start, len(lengths))]

    # Bisect: a few long documents may have more padding if many short ones have less.
    share, tokens = 0.0, sum(lengths)
    for step in range(1, 13):
        wider = share + 2.0**-step
        padded = sum(lengths[start] * (stop - start) for start, stop in cuts(wider))
        if padded - tokens <= PADDING * tokens:
            share = wider
    return cuts(share)


def batches(windows: Sequence[Window], batch_tokens: int, device: Any) -> list[Batch]:
    """Batches of windows on ``device``, longest first, at most ``batch_tokens`` tokens each."""
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ordered = sorted(windows, key=lambda w: (-len(w.ids), w.document, w.start))
    result = []
    for first, last in cut([len(w.ids) for w in ordered], batch_tokens):
        rows = ordered[first:last]
        ids = pad_sequence([torch.tensor(w.ids) for w in rows], batch_first=True)
        scored = [(n, t, w.document) for n, w in enumerate(rows) for t in range(w.start, w.stop)]
        row, time, document = np.array(scored).T
        keep, column = np.unique(time - 1, return_inverse=True)
        index, targets = row * len(keep) + column, ids[row, time]
        result.append(Batch(ids.to(device), keep.tolist(), index, targets.to(device), document))
    return result


def token_losses(model: Any, batch: Batch) -> Iterator[tuple["np.ndarray", "Tensor"]]:
    """Losses of a batch's scored tokens in nats, in parts: (documents' indices, fp32 losses)."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.keep).logits
    if logits.shape[1] != len(batch.keep):  # the model ignores logits_to_keep
        logits = logits[:, batch.keep]
    logits = logits.flatten(0, 1)
    rows = max(LOGITS // logits.shape[-1], 1)
    for start in range(0, len(batch.scored), rows):
        part = slice(start, start + rows)
        scored = batch.scored[part]
        contiguous = scored[-1] - scored[0] == len(scored) - 1  # a slice needs no copy
        chosen = logits[scored[0] : scored[-1] + 1] if contiguous else logits[scored]
        losses = cross_entropy(chosen.float(), batch.targets[part], reduction="none")
        yield batch.documents[part], losses


def nll(model: Any, batches: Sequence[Batch], documents: int) -> "np.ndarray":
    """Negative log-likelihood of each document's scored tokens, in nats: float64, (documents,)."""
    import numpy as np
    import torch

    total = np.zeros(documents)
    with torch.inference_mode():
        for batch in batches:
            for indices, losses in token_losses(model, batch):
                # Summed on the processor, in the documents' order; a GPU's order is arbitrary.
                np.add.at(total, indices, losses.double().cpu().numpy())
    return total
