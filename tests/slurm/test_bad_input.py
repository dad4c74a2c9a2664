"""What SLURM does not have is one line, before anything is submitted."""

import shutil

import pytest
from clones import Clone
from studies import ready_config, records, write_jsonl

import models
from mergelaw.errors import MergelawError
from mergelaw.workflow import slurm
from mergelaw.workflow.resources import Hardware


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        ({"slurm_partition": "night"}, "slurm_partition is 'night', which SLURM does not have; give one of main, gpus, bare"),
        ({"gpu_partition": "night"}, "gpu_partition is 'night', which SLURM does not have"),
        ({"gpu_partition": "bare"}, "partition bare has no GPUs, gpus_per_node is 4; name another as gpu_partition, or lower"),
        ({"gpus_per_node": 8}, "partition main has at most 4 GPUs in a node, gpus_per_node is 8"),
        ({"max_runtime": 4000}, "max_runtime is 4000 minutes, partition main allows 2880; lower it"),
        ({"slurm_account": "nobody"}, "slurm_account is 'nobody', yours are research"),
    ],
)  # fmt: skip
def test_what_the_profile_names_and_slurm_has_not(profile, line):
    hardware = Hardware(**{"gpus_per_node": 4} | profile)
    with pytest.raises(MergelawError, match=r"^profile: ") as caught:
        slurm.check(hardware, gpu_jobs=True)
    assert line in str(caught.value)


def test_what_slurm_has_is_accepted():
    whole = Hardware(gpus_per_node=4, slurm_account="research", gpu_partition="gpus")
    slurm.check(whole, gpu_jobs=True)
    slurm.check(Hardware(gpus_per_node=8, slurm_partition="bare"), gpu_jobs=False)
    slurm.check(Hardware(gpus_per_node=0, slurm_partition="bare"), gpu_jobs=True)


@pytest.fixture
def place(tmp_path) -> Clone:
    models.write_checkpoint(tmp_path / "models" / "base", dtype="float32")
    for domain in ("sums", "tales", "riddles"):
        write_jsonl(tmp_path / "data" / f"{domain}.jsonl", records(domain))
    config = ready_config(tmp_path) | {"experts": {"sums": {}}}
    return Clone(tmp_path, config)


def refused(place: Clone, line: str, **more: str) -> None:
    run = place.snakemake(**more)
    assert run.status == 1
    assert "Traceback" not in run.output and "submitted" not in run.output
    (found,) = run.errors()
    assert line in found
    assert not list(place.results.rglob("*@*"))


def test_gpu_rules_on_a_cluster_without_gpus_submit_nothing(place):
    place.edit({"gpu_partition: gpus": "gpu_partition: bare"})
    refused(place, "partition bare has no GPUs")


def test_without_slurm_nothing_is_begun(place, tmp_path):
    """As on a laptop: everything else is there, SLURM's commands are not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("snakemake", "mergelaw", "python3", "bash", "sh", "which", "env", "git"):
        (folder / name).symlink_to(shutil.which(name))
    refused(place, "sbatch: no such command, so there is no SLURM here", PATH=str(folder))


def test_a_model_that_fits_no_node_is_refused_while_the_workflow_is_read(place):
    place.edit({"gpu_memory_gb: 80": "gpu_memory_gb: 1"})
    run = place.snakemake("--dry-run")
    assert run.status == 1
    (line,) = run.errors()
    assert "the profile's nodes have 4 of 1 GB" in line
