"""Progress of a study: finished and running jobs, remaining time, failures."""

import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelaw.artifacts import lineage
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
    "learn": "coefficients",
    "gradients": "gradients",
    "evaluate": "evaluations",
    "fit": "law fits",
    "report": "report",
    "merge": "merges",
}
LONG = ("base", "expert", "evaluate")  # the stages that take most of the time
ERROR = re.compile(r"^mergelaw: error: |^\w*(Error|Exception|Interrupt)\b")
ACTIVE = 120  # seconds: a shard with a cell more recent than this is running
LINE_EVERY = 60  # seconds between lines of progress in a log
SAMPLED = 20  # finished jobs of a kind whose times are read


@dataclass(frozen=True)
class Progress:
    """Progress of a study at one moment.

    Attributes:
        stages: numbers of finished, running and all jobs, by stage in the pipeline's order.
        merges_measured, merges_planned: without bases and baselines.
        merges_per_minute: of the running evaluations; 0 if none runs.
        seconds_left: of the remaining jobs, with as many in parallel as now; None if unknown.
        failures: the last line of the log, by artifact.
    """

    stages: dict[str, dict[str, int]]
    merges_measured: int
    merges_planned: int
    merges_per_minute: float
    seconds_left: float | None
    failures: dict[str, str]

    def line(self) -> str:
        """Progress in one line, for a log."""
        counts = [
            f"{TITLES[stage]} {self.stages[stage]['finished']} of {self.stages[stage]['jobs']}"
            for stage in LONG
        ]
        return ", ".join([*counts, *self._rest()])

    def text(self) -> str:
        """Progress as a table, for a terminal."""
        rows = [
            f"{TITLES[stage]:<14}{count['finished']:>6} of {count['jobs']:<6}"
            + (f"{count['running']} running" if count["running"] else "")
            for stage, count in self.stages.items()
            if count["jobs"]
        ]
        failed = [f"failed: {path}: {line}" for path, line in self.failures.items()]
        return "\n".join([*rows, *self._rest(), *failed])

    def _rest(self) -> list[str]:
        rate = f", {self.merges_per_minute:.0f} a minute" if self.merges_per_minute else ""
        merges = f"merges measured {self.merges_measured:,} of {self.merges_planned:,}{rate}"
        if all(count["finished"] == count["jobs"] for count in self.stages.values()):
            return [merges, "all done"]
        if self.seconds_left is None:
            return [merges, "time left unknown"]
        return [merges, f"about {duration(self.seconds_left)} left"]

    def to_dict(self) -> dict[str, Any]:
        """Progress as JSON values."""
        return asdict(self)


def duration(seconds: float) -> str:
    """A duration in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(study: Study) -> Progress:
    """Progress of a study, read from its results folder only."""
    stages = {stage: {"finished": 0, "running": 0, "jobs": 0} for stage in TITLES}
    finished, missing, failed = [], [], []
    for artifact in study.by_path.values():
        counts = stages[artifact.stage]
        counts["jobs"] += 1
        if study.made(artifact):
            counts["finished"] += 1
            finished.append(artifact)
            continue
        missing.append(artifact)
        if _is_running(study.results / artifact.path):
            counts["running"] += 1
        else:
            failed.append(artifact)
    workers = max(sum(counts["running"] for counts in stages.values()), 1)
    measured, planned, rate = _merges(study)
    left = _seconds_left(study, finished, missing, workers, rate)
    return Progress(stages, measured, planned, rate, left, dict(_failures(study, failed)))


def _is_running(output: Path) -> bool:
    """True if a process is making this artifact."""
    if not output.with_name(f".{output.name}.work").exists():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _merges(study: Study) -> tuple[int, int, float]:
    """Numbers of merges measured and planned, and merges a minute of the running shards."""
    measured = planned = 0
    rate, stores = 0.0, defaultdict[tuple[str | None, str], list[Path]](list)
    for file in study.results.glob("cells/*/*-*-*.jsonl"):
        stores[file.parent.name, file.stem.rsplit("-", 2)[0]].append(file)
    for artifact in study.measurements:
        merges = sum(row[0] > 0 for row in artifact.rows)
        planned += merges
        if study.made(artifact):
            measured += merges
            continue
        name, domains = artifact.path.rpartition("/")[2], len(study.config.domains)
        cells = 0
        for file in stores[artifact.base, name]:
            count, last = file.read_bytes().count(b"\n"), file.stat().st_mtime
            start = int(file.stem.rsplit("-", 2)[1], 16) / 1e9
            cells += count
            if time.time() - last < ACTIVE and last > start:
                rate += 60 * count / domains / (last - start)
        measured += min(cells // domains, merges)
    return measured, planned, rate


def _seconds_left(
    study: Study,
    finished: Iterable[Artifact],
    missing: Iterable[Artifact],
    workers: int,
    rate: float,
) -> float | None:
    """Seconds for the missing jobs, from finished jobs of their stage and, if possible, their base.

    Evaluations are counted in merges; before one is finished, at the running ones' ``rate``, merges
    a minute. None if another slow stage has no finished job.
    """
    times: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for artifact in finished:
        for kind in ((artifact.stage, artifact.base), (artifact.stage, None)):
            if len(times[kind]) < SAMPLED:
                times[kind].append(_unit_seconds(study, artifact))
    total = 0.0
    for artifact in missing:
        seconds = times.get((artifact.stage, artifact.base)) or times.get((artifact.stage, None))
        if seconds:
            total += sum(seconds) / len(seconds) * max(len(artifact.rows), 1)
        elif artifact.stage == "evaluate" and rate:
            total += 60 * workers / rate * len(artifact.rows)
        elif artifact.stage in LONG:
            return None
    return total / workers


def _unit_seconds(study: Study, artifact: Artifact) -> float:
    """Wall seconds of a finished job, or of a merge that it measured."""
    entry = lineage.read(study.results / artifact.path)
    facts, merges = entry["facts"], len(artifact.rows)
    if "measured" in facts:
        merges = round(merges * facts["measured"] / max(facts["cells"], 1))
    return float(entry["wall_seconds"]) / max(merges, 1)


def _failures(study: Study, artifacts: Iterable[Artifact]) -> Iterator[tuple[str, str]]:
    """Artifacts whose log ends with an error, with that line."""
    for artifact in artifacts:
        log = study.results / "logs" / f"{artifact.path}.log"
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines and ERROR.search(lines[-1]):
            yield artifact.path, lines[-1].removeprefix("mergelaw: error: ")


def show_progress(study: Study, ended: threading.Event) -> None:
    """Write a line of progress to stderr every minute, from a thread, until the event is set."""

    def show() -> None:
        while not ended.wait(LINE_EVERY):
            with suppress(MergelawError, OSError):  # what is being written is whole next time
                line = f"mergelaw: {time.strftime('%H:%M')}: {progress(study).line()}"
                print(line, file=sys.stderr, flush=True)

    threading.Thread(target=show, daemon=True).start()
