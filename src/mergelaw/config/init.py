"""A first configuration of a study, from a base, its experts and files of documents."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mergelaw.data.inspection import Inspection, inspect
from mergelaw.data.recipe import Source
from mergelaw.data.sources import local_files
from mergelaw.errors import MergelawError
from mergelaw.merging.methods.learned import FEWEST
from mergelaw.models.checkpoint import (
    ADAPTER_CONFIG,
    is_adapter,
    read_config,
    vocabulary_size,
)
from mergelaw.models.inspect import inspect_base, inspect_expert, without_warnings
from mergelaw.models.size import size_of_architecture

TRAIN = {"train", "training"}
EVAL = {"eval", "evaluation", "test", "val", "valid", "validation", "dev"}
WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}  # YAML has values for them
ALIKE = 0.8  # least similarity of two words that mean the same domain
SHORTEST = 3  # letters of a word that may be the beginning of another, as law and lawyer
STEM = 5  # letters that two words may have in common, as medical and medicine
TOKENS = 256  # evaluation.max_tokens is this times a power of two


@without_warnings()
def draft(name: str, base: Path, experts: Sequence[Path], data: Sequence[Path]) -> str:
    """Text of a configuration for ready-made experts of one base.

    Names come from the paths. Raises MergelawError for models that do not fit, for records without
    documents, and for fewer than two experts.
    """
    inspect_base(base)
    models = named(dict.fromkeys(path for folder in experts for path in models_in(folder)))
    if len(models) < 2:
        raise MergelawError(f"--experts: {len(models)} models; give at least two to merge")
    vocabulary = _vocabulary(base, models.values())
    domains = domains_of(data)
    place = _plain(_clean(base.absolute().name))
    inspections = list(_looked_at(base, domains))
    longest = max(one.longest for one in inspections)
    fewest = min(len({each.document for each in one.documents}) for one in inspections)
    enough = fewest >= 4 * FEWEST  # a quarter of the documents, if they are few, is for calibration
    return "\n".join(
        [
            "# Written by `mergelaw init`. All keys: config/README.md.",
            f"name: {_plain(_clean(name))}",
            "",
            "# Documents that all merges are evaluated on. Where an expert was trained on the same",
            "# documents, its losses are too good: give others.",
            "domains:",
            *_domain_lines(domains),
            "",
            "bases:",
            f"  {place}: {{path: {json.dumps(str(base))}}}",
            "",
            "# A domain says what an expert is for. It was guessed from the names: correct it.",
            "experts:",
            *_expert_lines(place, models, domains),
            *vocabulary,
            "",
            "# Ways to merge. More of them, and their settings: config/README.md.",
            "methods:",
            "  average: {}",
            "  task_arithmetic: {lambda: 1.5}",
            "  ties: {density: 0.2}",
            *(["  learned: {}  # coefficients, from a few of the documents"] if enough else []),
            "",
            "# Subsets: all where there are few, otherwise three circles of neighbours.",
            "sampling: {circles: 3, exhaustive_up_to: 32}",
            *_evaluation_lines(base, longest),
            "",
        ]
    )


def models_in(folder: Path) -> list[Path]:
    """A folder that holds a model, or the models in a folder. Raises MergelawError for none."""
    folders = [
        path
        for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ()))
        if (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()
    ]
    if not folders:
        raise MergelawError(f"{folder}: holds no checkpoint and no adapter; give its folder")
    return folders[:1] if folders[0] == folder else folders


def named(paths: Iterable[Path]) -> dict[str, Path]:
    """Paths by names, which are the words of the paths that not all of them have."""
    paths = list(paths)
    words = {path: _words(path) for path in paths}
    shared = set.intersection(*map(set, words.values())) if len(paths) > 1 else set()
    short = {path: [w for w in words[path] if w not in shared] or words[path] for path in paths}
    names: dict[str, Path] = {}
    for path in paths:
        name = _clean("_".join(short[path]))
        if name in names:  # the same words: the folders above tell them apart
            name = _clean(f"{path.absolute().parent.name}_{name}")
        if name in names:
            raise MergelawError(f"{path}: has the name of {names[name]}; rename one of them")
        names[name] = path
    return names


def _words(path: Path) -> list[str]:
    stem = path.absolute().name
    if path.is_file():
        stem = stem.split(".")[0] or stem
    return [word for word in re.split(r"[^A-Za-z0-9]+", stem) if word] or ["model"]


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:64] or "model"


def _plain(name: str) -> str:
    """A name in YAML, in quotes where it would be read as something else."""
    plain = name[0].isalpha() and name.lower() not in WORDS
    return name if plain else json.dumps(name)


def domains_of(data: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Files or folders by domain and by key (`source`, `eval_source`).

    A single folder holds a file or a folder for each domain. ``law_train`` and ``law_test`` are one
    domain. Raises MergelawError for a folder without files of a known kind.
    """
    paths = list(dict.fromkeys(data))
    if len(paths) == 1 and (root := paths[0]).is_dir():
        files = local_files(Source(files=[str(root)]))
        paths = sorted({root / file.relative_to(root).parts[0] for file in files})
    domains: dict[str, dict[str, Path]] = {}
    for name, path in named(paths).items():
        words = name.split("_")
        rest = "_".join(word for word in words if word.lower() not in TRAIN | EVAL) or name
        key = "eval_source" if EVAL & {word.lower() for word in words} else "source"
        if key in domains.setdefault(rest, {}):
            raise MergelawError(f"{path}: has the name of {domains[rest][key]}; rename one")
        domains[rest][key] = path
    return {
        name: files if "source" in files else {"source": files["eval_source"]}
        for name, files in domains.items()
    }


