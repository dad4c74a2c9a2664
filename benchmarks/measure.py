"""Run a command and say how long it took and how much memory its process tree had at its peak.

    python benchmarks/measure.py -- snakemake --profile profiles/local

Memory is anonymous memory (heap and stacks, not mapped files), summed over the tree twice a second;
where the system does not tell it apart, resident memory.
"""

import resource
import sys
import threading
import time

import psutil


def anonymous(process: psutil.Process) -> int:
    """Anonymous bytes of one process, 0 once it is gone."""
    try:
        if sys.platform == "linux":
            with open(f"/proc/{process.pid}/status") as status:  # noqa: PTH123 - a hot loop
                for line in status:
                    if line.startswith("RssAnon:"):
                        return int(line.split()[1]) * 1024
            return 0
        return process.memory_info().rss
    except (psutil.Error, OSError):
        return 0


def main() -> int:
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    started = time.perf_counter()
    running = psutil.Popen(command)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.5):
            try:
                tree = [running, *running.children(recursive=True)]
            except psutil.Error:
                return
            peak = max(peak, sum(map(anonymous, tree)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = running.wait()
    except KeyboardInterrupt:  # the child has it too, and ends in its own way
        status = running.wait()
    stop.set()
    watcher.join()
    kind = "anonymous" if sys.platform == "linux" else "resident"
    minutes, seconds = divmod(time.perf_counter() - started, 60)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{minutes:.0f} min {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor "
        f"time), peak {kind} memory of all processes together {peak / 1e9:.2f} GB"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
