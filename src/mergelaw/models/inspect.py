"""Checks of local checkpoints from their headers, before anything is trained or merged."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import Tensors, is_adapter, mergeable, vocabulary_size
from mergelaw.models.compare import check_trust, compare, sampled_kinship
from mergelaw.models.lora import inspect_adapter
from mergelaw.models.parameters import (
    build,
    names_by_parameter,
    open_arranged,
    parameters_of,
    values_of,
)
from mergelaw.models.tokenizers import added_of, read_tokenizer, tokens_of


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the warnings of libraries: what matters of them is checked, and said in one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def inspect_base(folder: Path) -> list[str]:
    """Check a base from headers: weights, architecture, tokenizer. Returns notes for users.

    Raises MergelawError for an adapter, for weights that are missing, quantised, pickled or of
    another shape than config.json says, for an architecture that cannot be merged, and without a
    tokenizer.
    """
    folder = Path(folder)
    if is_adapter(folder):
        raise MergelawError(
            f"{folder}: is an adapter; a base is a whole model, so give the one that the adapter "
            "was trained on, or merge it with peft's merge_and_unload"
        )
    with Tensors(folder) as tensors:
        model = build(folder)
        loaded = parameters_of(model, tensors)
        names_by_parameter(tensors, values_of(model), loaded)
        ignored = sorted(set(mergeable(tensors)) - loaded.keys())
    notes = []
    if ignored:
        notes.append(
            f"{folder}: transformers ignores {len(ignored)} of its tensors ({ignored[0]!r}, ...), "
            "so they do not affect a loss"
        )
    return notes + inspect_tokenizer(folder, vocabulary_size(tensors.config) or 0)


def inspect_tokenizer(folder: Path, rows: int) -> list[str]:
    """Check that a base has a tokenizer; returns a note if it has ids beyond the embedding."""
    content = read_tokenizer(folder)
    if content is None:
        raise MergelawError(
            f"{folder}: has no tokenizer; copy the tokenizer's files into the checkpoint"
        )
    beyond = {n: t for n, t in (tokens_of(content) | added_of(content)).items() if n >= rows > 0}
    if not beyond:
        return []
    shown = ", ".join(f"{number} {token!r}" for number, token in sorted(beyond.items())[:3])
    return [
        f"{folder}: its tokenizer has ids beyond the {rows} rows of its embedding ({shown}); "
        "documents that use them are refused"
    ]


def inspect_expert(
    folder: Path, base: Path, vocabulary: str = "refuse", trust: Sequence[str] = ()
) -> list[str]:
    """Check that an expert, a checkpoint or an adapter, fits its base. Returns notes for users.

    It reads headers, and few values: to match names, and to say if the two are unrelated. Raises
    MergelawError.
    """
    folder, base = Path(folder), Path(base)
    if is_adapter(folder):
        check_trust(trust, {}, folder)
        return inspect_adapter(build(base), base, folder, vocabulary)
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(open_arranged(side)) for side in (base, folder))
        names, notes = compare(ours, theirs, vocabulary, trust)
        return notes + sampled_kinship(ours, theirs, names, trust)


def same_checkpoints(identities: Mapping[str, Any]) -> list[str]:
    """Notes on checkpoints that occur under several names; ``identities`` as in their recipes."""
    seen: dict[str, str] = {}
    notes = []
    for name, identity in identities.items():
        files = identity.get("files", {})
        weights = {f: d for f, d in files.items() if f.endswith(".safetensors")}
        key = repr(sorted((weights or identity).items()))
        if key in seen:
            notes.append(f"experts {seen[key]} and {name}: are the same checkpoint; remove one")
        seen.setdefault(key, name)
    return notes
