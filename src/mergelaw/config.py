"""The configuration: what a study measures, checked before anything starts.

The JSON schema (workflow/schemas) and the tables of config/README.md are generated from these
models, so every field carries its description. Hardware does not belong here but in a profile.
"""

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from mergelaw.errors import MergelawError
from mergelaw.methods import registry

# Names become parts of paths, so that a results folder can be read.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Model(BaseModel):
    """Unknown keys are refused everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Model):
    """Where a domain's documents come from: exactly one of `synthetic`, `files`, `dataset`."""

    synthetic: str | None = Field(None, description="a generator of mergelaw's own, by name")
    files: list[str] | None = Field(
        None, min_length=1, description="JSON, JSONL or Parquet files of documents"
    )
    dataset: str | None = Field(
        None, description="a dataset of the Hugging Face hub, or a folder, for `datasets`"
    )
    revision: str | None = Field(None, description="commit of the hub dataset")
    config: str | None = Field(None, description="configuration name of the dataset")
    split: str = Field("train", description="split of the dataset")
    where: dict[str, str | int | bool] | None = Field(
        None, description="keep only records whose columns have these values"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(v is not None for v in (self.synthetic, self.files, self.dataset)) != 1:
            raise ValueError("give exactly one of 'synthetic', 'files' and 'dataset'")
        if self.synthetic is not None:
            from mergelaw.synthetic import DOMAINS

            if self.synthetic not in DOMAINS:
                raise ValueError(
                    f"no generator {self.synthetic!r}{nearest(self.synthetic, DOMAINS)}"
                )
        return self


class Domain(Model):
    """A domain: documents to train its expert on, and to evaluate every merge on."""

    source: Source = Field(description="where the documents come from")
    eval_source: Source | None = Field(
        None, description="where the evaluation documents come from, if not from `source`"
    )
    train_documents: int | None = Field(
        None, ge=0, description="training documents; null: the study's setting"
    )
    eval_documents: int | None = Field(
        None, ge=1, description="evaluation documents; null: the study's setting"
    )
    held_out: bool = Field(False, description="evaluated only: no expert is trained on it")


class Corpus(Model):
    """What all domains share, unless a domain says otherwise."""

    train_documents: int | None = Field(
        None, ge=0, description="training documents per domain; null: all that are left"
    )
    eval_documents: int = Field(200, ge=1, description="evaluation documents per domain")


class Checkpoint(Model):
    """A model as the world has it: exactly one of `path` and `hub`."""

    path: str | None = Field(None, description="a local Hugging Face folder")
    hub: str | None = Field(None, description="a model id of the Hugging Face hub")
    revision: str | None = Field(None, description="its commit; required with `hub`")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of 'path' and 'hub'")
        if self.hub is not None and self.revision is None:
            raise ValueError("a hub model needs its 'revision' (a commit), or it cannot be traced")
        return self


class Optimisation(Model):
    """What pre-training and fine-tuning share."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; or give `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over the training documents")
    batch_size: int = Field(16, ge=1, description="sequences per optimiser step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass and device; null: the whole batch"
    )
    max_tokens: int = Field(2048, ge=8, description="longest sequence, in tokens")
    learning_rate: float = Field(gt=0, lt=1, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps that warm up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision; saved in the base's own dtype"
    )

    @model_validator(mode="after")
    def _duration(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("'batch_size' must be a multiple of 'micro_batch_size'")
        return self


class Pretraining(Optimisation):
    """A recipe for a base of one's own: tokenizer, architecture and training."""

    architecture: dict[str, Any] = Field(
        description="a transformers configuration: `model_type` and its fields"
    )
    vocab_size: int = Field(512, ge=260, description="size of the byte-level BPE tokenizer")
    domains: list[Name] = Field(
        min_length=1,
        description="domains of the mixture; named, so that a new domain trains no base again",
    )
    chat_share: float = Field(
        0.02, ge=0, le=1, description="share of the documents in chat format, the rest plain"
    )
    seed: int = Field(0, ge=0, description="seed of weights and data order")


class Training(Optimisation):
    """How experts are fine-tuned; the loss is on the response alone."""

    trainer: Literal["trl"] = Field("trl", description="trl: TRL's SFTTrainer")
    packing: bool = Field(
        False, description="several documents in one sequence, without attention across them"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations, save memory")
    long_documents: Literal["refuse", "split", "truncate"] = Field(
        "refuse", description="what to do with a training document above `max_tokens`"
    )


class Base(Model):
    """A base model: `path`, `hub` or `pretraining`, the last over the study's own."""

    path: str | None = Field(None, description="a local Hugging Face folder")
    hub: str | None = Field(None, description="a model id of the Hugging Face hub")
    revision: str | None = Field(None, description="its commit; required with `hub`")
    pretraining: dict[str, Any] | None = Field(
        None, description="what differs from the study's `pretraining`"
    )
    training: dict[str, Any] = Field(
        {}, description="what differs from the study's `training` for this base's experts"
    )
    N: float | None = Field(
        None, gt=0, description="nominal size in billions, shown beside the counted one"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(v is not None for v in (self.path, self.hub, self.pretraining)) != 1:
            raise ValueError("give exactly one of 'path', 'hub' and 'pretraining'")
        if self.hub is not None and self.revision is None:
            raise ValueError("a hub model needs its 'revision' (a commit), or it cannot be traced")
        return self


class Expert(Model):
    """An expert: trained here on its domains, or ready-made checkpoints by base."""

    domains: list[Name] | None = Field(
        None, min_length=1, description="domains it is trained on; null: the one of its name"
    )
    training: dict[str, Any] = Field(
        {}, description="what differs from the study's `training` for this expert"
    )
    checkpoints: dict[Name, Checkpoint] | None = Field(
        None, description="ready-made: one checkpoint for each base, by the base's name"
    )


class Sampling(Model):
    """Which subsets of the pool are merged."""

    design: Literal["exhaustive", "ring", "difference", "iid"] = Field(
        "ring", description="where the subsets are too many to take all"
    )
    k: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="numbers of experts to merge; null: 1 to M"
    )
    circles: int = Field(
        3, ge=1, description="independent circles; three or more give standard errors"
    )
    exhaustive_up_to: int = Field(
        128, ge=1, description="take all C(M,k) subsets where there are no more than this"
    )
    subsets_per_k: int = Field(9, ge=1, description="iid only: subsets drawn for each k")
    merges_per_shard: int = Field(128, ge=1, description="merges that one job evaluates")
    seed: int = Field(0, ge=0, description="seed of circles and draws")


class Evaluation(Model):
    """How the cross-entropy of a merge is measured."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and arithmetic; sums are in float64"
    )
    max_tokens: int = Field(2048, ge=8, description="longest document, in tokens")
    long_documents: Literal["refuse", "split", "truncate"] = Field(
        "refuse", description="what to do with an evaluation document above `max_tokens`"
    )
    batch_tokens: int = Field(
        8192, ge=8, description="tokens in one forward pass, padding included"
    )


class Merge(Model):
    """A merge to be written out as a checkpoint."""

    base: Name = Field(description="the base")
    method: Name = Field(description="one of `methods`, by name")
    experts: list[Name] = Field(min_length=1, description="the experts")
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="one for each expert; null: equal"
    )
    seed: int | None = Field(None, ge=0, description="training seed; null: the first")


# The union over the methods' own models, told apart by their `method`.
AnyMethod = Annotated[Union[*registry().values()], Field(discriminator="method")]


class Config(Model):
    """One study."""

    name: Name = Field(description="name of the study; the model family of its bases")
    results: str = Field("results", min_length=1, description="folder of everything it makes")
    seed: int = Field(0, ge=0, description="seed of generators and of train/eval splits")
    corpus: Corpus = Field(Corpus(), description="what all domains share")
    domains: dict[Name, Domain] = Field(min_length=1, description="evaluation domains by name")
    pretraining: dict[str, Any] | None = Field(
        None, description="the recipe that bases with `pretraining` share"
    )
    bases: dict[Name, Base] = Field(min_length=1, description="the ladder of base models by name")
    training: dict[str, Any] = Field(
        {}, description="how experts are trained; see the fields of `training`"
    )
    training_seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="every expert is trained, and the plan measured, with each"
    )
    experts: dict[Name, Expert] | None = Field(
        None, description="the pool by name; null: one for each domain that is not held out"
    )
    baselines: dict[Name, Expert] = Field(
        {}, description="models outside the pool, evaluated alone: a multitask model, say"
    )
    methods: dict[Name, AnyMethod] = Field(min_length=1, description="merge methods by name")
    sampling: Sampling = Field(Sampling(), description="which subsets are merged")
    evaluation: Evaluation = Field(Evaluation(), description="how a merge is evaluated")
    merges: dict[Name, Merge] = Field({}, description="merges to write out as checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _fill_names(cls, data: Any) -> Any:
        """`average: {}` means the method of that name; no `experts` means one per domain."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        methods = data.get("methods")
        if isinstance(methods, dict):
            data["methods"] = {
                name: {"method": name, **(method or {})}
                if isinstance(method, dict | None)
                else method
                for name, method in methods.items()
            }
        return data

    # -- what is left open above, resolved ---------------------------------------------------

    def pool(self) -> dict[str, Expert]:
        """The experts in canonical order: the configuration's."""
        if self.experts is not None:
            return self.experts
        return {name: Expert() for name, domain in self.domains.items() if not domain.held_out}

    def expert_domains(self, name: str) -> list[str]:
        """The domains that a trained expert or baseline sees."""
        expert = {**self.baselines, **self.pool()}[name]
        if expert.domains is not None:
            return expert.domains
        if name in self.baselines:
            return [name for name, domain in self.domains.items() if not domain.held_out]
        return [name]

    def training_of(self, base: str, expert: str) -> Training:
        """The training recipe: the study's, then the base's, then the expert's own settings."""
        own = {**self.baselines, **self.pool()}[expert].training
        return Training.model_validate({**self.training, **self.bases[base].training, **own})

    def pretraining_of(self, base: str) -> Pretraining:
        own = self.bases[base].pretraining or {}
        shared = self.pretraining or {}
        architecture = {**shared.get("architecture", {}), **own.get("architecture", {})}
        return Pretraining.model_validate({**shared, **own, "architecture": architecture})

    @model_validator(mode="after")
    def _cross_references(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        domains, bases, pool = self.domains, self.bases, self.pool()
        if not pool:
            yield "no expert: every domain is held out and no 'experts' are given"
        for name in pool:
            if name in self.baselines:
                yield f"baselines.{name}: the pool has an expert of this name"
        for where, name, expert in [
            *(("experts", name, expert) for name, expert in pool.items()),
            *(("baselines", name, expert) for name, expert in self.baselines.items()),
        ]:
            at = f"{where}.{name}"
            if expert.checkpoints is not None:
                if expert.domains is not None or expert.training:
                    yield f"{at}: ready-made checkpoints take no 'domains' and no 'training'"
                for base in expert.checkpoints:
                    if base not in bases:
                        yield f"{at}.checkpoints: no base {base!r}{nearest(base, bases)}"
                for base in bases:
                    if base not in expert.checkpoints:
                        yield f"{at}.checkpoints: base {base!r} has no checkpoint"
                continue
            for domain in self.expert_domains(name):
                if domain not in domains:
                    yield f"{at}: no domain {domain!r}{nearest(domain, domains)}"
                elif domains[domain].held_out:
                    yield f"{at}: domain {domain!r} is held out, no expert may train on it"
            for base in bases:
                yield from prefixed(at, lambda b=base, e=name: self.training_of(b, e))
        for name, base in bases.items():
            if base.pretraining is None:
                continue
            at = f"bases.{name}.pretraining"
            yield from prefixed(at, lambda b=name: self.pretraining_of(b))
            recipe = self.pretraining_of(name)
            for domain in recipe.domains:
                if domain not in domains:
                    yield f"{at}.domains: no domain {domain!r}{nearest(domain, domains)}"
                elif domains[domain].held_out:
                    yield f"{at}.domains: domain {domain!r} is held out"
            if "model_type" not in recipe.architecture:
                yield f"{at}.architecture: needs a 'model_type' (llama, qwen2, ...)"
        for k in self.sampling.k or []:
            if k > len(pool):
                yield f"sampling.k: {k} is larger than the pool of {len(pool)} experts"
        if self.sampling.k and len(set(self.sampling.k)) < len(self.sampling.k):
            yield "sampling.k: a number is given twice"
        if len(set(self.training_seeds)) < len(self.training_seeds):
            yield "training_seeds: a seed is given twice"
        if (
            self.sampling.design == "exhaustive"
            and sum(math.comb(len(pool), k) for k in self.sampling.k or range(1, len(pool) + 1))
            > 100_000
        ):
            yield "sampling.design: over 100,000 subsets; use 'ring' or 'difference'"
        for name, merge in self.merges.items():
            for what, value, known in [
                ("base", merge.base, bases),
                ("method", merge.method, self.methods),
                *(("expert", expert, pool) for expert in merge.experts),
            ]:
                if value not in known:
                    yield f"merges.{name}: no {what} {value!r}{nearest(value, known)}"
            if len(set(merge.experts)) < len(merge.experts):
                yield f"merges.{name}: an expert is given twice"
            if merge.weights is not None and len(merge.weights) != len(merge.experts):
                yield f"merges.{name}: {len(merge.weights)} weights, {len(merge.experts)} experts"
            if merge.seed is not None and merge.seed not in self.training_seeds:
                yield f"merges.{name}: seed {merge.seed} is not among 'training_seeds'"


def prefixed(at: str, resolve) -> Iterator[str]:
    """The problems of a recipe that is put together from several places."""
    try:
        resolve()
    except ValidationError as error:
        yield f"{at}: {describe(error)}"


def nearest(name: str, known) -> str:
    """'; did you mean X?', or what there is."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def describe(error: ValidationError) -> str:
    """A validation error as one line: where, what, and the nearest known key."""
    models = _models_by_title()
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part not in registry())
        message = re.sub(r"^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(models.get(error.title, Config), item["loc"][:-1])
            message = f"unknown key{nearest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] == "union_tag_invalid":
            tag = str(item["ctx"]["tag"])
            where = f"{where}.method"
            message = f"no merge method {tag!r}{nearest(tag, registry())}"
        elif item["type"] in ("string_pattern_mismatch",) and "[key]" in where:
            message = "a name is made of letters, digits, '.', '_' and '-'"
            where = where.replace(".[key]", "")
        elif item["type"] != "value_error":
            message = f"{message} (got {str(item['input'])[:40]!r})"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(dict.fromkeys(parts))


def _models_by_title() -> dict[str, type[BaseModel]]:
    return {model.__name__: model for model in (Config, Training, Pretraining)}


def _fields_at(model: type[BaseModel], loc: tuple) -> list[str]:
    """The keys known at a place of the configuration."""
    current: Any = model
    if len(loc) > 2 and loc[0] == "methods":
        current = registry()[loc[2]]
        loc = loc[3:]
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            fields = {f.alias or n: f.annotation for n, f in current.model_fields.items()}
            current = fields.get(part)
            continue
        models = [a for a in _flatten(current) if isinstance(a, type)]
        current = next((a for a in models if issubclass(a, BaseModel)), None)
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        models = [a for a in _flatten(current) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = models[0] if models else model
    return [f.alias or n for n, f in current.model_fields.items()]


def _flatten(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _flatten(argument)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent override."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                line = key_node.start_mark.line + 1
                raise MergelawError(f"line {line}: key {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path | str) -> Config:
    """The checked configuration of a YAML file. Raises MergelawError, one line."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise MergelawError(f"{path}: no such file; name a configuration, as in config/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MergelawError(f"{path}: cannot be read ({error})") from None
    except MergelawError as error:
        raise MergelawError(f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise MergelawError(f"{path}{where}: not YAML ({reason}); mend the file") from None
    return parse(data, str(path))


def parse(data: Any, where: str = "configuration") -> Config:
    """The checked configuration of plain data (from YAML, JSON or Snakemake)."""
    if not isinstance(data, dict):
        raise MergelawError(f"{where}: is not a mapping of keys to values; see config/README.md")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise MergelawError(f"{where}: {describe(error)}") from None
