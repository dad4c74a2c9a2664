"""Run commands in forks of a process that has imported torch and transformers already.

These imports take 5 s of processor time, and a local run has a hundred commands. It starts a server
and names its address in the environment. A command hands over its arguments, environment, folder
and streams, and waits for the exit status. When one end is killed, so is the other.
"""

import atexit
import ctypes
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ADDRESS = "MERGELAW_FORKSERVER"


def start() -> subprocess.Popen[bytes]:
    """Start a server for the commands that this process starts. It ends with this process."""
    # A socket's address has room for 108 bytes, so it cannot lie in the results folder.
    os.environ[ADDRESS] = address = f"{tempfile.mkdtemp(prefix='mergelaw-')}/socket"
    program = "from mergelaw.cli import serve; serve()"
    # The terminal's Ctrl-C is for the commands, which end their forks.
    server = subprocess.Popen(
        [sys.executable, "-c", program, address], stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(server.communicate)  # waits, so that its processor time counts as ours
    return server


def run(words: list[str]) -> int | None:
    """Run a command in a fork. Returns its exit status, or None where no server answers."""
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
        answer = connection.makefile().read()
    status = int(answer or -signal.SIGKILL)
    if status >= 0:
        return status
    print(f"mergelaw: error: killed by {signal.Signals(-status).name}; rerun", file=sys.stderr)
    return 128 - status


def serve(address: str, main: Callable[[], Any]) -> None:
    """Import the libraries, then run ``main`` in a fork for each command.

    Returns when standard input ends.
    """
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
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            if sys.stdin in ready:
                return shutil.rmtree(Path(address).parent)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                fork_command(connection)
                return main()
            connection.close()


def fork_command(connection: socket.socket) -> None:
    """Return in a new fork, ready to run the command; this process sends its status and exits."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    words, environment, folder = json.loads(connection.makefile().readline())
    ended, alive = os.pipe()
    command = os.fork()
    if command:
        os.close(alive)
        ready, _, _ = select.select([connection.fileno(), ended], [], [])
        if ended not in ready:  # the waiting command was killed
            os.kill(command, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        with suppress(OSError):
            connection.sendall(str(status).encode())
        os._exit(0)
    connection.close()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["mergelaw", *words]
