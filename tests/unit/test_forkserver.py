"""A command run by a fork is the same command: streams, folder, environment, exit status, end."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import jobs
from mergelaw.workflow import forkserver

MERGELAW = [sys.executable, "-c", "from mergelaw.cli import main; main()"]


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute for nothing")


@pytest.fixture(scope="module")
def server():
    process, address = started()
    yield address
    ended(process, address)


def started() -> tuple[subprocess.Popen[bytes], str]:
    process = forkserver.start()
    address = os.environ.pop(forkserver.ADDRESS)
    wait_for(Path(address).exists)
    return process, address


def ended(process, address: str) -> None:
    process.stdin.close()
    assert process.wait(10) == 0
    assert not Path(address).parent.exists()


def environment(address: str, **more: str) -> dict[str, str]:
    return {**os.environ, forkserver.ADDRESS: address, **more}


def corpus(folder: Path, output: str, documents: int) -> list[str]:
    """A command that builds a corpus; ``output`` is relative to its working directory."""
    source = {"synthetic": "algebra"}
    recipe = {"source": source, "train_documents": documents, "eval_documents": 5, "seed": 0}
    sources = {"split": "train", "recipe": recipe}
    job = jobs.write(folder / "job.json", "corpus", output, {}, sources=sources)
    return [*MERGELAW, "stage", "corpus", str(job)]


def forks(address: str) -> list[psutil.Process]:
    """Living processes that the server has forked."""
    family = [p for p in psutil.process_iter(["cmdline"]) if address in (p.info["cmdline"] or ())]
    return [process for process in family if process.parent() in family]


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--version"], 0), (["nonsense"], 2), (["stage", "fit", "nowhere"], 1)],
)
def test_it_prints_and_ends_as_by_itself(server, tmp_path, words, status):
    runs = [
        subprocess.run([*MERGELAW, *words], env=env, capture_output=True, cwd=tmp_path, check=False)
        for env in (environment(server), dict(os.environ))
    ]
    assert runs[0].returncode == runs[1].returncode == status
    assert (runs[0].stdout, runs[0].stderr) == (runs[1].stdout, runs[1].stderr)
    assert runs[0].stdout or runs[0].stderr


def test_it_works_in_the_commands_folder_and_environment(server, tmp_path):
    (tmp_path / "study.yaml").write_text("name: ${NOT_EXPANDED}")
    program = "import os, mergelaw.cli as c; c.main()"
    run = [sys.executable, "-c", program, "config", "check", "study.yaml"]
    ended = subprocess.run(
        run, env=environment(server), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and ended.stderr.startswith("mergelaw: error: study.yaml")
    assert subprocess.run(
        corpus(tmp_path, "here", 5), env=environment(server), cwd=tmp_path, check=True
    )
    assert (tmp_path / "here" / "lineage.json").exists()


def test_the_fork_dies_with_its_command(server, tmp_path):
    command = subprocess.Popen(
        corpus(tmp_path, str(tmp_path / "big"), 10**6), env=environment(server)
    )
    wait_for(lambda: forks(server))
    command.kill()
    command.wait()
    wait_for(lambda: not forks(server))
    assert not (tmp_path / "big").exists()


def test_the_command_fails_with_its_fork(server, tmp_path):
    """In one line, whichever of its two processes is killed: the command's or the one that waits."""
    for place in (0, -1):
        command = subprocess.Popen(
            corpus(tmp_path, str(tmp_path / f"big{place}"), 10**6),
            env=environment(server), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for((tmp_path / f".big{place}.work").exists)
        sorted(forks(server), key=lambda process: process.create_time())[place].kill()
        _, errors = command.communicate(timeout=10)
        assert command.returncode == 128 + signal.SIGKILL
        line = errors.splitlines()[-1]
        assert line.startswith("mergelaw: error:") and "SIGKILL" in line
        wait_for(lambda: not forks(server))


def test_without_a_server_the_command_runs_by_itself(tmp_path):
    nobody = environment(str(tmp_path / "socket"))
    assert (
        subprocess.run(
            [*MERGELAW, "--version"], env=nobody, capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.mark.parametrize("killed", [False, True])
def test_a_fork_outlives_the_server(tmp_path, killed):
    process, address = started()
    command = subprocess.Popen(
        corpus(tmp_path, str(tmp_path / "some"), 3000), env=environment(address)
    )
    wait_for(lambda: len(forks(address)) == 2)
    if killed:
        process.kill()
        shutil.rmtree(Path(address).parent)
    else:
        process.stdin.close()
    assert command.wait(120) == 0
    assert (tmp_path / "some" / "lineage.json").exists()
    assert process.wait(10) == (-signal.SIGKILL if killed else 0)
    assert not Path(address).parent.exists()


def test_a_server_that_is_killed_before_it_reads_a_command_is_not_needed(tmp_path):
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [*MERGELAW, "--version"]
        run = subprocess.Popen(command, env=environment(address), stdout=subprocess.PIPE)
        select.select([listener], [], [], 60)
        time.sleep(0.5)  # the command is sent, and waits
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and output.startswith(b"mergelaw ")


def test_a_long_folder_for_temporary_files_is_no_obstacle(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 20) / ("longer" * 20)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    process, address = started()
    subprocess.run([*MERGELAW, "--version"], env=environment(address), check=True)
    ended(process, address)