def _looked_at(base: Path, domains: Mapping[str, Mapping[str, Path]]) -> Iterator[Inspection]:
    """Documents and tokens of each file, one after the other."""
    from mergelaw.models.causal_lm import load_tokenizer

    tokenizer, rows = load_tokenizer(base), vocabulary_size(read_config(base))
    for files in domains.values():
        for path in files.values():
            yield inspect(Source(files=[str(path)]), tokenizer, rows, None)


def domain_of(expert: str, domains: Iterable[str]) -> str | None:
    """The only domain whose name shares a word with an expert's; None if several do or none."""

    def alike(left: str, right: str) -> bool:
        short, long = sorted((left.lower(), right.lower()), key=len)
        start = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
        same = start == len(short) >= SHORTEST or (start >= STEM and start >= 0.7 * len(short))
        return same or difflib.SequenceMatcher(None, short, long).ratio() >= ALIKE

    domains = list(domains)
    if expert in domains:
        return expert
    matches = [
        domain
        for domain in domains
        if any(alike(a, b) for a in expert.split("_") for b in domain.split("_"))
    ]
    return matches[0] if len(matches) == 1 else None


def _vocabulary(base: Path, experts: Iterable[Path]) -> list[str]:
    """Lines of the vocabulary's setting, where an expert's size differs from its base's."""
    lines: list[str] = []
    for expert in experts:
        try:
            inspect_expert(expert, base)
        except MergelawError:
            inspect_expert(expert, base, "common_rows")
            lines = [
                "",
                "# Some experts have another number of tokens: the rows that all have are merged.",
                "vocabulary: common_rows",
            ]
    return lines


def _domain_lines(domains: Mapping[str, Mapping[str, Path]]) -> Iterator[str]:
    for name, files in domains.items():
        parts = [f"{key}: {{files: [{json.dumps(str(path))}]}}" for key, path in files.items()]
        yield f"  {_plain(name)}: {{{', '.join(parts)}}}"


def _expert_lines(base: str, models: Mapping[str, Path], domains: Iterable[str]) -> Iterator[str]:
    for name, path in models.items():
        domain = domain_of(name, domains)
        place = f"checkpoints: {{{base}: {{path: {json.dumps(str(path))}}}}}"
        kind = "adapter" if is_adapter(path) else "whole model"
        if domain is None:
            yield f"  {_plain(name)}: {{{place}}}  # {kind}; no domain of its name"
        else:
            yield f"  {_plain(name)}: {{{place}, domains: [{_plain(domain)}]}}  # {kind}"


def _evaluation_lines(base: Path, longest: int) -> Iterator[str]:
    """Lines of the evaluation: room for the longest document, as far as the model has positions."""
    config = read_config(base)
    config |= config.get("text_config") or {}
    positions = config.get("max_position_embeddings") or config.get("n_positions") or longest
    room = TOKENS
    while room < longest:
        room *= 2
    yield ""
    yield f"# The longest document has {longest:,} tokens."
    settings = [f"max_tokens: {min(room, positions)}"]
    if longest > positions:
        yield f"# The model has {positions:,} positions, so longer documents are cut there."
        settings.append("long_documents: truncate")
    size = size_of_architecture(config)
    if size and size.total > 1e9 and config.get("torch_dtype", config.get("dtype")) == "bfloat16":
        yield "# In bfloat16 as stored; float32 is exact, and takes a GPU about 8 times as long."
        settings.append("dtype: bfloat16")
    yield f"evaluation: {{{', '.join(settings)}}}"
