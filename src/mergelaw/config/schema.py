"""The configuration: what a study measures, checked before anything starts.

The JSON schema (workflow/schemas) and the tables of config/README.md are generated from these
models, so every field carries its description. Hardware does not belong here but in a profile.
"""

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from mergelaw.artifacts.recipe import Model, Name
from mergelaw.data.recipe import Source
from mergelaw.errors import MergelawError, nearest
from mergelaw.evaluation.recipe import BASELINES, Evaluation, Sampling
from mergelaw.merging.methods import Method, registry
from mergelaw.models.recipe import Checkpoint, Optimisation, Pretraining, Training, check_revision

# A configuration is written by hand. What is beyond these is a mistake (a range mistyped, aliases
# that expand without end) and would keep every job's parser busy.
MAX_MERGES = 100_000
MAX_VALUES = 100_000
MAX_DEPTH = 32


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


class Base(Model):
    """A base model: `path`, `hub` or `pretraining`, the last over the study's own."""

    path: str | None = Field(None, description="a local Hugging Face folder")
    hub: str | None = Field(None, description="a model id of the Hugging Face hub")
    revision: str | None = Field(None, description="its commit, or a branch; required with `hub`")
    pretraining: dict[str, Any] | None = Field(
        None, description="what differs from the study's `pretraining`"
    )
    training: dict[str, Any] = Field(
        {}, description="what differs from the study's `training` for this base's experts"
    )
    sampling: dict[str, Any] = Field(
        {}, description="what differs from the study's `sampling` for this base's merges"
    )
    N: float | None = Field(
        None,
        gt=0,
        description="nominal size in billions, shown beside the counted one; of a hub model that "
        "is not at hand, what a cluster's jobs ask for follows from it",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(v is not None for v in (self.path, self.hub, self.pretraining)) != 1:
            raise ValueError("give exactly one of 'path', 'hub' and 'pretraining'")
        check_revision(self.hub, self.revision)
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
if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[Union[*registry().values()], Field(discriminator="method")]


class Config(Model):
    """One study."""

    name: Name = Field(description="name of the study; the model family of its bases")
    results: str = Field(
        "results", pattern=r"^[^{}<>*?\r\n]+$", description="folder of everything it makes"
    )
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
    vocabulary: Literal["refuse", "common_rows"] = Field(
        "refuse",
        description="an expert with another number of tokens: refused, or merged in the rows that "
        "it and its base have",
    )
    storage: Literal["materialised", "derived"] = Field(
        "materialised",
        description="task vectors: kept as files, or subtracted again whenever they are needed",
    )
    methods: dict[Name, AnyMethod] = Field(min_length=1, description="merge methods by name")
    sampling: Sampling = Field(Sampling(), description="which subsets are merged")
    evaluation: Evaluation = Field(Evaluation(), description="how a merge is evaluated")
    merges: dict[Name, Merge] = Field({}, description="merges to write out as checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _fill_names(cls, data: Any) -> Any:
        """`average:` means the method of that name; `algebra:` the expert with all defaults."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for key in ("experts", "baselines"):
            if isinstance(data.get(key), dict):
                data[key] = {n: {} if v is None else v for n, v in data[key].items()}
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
        return Training.model_validate(override(self.training, self.bases[base].training, own))

    def sampling_of(self, base: str) -> Sampling:
        """The sampling of a base's merges: the study's, then the base's own settings."""
        own = self.bases[base].sampling
        return Sampling.model_validate(self.sampling.model_dump() | own) if own else self.sampling

    def pretraining_of(self, base: str) -> Pretraining:
        """The recipe of a base of one's own: the study's, then the base's own settings."""
        own = self.bases[base].pretraining or {}
        shared = self.pretraining or {}
        architecture = {**shared.get("architecture", {}), **own.get("architecture", {})}
        recipe = override(shared, own)
        return Pretraining.model_validate(
            recipe | ({"architecture": architecture} if architecture else {})
        )

    # -- what no single field can know -------------------------------------------------------

    @model_validator(mode="after")
    def _cross_references(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """In an order in which each may rely on the ones before it."""
        if BASELINES in self.methods:
            yield f"methods.{BASELINES}: the name is reserved (see 'baselines'); choose another"
        if not self.pool():
            yield (
                "domains: every domain is held out, which leaves no expert; give 'experts'"
                if self.experts is None
                else "experts: is empty; name one, or leave the key out for one for each domain"
            )
        yield from self._recipe_problems()
        for where, experts in (("experts", self.pool()), ("baselines", self.baselines)):
            for name, expert in experts.items():
                yield from self._expert_problems(f"{where}.{name}", name, expert)
        yield from self._base_problems()
        yield from self._document_problems()
        yield from self._sampling_problems()
        for name, merge in self.merges.items():
            yield from self._merge_problems(f"merges.{name}", merge)

    def _recipe_problems(self) -> Iterator[str]:
        """A setting that is wrong by itself is reported where it stands, once."""
        yield from part_problems("training", self.training, Training)
        yield from part_problems("pretraining", self.pretraining or {}, Pretraining)
        for name, base in self.bases.items():
            yield from part_problems(f"bases.{name}.training", base.training, Training)
            yield from part_problems(f"bases.{name}.sampling", base.sampling, Sampling)
            own = base.pretraining or {}
            yield from part_problems(f"bases.{name}.pretraining", own, Pretraining)
        for where, experts in (("experts", self.pool()), ("baselines", self.baselines)):
            for name, expert in experts.items():
                yield from part_problems(f"{where}.{name}.training", expert.training, Training)

    def _expert_problems(self, at: str, name: str, expert: Expert) -> Iterator[str]:
        if name in self.baselines and name in self.pool():
            yield f"baselines.{name}: the pool has an expert of this name; choose another"
        if expert.checkpoints is not None:
            if expert.domains is not None or expert.training:
                yield f"{at}: ready-made checkpoints take no 'domains' and no 'training'"
            for base in expert.checkpoints:
                if base not in self.bases:
                    yield f"{at}.checkpoints: no base {base!r}{nearest(base, self.bases)}"
            for base in self.bases:
                if base not in expert.checkpoints:
                    yield f"{at}.checkpoints: base {base!r} has none; give one for each base"
            return
        if expert.domains is None and name not in self.baselines and name not in self.domains:
            yield (
                f"{at}: no domain {name!r}, and the expert's 'domains' are not given"
                f"{nearest(name, self.domains)}"
            )
        yield from self._training_domains(f"{at}.domains", self.expert_domains(name))
        for base, settings in self.bases.items():
            own = {**settings.training, **expert.training}
            for problem in problems_of(partial(self.training_of, base, name), "training"):
                yield f"{problem} (for {at} on base {base!r})" if own else problem

    def _training_domains(self, at: str, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            if name not in self.domains:
                yield f"{at}: no domain {name!r}{nearest(name, self.domains)}"
            elif self.domains[name].held_out:
                yield f"{at}: domain {name!r} is held out, nothing may train on it"
            elif self._train_documents(name) == 0:
                yield (
                    f"{at}: domain {name!r} has train_documents: 0; give it some, or set its "
                    "'held_out'"
                )
        yield from repeated(at, names)

    def _train_documents(self, domain: str) -> int | None:
        own = self.domains[domain].train_documents
        return self.corpus.train_documents if own is None else own

    def _base_problems(self) -> Iterator[str]:
        for name, base in self.bases.items():
            if base.pretraining is None:
                continue
            own = f"bases.{name}.pretraining"
            shared = "pretraining" if self.pretraining else own
            for problem in problems_of(partial(self.pretraining_of, name), shared):
                yield f"{problem} (for base {name!r})" if self.pretraining else problem
            recipe = self.pretraining_of(name)
            for key, found in (
                ("domains", self._training_domains("domains", recipe.domains)),
                ("architecture", architecture_problems(recipe.architecture)),
            ):
                at = own if key in base.pretraining else "pretraining"
                for problem in found:
                    yield f"{at}.{problem}"

    def _document_problems(self) -> Iterator[str]:
        for name, domain in self.domains.items():
            endless = domain.source.synthetic is not None and not domain.held_out
            if endless and self._train_documents(name) is None:
                yield (
                    f"domains.{name}.train_documents: a synthetic source has no end; give a "
                    "number here or in 'corpus'"
                )

    def _sampling_problems(self) -> Iterator[str]:
        yield from repeated("training_seeds", self.training_seeds)
        size = len(self.pool())
        for base, own in self.bases.items():
            sampling = self.sampling_of(base)
            at = f"bases.{base}.sampling" if own.sampling else "sampling"
            sizes = sampling.k or range(1, size + 1)
            for k in sizes:
                if k > size:
                    yield f"{at}.k: {k} is larger than the pool of {size} experts"
            yield from repeated(f"{at}.k", sizes)
            draws = sampling.subsets_per_k if sampling.design == "iid" else size
            replicates = 1 if sampling.design == "iid" else sampling.circles
            merges = 0
            for k in sizes:
                level = math.comb(size, k)
                if sampling.design != "exhaustive" and level > max(
                    sampling.exhaustive_up_to, draws
                ):
                    level = draws * replicates
                merges += level
                if merges > MAX_MERGES:
                    yield (
                        f"{at}: over {MAX_MERGES:,} merges for each base; name fewer numbers in "
                        "'k', or sample fewer subsets ('design', 'circles', 'subsets_per_k')"
                    )

    def _merge_problems(self, at: str, merge: Merge) -> Iterator[str]:
        named: list[tuple[str, str, Collection[str]]] = [
            ("base", merge.base, self.bases),
            ("method", merge.method, self.methods),
            *(("expert", expert, self.pool()) for expert in merge.experts),
        ]
        for what, value, known in named:
            if value not in known:
                key = "experts" if what == "expert" else what
                yield f"{at}.{key}: no {what} {value!r}{nearest(value, known)}"
        yield from repeated(f"{at}.experts", merge.experts)
        if merge.weights is not None and len(merge.weights) != len(merge.experts):
            yield f"{at}.weights: {len(merge.weights)} for {len(merge.experts)} experts"
        if merge.seed is not None and merge.seed not in self.training_seeds:
            yield f"{at}.seed: {merge.seed} is not among 'training_seeds'"


# -- recipes that are put together from several places -----------------------------------------


def override(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which the later ones win; `steps` and `epochs` stand for each other.

    The options in `openrlhf` are laid over one another one by one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if layer.get(key) is not None:
                merged.pop(other, None)
        options = [part["openrlhf"] for part in (merged, layer) if part.get("openrlhf")]
        merged.update(layer)
        if len(options) == 2 and all(isinstance(part, Mapping) for part in options):
            merged["openrlhf"] = {**options[0], **options[1]}
    return merged


def part_problems(at: str, part: Mapping[str, Any], model: type[BaseModel]) -> Iterator[str]:
    """What is wrong with a part of a recipe, whatever the other parts are."""
    try:
        model.model_validate(part)
    except ValidationError as error:
        items = [item for item in error.errors() if item["type"] != "missing" and item["loc"]]
        if items:
            yield describe(items, model, at)
    if part.get("steps") is not None and part.get("epochs") is not None:
        yield f"{at}: give exactly one of 'steps' and 'epochs'"


def problems_of(resolve: Callable[[], Optimisation], at: str) -> Iterator[str]:
    """What is wrong with a whole recipe whose parts are right."""
    try:
        resolve()
    except ValidationError as error:
        yield describe(error.errors(), Config, at)


def architecture_problems(architecture: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(architecture.get("model_type"), str):
        yield "architecture: needs a 'model_type' (llama, qwen2, ...)"


def repeated(at: str, values: Iterable[Hashable]) -> Iterator[str]:
    seen = set()
    for value in values:
        if value in seen:
            yield f"{at}: {value} is given twice; remove one"
        seen.add(value)


# -- errors in one line ------------------------------------------------------------------------

NAME_RULE = (
    "a name has up to 64 letters, digits, '.', '_' and '-', and begins with a letter or a digit"
)
PLAIN_WORDS = {
    "missing": "is required",
    "string_pattern_mismatch": NAME_RULE,
    "string_too_long": NAME_RULE,
    "string_type": "is not text; put it in quotes",
    "dict_type": "is not a mapping of keys to values",
    "model_type": "is not a mapping of keys to values",
    "model_attributes_type": "is not a mapping of keys to values",
    "list_type": "is not a list",
    "too_short": "is empty",
}
MAX_PROBLEMS = 5


def describe(items: Sequence[Any], model: type[BaseModel] = Config, at: str = "") -> str:
    """Validation errors of ``model``, found at ``at``, as one line: where, what, what to do."""
    parts = list(dict.fromkeys(_describe(item, model, at) for item in items))
    more = len(parts) - MAX_PROBLEMS
    return "; ".join(parts[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _describe(item: Any, model: type[BaseModel], at: str) -> str:
    kind, loc = item["type"], list(item["loc"])
    message = re.sub(r"^Value error, ", "", item["msg"])
    if kind == "extra_forbidden":
        message = f"unknown key{nearest(str(loc[-1]), _fields_at(model, loc[:-1]))}"
    elif kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        message = f"no merge method {tag!r}{nearest(tag, registry())}"
    elif kind in PLAIN_WORDS and loc != ["results"]:
        message = PLAIN_WORDS[kind]
    if kind not in ("extra_forbidden", "union_tag_invalid", "missing", "value_error"):
        message += f" (got {_clip(repr(item['input']))})"
    if loc[:1] == ["methods"] and len(loc) > 2 and loc[2] in registry():
        del loc[2]  # pydantic's name for the member of the union
    where = ".".join(_clip(str(part)) for part in loc if part != "[key]")
    where = ".".join(filter(None, [at, where]))
    return f"{where}: {message}" if where else message


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys known at a place of the configuration."""
    if len(loc) > 2 and loc[0] == "methods":
        return _keys(registry()[loc[2]])
    parts = iter(loc)
    for part in parts:
        within = list(_flatten(model.model_fields[part].annotation))
        model = next(a for a in within if isinstance(a, type) and issubclass(a, BaseModel))
        if any(get_origin(annotation) in (dict, list) for annotation in within):
            next(parts)  # a name or an index
    return _keys(model)


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _flatten(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _flatten(argument)


# -- reading -----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent override."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise MergelawError(f"line {line}: key {key.value!r} is given twice; remove one")
            seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise MergelawError(f"line {node.start_mark.line + 1}: merge keys expand without end")


def load(path: Path | str) -> Config:
    """The checked configuration of a YAML file. Raises MergelawError, one line."""
    return parse(read(path), str(path))


def read(path: Path | str) -> Any:
    """The data of a YAML file, keys given twice refused. Raises MergelawError, one line."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise MergelawError(f"{path}: no such file; name a configuration, as in config/") from None
    except UnicodeDecodeError:
        raise MergelawError(f"{path}: is not UTF-8 text; save it as such") from None
    except OSError as error:
        raise MergelawError(f"{path}: cannot be read ({error.strerror})") from None
    except MergelawError as error:
        raise MergelawError(f"{path}: {error}") from None
    except RecursionError:
        raise MergelawError(f"{path}: is nested too deeply; mend the file") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise MergelawError(
            f"{path}{where}: not YAML ({_clip(str(reason).splitlines()[0])}); mend the file"
        ) from None


def parse(data: Any, where: str = "configuration") -> Config:
    """The checked configuration of plain data (from YAML, JSON or Snakemake)."""
    if data is None:
        raise MergelawError(f"{where}: is empty; see config/README.md")
    if not isinstance(data, dict):
        raise MergelawError(f"{where}: is not a mapping of keys to values; see config/README.md")
    for values, _ in enumerate(_walk(data, where)):
        if values > MAX_VALUES:
            raise MergelawError(f"{where}: over {MAX_VALUES:,} values; do aliases expand in it?")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise MergelawError(f"{where}: {describe(error.errors())}") from None


def _walk(value: Any, where: str, at: tuple[str, ...] = ()) -> Iterator[None]:
    """Step through all values; MergelawError for one that JSON could not hold."""
    yield
    place = f"{where}: {'.'.join(map(_clip, at))}".removesuffix(": ")
    if len(at) > MAX_DEPTH:
        raise MergelawError(f"{where}: {'.'.join(at[:3])}: is nested too deeply; mend the file")
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise MergelawError(
                    f"{place}: YAML reads the key {_clip(str(key))} as {_kind(key)}, not as text; "
                    "put it in quotes"
                )
            yield from _walk(key, where, at)
            yield from _walk(entry, where, (*at, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _walk(entry, where, (*at, str(index)))
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise MergelawError(f"{place}: is not Unicode text (a lone surrogate); mend it")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise MergelawError(f"{place}: is too large a number; use one below 2^63")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise MergelawError(f"{place}: is {value}; give a finite number")
    elif value is not None:
        raise MergelawError(
            f"{place}: YAML reads {_clip(str(value))} as {_kind(value)}; if text is meant, put it "
            "in quotes"
        )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false (so are on, off, yes and no)"
    if value is None:
        return "nothing"
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
