"""How well `mergelaw estimate` tells what a study took: predicted against realised, by stage.

    python benchmarks/estimate.py config/config.yaml

The study has to have run. Of each base it predicts the jobs by rates that were measured on the
other bases alone, and, in the last lines, all of them by all rates. Seconds are processor time
where processors did the work, wall time on GPUs.
"""

import sys
from collections import defaultdict
from pathlib import Path

from mergelaw import config
from mergelaw.artifacts import lineage
from mergelaw.workflow.estimate import Rates, measured, measured_share
from mergelaw.workflow.progress import TITLES
from mergelaw.workflow.study import Study


def compare(study: Study, rates: Rates, base: str | None) -> dict[str, list[float]]:
    """(jobs, predicted seconds, realised seconds) by stage, of one base's jobs or of all."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for artifact in study.by_path.values():
        if not study.made(artifact) or base not in (None, artifact.base):
            continue
        entry, stage = lineage.read(study.results / artifact.path), artifact.stage
        share = measured_share(entry)
        if not share or stage not in rates.stages:
            continue
        row = found[stage]
        row[0] += 1
        row[1] += rates.of_stage(stage).start_seconds + share * rates.working(study, artifact)
        row[2] += entry["wall_seconds" if rates.gpus_per_node else "cpu_seconds"]
    return found


def show(title: str, found: dict[str, list[float]]) -> None:
    found["in all"] = [sum(column) for column in zip(*found.values(), strict=True)]
    for stage, (jobs, predicted, realised) in found.items():
        name = TITLES.get(stage, stage)
        ratio = predicted / realised if realised else float("nan")
        print(f"{title:<12}{name:<14}{jobs:>5.0f}{predicted:>11.1f}{realised:>11.1f}{ratio:>8.2f}")
        title = ""


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    study = Study(config.load(Path(sys.argv[1])))
    bases = study.config.bases
    print(f"{'base':<12}{'stage':<14}{'jobs':>5}{'predicted':>11}{'realised':>11}{'ratio':>8}")
    if len(bases) > 1:
        for base in bases:
            others = {name: settings for name, settings in bases.items() if name != base}
            rest = Study(study.config.model_copy(update={"bases": others, "merges": {}}))
            show(base, compare(study, measured(rest), base))
    show("all, by all", compare(study, measured(study), None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
