"""Progress of a study: what is made, what runs, how long the rest may take, what failed."""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelaw.artifacts import lineage
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.errors import MergelawError
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.study import Study

TITLES = {
    "corpus": "corpora",
    "overlap": "overlap check",
    "base": "bases",
    "expert": "experts",
    "task_vector": "task vectors",
    "design": "designs",
    "evaluate": "evaluations",
    "fit": "law fits",
    "report": "report",
    "merge": "merges",
}
ERROR = re.compile(r"^mergelaw: error: |^\w*(Error|Exception|Interrupt)\b")
ACTIVE = 120  # seconds since its last cell in which a shard counts as running
LINE_EVERY = 60  # seconds between lines of progress in a log
SAMPLED = 20  # finished jobs of a kind whose times are read


@dataclass(frozen=True)
class Progress:
    """Progress of a study at one moment.

    Attributes:
        stages: by stage in the pipeline's order: jobs finished, running, in all.
        merges: merges measured and planned, bases and baselines not counted.
        rate: merges a minute that running evaluations measure; 0 if none runs.
        seconds_left: of the remaining jobs at as many at a time as run now; None if unknown.
        failures: artifact and last line of its log.
        earlier: artifacts made by another version of mergelaw, which are not used.
    """

    stages: dict[str, tuple[int, int, int]]
    merges: tuple[int, int]
    rate: float
    seconds_left: float | None
    failures: list[tuple[str, str]]
    earlier: int

    @property
    def finished(self) -> bool:
        """True if every artifact exists."""
        return all(done == jobs for done, _, jobs in self.stages.values())

    def line(self) -> str:
        """Progress in one line, for a log."""
        parts = [
            f"{TITLES[stage]} {done} of {jobs}"
            for stage, (done, _, jobs) in self.stages.items()
            if stage in ("base", "expert", "evaluate") and jobs
        ]
        return ", ".join([*parts, self._merges(), *self._rest()])

    def text(self) -> str:
        """Progress as a table, for a terminal."""
        lines = [
            f"{TITLES[stage]:<14}{done:>6} of {jobs:<6}{f'{running} running' if running else ''}"
            for stage, (done, running, jobs) in self.stages.items()
            if jobs
        ]
        lines += [self._merges(), *self._rest()]
        lines += [f"failed: {name}: {line}" for name, line in self.failures]
        if self.earlier:
            lines.append(
                f"{self.earlier} artifacts were made by another version of mergelaw and are not "
                "used; `mergelaw gc` lists them"
            )
        return "\n".join(lines)

    def _merges(self) -> str:
        rate = f", {self.rate:.0f} a minute" if self.rate else ""
        return f"merges measured {self.merges[0]:,} of {self.merges[1]:,}{rate}"

    def _rest(self) -> list[str]:
        if self.finished:
            return ["all done"]
        if self.seconds_left is None:
            return ["time left unknown"]
        return [f"about {duration(self.seconds_left)} left"]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "stages": {
                stage: {"finished": done, "running": running, "jobs": jobs}
                for stage, (done, running, jobs) in self.stages.items()
            },
            "merges": {"measured": self.merges[0], "planned": self.merges[1]},
            "merges_per_minute": self.rate,
            "seconds_left": self.seconds_left,
            "failures": [{"artifact": name, "error": line} for name, line in self.failures],
            "of_other_versions": self.earlier,
        }


