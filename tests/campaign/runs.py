"""Hours of faults over whole runs, counted: python tests/campaign/runs.py --rounds 50 --seed 0

Each round starts a small study from nothing and disturbs it until it is done: its processes are
killed, ended, stopped and continued at random moments, alone or all together, a second run starts
beside it, its disk is full for a while. Then files of every kind of artifact are flipped and cut. A
round passes if what it measured is measured once and has the bits of an undisturbed run, and if
every damage is named or repaired. Ends with an error at the first that is not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "workflow"))

from studies import KINDS, Place, kill, make_trained, same_measurements

MOMENTS = 15.0  # seconds within which a run is disturbed
FAULTS = ("kill", "kill all", "end", "end all", "stop", "second run", "full disk")


def disturb(place: Place, rng: random.Random, done: Counter[str], disk: Path | None) -> None:
    """One run of the study with one fault in it."""
    fault = rng.choice(FAULTS if disk else FAULTS[:-1])
    filler = disk / "filler" if disk else None
    if fault == "full disk" and disk and filler:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(max(free - rng.randint(0, 400_000), 0)))
        run = place.snakemake()
        filler.unlink()
        assert "Traceback" not in run.output, run.output[-4000:]
        if run.status:
            assert any("No space left" in line for line in run.errors()), run.output[-4000:]
        done[f"full disk: {'one line' if run.status else 'no write hit it'}"] += 1
        return
    run = place.start()
    time.sleep(rng.uniform(0.5, MOMENTS))
    if run.poll() is not None:
        done["came too late"] += 1
    elif fault.startswith("kill"):
        kill(run, fault == "kill all")
        done[fault] += 1
        return
    elif fault.startswith("end"):
        if fault == "end all":
            os.killpg(run.pid, signal.SIGTERM)
        else:
            run.terminate()
        done[fault] += 1
    elif fault == "stop":
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 3))
        os.killpg(run.pid, signal.SIGCONT)
        done[fault] += 1
    else:
        second = place.snakemake()
        said = any("another run is working" in line for line in second.errors())
        done[f"second run: {'refused' if said else 'after the first'}"] += 1
        assert said or second.status == 0, second.output[-4000:]
    output, _ = run.communicate()
    assert "Traceback" not in output, output[-4000:]


def check(place: Place, undisturbed: Place) -> None:
    place.finish()
    cells = place.cells()
    assert len(cells) == len(set(cells)), "a cell was measured twice"
    same_measurements(place.rows(), undisturbed.rows())
    assert place.laws()["fits"] == undisturbed.laws()["fits"]
    assert place.planned() == {}


def damage(place: Place, rng: random.Random, done: Counter[str]) -> None:
    """Flip or cut a file of every kind; each must be named by its path."""
    for kind in KINDS:
        files = [
            file
            for folder in place.artifacts(kind).values()
            for file in folder.rglob("*")
            if file.is_file()
            and not file.is_symlink()
            and not file.name.startswith(".snakemake")
            and file.stat().st_size
        ]
        if not files or kind in ("merges", "checks"):
            continue
        file = rng.choice(files)
        whole = file.read_bytes()
        spot = rng.randrange(len(whole))
        way = rng.choice(("flipped", "cut"))
        file.write_bytes(
            whole[:spot]
            + (
                b""
                if way == "cut"
                else bytes([whole[spot] ^ 1 << rng.randrange(8)]) + whole[spot + 1 :]
            )
        )
        found = place.mergelaw("lineage", str(place.results), "--verify")
        file.write_bytes(whole)
        assert found.status == 1 and "Traceback" not in found.output, (file, way, found.output)
        assert str(file) in found.output or str(file.parent) in found.output, (file, found.output)
        done[f"{way} file named: {kind}"] += 1


def damage_cells(place: Place, undisturbed: Place, rng: random.Random, done: Counter[str]) -> None:
    """A damaged line of the store is measured again, and only that."""
    files = sorted((place.results / "cells").rglob("*.jsonl"))
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    spot = rng.randrange(len(content) - 1)
    content[spot] ^= 1 << rng.randrange(7)
    file.write_bytes(content)
    place.forget("evals", "laws", "reports")
    place.finish()
    same_measurements(place.rows(), undisturbed.rows())
    done["flipped cell measured again"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--faults", type=int, default=5, help="runs disturbed in a round")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, done = random.Random(asked.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        undisturbed = make_trained(folder / "undisturbed")
        disk = folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        if not mounted:
            print("no right to mount a small disk: none will be full")
        try:
            for number in range(asked.rounds):
                place = Place(folder / f"round{number}", undisturbed.config)
                if mounted:
                    (disk / f"{number}").mkdir()
                    place.results.symlink_to(disk / f"{number}")
                for _ in range(asked.faults):
                    disturb(place, rng, done, disk if mounted else None)
                check(place, undisturbed)
                damage(place, rng, done)
                damage_cells(place, undisturbed, rng, done)
                done["rounds passed"] += 1
                shutil.rmtree(disk / f"{number}", ignore_errors=True)
                shutil.rmtree(place.folder)
                print(json.dumps(dict(sorted(done.items()))), flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
