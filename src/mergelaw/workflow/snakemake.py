"""Interface to Snakemake: inputs, files and resources of the rules, and a run's start and end.

Only this module and rules/common.smk use Snakemake's objects.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from snakemake.io import ancient

from mergelaw.artifacts.run_lock import lock_results
from mergelaw.config import parse, read_files
from mergelaw.errors import MergelawError, system_message
from mergelaw.evaluation.recipe import BASELINES
from mergelaw.workflow import forkserver, progress, resources, slurm
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.cost import Work, work_of
from mergelaw.workflow.job import job_file, write_job
from mergelaw.workflow.study import Study

Function = TypeVar("Function", bound=Callable[..., Any])


def fail(message: str) -> NoReturn:
    """End the run with one line."""
    sys.exit(f"mergelaw: error: {message}")


@contextmanager
def one_line_errors() -> Any:
    """Turn errors that a user can fix into one line."""
    try:
        yield
    except MergelawError as error:
        fail(str(error))
    except OSError as error:
        fail(system_message(error))


class Pipeline:
    """A study in the terms of Snakemake's rules.

    ``workflow`` is Snakemake's workflow object, with its configuration files and ``--config``.
    """

    def __init__(self, workflow: Any):
        self.workflow = workflow
        with one_line_errors():
            # Read again as YAML 1.2, which refuses repeated keys; Snakemake reads YAML 1.1.
            settings = workflow.config_settings.config_args
            self.config = read_files(workflow.configfiles, settings)
            if "openrlhf_python" in self.config:  # set by a profile, as it depends on the machine
                os.environ["MERGELAW_OPENRLHF_PYTHON"] = str(self.config.pop("openrlhf_python"))
            where = " + ".join(map(str, workflow.configfiles))
            self.study = Study(parse(self.config, where))
            defaults = workflow.resource_settings.default_resources or {}
            values = {name: getattr(value, "raw", value) for name, value in defaults.items()}
            self.hardware = resources.Hardware.of(values)
            known = self.study.known.values()
            self.roles = {role for one in known for role in (*one.inputs, *one.checks)}
            self.works: list[Work] = []
            if self.hardware and workflow.is_main_process:
                missing = [a for a in self.study.by_path.values() if not self.study.made(a)]
                self.works = [work_of(self.study, artifact) for artifact in missing]
                for work in self.works:
                    for problem in resources.problems(work, self.hardware):
                        raise MergelawError(problem)
        self._shown = threading.Event()  # set when no more lines of progress are wanted
        # On one machine the profile makes jobs take turns on its GPUs.
        self.one_machine = not self.hardware and shutil.which("nvidia-smi") is not None

    def paths(self, pattern: str) -> "Paths":
        """Files of the artifacts whose path in the results folder matches this pattern."""
        return Paths(self, pattern)

    def tracked(self, artifact: Artifact) -> str:
        """The file by which Snakemake tracks an artifact."""
        return f"{self.study.results}/{artifact.path}/lineage.json"

    def targets(self) -> list[str]:
        """Tracked files of all artifacts that the study requests."""
        return [self.tracked(artifact) for artifact in self.study.targets()]

    def gradients(self) -> list[str]:
        """Tracked files of the gradients of all bases."""
        return [self.tracked(artifact) for artifact in self.study.gradients.values()]

    def names(self, *artifacts: Artifact) -> str:
        """Regular expression of these artifacts' last names, for a wildcard's constraint."""
        names = {re.escape(artifact.folder.rpartition("/")[2]) for artifact in artifacts}
        return "|".join(sorted(names)) or "(?!)"

    # -- start and end of a run ----------------------------------------------------------------

    def start(self) -> None:
        """Lock the results folder, check the conditions of every job, write the jobs."""
        with one_line_errors():
            if self.workflow.executor_plugin.name == "slurm":
                slurm.check(self.hardware, any(work.counts for work in self.works))
            missing = [a for a in self.study.by_path.values() if not self.study.made(a)]
            if any(a.recipe.get("training", {}).get("trainer") == "openrlhf" for a in missing):
                from mergelaw.models import openrlhf

                openrlhf.interpreter()
            self._lock = lock_results(self.study.results)
            for artifact in self.study.known.values():
                mark = Path(self.tracked(artifact))
                if not mark.exists():
                    write_job(self.study.results, artifact)
                elif mark.stat().st_mtime > time.time():  # written or copied under another clock
                    os.utime(mark)  # Snakemake refuses an output that is older than its inputs
            here = self.workflow.local_exec and not self._deploys()
            if here and sys.platform == "linux":  # jobs run with this Python
                self._forks = forkserver.start()
        if not sys.stderr.isatty():
            progress.show_progress(self.study, self._shown)

    def _deploys(self) -> bool:
        return bool(self.workflow.deployment_settings.deployment_method)

    def succeed(self) -> None:
        """Print the summary of the results, with the path of the report."""
        from mergelaw.workflow.results import summary, summary_text

        self._shown.set()
        if self.study.made(self.study.report):  # not after --until
            with one_line_errors():
                print(summary_text(summary(self.study)), file=sys.stderr)

    def report_the_rest(self) -> None:
        """After a failure, print what failed, then fit and report the measured cells."""
        self._shown.set()
        with one_line_errors():
            print(progress.progress(self.study).text(), file=sys.stderr)
        shards = [a for a in self.study.evals.values() if a.method != BASELINES]
        if not any(map(self.study.made, shards)):
            return
        with one_line_errors(), tempfile.NamedTemporaryFile("w", suffix=".json") as resolved:
            json.dump(self.config, resolved)
            resolved.flush()
            if subprocess.run(["mergelaw", "stage", "partial", resolved.name]).returncode:
                raise MergelawError(
                    f"{self.study.results}/partial: what was measured could not be reported; see "
                    "the error above"
                )


def with_signature(function: Function) -> Function:
    """Keep a function's signature, which Snakemake asks for at every call."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class Paths:
    """Inputs, outputs and resources of a rule, by the path of its artifacts."""

    def __init__(self, pipeline: Pipeline, pattern: str):
        self._pipeline = pipeline
        self._pattern = pattern
        self.output = f"<results>/{pattern}/lineage.json"
        self.log = f"<results>/logs/{pattern}.log"

    def _artifact(self, wildcards: Any) -> Artifact:
        return self._pipeline.study.known[self._pattern.format(**wildcards)]

    def input(self, role: str) -> Callable[[Any], list[Any]] | list[Any]:
        """Input function: the artifacts of a role. An existing path is valid at any age.

        Checks of an existing artifact are left out, because a check with a new domain would
        otherwise require every expert again. A role that no artifact has is no function: Snakemake
        would call it for every job.
        """
        if role not in self._pipeline.roles:
            return []

        @with_signature
        def inputs(wildcards: Any) -> list[Any]:
            artifact = self._artifact(wildcards)
            if role in artifact.checks and self._pipeline.study.made(artifact):
                return []
            return [ancient(self._pipeline.tracked(one)) for one in artifact.of_role(role)]

        return inputs

    @property
    def job(self) -> Callable[[Any], str]:
        """Params function: the path of the job's file."""

        @with_signature
        def job(wildcards: Any) -> str:
            return str(job_file(self._pipeline.study.results, self._artifact(wildcards)))

        return job

    @property
    def resources(self) -> dict[str, Callable[..., Any]]:
        """Resources that the jobs request; on one machine its GPU, if it has one."""
        pipeline = self._pipeline
        if pipeline.one_machine:
            return {"gpu": lambda wildcards: int(self._artifact(wildcards).on_gpu)}
        hardware = pipeline.hardware
        if hardware is None:
            return {}

        def resource(name: str) -> Callable[..., Any]:
            def value(wildcards: Any, threads: int, attempt: int) -> Any:
                work = work_of(pipeline.study, self._artifact(wildcards))
                return resources.ask(work, hardware, threads, attempt)[name]

            return value

        return {name: resource(name) for name in resources.ASKED}
