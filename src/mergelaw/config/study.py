"""Configuration of a study: all its sections, and the recipes that follow from them."""

from functools import cached_property
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mergelaw.artifacts.recipe import Distinct, LocalPath, Model, Name, Seed
from mergelaw.config.domains import Corpus, Domain
from mergelaw.config.merges import Merge, Methods
from mergelaw.config.partial import Partial, complete
from mergelaw.config.pool import Base, Expert
from mergelaw.data.recipe import SplitRecipe
from mergelaw.evaluation.recipe import Evaluation, Sampling
from mergelaw.merging.methods import Method
from mergelaw.merging.methods.learned import Learned
from mergelaw.models.recipe import Pretraining, Training

# `algebra:` without settings is an expert with all defaults.
EmptyOrExpert = Annotated[
    Expert,
    BeforeValidator(
        lambda value: {} if value is None else value, json_schema_input_type=Expert | None
    ),
]


class Config(Model):
    """A study."""

    include: LocalPath | None = Field(
        None, description="path, from this file's folder, of a configuration that this one adds to"
    )
    name: Name = Field(description="name of the study and of the model family of its bases")
    results: LocalPath = Field(
        "results", pattern=r"^[^{}<>*?\r\n]+$", description="folder that results are written to"
    )
    seed: Seed = Field(0, description="seed of generated documents and of splits")
    corpus: Corpus = Field(Corpus(), description="numbers of documents of all domains")
    domains: dict[Name, Domain] = Field(min_length=1, description="domains by name")
    pretraining: Partial[Pretraining] | None = Field(
        None, description="the recipe that bases with `pretraining` share"
    )
    bases: dict[Name, Base] = Field(min_length=1, description="base models of all sizes by name")
    training: Partial[Training] = Field(
        {}, validate_default=True, description="how experts are trained"
    )
    training_seeds: Distinct[Seed] = Field(
        [0], description="train every expert, and measure every merge, with each"
    )
    experts: dict[Name, EmptyOrExpert] | None = Field(
        None,
        min_length=1,
        description="the pool by name; null: one for each domain that is not held out",
    )
    baselines: dict[Name, EmptyOrExpert] = Field(
        {}, description="models evaluated but never merged, for example a multitask model"
    )
    vocabulary: Literal["refuse", "common_rows"] = Field(
        "refuse", description="an expert with another vocabulary size: stop, or merge common rows"
    )
    storage: Literal["materialised", "derived"] = Field(
        "materialised", description="task vectors: written to files, or computed when needed"
    )
    methods: Methods = Field(min_length=1, description="merge methods by name")
    sampling: Sampling = Field(Sampling(), description="which subsets are merged")
    evaluation: Evaluation = Field(Evaluation(), description="how a merge is evaluated")
    merges: dict[Name, Merge] = Field(
        {}, description="merges to measure besides the design's, and to write out as checkpoints"
    )

    @cached_property
    def models(self) -> dict[str, Expert]:
        """Experts and baselines by name."""
        return {**self._pool, **self.baselines}

    @cached_property
    def _pool(self) -> dict[str, Expert]:
        if self.experts is not None:
            return self.experts
        return {name: Expert() for name, domain in self.domains.items() if not domain.held_out}

    def pool(self, base: str | None = None) -> list[str]:
        """Names of the experts, or of those that a base has, in the order of the configuration."""
        return [name for name in self._pool if base is None or self.has(base, name)]

    @property
    def designed(self) -> dict[str, Method]:
        """Methods that merge every subset of the design, so that laws are fitted to them."""
        return {
            name: method
            for name, method in self.methods.items()
            if not (isinstance(method, Learned) and method.subsets == "pool")
        }

    def common_pool(self) -> list[str]:
        """Names of the experts that all bases have; a law over several sizes is about them."""
        return [name for name in self.pool() if all(self.has(base, name) for base in self.bases)]

    def has(self, base: str, name: str) -> bool:
        """True if a base has this expert or baseline: trained, or with a checkpoint."""
        checkpoints = self.models[name].checkpoints
        return checkpoints is None or base in checkpoints

    def expert_domains(self, name: str) -> list[str]:
        """The domains that an expert or baseline is trained on, or that a ready-made one is for.

        By default an expert's domain has its name, and a trained baseline has all domains. Empty
        for a ready-made one without `domains` whose name is no domain.
        """
        expert = self.models[name]
        if expert.domains is not None:
            return expert.domains
        if name in self.baselines and expert.checkpoints is None:
            return [name for name, domain in self.domains.items() if not domain.held_out]
        return [name] if expert.checkpoints is None or name in self.domains else []

    @cached_property
    def trained_domains(self) -> set[str]:
        """The domains that a model of the study is trained on."""
        trained = [name for name, expert in self.models.items() if expert.checkpoints is None]
        domains = {domain for name in trained for domain in self.expert_domains(name)}
        for base in self.bases.values():
            if base.pretraining is not None:
                shared = self.pretraining.domains if self.pretraining else []
                domains.update(base.pretraining.domains or shared or [])
        return domains

    def splits_of(self, name: str) -> SplitRecipe:
        """Recipe of a domain's splits; the study's document numbers are the defaults.

        A domain that no model is trained on has no training split, and where nothing is trained on
        a source, evaluation and calibration take by default what is there, up to the defaults.
        """
        domain, corpus = self.domains[name], self.corpus
        train, calibration = domain.train_documents, domain.calibration_documents
        trained = name in self.trained_domains
        if not trained:
            train = 0
        if domain.held_out:
            calibration = calibration or 0
        settings = {*corpus.model_fields_set, *domain.model_fields_set}
        at_most: tuple[str, ...] = ("eval", "calibration")
        if trained:
            at_most = () if domain.eval_source is None else ("eval",)
        return SplitRecipe(
            source=domain.source,
            eval_source=domain.eval_source,
            eval_documents=domain.eval_documents or corpus.eval_documents,
            train_documents=corpus.train_documents if train is None else train,
            calibration_documents=(
                corpus.calibration_documents if calibration is None else calibration
            ),
            confirm_documents=corpus.confirm_documents,
            at_most=tuple(s for s in at_most if f"{s}_documents" not in settings),
            seed=self.seed,
        )

    def training_of(self, base: str, expert: str) -> Training:
        """Training recipe of an expert. Raises pydantic.ValidationError if it is incomplete."""
        parts = (self.training, self.bases[base].training, self.models[expert].training)
        return complete(Training, *parts)

    def pretraining_of(self, base: str) -> Pretraining:
        """Recipe of a pre-trained base. Raises pydantic.ValidationError if it is incomplete."""
        return complete(Pretraining, self.pretraining, self.bases[base].pretraining)

    def sampling_of(self, base: str) -> Sampling:
        """Sampling design of a base."""
        return complete(Sampling, self.sampling, self.bases[base].sampling)
