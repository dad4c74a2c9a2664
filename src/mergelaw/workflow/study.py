"""A study: a configuration resolved into artifacts with keys, paths and inputs.

It is a pure function of the configuration and the identity of its sources. It measures nothing and
does not import torch, because every job of the workflow parses it again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelaw.artifacts.cache import FileCache
from mergelaw.artifacts.keys import digest
from mergelaw.artifacts.lineage import DIGESTS, LINEAGE
from mergelaw.config import Config
from mergelaw.config.merges import Merge
from mergelaw.data.documents import evaluated, split_identity, split_sizes
from mergelaw.data.recipe import SPLITS
from mergelaw.errors import MergelawError
from mergelaw.evaluation.design import Subset, Weighted, sample
from mergelaw.evaluation.recipe import BASELINES
from mergelaw.merging.methods.average import Average
from mergelaw.merging.methods.learned import Learned
from mergelaw.models.checkpoint import files, read_config
from mergelaw.models.recipe import Checkpoint
from mergelaw.models.size import Size, size_of_architecture, size_of_nominal
from mergelaw.workflow.artifact import Artifact


def _weighted(experts: Sequence[str], weights: Sequence[float] | None = None) -> Weighted:
    """The row of a merge outside of the design."""
    shares = tuple(weights or [1.0] * len(experts))
    return Weighted(len(experts), -1, -1, tuple(experts), shares)


class Study:
    """Every artifact of a configuration, by stage."""

    def __init__(self, config: Config):
        self.config = config
        self.results = Path(config.results)
        self._cache = FileCache(self.results / DIGESTS)
        self._sizes: dict[str, Size] = {}

    # -- sources -------------------------------------------------------------------------------

    def _checkpoint(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Identity of a ready-made checkpoint: a commit, or the digests of its files."""
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
        return {"files": {name: self._cache.sha256(folder / name) for name in names}}

    # -- stages --------------------------------------------------------------------------------

    @cached_property
    def corpora(self) -> dict[str, dict[str, Artifact]]:
        """Corpora by split and domain, without a domain's empty splits.

        Raises MergelawError for unreadable or too few documents.
        """
        corpora: dict[str, dict[str, Artifact]] = {split: {} for split in SPLITS}
        errors = []
        for name in self.config.domains:
            recipe = self.config.splits_of(name)
            sources = {"recipe": recipe.model_dump(exclude_defaults=True)}
            try:
                for split in recipe.splits():
                    size = split_sizes(recipe, split, self._cache)
                    if size is not None and not size[0]:
                        continue
                    corpora[split][name] = Artifact(
                        "corpus",
                        f"corpora/{name}/{split}",
                        split_identity(recipe, split, self._cache),
                        name=name,
                        split=split,
                        sources={"split": split, **sources},
                        size=size,
                    )
            except MergelawError as error:
                errors.append(str(error))
        if errors:
            more = f" ({len(errors) - 1} more domains have errors)" if errors[1:] else ""
            raise MergelawError(errors[0] + more)
        return corpora

    def evaluated(self) -> dict[str, list[str]]:
        """The evaluation documents of each domain of local files, by their digests."""
        splits = {name: self.config.splits_of(name) for name in self.config.domains}
        sets = {name: evaluated(recipe, self._cache) for name, recipe in splits.items()}
        return {name: documents for name, documents in sets.items() if documents}

    @cached_property
    def overlap(self) -> Artifact:
        """The check that no domain's evaluation documents are training documents of a domain."""
        splits = {split: self.corpora[split] for split in ("train", "eval")}
        return Artifact("overlap", "checks/overlap", {}, inputs=splits)

    @cached_property
    def calibration_overlap(self) -> Artifact:
        """The overlap check with calibration and confirming documents included."""
        return Artifact("overlap", "checks/calibration-overlap", {}, inputs=self.corpora)

    @cached_property
    def bases(self) -> dict[str, Artifact]:
        """Bases by name."""
        return {name: self._base(name) for name in self.config.bases}

    def _base(self, name: str) -> Artifact:
        base = self.config.bases[name]
        if base.pretraining is None:
            checkpoint = Checkpoint(path=base.path, hub=base.hub, revision=base.revision)
            return self._ready_made("base", f"bases/{name}", checkpoint, base=name)
        pretraining = self.config.pretraining_of(name)
        return Artifact(
            "base",
            f"bases/{name}",
            {"pretraining": pretraining.model_dump()},
            base=name,
            inputs={"corpora": {d: self.corpora["train"][d] for d in pretraining.domains}},
            checks={"overlap": self.overlap},
        )

    def _ready_made(
        self, stage: str, folder: str, checkpoint: Checkpoint, **place: Any
    ) -> Artifact:
        recipe = {"checkpoint": self._checkpoint(checkpoint)}
        sources = checkpoint.model_dump(exclude_none=True, include={"path", "hub", "revision"})
        return Artifact(stage, folder, recipe, sources=sources, **place)

    def expert(self, base: str, name: str, seed: int) -> Artifact:
        """An expert of the pool, or a baseline."""
        expert = self.config.models[name]
        if expert.checkpoints is not None:
            checkpoint, folder = expert.checkpoints[base], f"experts/{base}/{name}"
            return self._ready_made("expert", folder, checkpoint, base=base, name=name)
        settings = self.config.training_of(base, name)
        unused = {"openrlhf"} if settings.openrlhf is None else set()
        corpora = {d: self.corpora["train"][d] for d in self.config.expert_domains(name)}
        return Artifact(
            "expert",
            f"experts/{base}/{name}-s{seed}",
            {"training": settings.model_dump(exclude=unused), "seed": seed},
            base=base,
            name=name,
            seed=seed,
            inputs={"base": self.bases[base], "corpora": corpora},
            checks={"overlap": self.overlap},
        )

    @cached_property
    def experts(self) -> dict[tuple[str, str, int], Artifact]:
        """Experts and baselines by (base, name, training seed)."""
        return {
            (base, name, seed): self.expert(base, name, seed)
            for base in self.config.bases
            for seed in self.config.training_seeds
            for name in self.config.models
            if self.config.has(base, name)
        }

    @cached_property
    def task_vectors(self) -> dict[tuple[str, str, int], Artifact]:
        """Task vectors by (base, expert, training seed)."""
        # The recipe has no defaults and no storage, which does not change a task vector's values.
        vocabulary, storage = self.config.vocabulary, self.config.storage
        recipe = {"vocabulary": vocabulary} if vocabulary != "refuse" else {}
        sources = {"storage": storage} if storage != "materialised" else {}
        return {
            (base, name, seed): Artifact(
                "task_vector",
                expert.folder.replace("experts/", "task_vectors/", 1),
                recipe | self._trust(base, name),
                base=base,
                name=name,
                seed=expert.seed,
                sources=sources,
                inputs={"base": self.bases[base], "expert": expert},
            )
            for (base, name, seed), expert in self.experts.items()
        }

    def _trust(self, base: str, name: str) -> dict[str, Any]:
        """The keys of an expert's configuration that may differ from its base's, if any."""
        checkpoints = self.config.models[name].checkpoints or {}
        trust = checkpoints[base].trust if base in checkpoints else None
        return {"trust": sorted(trust)} if trust else {}

    def subsets(self, base: str) -> list[Subset]:
        """The subsets of a base's design."""
        settings = self.config.sampling_of(base).model_dump(exclude={"merges_per_shard"})
        return sample(experts=self.config.pool(base), base=base, **settings)

    @cached_property
    def rows(self) -> dict[str, list[Subset]]:
        """Rows of each base's design, the same for every method and training seed."""
        return {base: self.subsets(base) for base in self.config.bases}

    @cached_property
    def designs(self) -> dict[str, Artifact]:
        """Designs by base: the subsets that are merged."""
        return {
            base: Artifact(
                "design", f"designs/{base}", {"subsets": digest(rows)}, base=base, rows=rows
            )
            for base, rows in self.rows.items()
        }

    @cached_property
    def evals(self) -> dict[tuple[str, str, int, int], Artifact]:
        """Shards of evaluations by (base, method, training seed, shard)."""
        methods = {name: method.recipe() for name, method in self.config.designed.items()}
        single = Average().recipe()
        evals = {}
        for base in self.config.bases:
            work = {method: (recipe, self._parts(base)) for method, recipe in methods.items()}
            baselines = [name for name in self.config.baselines if self.config.has(base, name)]
            if baselines:
                alone = [Subset(1, -1, -1, (name,)) for name in baselines]
                work[BASELINES] = (single, [alone])
            for method, (recipe, parts) in work.items():
                for seed in self.config.training_seeds:
                    for shard, part in enumerate(parts):
                        evals[base, method, seed, shard] = self._evaluation(
                            base, method, seed, f"s{seed}-{shard:03d}", recipe, part
                        )
        return evals

    def _parts(self, base: str) -> list[list[Subset]]:
        """The rows of a base's design, by shard."""
        size, rows = self.config.sampling_of(base).merges_per_shard, self.rows[base]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _evaluation(
        self,
        base: str,
        method: str,
        seed: int,
        name: str,
        recipe: Mapping[str, Any],
        rows: Sequence[Subset | Weighted],
        split: str = "eval",
    ) -> Artifact:
        members = sorted({expert for row in rows for expert in row.experts})
        return Artifact(
            "evaluate",
            f"evals/{base}/{method}/{name}",
            {
                "method": recipe,
                "evaluation": self.config.evaluation.model_dump(),
                "subsets": digest(rows),
                "domains": {name: domain.held_out for name, domain in self.config.domains.items()},
                "labels": {
                    "family": self.config.name,
                    "base": base,
                    "method": method,
                    "seed": seed,
                    "N_nominal": self.config.bases[base].N,
                },
            },
            base=base,
            method=method,
            seed=seed,
            sources={"cells": str(self.results / "cells" / base)},
            inputs={
                "base": self.bases[base],
                "task_vectors": {e: self.task_vectors[base, e, seed] for e in members},
                "corpora": self.corpora[split],
                **self._learned(base, method, seed, [row.experts for row in rows]),
            },
            checks={"overlap": self.overlap if split == "eval" else self.calibration_overlap},
            rows=rows,
        )

    @cached_property
    def laws(self) -> Artifact:
        """The fitted laws."""
        name, common = self.config.name, self.config.common_pool()
        # A law over several sizes compares the same experts on all bases.
        recipe = {"common_experts": common} if common != self.config.pool() else {}
        return Artifact("fit", f"laws/{name}", recipe, name=name, inputs={"evals": self._shards()})

    def _shards(self) -> dict[str, Artifact]:
        return {a.folder.removeprefix("evals/"): a for a in self.evals.values()}

    @cached_property
    def merge_evals(self) -> dict[str, Artifact]:
        """Evaluations of the merges in ``merges``, by merge. No law is fitted to them.

        Those that are only measured share a job for each base, rule and training seed.
        """
        evals: dict[str, Artifact] = {}
        shared: dict[tuple[str, str, int], dict[str, Weighted]] = defaultdict(dict)
        for name, merge in self.config.merges.items():
            experts, weights, seed = self._members(merge)
            row = _weighted(experts, weights)
            if merge.write or isinstance(self.config.methods[merge.method], Learned):
                title = f"merge-{name}"
                evals[name] = self._measurement(merge.base, merge.method, title, [row], seed)
            else:
                shared[merge.base, merge.method, seed][name] = row
        for (base, method, seed), rows in shared.items():
            size, names = self.config.sampling_of(base).merges_per_shard, list(rows)
            for start in range(0, len(names), size):
                part = names[start : start + size]
                title, members = f"more-s{seed}-{start // size:03d}", [rows[n] for n in part]
                evals |= dict.fromkeys(part, self._measurement(base, method, title, members, seed))
        return evals

    @cached_property
    def confirmations(self) -> dict[str, Artifact]:
        """Evaluations of the merges to write, by name, on documents that no choice has seen."""
        if not self.config.corpus.confirm_documents:
            return {}
        evals = {}
        for name, merge in self.config.merges.items():
            if merge.write:
                experts, weights, seed = self._members(merge)
                place, rows = (merge.base, merge.method), [_weighted(experts, weights)]
                evals[name] = self._measurement(*place, f"confirm-{name}", rows, seed, "confirm")
        return evals

    def _measurement(
        self,
        base: str,
        method: str,
        name: str,
        merges: Sequence[Weighted],
        seed: int,
        split: str = "eval",
    ) -> Artifact:
        """Evaluation of merges outside of the design, and of the base itself."""
        rows: list[Subset | Weighted] = [Subset(0, -1, -1, ()), *merges]
        recipe = self.config.methods[method].recipe()
        return self._evaluation(base, method, seed, name, recipe, rows, split)

    @cached_property
    def learned_evals(self) -> list[Artifact]:
        """Evaluations of learned merges of each base's whole pool, outside of the design."""
        return [
            self._measurement(base, name, f"s{seed}-000", [_weighted(self.config.pool(base))], seed)
            for base in self.config.bases
            for name in self.config.methods
            if name not in self.config.designed
            for seed in self.config.training_seeds
        ]

    def _learned(
        self, base: str, method: str, seed: int, subsets: Sequence[Sequence[str]]
    ) -> dict[str, Artifact]:
        """The coefficients, by their role as an input, of merges whose method learns them.

        Those of one merge are in the table of its shard, if the method learns the design.
        """
        recipe = self.config.methods.get(method)
        learned = dict.fromkeys(tuple(subset) for subset in subsets if subset)
        if not (isinstance(recipe, Learned) and learned):
            return {}
        if recipe.subsets == "design" and len(learned) == 1:
            for part in self._parts(base):
                members = dict.fromkeys(row.experts for row in part if row.experts)
                if learned.keys() <= members.keys():
                    learned = members
                    break
        experts = sorted(set().union(*learned), key=self.config.pool().index)
        coefficients = Artifact(
            "learn",
            f"learned/{base}/{method}-s{seed}",
            {
                "method": recipe.recipe(),
                "subsets": digest(list(learned)),
                "evaluation": self.config.evaluation.model_dump(),
            },
            base=base,
            method=method,
            seed=seed,
            rows=list(learned),
            inputs={
                "base": self.bases[base],
                "task_vectors": {e: self.task_vectors[base, e, seed] for e in experts},
                "corpora": self.corpora["calibration"],
            },
            checks={"overlap": self.calibration_overlap},
        )
        return {"coefficients": coefficients}

    @cached_property
    def gradients(self) -> dict[tuple[str, int], Artifact]:
        """Gradients that predict merges, by base and training seed; made only on request."""
        methods = {
            name: method.recipe()
            for name, method in self.config.methods.items()
            if not isinstance(method, Learned)
        }
        return {
            (base, seed): Artifact(
                "gradients",
                f"gradients/{base}/s{seed}",
                {
                    "methods": methods,
                    "experts": self.config.pool(base),
                    "evaluation": self.config.evaluation.model_dump(),
                },
                base=base,
                seed=seed,
                sources={"cells": str(self.results / "cells" / base)},
                inputs={
                    "base": self.bases[base],
                    "task_vectors": {
                        e: self.task_vectors[base, e, seed] for e in self.config.pool(base)
                    },
                    "corpora": self.corpora["eval"],
                },
                checks={"overlap": self.overlap},
            )
            for base in self.config.bases
            for seed in self.config.training_seeds
        }

    @cached_property
    def measurements(self) -> list[Artifact]:
        """All evaluations: of the design, of learned merges and of the merges to write."""
        named = dict.fromkeys(self.merge_evals.values())
        return [*self.evals.values(), *self.learned_evals, *named]

    @cached_property
    def coefficients(self) -> list[Artifact]:
        """Learned coefficients of all merges that are measured."""
        every = [a for one in self.measurements for a in one.of_role("coefficients")]
        return list({artifact.path: artifact for artifact in every}.values())

    def _members(self, merge: Merge) -> tuple[list[str], list[float] | None, int]:
        """Experts in the pool's order, their weights, and the training seed of a merge to write."""
        pool = self.config.pool()
        order = sorted(range(len(merge.experts)), key=lambda i: pool.index(merge.experts[i]))
        weights = [merge.weights[i] for i in order] if merge.weights else None
        seed = self.config.training_seeds[0] if merge.seed is None else merge.seed
        return [merge.experts[i] for i in order], weights, seed

    @cached_property
    def report(self) -> Artifact:
        """The report."""
        name = self.config.name
        evals = {a.folder.removeprefix("evals/"): a for a in self.measurements}
        inputs: dict[str, Any] = {"laws": self.laws, "evals": evals}
        learned = [a for a in self.coefficients if tuple(self.config.pool(a.base)) in a.rows]
        if learned:
            one_each = len(learned) == len(self.config.bases)
            inputs["coefficients"] = {
                str(a.base) if one_each else a.folder.removeprefix("learned/"): a for a in learned
            }
        return Artifact("report", f"reports/{name}", {"title": name}, name=name, inputs=inputs)

    @cached_property
    def merges(self) -> dict[str, Artifact]:
        """Merges to write as checkpoints, by name."""
        merges, confirm = {}, self.confirmations
        for name, merge in self.config.merges.items():
            if not merge.write:
                continue
            experts, weights, seed = self._members(merge)
            vectors = {e: self.task_vectors[merge.base, e, seed] for e in experts}
            merges[name] = Artifact(
                "merge",
                f"merges/{merge.base}/{merge.method}/{name}",
                {
                    "method": self.config.methods[merge.method].recipe(),
                    "experts": experts,
                    "weights": weights,
                },
                base=merge.base,
                method=merge.method,
                name=name,
                seed=seed,
                inputs={
                    "base": self.bases[merge.base],
                    "task_vectors": vectors,
                    "evaluation": self.merge_evals[name],
                    **({"confirmation": confirm[name]} if name in confirm else {}),
                    **self._learned(merge.base, merge.method, seed, [experts]),
                },
            )
        return merges

    # -- all artifacts -------------------------------------------------------------------------

    def size(self, base: str) -> Size:
        """Size of a base, from its recipe, its ``config.json`` (local or cached), or its N.

        Raises MergelawError if the size is not yet known.
        """
        if base not in self._sizes:
            architecture, nominal = self._architecture(base), self.config.bases[base].N
            size = size_of_architecture(architecture) if architecture else None
            if size is None and nominal is None:
                when = "before it is fetched" if architecture is None else "from its config.json"
                raise MergelawError(
                    f"bases.{base}: its size is not known {when}; give its 'N' in billions"
                )
            self._sizes[base] = size or size_of_nominal(nominal or 0)
        return self._sizes[base]

    def _architecture(self, base: str) -> Mapping[str, Any] | None:
        """Architecture of a base as a transformers configuration; None if not available."""
        settings = self.config.bases[base]
        if settings.pretraining is not None:
            recipe = self.config.pretraining_of(base)
            sizes = {"vocab_size": recipe.vocab_size, "max_position_embeddings": recipe.max_tokens}
            return sizes | recipe.architecture
        if settings.path is not None:
            return read_config(Path(settings.path))
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            str(settings.hub), "config.json", revision=settings.revision
        )
        return read_config(Path(cached).parent) if isinstance(cached, str) else None

    def made(self, artifact: Artifact) -> bool:
        """True if the artifact exists."""
        return (self.results / artifact.path / LINEAGE).exists()

    def artifacts(self) -> Iterator[Artifact]:
        """Every artifact that a run makes, inputs first."""
        yield from self.corpora["train"].values()
        yield from self.corpora["eval"].values()
        yield self.overlap
        yield from self.bases.values()
        yield from self.experts.values()
        yield from self.task_vectors.values()
        yield from self.designs.values()
        if self.coefficients or self.confirmations:
            yield from self.corpora["calibration"].values()
            yield from self.corpora["confirm"].values()
            yield self.calibration_overlap
            yield from self.coefficients
        yield from self.measurements
        yield from self.confirmations.values()
        yield self.laws
        yield self.report
        yield from self.merges.values()

    @cached_property
    def by_path(self) -> Mapping[str, Artifact]:
        """Artifacts by path, inputs first; ready-made experts occur once for all seeds."""
        return {artifact.path: artifact for artifact in self.artifacts()}

    @cached_property
    def known(self) -> Mapping[str, Artifact]:
        """Artifacts by path, including those that are made only on request."""
        splits = [*self.corpora["calibration"].values(), *self.corpora["confirm"].values()]
        on_request = [*splits, self.calibration_overlap]
        on_request += self.gradients.values()
        return {**self.by_path, **{artifact.path: artifact for artifact in on_request}}

    def targets(self) -> list[Artifact]:
        """Artifacts that are no input of another one."""
        return [self.overlap, *self.designs.values(), self.report, *self.merges.values()]
