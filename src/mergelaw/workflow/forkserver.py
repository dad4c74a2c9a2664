"""Run commands in forks of a process that has already imported torch and transformers.

These imports take 5 s of processor time, and a local run has a hundred commands. The run puts the
server's address into the environment. A command sends its arguments, environment, folder and
streams, and waits for the exit status. If either end is killed, so is the other.
"""

import atexit
import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children, get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ADDRESS = "MERGELAW_FORKSERVER"
FORKS = get_context("fork")


def start() -> subprocess.Popen[bytes]:
    """Start a server for the commands of this process. It ends with this process."""
    # A socket's address has at most 108 bytes, so it is not in the results folder, nor in a TMPDIR
    # with a long path.
    near = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 80 else "/tmp"
    os.environ[ADDRESS] = address = f"{tempfile.mkdtemp(prefix='mergelaw-', dir=near)}/socket"
    program = "from mergelaw.cli import serve; serve()"
    # Ctrl-C in the terminal ends the commands, which end their forks.
    server = subprocess.Popen(
        [sys.executable, "-c", program, address], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(server.communicate)  # waits, so that its processor time counts as ours
    return server


def run(words: list[str]) -> int | None:
    """Run a command in a fork. Returns its exit status, or None if no server answers."""
    address = os.environ.pop(ADDRESS, None)
    if address is None:
        return None
    job = json.dumps([words, dict(os.environ), str(Path.cwd())])
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [b"0"], [0, 1, 2])
            connection.sendall(job.encode() + b"\n")
        except OSError:  # the server is still importing, or has ended
            return None
        try:
            answer = connection.makefile().readline()
        except ConnectionResetError:  # the server was killed before it read the job
            return None
    status = int(answer or -signal.SIGKILL)
    if status >= 0:
        return status
    print(f"mergelaw: error: killed by {signal.Signals(-status).name}; rerun", file=sys.stderr)
    return 128 - status


def serve(address: str, main: Callable[[], Any]) -> None:
    """Import the libraries, then run ``main`` in a fork for each command until stdin ends."""
    import datasets  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from mergelaw.evaluation import shard  # noqa: F401
    from mergelaw.merging import kernels  # noqa: F401
    from mergelaw.models import finetune  # noqa: F401

    gc.freeze()  # imported objects are never garbage, and stay shared with the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while 0 not in wait([listener, 0]):  # standard input
            active_children()  # reaps ended forks
            connection, _ = listener.accept()
            FORKS.Process(target=supervise, args=[listener, connection, main]).start()
            connection.close()
    shutil.rmtree(Path(address).parent)


def supervise(listener: socket.socket, connection: socket.socket, main: Callable[[], Any]) -> None:
    """Run a connection's command in a fork and send its exit status; kill it if the client ends."""
    listener.close()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    job = json.loads(connection.makefile().readline())
    process = FORKS.Process(target=run_here, args=[main, streams, job])
    process.start()
    if process.sentinel not in wait([process.sentinel, connection]):
        process.kill()
    process.join()
    with suppress(OSError):  # the command is gone
        connection.sendall(f"{process.exitcode}\n".encode())


def run_here(main: Callable[[], Any], streams: list[int], job: list[Any]) -> None:
    """Run a command in this process, with its streams, environment and folder."""
    words, environment, folder = job
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the supervisor
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["mergelaw", *words]
    main()
