"""A real SLURM on one machine, from Debian's packages, without systemd and without GPUs.

munge, MariaDB, slurmdbd, slurmctld and one slurmd, all with files of their own in one folder. The
node declares GPUs that are links to /dev/null: SLURM counts and hands them out like any others. A
second node is declared and never started: its partition has no GPU. Needs root, for slurmd does,
and /etc/slurm/slurm.conf, for the jobs' inner srun reads no other.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGURATION = Path("/etc/slurm/slurm.conf")
PACKAGES = ("slurm-wlm", "slurmdbd", "mariadb-server", "munge")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacct")
GPUS = 4
PATIENCE = 120  # seconds for a daemon to answer

SLURM = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[2]}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
KillWait=5
PropagatePrioProcess=1
SchedulerParameters=sched_interval=2,batch_sched_delay=0
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=500000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=bare NodeAddr=127.0.0.1 Port={ports[4]} CPUs=4 RealMemory=16000 State=DOWN
PartitionName=main Nodes={node} Default=YES MaxTime=2-00:00:00 State=UP
PartitionName=gpus Nodes={node} MaxTime=1-00:00:00 State=UP
PartitionName=bare Nodes=bare MaxTime=1-00:00:00 State=UP
"""
DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[2]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[3]}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


class Cluster:
    """Started when made; :meth:`stop` ends what was started and removes the links."""

    def __init__(self, folder: Path):
        if CONFIGURATION.exists() or CONFIGURATION.is_symlink():
            raise RuntimeError(f"{CONFIGURATION}: this machine has a SLURM of its own; not touched")
        self.folder = folder
        self._started: list[tuple[str, subprocess.Popen[bytes] | None]] = []
        for name in ("state", "spool", "dev", "data"):
            (folder / name).mkdir(parents=True)
        host, ports = socket.gethostname().split(".")[0], free_ports(5)
        password = secrets.token_hex(16)
        names = {"folder": folder, "host": host, "ports": ports, "gpus": GPUS, "node": host}
        (folder / "slurm.conf").write_text(SLURM.format(**names))
        (folder / "slurmdbd.conf").write_text(DATABASE.format(**names, password=password))
        (folder / "slurmdbd.conf").chmod(0o600)
        for number in range(GPUS):
            (folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(
            f"NodeName={host} Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n"
        )
        CONFIGURATION.parent.mkdir(exist_ok=True)
        CONFIGURATION.symlink_to(folder / "slurm.conf")
        try:
            self._start(ports[3], password)
        except BaseException:
            self.stop()
            raise

    def _start(self, database_port: int, password: str) -> None:
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        data = folder / "data"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        create = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"]
        subprocess.run([*create, "--skip-test-db"], check=True, **quiet)
        sql = folder / "accounting.sql"
        sql.write_text(
            "CREATE DATABASE slurm;\n"
            f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            "GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';\n"
        )
        self._daemon(
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}",
            f"--socket={folder}/mariadb.socket", f"--port={database_port}",
            "--bind-address=127.0.0.1", "--skip-name-resolve", f"--init-file={sql}",
            "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        answers("the database", lambda: reachable(database_port))
        self._daemon("slurmdbd", "-D")
        answers("slurmdbd", lambda: self.runs("sacctmgr", "-n", "list", "cluster"))
        self._daemon("slurmctld", "-D", "-c")
        answers("slurmctld", lambda: self.runs("scontrol", "ping"))
        for words in ("account research", "user root account=research"):
            self.run("sacctmgr", "-i", "add", *words.split())
        self._daemon("slurmd", "-D")
        idle = ["sinfo", "-h", "-p", "main", "-o", "%T"]
        answers("the node", lambda: self.run(*idle).strip() == "idle")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("wb")
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.environment(),
            start_new_session=True,
        )
        self._started.append((command[0], started))
        if command[0] == "munged":
            answers("munged", (self.folder / "munge.socket").exists)

    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def runs(self, *command: str) -> bool:
        return subprocess.run(command, capture_output=True, env=self.environment()).returncode == 0

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=self.environment()
        )
        return done.stdout

    def stop(self) -> None:
        if len(self._started) > 3:
            subprocess.run(["scancel", "--user=root"], env=self.environment(), check=False)
        for _, process in reversed(self._started):
            if process is None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        CONFIGURATION.unlink(missing_ok=True)


# -- SLURM's own records -----------------------------------------------------------------------


def records(folder: Path, rule: str = "") -> list[dict[str, Any]]:
    """What SLURM's database says of the jobs of a rule that were started in ``folder``.

    In the order they were submitted: id, state, ``gpus``, ``megabytes`` and ``minutes`` asked for,
    partition and account. The rule stands in the comment, which the controller knows from the
    beginning, and the database once the job has ended.
    """
    comments = dict(
        line.split("|", 1) for line in output("squeue", "-h", "-a", "-t", "all", "-o", "%i|%k")
    )
    fields = ("JobIDRaw", "State", "Partition", "Account", "TimelimitRaw", "ReqTRES", "WorkDir")
    since = ("-S", "now-1days", "-E", "now+1days")
    found = []
    for line in output("sacct", "-a", "-X", "-n", "-P", *since, f"--format={','.join(fields)}"):
        values = dict(zip(fields, line.split("|"), strict=True))
        name, _, wildcards = comments[values["JobIDRaw"]].partition("_wildcards_")
        if Path(values["WorkDir"]) != folder or rule not in name:
            continue
        asked = dict(part.split("=") for part in values["ReqTRES"].split(","))
        found.append(
            {
                "id": values["JobIDRaw"],
                "rule": name.removeprefix("rule_"),
                "of": wildcards,
                "state": values["State"].split()[0],
                "gpus": int(asked.get("gres/gpu", 0)),
                "megabytes": megabytes(asked["mem"]),
                "minutes": int(values["TimelimitRaw"]),
                "partition": values["Partition"],
                "account": values["Account"],
            }
        )
    return sorted(found, key=lambda job: int(job["id"]))


def output(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def megabytes(text: str) -> int:
    scale = {"M": 1, "G": 1024, "T": 1024**2}
    return round(float(text[:-1]) * scale[text[-1]])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def reachable(port: int) -> bool:
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) == 0


def answers(what: str, question: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not question():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} does not answer after {PATIENCE} s")
        time.sleep(0.1)


def install() -> None:
    """Debian's packages, where their programs are missing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or (missing and shutil.which("apt-get") is None):
        raise RuntimeError(
            f"a SLURM to test on needs root, and Debian's packages {' '.join(PACKAGES)}"
        )
    if missing:
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(install, env=environment, **quiet)


def main() -> int:
    """Run a command on a cluster of its own: ``cluster.py pytest tests/slurm``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        install()
        cluster = Cluster(folder / "cluster")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"cluster.py: error: {error}", file=sys.stderr)
        return 1
    try:
        return subprocess.run(sys.argv[1:], env=cluster.environment()).returncode
    finally:
        cluster.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
