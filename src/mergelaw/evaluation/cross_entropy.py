"""Cross-entropy of a resident model on tokenised documents, in nats per scored token.

Windows of similar length share a batch, padded on the right: under causal attention nothing that is
scored sees the padding, so no mask is needed and every causal architecture gives what it gives one
document at a time. Batches are cut so that padding is under 5% of the tokens, and depend on nothing
but the set itself: the same cell has the same bits whatever else is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergelaw.data.tokenize import Window

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PADDING = 0.05
# Logits widened to fp32 at a time.
LOGITS = 1 << 26


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, longest), the scored positions and whose they are."""

    ids: "Tensor"
    keep: list[int]  # time steps whose logits are needed, ascending; of no device
    at: "np.ndarray"  # of each scored token its place in the flattened (rows, len(keep)), ascending
    targets: "Tensor"
    documents: "np.ndarray"


def cut(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Cut lengths (descending) into few batches: ranges [start, stop).

    A batch has at most ``batch_tokens`` tokens (or one row), padding included, and all together
    have at most 5% padding.
    """

    def cuts(share: float) -> tuple[list[tuple[int, int]], int]:
        """Greedy: a batch grows while padding is at most ``share`` of it."""
        made, start, tokens, padding = [], 0, 0, 0
        for stop, length in enumerate(lengths):
            size = lengths[start] * (stop - start + 1)
            waste = size - tokens - length
            if stop > start and (size > batch_tokens or waste > share * size):
                made.append((start, stop))
                padding += lengths[start] * (stop - start) - tokens
                start, tokens = stop, 0
            tokens += length
        padding += lengths[start] * (len(lengths) - start) - tokens
        return [*made, (start, len(lengths))], padding

    # Few long documents may be padded more where many short ones are padded less.
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        if cuts(share)[1] <= PADDING * sum(lengths):
            low = share
        else:
            high = share
    return cuts(low)[0]


def batches(windows: Sequence[Window], batch_tokens: int, device: Any) -> list[Batch]:
    """The windows as batches on ``device``, longest first."""
    import numpy as np
    import torch

    ordered = sorted(windows, key=lambda w: (-len(w.ids), w.document, w.start))
    made = []
    for start, stop in cut([len(w.ids) for w in ordered], batch_tokens):
        rows = ordered[start:stop]
        ids = torch.zeros(len(rows), len(rows[0].ids), dtype=torch.long)
        keep = sorted({t - 1 for w in rows for t in range(w.start, w.stop)})
        place = {t: i for i, t in enumerate(keep)}
        at, targets, documents = [], [], []
        for row, window in enumerate(rows):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            for t in range(window.start, window.stop):
                at.append(row * len(keep) + place[t - 1])
                targets.append(window.ids[t])
                documents.append(window.document)
        made.append(
            Batch(
                ids.to(device),
                keep,
                np.array(at),
                torch.tensor(targets).to(device),
                np.array(documents),
            )
        )
    return made


def nll(model: Any, made: Sequence[Batch], documents: int) -> "np.ndarray":
    """Negative log-likelihood in nats of each document's scored tokens: float64, (documents,)."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    total = np.zeros(documents)
    with torch.inference_mode():
        for batch in made:
            logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.keep).logits
            if logits.shape[1] != len(batch.keep):  # a model that knows nothing of logits_to_keep
                logits = logits[:, batch.keep]
            logits = logits.flatten(0, 1)
            rows = max(LOGITS // logits.shape[-1], 1)
            for start in range(0, len(batch.at), rows):
                part = slice(start, start + rows)
                at = batch.at[part]
                one_piece = at[-1] - at[0] == len(at) - 1  # which needs no copy
                scored = logits[at[0] : at[-1] + 1] if one_piece else logits[at]
                losses = cross_entropy(scored.float(), batch.targets[part], reduction="none")
                # In the documents' order: a GPU would add them in any.
                np.add.at(total, batch.documents[part], losses.double().cpu().numpy())
    return total
