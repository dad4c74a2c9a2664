"""Cross-entropy of a resident model on tokenised documents, in nats per scored token.

Windows of similar length share a batch and are padded on the right. Under causal attention no
scored token sees the padding, so no mask is needed, and every causal architecture gives what it
gives one document at a time. Padding stays under 5% of the tokens. Batches depend on nothing but
the evaluation set, so a cell has the same bits whatever else is measured.
"""

from collections.abc import Sequence
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

    A batch has at most ``batch_tokens`` tokens, padding included, or is a single row. Padding is at
    most ``PADDING`` of the set's tokens.
    """

    def cuts(share: float) -> tuple[list[tuple[int, int]], int]:
        """Greedy batches with at most ``share`` padding each, and the padding of all of them."""
        ranges, start, tokens, padding = [], 0, 0, 0
        for stop, length in enumerate(lengths):
            size = lengths[start] * (stop - start + 1)
            waste = size - tokens - length
            if stop > start and (size > batch_tokens or waste > share * size):
                ranges.append((start, stop))
                padding += lengths[start] * (stop - start) - tokens
                start, tokens = stop, 0
            tokens += length
        padding += lengths[start] * (len(lengths) - start) - tokens
        return [*ranges, (start, len(lengths))], padding

    # Bisect: few long documents may be padded more where many short ones are padded less.
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        if cuts(share)[1] <= PADDING * sum(lengths):
            low = share
        else:
            high = share
    return cuts(low)[0]


def batches(windows: Sequence[Window], batch_tokens: int, device: Any) -> list[Batch]:
    """Batches of windows on ``device``, longest first, at most ``batch_tokens`` tokens each."""
    ordered = sorted(windows, key=lambda w: (-len(w.ids), w.document, w.start))
    ranges = cut([len(w.ids) for w in ordered], batch_tokens)
    return [_batch(ordered[start:stop], device) for start, stop in ranges]


def _batch(rows: Sequence[Window], device: Any) -> Batch:
    import numpy as np
    import torch

    ids = torch.zeros(len(rows), len(rows[0].ids), dtype=torch.long)
    keep = sorted({t - 1 for w in rows for t in range(w.start, w.stop)})
    column = {step: index for index, step in enumerate(keep)}
    scored, targets, documents = [], [], []
    for row, window in enumerate(rows):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        for t in range(window.start, window.stop):
            scored.append(row * len(keep) + column[t - 1])
            targets.append(window.ids[t])
            documents.append(window.document)
    return Batch(
        ids.to(device),
        keep,
        np.array(scored),
        torch.tensor(targets).to(device),
        np.array(documents),
    )


def nll(model: Any, batches: Sequence[Batch], documents: int) -> "np.ndarray":
    """Negative log-likelihood of each document's scored tokens, in nats: float64, (documents,)."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    total = np.zeros(documents)
    with torch.inference_mode():
        for batch in batches:
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
                # Summed on the processor, in the documents' order; a GPU's order is arbitrary.
                np.add.at(total, batch.documents[part], losses.double().cpu().numpy())
    return total
