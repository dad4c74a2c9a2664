"""A study: a configuration resolved into artifacts with keys, paths and inputs.

A pure function of the configuration and the identity of its sources; nothing is measured here, and
nothing imports torch, for every job of the workflow parses this again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelaw.artifacts.keys import canonical_json, digest, stage_key
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.config.schema import Config, Expert
from mergelaw.data.documents import source_identity
from mergelaw.data.recipe import Source
from mergelaw.errors import MergelawError
from mergelaw.evaluation.design import Subset, sample
from mergelaw.evaluation.recipe import BASELINES
from mergelaw.merging.methods.average import Average
from mergelaw.models.checkpoint import files
from mergelaw.models.recipe import Checkpoint
from mergelaw.models.size import Size, size_of_base


@dataclass(frozen=True)
class Artifact:
    """Something that a stage makes: what of, from what, and where it goes.

    ``inputs`` are what it is made from; those in ``unkeyed`` do not define it (a plan of which a
    shard takes its own rows; a check that has to pass first). ``sources`` says where files from
    outside lie (of a plan: what its subsets are drawn from); what they are stands in the recipe, so
    that moving them changes no key.
    """

    stage: str
    name: str
    recipe: dict[str, Any]
    sources: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, "Artifact"] = field(default_factory=dict)
    unkeyed: dict[str, "Artifact"] = field(default_factory=dict)
    rows: str | None = None  # of a shard: which of its plan's

    @cached_property
    def key(self) -> str:
        keys = {name: artifact.key for name, artifact in self.inputs.items()}
        return stage_key(self.stage, self.recipe, keys)

    @cached_property
    def path(self) -> str:
        """Relative to the results folder."""
        return f"{self.name}@{self.key}"

    @property
    def trains(self) -> bool:
        return bool(self.recipe.keys() & {"training", "pretraining"})

    @property
    def on_gpu(self) -> bool:
        """Whether its job uses a GPU where there is one."""
        return self.trains or self.stage == "evaluate"

    @cached_property
    def recipe_json(self) -> str:
        """What the stage's command is given: the recipe, with its sources."""
        recipe = self.recipe | ({"sources": self.sources} if self.sources else {})
        return canonical_json(recipe)


