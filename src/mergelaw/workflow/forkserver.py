"""A process that has imported the libraries already, and is forked for each job of a local run.

Importing torch, transformers and TRL takes seconds, which a study of small models would spend a
hundred times. So a run on one machine starts one such process; a command that finds its address
in the environment hands over its arguments, environment, working directory and standard streams,
waits for the exit status, and runs by itself where nobody answers. Both ends of the connection
are held by the command and by its fork alone: when either dies, the other one does.

    python -m mergelaw.workflow.forkserver ADDRESS      ends when its standard input does
"""

import atexit
import contextlib
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
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

ADDRESS = "MERGELAW_FORKSERVER"
IMPORTED = (
    "datasets",
    "mergelaw.merging.kernels",
    "pandas",
    "pyarrow.parquet",
    "safetensors.torch",
    "torch",
)


def start() -> subprocess.Popen[bytes]:
    """Start a server for the commands that this process will start; it ends with this process."""
    # A socket's address has little room, so it does not lie in the results folder.
    address = f"{tempfile.mkdtemp(prefix='mergelaw-')}/socket"
    command = [sys.executable, "-m", "mergelaw.workflow.forkserver", address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE)
    os.environ[ADDRESS] = address

    def end() -> None:
        server.communicate()  # so that what its forks used counts as this process's
        shutil.rmtree(Path(address).parent, ignore_errors=True)  # if it was killed

    atexit.register(end)
    return server


# -- the command's side ------------------------------------------------------------------------


def hand_over(words: list[str]) -> int | None:
    """Have the command ``words`` run by a fork; its exit status, or None: nobody is there."""
    address = os.environ.pop(ADDRESS, None)
    if address is None:
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        job = {"words": words, "environment": dict(os.environ), "folder": str(Path.cwd())}
        try:
            connection.connect(address)
            socket.send_fds(connection, [b"fds"], [0, 1, 2])
            connection.sendall(json.dumps(job).encode() + b"\n")
        except OSError:  # still importing, or gone
            return None
        status = connection.makefile("rb").read()
    return int(status) if status else 128 + signal.SIGKILL


# -- the server's side -------------------------------------------------------------------------


def serve(address: str) -> None:
    """Import, then fork for each connection."""
    from mergelaw.cli.app import quiet

    quiet()
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    gc.freeze()  # what was imported is never garbage, and stays shared
    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", DeprecationWarning)  # that threads run: none that holds a lock
    with socket.socket(socket.AF_UNIX) as listener:
        unfinished = address + ".new"
        listener.bind(unfinished)
        listener.listen()
        os.rename(unfinished, address)  # noqa: PTH104 - nobody connects before it listens
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                shutil.rmtree(Path(address).parent)
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                with contextlib.suppress(OSError):
                    work(connection)
                os._exit(1)
            connection.close()


def reap(*_: object) -> None:
    """Take leave of forks that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def work(connection: socket.socket) -> None:
    """Run the command of a connection in this fork, send its exit status, end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _, streams, _, _ = socket.recv_fds(connection, 3, 3)
    job = json.loads(connection.makefile("rb").readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["mergelaw", *job["words"]]
    threading.Thread(target=end_with, args=[connection], daemon=True).start()
    status: Any = 0
    try:
        from mergelaw.cli.app import main

        main()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.sendall(str(int(status)).encode())
    os._exit(0)


def end_with(connection: socket.socket) -> None:
    """The command that waits for this fork was killed: so is the fork."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
