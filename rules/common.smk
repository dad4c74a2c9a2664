# The study behind the configuration, and the few helpers that rules use.
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mergelaw.cli import forkserver
from mergelaw.config import schema as mergelaw_config
from mergelaw.workflow import resources
from mergelaw.workflow import slurm
from mergelaw.errors import MergelawError, of_system
from mergelaw.artifacts.lineage import only_run, write_json
from mergelaw.workflow.study import Study

# What a profile may say besides, for it is about the machine: which Python OpenRLHF is installed for.
if "openrlhf_python" in config:
    os.environ.update(MERGELAW_OPENRLHF_PYTHON=str(config.pop("openrlhf_python")))
# For envs/main.yaml, which Snakemake copies before pip reads it.
os.environ.update(MERGELAW_ROOT=str(Path(workflow.basedir).parent))

try:
    for path in workflow.configfiles:
        mergelaw_config.read(path)  # Snakemake's own reader lets a key be given twice
    study = Study(mergelaw_config.parse(dict(config), " + ".join(map(str, workflow.configfiles))))
    study.by_path
    # What nodes have, as the profile says; nothing, where everything runs on this machine.
    settings = workflow.resource_settings.default_resources or {}
    hardware = resources.Hardware.of({n: getattr(v, "raw", v) for n, v in settings.items()})
    to_come = []
    if hardware and workflow.is_main_process:
        missing = [artifact for artifact in study.by_path.values() if not study.made(artifact)]
        to_come = [resources.need_of(study, artifact) for artifact in missing]
        resources.check(to_come, hardware)
except MergelawError as error:
    sys.exit(f"mergelaw: error: {error}")

# On one machine the jobs that would use its GPUs take turns, as its profile says.
turns = not hardware and shutil.which("nvidia-smi") is not None

# Of every failed job it would be said that a lineage.json which never was cannot be restored.
logger.addFilter(lambda record: "no backup found" not in str(record.msg))


pathvars:
    results=config.get("results", "results"),


wildcard_constraints:
    key="[0-9a-f]{8}",
    base="[^/@]+",
    method="[^/@]+",
    name="[^/@]+",


def tracked(paths):
    """The files that stand for artifacts, by path below the results folder."""
    return [f"{study.results}/{path}/lineage.json" for path in paths]


def needs(pattern):
    """Input function: what the artifact of this path is made from. A path that exists is right.

    What does not define an artifact that exists is left out: a check with one domain more would
    otherwise ask for every expert again.
    """

    def inputs(wildcards):
        made = study.by_path[pattern.format(**wildcards)]
        (lineage,) = tracked([made.path])
        needed = [*made.inputs.values(), *([] if Path(lineage).exists() else made.unkeyed.values())]
        return [ancient(path) for path in tracked(artifact.path for artifact in needed)]

    return inputs


class Arguments:
    """An artifact as arguments of its stage's command: ``@`` and a file of them, beside its log.

    A command line has no room for a thousand shards, and in a failed job's message it would bury
    what went wrong. The file is written when the command is, and not for jobs that do not run.
    """

    def __init__(self, artifact):
        self.artifact = artifact

    def __str__(self):
        made = self.artifact
        pairs = [("recipe", made.recipe_json)] if made.recipe_json != "{}" else []
        for name, artifact in [*made.inputs.items(), *made.unkeyed.items()]:
            flag, _, what = name.partition(":")
            path = f"{study.results}/{artifact.path}"
            if flag != "overlap":
                pairs.append((flag, f"{what}={path}" if flag == "task-vector" else path))
        pairs += [("rows", made.rows)] if made.rows else []
        pairs += [("output", f"{study.results}/{made.path}")]
        given = [word for name, value in pairs for word in (f"--{name}", value)]
        file = Path(f"{study.results}/logs/{made.path}.json")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, given)  # which a job of another run may be reading
        except OSError:  # a full disk, of which the command will tell
            return shlex.join(given)
        return shlex.quote(f"@{file}")


def options(pattern):
    """Params function: the arguments of the artifact's command."""
    return lambda wildcards: Arguments(study.by_path[pattern.format(**wildcards)])


def asks(pattern):
    """What an artifact's job asks a cluster for, as input functions by the resources' names.

    Where the profile names no hardware, on one machine, nothing but its GPUs, if it has any.
    """

    def asked(name):
        def value(wildcards, threads, attempt):
            made = study.by_path[pattern.format(**wildcards)]
            need = resources.need_of(study, made)
            return resources.ask(need, hardware, threads, attempt)[name]

        return value

    if turns:
        return {"gpu": lambda wildcards: int(study.by_path[pattern.format(**wildcards)].on_gpu)}
    return {name: asked(name) for name in resources.ASKED} if hardware else {}


def check_trainers():
    """Whether what an expert is still to be trained by is there."""
    for artifact in study.experts.values():
        trainer = artifact.recipe.get("training", {}).get("trainer")
        (lineage,) = tracked([artifact.path])
        if trainer == "openrlhf" and not Path(lineage).exists():
            from mergelaw.models import openrlhf

            openrlhf.interpreter()
            return


def start():
    """One run at a time on a results folder, from whatever working directory.

    What every training would fail for is said before the first job.
    """
    global run_lock, forks
    try:
        if workflow.executor_plugin.name == "slurm":
            status = workflow.executor_settings.status_command
            slurm.check(hardware, status, any(need.counts for need in to_come))
        check_trainers()
        run_lock = only_run(study.results)
        here = workflow.local_exec and not workflow.deployment_settings.deployment_method
        if here and sys.platform == "linux":  # where jobs run with this very Python
            forks = forkserver.start()
    except MergelawError as error:
        sys.exit(f"mergelaw: error: {error}")
    except OSError as error:
        sys.exit(f"mergelaw: error: {of_system(error)}")


def report_the_rest():
    """After a failure: fits and report of what there is, where a merge is measured."""
    merges = [artifact.path for artifact in study.evals.values() if "plan" in artifact.unkeyed]
    if not any(Path(path).exists() for path in tracked(merges)):
        return
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as resolved:
            json.dump(dict(config), resolved)
            resolved.flush()
            subprocess.run(["mergelaw", "partial", "--config", resolved.name])
    except OSError as error:
        sys.exit(f"mergelaw: error: {of_system(error)}")