def duration(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(study: Study) -> Progress:
    """Progress of a study, from its results folder alone."""
    stages: dict[str, list[int]] = {stage: [0, 0, 0] for stage in TITLES}
    made, missing, running = [], [], []
    for artifact in study.by_path.values():
        counts = stages[artifact.stage]
        counts[2] += 1
        if study.made(artifact):
            counts[0] += 1
            made.append(artifact)
            continue
        missing.append(artifact)
        if is_running(study.results / artifact.path):
            counts[1] += 1
            running.append(artifact)
    measured, planned, rate = merges_measured(study)
    return Progress(
        {stage: (counts[0], counts[1], counts[2]) for stage, counts in stages.items()},
        (measured, planned),
        rate,
        seconds_left(study, made, missing, max(len(running), 1)),
        [*failures(study, (a for a in missing if a not in running))],
        sum(1 for _ in earlier_artifacts(study.results)),
    )


def is_running(output: Path) -> bool:
    """True if a process makes this artifact now."""
    if not output.with_name(f".{output.name}.work").exists():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            return False
    except (Timeout, OSError):
        return True


def merges_measured(study: Study) -> tuple[int, int, float]:
    """Merges measured, merges planned, and merges a minute of the shards that run."""
    measured = planned = 0
    rate = 0.0
    for artifact in study.evals.values():
        merges = sum(row[0] > 0 for row in artifact.rows)
        planned += merges
        if study.made(artifact):
            measured += merges
            continue
        name, domains = artifact.path.rpartition("/")[2], len(study.config.domains)
        cells = 0
        for file in (study.results / "cells" / str(artifact.base)).glob(f"{name}-*.jsonl"):
            count, last = file.read_bytes().count(b"\n"), file.stat().st_mtime
            start = int(file.stem.removeprefix(f"{name}-").partition("-")[0], 16) / 1e9
            cells += count
            if time.time() - last < ACTIVE and last > start:
                rate += 60 * count / domains / (last - start)
        measured += min(cells // domains, merges)
    return measured, planned, rate


def seconds_left(
    study: Study, made: Iterable[Artifact], missing: list[Artifact], workers: int
) -> float | None:
    """Seconds for the missing jobs from those of finished ones; None if a kind has none."""
    times: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for artifact in made:
        for kind in ((artifact.stage, artifact.base), (artifact.stage, None)):
            if len(times[kind]) < SAMPLED:
                times[kind].append(job_seconds(study, artifact))
    total = 0.0
    for artifact in missing:
        known = times.get((artifact.stage, artifact.base)) or times.get((artifact.stage, None))
        if known:
            total += sum(known) / len(known) * max(len(artifact.rows), 1)
        elif artifact.stage in ("base", "expert", "evaluate"):
            return None
    return total / workers


def job_seconds(study: Study, artifact: Artifact) -> float:
    """Wall seconds of a finished job; of an evaluation, a merge that it measured."""
    entry = lineage.read(study.results / artifact.path)
    facts, seconds = entry["facts"], float(entry["wall_seconds"])
    if not artifact.rows:
        return seconds
    share = facts.get("measured", 0) / max(facts.get("cells", 0), 1)
    return seconds / max(share * len(artifact.rows), 1)


def failures(study: Study, missing: Iterable[Artifact]) -> Iterable[tuple[str, str]]:
    """Missing artifacts whose log ends with an error, and that line."""
    for artifact in missing:
        log = study.results / "logs" / f"{artifact.path}.log"
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines and ERROR.search(lines[-1]):
            yield artifact.path, lines[-1].removeprefix("mergelaw: error: ")


def earlier_artifacts(results: Path) -> Iterable[Path]:
    """Artifacts whose lineage another version of mergelaw wrote."""
    for mark in results.glob(f"*/**/*@*/{LINEAGE}"):
        head = mark.read_text(encoding="utf-8", errors="replace")
        schema = re.search(r'^ "schema": (\d+)', head, re.MULTILINE)
        if schema and int(schema[1]) != lineage.SCHEMA:
            yield mark.parent


def show_progress(study: Study, write: Callable[[str], Any]) -> threading.Event:
    """Write a line of progress every minute, from a thread, until the event is set."""
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(LINE_EVERY):
            try:
                write(f"mergelaw: {time.strftime('%H:%M')}: {progress(study).line()}")
            except (MergelawError, OSError):  # what is half written now is whole in a minute
                continue

    threading.Thread(target=show, daemon=True).start()
    return ended