def keyed(kind: str, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    return {f"{kind}:{name}": artifact for name, artifact in artifacts.items()}


def subsets_recipe(subsets: list[Subset]) -> list[list[Any]]:
    return [[s.k, s.replicate, s.place, list(s.experts)] for s in subsets]


class Study:
    """Every artifact of a configuration, by stage."""

    def __init__(self, config: Config, cache: Path | None = None):
        self.config = config
        self.results = Path(config.results)
        self._cache = cache or self.results / "cache" / "digests.json"
        self._sizes: dict[str, Size] = {}

    # -- sources -------------------------------------------------------------------------------

    def _documents(self, source: Source) -> dict[str, Any]:
        """What a source of documents is: its contents, without the paths of files."""
        identity = source_identity(source.model_dump(exclude_none=True), self._cache)
        if source.files is not None:
            identity = {"files": [value for _, value in identity["files"]]}
        skip = {"invalid_records": "skip"} if source.invalid_records == "skip" else {}
        return identity | {"where": source.where} | skip

    def _checkpoint(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a ready-made checkpoint is: a commit, or the digests of its files."""
        if checkpoint.hub is not None:
            return {"hub": checkpoint.hub, "revision": checkpoint.revision}
        folder = Path(checkpoint.path or "")
        if not folder.is_dir():
            raise MergelawError(f"{folder}: no such folder; give a local Hugging Face checkpoint")
        names = files(folder)
        if not names:
            raise MergelawError(
                f"{folder}: holds no model; give a local Hugging Face checkpoint or LoRA adapter"
            )
        paths = [str(folder / name) for name in names]
        identity = source_identity({"files": paths}, self._cache)["files"]
        return {"files": {Path(name).name: value for name, value in identity}}

    # -- stages --------------------------------------------------------------------------------

    @cached_property
    def corpora(self) -> dict[str, Artifact]:
        shared = self.config.corpus
        made = {}
        for name, domain in self.config.domains.items():
            train = domain.train_documents
            train = shared.train_documents if train is None else train
            sources = {"source": domain.source, "eval_source": domain.eval_source}
            given = {k: v for k, v in sources.items() if v is not None}
            recipe = {
                **{k: self._documents(v) for k, v in given.items()},
                "train_documents": 0 if domain.held_out else train,
                "eval_documents": domain.eval_documents or shared.eval_documents,
                "seed": self.config.seed,
            }
            found = {k: v.model_dump(exclude_none=True) for k, v in given.items()}
            made[name] = Artifact("corpus", f"corpora/{name}", recipe, found)
        return made

    @cached_property
    def overlap(self) -> Artifact:
        """The check that no domain evaluates what another one trains on."""
        return Artifact("overlap", "checks/overlap", {}, inputs=keyed("corpus", self.corpora))

    @cached_property
    def bases(self) -> dict[str, Artifact]:
        made = {}
        for name, base in self.config.bases.items():
            sources: dict[str, Any] = {}
            inputs: dict[str, Artifact] = {}
            unkeyed: dict[str, Artifact] = {}
            if base.pretraining is not None:
                pretraining = self.config.pretraining_of(name)
                recipe: dict[str, Any] = {"pretraining": pretraining.model_dump()}
                inputs = {
                    f"corpus:{domain}": self.corpora[domain] for domain in pretraining.domains
                }
                unkeyed = {"overlap": self.overlap}
            else:
                checkpoint = Checkpoint(path=base.path, hub=base.hub, revision=base.revision)
                recipe = {"checkpoint": self._checkpoint(checkpoint)}
                sources = checkpoint.model_dump(exclude_none=True)
            made[name] = Artifact("base", f"bases/{name}", recipe, sources, inputs, unkeyed)
        return made

    def expert(self, base: str, name: str, seed: int) -> Artifact:
        """An expert of the pool, or a baseline."""
        expert: Expert = {**self.config.baselines, **self.config.pool()}[name]
        if expert.checkpoints is not None:
            checkpoint = expert.checkpoints[base]
            recipe: dict[str, Any] = {"checkpoint": self._checkpoint(checkpoint)}
            sources = checkpoint.model_dump(exclude_none=True)
            return Artifact("expert", f"experts/{base}/{name}", recipe, sources)
        settings = self.config.training_of(base, name)
        unused = {"openrlhf"} if settings.openrlhf is None else set()
        training = settings.model_dump(exclude=unused)
        recipe = {"training": training, "seed": seed}
        corpora = {d: self.corpora[d] for d in self.config.expert_domains(name)}
        return Artifact(
            "expert",
            f"experts/{base}/{name}-s{seed}",
            recipe,
            inputs={"base": self.bases[base], **keyed("corpus", corpora)},
            unkeyed={"overlap": self.overlap},
        )

    @cached_property
    def experts(self) -> dict[tuple[str, str, int], Artifact]:
        names = [*self.config.pool(), *self.config.baselines]
        return {
            (base, name, seed): self.expert(base, name, seed)
            for base in self.config.bases
            for seed in self.config.training_seeds
            for name in names
        }

    @cached_property
    def task_vectors(self) -> dict[tuple[str, str, int], Artifact]:
        # Only what differs from the default, so that it leaves other keys alone. How a vector is
        # kept is no part of what it is.
        vocabulary, storage = self.config.vocabulary, self.config.storage
        recipe = {"vocabulary": vocabulary} if vocabulary != "refuse" else {}
        how = {"storage": storage} if storage != "materialised" else {}
        return {
            (base, name, seed): Artifact(
                "task_vector",
                expert.name.replace("experts/", "task_vectors/", 1),
                recipe,
                how,
                inputs={"base": self.bases[base], "expert": expert},
            )
            for (base, name, seed), expert in self.experts.items()
        }

    def _drawn_from(self, base: str) -> dict[str, Any]:
        """What ``sample`` draws a base's subsets from."""
        design = self.config.sampling_of(base).model_dump(exclude={"merges_per_shard"})
        return {"experts": list(self.config.pool()), "base": base, **design}

    def subsets(self, base: str) -> list[Subset]:
        return sample(**self._drawn_from(base))

    @cached_property
    def plans(self) -> dict[str, Artifact]:
        """The sampled merges of each base: the same for every method and training seed.

        Known by their digest: the command line of a job has no room for a large plan.
        """
        return {
            base: Artifact(
                "plan", f"plans/{base}", {"subsets": digest(rows)}, self._drawn_from(base)
            )
            for base, rows in self._subsets.items()
        }

    @cached_property
    def _subsets(self) -> dict[str, list[list[Any]]]:
        return {base: subsets_recipe(self.subsets(base)) for base in self.config.bases}

    def shards(self, base: str) -> list[list[list[Any]]]:
        """The plan's rows, cut by rank."""
        size, rows = self.config.sampling_of(base).merges_per_shard, self._subsets[base]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @cached_property
    def evals(self) -> dict[tuple[str, str, int, int], Artifact]:
        """By (base, method, training seed, shard)."""
        config, made = self.config, {}
        domains = {name: domain.held_out for name, domain in config.domains.items()}
        evaluation = config.evaluation.model_dump()
        methods = {n: m.model_dump(by_alias=True) for n, m in config.methods.items()}
        single = Average().model_dump(by_alias=True)
        corpora = keyed("corpus", self.corpora)
        for base in config.bases:
            size = config.sampling_of(base).merges_per_shard
            baselines = [[1, -1, -1, [name]] for name in config.baselines]
            plans = {method: (recipe, self.shards(base)) for method, recipe in methods.items()}
            if baselines:
                plans[BASELINES] = (single, [baselines])
            for method, (recipe, shards) in plans.items():
                for seed in config.training_seeds:
                    for index, rows in enumerate(shards):
                        members = sorted({name for row in rows for name in row[3]})
                        pool = {name: self.task_vectors[base, name, seed] for name in members}
                        vectors = keyed("task-vector", pool)
                        made[base, method, seed, index] = Artifact(
                            "evaluate",
                            f"evals/{base}/{method}/s{seed}-{index:03d}",
                            {
                                "method": recipe,
                                "evaluation": evaluation,
                                "subsets": digest(rows),
                                "domains": domains,
                                "labels": {
                                    "family": config.name,
                                    "base": base,
                                    "method": method,
                                    "seed": seed,
                                    "N_nominal": config.bases[base].N,
                                },
                            },
                            inputs={"base": self.bases[base], **vectors, **corpora},
                            unkeyed={"overlap": self.overlap}
                            | ({} if method == BASELINES else {"plan": self.plans[base]}),
                            rows=canonical_json(rows)
                            if method == BASELINES
                            else f"{index * size}:{index * size + len(rows)}",
                        )
        return made

    @cached_property
    def laws(self) -> Artifact:
        inputs = {f"evals:{artifact.name}": artifact for artifact in self.evals.values()}
        return Artifact("fit", f"laws/{self.config.name}", {}, inputs=inputs)

    @cached_property
    def report(self) -> Artifact:
        recipe = {"title": self.config.name}
        return Artifact("report", f"reports/{self.config.name}", recipe, inputs={"laws": self.laws})

    @cached_property
    def merges(self) -> dict[str, Artifact]:
        names, made = list(self.config.pool()), {}
        for name, merge in self.config.merges.items():
            seed = self.config.training_seeds[0] if merge.seed is None else merge.seed
            order = sorted(range(len(merge.experts)), key=lambda i: names.index(merge.experts[i]))
            experts = [merge.experts[i] for i in order]
            weights = [merge.weights[i] for i in order] if merge.weights else None
            pool = {e: self.task_vectors[merge.base, e, seed] for e in experts}
            made[name] = Artifact(
                "merge",
                f"merges/{merge.base}/{merge.method}/{name}",
                {
                    "method": self.config.methods[merge.method].model_dump(by_alias=True),
                    "experts": experts,
                    "weights": weights,
                },
                inputs={"base": self.bases[merge.base], **keyed("task-vector", pool)},
            )
        return made

    def size(self, base: str) -> Size:
        """The size of a base; MergelawError where it cannot be known yet."""
        if base not in self._sizes:
            self._sizes[base] = size_of_base(self.config, base)
        return self._sizes[base]

    def rows(self, artifact: Artifact) -> list[list[Any]]:
        """The merges of a shard: k, replicate, place, experts."""
        if artifact.rows and artifact.rows.startswith("["):
            return json.loads(artifact.rows)
        first, last = map(int, (artifact.rows or "0:0").split(":"))
        return self._subsets[artifact.name.split("/")[1]][first:last]

    def made(self, artifact: Artifact) -> bool:
        return (self.results / artifact.path / LINEAGE).exists()

    def artifacts(self) -> Iterator[Artifact]:
        """Every artifact of the study, inputs first."""
        yield from self.corpora.values()
        yield self.overlap
        yield from self.bases.values()
        yield from self.experts.values()
        yield from self.task_vectors.values()
        yield from self.plans.values()
        yield from self.evals.values()
        yield self.laws
        yield self.report
        yield from self.merges.values()

    @cached_property
    def by_path(self) -> Mapping[str, Artifact]:
        return {artifact.path: artifact for artifact in self.artifacts()}

    def targets(self) -> list[str]:
        """What the workflow is asked for: what nothing else that is made needs."""
        ends = (self.overlap, *self.plans.values(), self.report, *self.merges.values())
        return [artifact.path for artifact in ends]
