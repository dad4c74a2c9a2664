"""One artifact of a study: its stage, inputs and folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergelaw.artifacts.keys import KEY_DIGITS, stage_key

Inputs = Mapping[str, "Artifact | Mapping[str, Artifact]"]
Row = Sequence[Any]  # a design's row: k, circle, place, experts


@dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact, defined before it is made.

    Attributes:
        stage: the stage that makes it, as in ``artifacts.keys.STAGES``.
        folder: its folder below the results folder, without the key.
        recipe: the settings that define it, as JSON values.
        base, method, name, seed, split: its place in the study; name is that of a domain,
            an expert, a written merge or the study, split that of a corpus.
        sources: paths of external files. The recipe identifies their content, so moving them
            changes no key.
        inputs: the artifacts it is made from, by role: one artifact, or several by name.
        checks: artifacts that have to exist first, but do not define it.
        rows: its rows of the design, or of a merge to write.
        size: number of documents of a corpus of local files, and their UTF-8 bytes.
    """

    stage: str
    folder: str
    recipe: dict[str, Any]
    base: str | None = None
    method: str | None = None
    name: str | None = None
    seed: int | None = None
    split: str | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    checks: Mapping[str, "Artifact"] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    size: tuple[int, int] | None = None

    @cached_property
    def key(self) -> str:
        """The full key: 64 hexadecimal digits."""
        keys = {name: artifact.key for name, artifact in self.named_inputs()}
        return stage_key(self.stage, self.recipe, keys)

    @cached_property
    def path(self) -> str:
        """Path relative to the results folder."""
        return f"{self.folder}@{self.key[:KEY_DIGITS]}"

    @property
    def trains(self) -> bool:
        """True for a model that the study pre-trains or fine-tunes."""
        return bool(self.recipe.keys() & {"training", "pretraining"})

    @property
    def on_gpu(self) -> bool:
        """True if its job uses a GPU if available."""
        return self.trains or self.stage in ("learn", "gradients", "evaluate")

    def named_inputs(self) -> Iterator[tuple[str, "Artifact"]]:
        """Inputs with their names in a lineage: ``base``, ``corpora:algebra``."""
        for role, value in self.inputs.items():
            if isinstance(value, Artifact):
                yield role, value
            else:
                yield from ((f"{role}:{name}", artifact) for name, artifact in value.items())

    def of_role(self, role: str) -> list["Artifact"]:
        """Inputs and checks of a role."""
        value = self.inputs[role] if role in self.inputs else self.checks.get(role, {})
        return [value] if isinstance(value, Artifact) else list(value.values())

    def names(self, role: str) -> list[str]:
        """Names of the inputs of a role: domains of ``corpora``, experts of ``task_vectors``."""
        value = self.inputs.get(role, {})
        return [] if isinstance(value, Artifact) else list(value)

    def dependencies(self) -> Iterator["Artifact"]:
        """Inputs and checks."""
        yield from (artifact for _, artifact in self.named_inputs())
        yield from self.checks.values()
