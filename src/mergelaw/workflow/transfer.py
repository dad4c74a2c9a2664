"""What a study needs, taken from another results folder: artifacts with their inputs, and cells."""

import os
from collections.abc import Mapping
from pathlib import Path

from mergelaw.artifacts import lineage
from mergelaw.errors import MergelawError
from mergelaw.evaluation.cells import Store
from mergelaw.models import checkpoint
from mergelaw.workflow.study import Artifact, Study


class Transfer:
    """Copies what is not in the study's results yet; each artifact after its inputs.

    Every copy is verified. What cannot be taken is left out, with all that was made from it, and
    stands in ``left`` with the reason. Checkpoints from outside are linked from the study's own
    sources, as a run does.
    """

    def __init__(self, study: Study, source: Path):
        if not (source / lineage.MARK).exists():
            raise MergelawError(
                f"{source}: no results folder of mergelaw; name one that a run made"
            )
        lineage.check_layout(source)
        self.study, self.source = study, source.resolve()
        self.taken: list[Path] = []  # relative to the results
        self.cells = 0
        self._reasons: dict[Path, str] = {}  # why not, by folder there; "": taken, or here already

    @property
    def left(self) -> list[str]:
        return [reason for reason in self._reasons.values() if reason]

    def run(self) -> None:
        with lineage.only_run(self.study.results):
            for path, artifact in self.study.by_path.items():
                there = self.source / path
                if not self.study.made(artifact) and (there / lineage.LINEAGE).exists():
                    self._take(there)
            for base in self.study.bases:
                self._take_cells(Path("cells", base))

    def _take(self, folder: Path) -> str:
        """Take an artifact; the reason why not, if so."""
        if folder not in self._reasons:
            self._reasons[folder] = f"{folder}: is made from itself"
            try:
                self._take_inputs(folder, lineage.read(folder)["inputs"])
                place = folder.relative_to(self.source)
                artifact = self.study.by_path.get(place.as_posix())
                if artifact and "checkpoint" in artifact.recipe:
                    made = self._link(artifact)
                else:
                    made = lineage.take(folder, self.study.results / place)
                if made:
                    self.taken.append(place)
                    print(place, flush=True)
                self._reasons[folder] = ""
            except MergelawError as error:
                self._reasons[folder] = str(error)
        return self._reasons[folder]

    def _link(self, artifact: Artifact) -> bool:
        return lineage.make(
            self.study.results / artifact.path,
            artifact.stage,
            artifact.recipe,
            {},
            lambda folder, state: checkpoint.link_known(
                artifact.recipe["checkpoint"], artifact.sources, folder
            ),
        )

    def _take_inputs(self, folder: Path, inputs: Mapping[str, Mapping[str, str]]) -> None:
        for name, entry in inputs.items():
            place = Path(os.path.normpath(folder / entry["path"]))
            if not place.is_relative_to(self.source):
                raise MergelawError(f"{folder}: its input {name} lies outside of {self.source}")
            if self._take(place):
                raise MergelawError(f"{folder}: its input {name} was left out")
            here = self.study.results / place.relative_to(self.source)
            if lineage.read(here)["digest"] != entry["digest"]:
                raise MergelawError(f"{folder}: is made from another {name} than {here}")

    def _take_cells(self, place: Path) -> None:
        there = Store(self.source / place)
        with Store(self.study.results / place, "import") as store:
            new = [cell for name, cell in there.known.items() if name not in store.known]
            if new:
                store.append(new)
        self.cells += len(new)
