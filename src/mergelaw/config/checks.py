"""Checks across the sections of a configuration."""

from collections.abc import Collection, Iterable, Iterator
from math import comb

from pydantic import ValidationError

from mergelaw.config.messages import describe
from mergelaw.config.study import Config
from mergelaw.errors import nearest
from mergelaw.evaluation.design import MAX_EXHAUSTIVE, exhaustive_levels
from mergelaw.evaluation.recipe import BASELINES
from mergelaw.merging.methods.learned import FEWEST, Learned


def problems(config: Config) -> Iterator[str]:
    """Contradictions between sections, one line each.

    Each check relies on the previous ones, so use only the first problem.
    """
    if config.include:
        yield "include: only a file of its own can include another; give the merged settings"
    if BASELINES in config.methods:
        yield f"methods.{BASELINES}: the name is reserved (see 'baselines'); choose another"
    if not config.pool():
        yield "domains: every domain is held out, so there is no expert; give 'experts'"
    for name in config.models:
        yield from _expert_problems(config, name)
    for name, base in config.bases.items():
        if base.pretraining is not None:
            yield from _pretraining_problems(config, name, base.pretraining.model_fields_set)
    for name, domain in config.domains.items():
        endless = domain.source.synthetic is not None
        if endless and config.splits_of(name).train_documents is None:
            yield f"domains.{name}.train_documents: a synthetic source has no end; give a number"
    for name in config.bases:
        yield from _sampling_problems(config, name)
    if not config.designed:
        yield (
            "methods: laws need a method that merges more than the whole pool; add `average: {}`, "
            "or set `subsets: design`"
        )
    for name, method in config.methods.items():
        if isinstance(method, Learned):
            yield from _calibration_problems(config, name)
    for name in config.merges:
        yield from _merge_problems(config, name)


def _expert_problems(config: Config, name: str) -> Iterator[str]:
    expert, where = config.models[name], f"experts.{name}"
    if name in config.baselines:
        where = f"baselines.{name}"
        if name in config.pool():
            yield f"{where}: the pool has an expert of this name; choose another"
    if expert.checkpoints is not None:
        if expert.training.model_fields_set:
            yield f"{where}: ready-made checkpoints take no 'training'; remove it"
        yield from _unknown(f"{where}.checkpoints", "base", expert.checkpoints, config.bases)
        yield from _unknown(f"{where}.domains", "domain", expert.domains or (), config.domains)
        return
    yield from _domain_problems(config, f"{where}.domains", config.expert_domains(name))
    for base, settings in config.bases.items():
        try:
            config.training_of(base, name)
        except ValidationError as error:
            problem = describe(error, "training")
            differs = settings.training.model_fields_set | expert.training.model_fields_set
            yield f"{problem} (for {where} on base {base!r})" if differs else problem


def _domain_problems(config: Config, where: str, names: Iterable[str]) -> Iterator[str]:
    """Problems of the domains that a model is trained on."""
    yield from _unknown(where, "domain", names, config.domains)
    for name in names:
        if config.domains[name].held_out:
            yield f"{where}: domain {name!r} is held out; train on others, or unset 'held_out'"
        elif config.splits_of(name).train_documents == 0:
            yield f"{where}: domain {name!r} has train_documents: 0; give it some"


def _pretraining_problems(config: Config, base: str, settings: set[str]) -> Iterator[str]:
    specific = f"bases.{base}.pretraining"
    shared = specific if config.pretraining is None else "pretraining"
    try:
        recipe = config.pretraining_of(base)
    except ValidationError as error:
        yield f"{describe(error, shared)} (for base {base!r})"
        return
    where = specific if "domains" in settings else shared
    yield from _domain_problems(config, f"{where}.domains", recipe.domains)
    where = specific if "architecture" in settings else shared
    if not isinstance(recipe.architecture.get("model_type"), str):
        yield f"{where}.architecture: needs a 'model_type' (llama, qwen2, ...)"


def _sampling_problems(config: Config, base: str) -> Iterator[str]:
    pool, sampling = len(config.pool(base)), config.sampling_of(base)
    differs = config.bases[base].sampling.model_fields_set
    where = f"bases.{base}.sampling" if differs else "sampling"
    if not pool:
        yield f"bases.{base}: no expert has a checkpoint for it; give one, or remove the base"
    sizes = sampling.k or range(1, pool + 1)
    if max(sizes) > pool:
        yield (
            f"{where}.k: {max(sizes)} is larger than the pool of {pool} experts of base {base!r}; "
            "remove it"
        )
    exhaustive = exhaustive_levels(sampling.design, sizes, pool, sampling.exhaustive_up_to)
    merges = sum(comb(pool, k) for k in exhaustive)
    merges += (len(sizes) - len(exhaustive)) * pool * sampling.circles
    if merges > MAX_EXHAUSTIVE:
        yield (
            f"{where}: over {MAX_EXHAUSTIVE:,} merges for each base; name fewer numbers in 'k', or "
            "sample fewer subsets ('design', 'circles', 'exhaustive_up_to')"
        )


def _calibration_problems(config: Config, method: str) -> Iterator[str]:
    """Problems of the documents that a method learns coefficients from."""
    counts = {name: config.splits_of(name).calibration_documents for name in config.domains}
    if not any(counts.values()):
        yield (
            f"methods.{method}: no domain has calibration documents to learn from; set "
            "corpus.calibration_documents"
        )
    for name, count in counts.items():
        if 0 < count < FEWEST:
            yield (
                f"methods.{method}: domain {name!r} has calibration_documents: {count}, of which a "
                f"third is held out; give at least {FEWEST}, or 0 to leave it out"
            )


def _merge_problems(config: Config, name: str) -> Iterator[str]:
    merge, where = config.merges[name], f"merges.{name}"
    yield from _unknown(f"{where}.base", "base", [merge.base], config.bases)
    yield from _unknown(f"{where}.method", "method", [merge.method], config.methods)
    yield from _unknown(f"{where}.experts", "expert", merge.experts, config.pool(merge.base))
    if merge.weights is not None and isinstance(config.methods.get(merge.method), Learned):
        yield f"{where}.weights: method {merge.method!r} learns them; remove the weights"
    if merge.weights is not None and len(merge.weights) != len(merge.experts):
        yield f"{where}.weights: {len(merge.weights)} for {len(merge.experts)} experts; give all"
    if merge.seed is not None and merge.seed not in config.training_seeds:
        yield f"{where}.seed: {merge.seed} is not among 'training_seeds'; use one of them"


def _unknown(where: str, what: str, names: Iterable[str], valid: Collection[str]) -> Iterator[str]:
    """Names that the configuration does not define."""
    for name in names:
        if name not in valid:
            yield f"{where}: no {what} {name!r}{nearest(name, valid)}"
