"""Seconds per merged-and-evaluated model: ours, mergekit's, the paper's code's, and the floor.

    make bench                                  # both sizes, k = 2, 4, 8, every method
    python benchmarks/bench.py --sizes 45M --k 2 8 --methods average ties

Base and experts are random, of Llama's architecture, in bfloat16 files; all are evaluated in
float32 (on a GPU in bfloat16). mergekit and the paper's code run as their users run them: a
command that merges and writes, then a process that loads the result by transformers and asks for
its loss on as many tokens. What starting a command and its imports take is told apart, for the
second process it is not counted; the loss is timed once a size. Of ours a merge is also evaluated
in one go, at the largest k. The floor is the forward pass alone and one pass over the bytes of
base, vectors and result at the copy bandwidth measured here.

On one thread seconds are of processor time, on several or with a GPU of the clock. Repetitions are
interleaved, caches are cold, and the least counts; memory passes are the median of merges against
the copy just before each, for what memory gives varies. Peers are found in PEERS (.venv-peers);
`--no-peers` leaves them out.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch
import transformers
import yaml

from mergelaw.artifacts import lineage, store
from mergelaw.cli.process import prepare_torch
from mergelaw.data.tokenize import Window
from mergelaw.evaluation import cross_entropy
from mergelaw.evaluation import shard as evaluate
from mergelaw.merging import task_vector
from mergelaw.merging.engine import Merger
from mergelaw.merging.export import mergekit_recipe
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.ties import magnitude_threshold
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models import causal_lm

transformers.logging.disable_progress_bar()
ROOT = Path(__file__).parents[1]
SIZES = {
    "1M": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "vocab": 4096},
    "45M": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "vocab": 32768},
    "460M": {
        "hidden_size": 1280,
        "num_hidden_layers": 21,
        "intermediate_size": 3456,
        "vocab": 32768,
    },
}
METHODS = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic", "lambda": 0.8},
    "ties": {"method": "ties", "density": 0.2},
    "dare_linear": {"method": "dare_linear", "drop_rate": 0.5},
    "dare_ties": {"method": "dare_ties", "drop_rate": 0.5},
}
PAPER = {"average": "average_merging", "ties": "ties_merging"}
WINDOW = 1024  # tokens of one document


def high_water(pid: int) -> int:
    """The most memory that a process has had, in bytes; 0 where nobody tells."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Clock:
    """Processor seconds on one thread, else seconds."""

    def __init__(self) -> None:
        self.processor = torch.get_num_threads() == 1 and not torch.cuda.is_available()

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if self.processor else time.perf_counter()

    def of(self, work: Callable[[], object]) -> float:
        start = self.now()
        work()
        return self.now() - start

    def command(self, *arguments: object) -> tuple[float, float] | None:
        """(seconds, peak bytes) of a command; None: this machine has too little memory for it."""
        start = time.perf_counter()
        limit = psutil.virtual_memory().available * 9 // 10

        def within() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        threads = str(torch.get_num_threads())
        with tempfile.TemporaryFile() as log:
            environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": threads}
            running = subprocess.Popen(
                [str(a) for a in arguments], stdout=log, stderr=log, env=environment,
                preexec_fn=within if sys.platform == "linux" else None,
            )  # fmt: skip
            peak = pid = 0
            while not pid:
                # Not what the system tells at the end: that counts this process's before the exec.
                peak = max(peak, high_water(running.pid))
                time.sleep(0.02)
                pid, status, used = os.wait4(running.pid, os.WNOHANG)
            running.returncode = os.waitstatus_to_exitcode(status)
            if running.returncode:
                log.seek(0)
                said = log.read().decode()
                if any(
                    word in said for word in ("MemoryError", "enough memory", "allocate memory")
                ):
                    return None
                raise SystemExit(f"{arguments[0]}: {said[-2000:]}")
        if not peak:
            peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        wall = time.perf_counter() - start
        return (used.ru_utime + used.ru_stime if self.processor else wall), peak


def make_models(folder: Path, size: str, count: int) -> tuple[Path, dict[str, Path]]:
    """A base and ``count`` fine-tunes of it: noise, a thousandth of the usual weight's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(SIZES[size])
    heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        vocab_size=shape.pop("vocab"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    experts = {}
    for number in range(count + 1):
        path = folder / ("base" if number == 0 else f"expert{number}")
        if number:
            experts[path.name] = path
        if path.exists():
            continue
        torch.manual_seed(number)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape) * 0.002 * (number > 0)
                parameter.copy_(parameter.float() + noise)
        model.save_pretrained(path)
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old)
    return folder / "base", experts


def vector_of(base: Path, expert: Path) -> TaskVector:
    folder = expert.with_name(f"{expert.name}.vector")
    store.make(
        folder, "task_vector", {}, {}, lambda work, state: task_vector.write(base, expert, work)
    )
    return TaskVector(folder)


def batches(vocabulary: int, count: int, device: torch.device) -> tuple[list, int]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (max(count // WINDOW, 1), WINDOW), generator=generator)
    windows = [Window(i, tuple(row), 1, WINDOW) for i, row in enumerate(ids.tolist())]
    return cross_entropy.batches(windows, 8192, device), len(windows)


def copy_bandwidth(clock: Clock, device: torch.device, elements: int) -> float:
    """Bytes read and written per second by a large copy."""
    elements = max(min(elements, 1 << 26), 1 << 24)  # far beyond the caches
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    seconds = min(clock.of(lambda: target.copy_(source)) for _ in range(9))
    return 8 * elements / seconds


def matrix_rate(clock: Clock, device: torch.device) -> float:
    """Floating-point operations per second of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    _ = a @ b
    return 2 * 8192**3 / min(clock.of(lambda: a @ b) for _ in range(9))


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in (head, *rows):
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, width, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip(), flush=True)


class Pass:
    """The forward pass over the evaluation's tokens, by a model that is loaded."""

    def __init__(self, base: Path, tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.model = causal_lm.load(base, self.dtype, device_map=self.device.type).eval()
        self.batches, self.documents = batches(self.model.config.vocab_size, tokens, self.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.tokens = self.documents * (WINDOW - 1)

    def __call__(self) -> object:
        return cross_entropy.nll(self.model, self.batches, self.documents)


def forward_pass(clock: Clock, base: Path, asked: argparse.Namespace) -> dict[str, float]:
    forward = Pass(base, asked.tokens)
    seconds = min(clock.of(forward) for _ in range(asked.forwards))
    return {"seconds": seconds, "parameters": forward.parameters, "tokens": forward.tokens}


def merging(
    clock: Clock,
    base: Path,
    vectors: dict[str, TaskVector],
    recipe: dict,
    asked: argparse.Namespace,
) -> dict[int, dict[str, float]]:
    """Our merges by one method against the memory's floor, for each k; evaluated at the last."""
    forward = Pass(base, asked.tokens)
    device, size = forward.device, forward.parameters
    merges: dict[int, list[float]] = {k: [] for k in asked.k}
    passes: dict[int, list[float]] = {k: [] for k in asked.k}
    copies = []
    # Vectors are in fp32, the result in the model's dtype; the base is held in fp32, or streamed
    # from its bfloat16 file.
    width = 2 if forward.dtype == "bfloat16" else 4
    start = clock.now()
    memory = asked.memory or evaluate.memory_for_vectors(device)
    cache = base.parent / "prepared"
    with Merger(forward.model, base, vectors, method_of(recipe), memory, cache) as merger:
        prepared = clock.now() - start
        merger.merge(list(vectors)[: max(asked.k)])  # what is compiled or read from disk once
        for _ in range(asked.repeats):
            for k in asked.k:
                copies.append(copy_bandwidth(clock, device, size))  # and nothing left in caches
                merges[k].append(clock.of(lambda k=k: merger.merge(list(vectors)[:k])))
                bytes_ = size * (4 * k + width + (4 if merger.resident else 2))
                passes[k].append(merges[k][-1] * copies[-1] / bytes_)
        both = clock.of(lambda: (merger.merge(list(vectors)[: max(asked.k)]), forward()))
        resident = merger.resident
    return {
        k: {
            "merge": min(merges[k]),
            "passes": median(passes[k]),
            "both": both if k == max(asked.k) else float("nan"),
            "memory": min(merges[k]) / median(passes[k]),
            "prepared": prepared,
            "resident": float(resident),
            "bandwidth": median(copies),
        }
        for k in asked.k
    }


def plainly(folder: Path, tokens: int) -> dict[str, float]:
    """Seconds to load a model and to ask it for its loss, as one does; in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--plainly", str(folder), "--tokens", str(tokens)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return json.loads(run.stdout.splitlines()[-1])


def evaluate_plainly(folder: Path, tokens: int) -> dict[str, float]:
    import transformers.models.llama.modeling_llama  # else it would be while loading

    clock = Clock()
    start = clock.now()
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    if torch.cuda.is_available():
        model.cuda()
    load = clock.now() - start
    if not tokens:
        return {"load": load}
    shape = max(tokens // WINDOW, 1), WINDOW
    ids = torch.randint(model.config.vocab_size, shape, device=model.device)

    def loss() -> object:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    return {"load": load, "evaluate": min(clock.of(loss) for _ in range(2))}


def peers(
    clock: Clock, folder: Path, base: Path, experts: dict[str, Path], asked: argparse.Namespace
) -> dict[tuple[str, str, int], tuple[float, float] | None]:
    """(seconds, peak bytes) of mergekit and of the paper's code: merge, write and load.

    None: too much for this machine's memory.
    """
    programs = Path(os.environ.get("PEERS", ROOT / ".venv-peers")).absolute() / "bin"
    if not (programs / "mergekit-yaml").exists():
        raise SystemExit(f"no mergekit in {programs}: run `make bench`, or give --no-peers")
    out = folder / "peer"
    found: dict[tuple[str, str, int], tuple[float, float] | None] = {}

    def timed(name: str, method: str, k: int, *command: object) -> None:
        shutil.rmtree(out, ignore_errors=True)
        made = clock.command(*command)
        if made is None:
            found[name, method, k] = None
            return
        seconds, peak = made[0] + plainly(out, 0)["load"], made[1]
        best = found.get((name, method, k)) or (float("inf"), 0.0)
        found[name, method, k] = min(best[0], seconds), max(best[1], peak)

    def started(programs: Path, name: str, imports: str) -> None:
        """What a command costs that has imported everything, from a warm disk, no more."""
        runs = [clock.command(programs / "python", "-c", imports) for _ in range(2)]
        found[name, "start", 0] = runs[1]

    for _ in range(asked.peer_repeats):
        idle = "import mergekit.scripts.run_yaml, mergekit.merge, transformers"
        started(programs, "mergekit", idle)
        idle = "import merge.merging_methods, transformers.models.llama.modeling_llama"
        started(programs, "paper", idle)
        for method in asked.methods:
            rule = method_of(METHODS[method])
            for k in asked.k:
                chosen = {name: str(experts[name]) for name in list(experts)[:k]}
                recipe = mergekit_recipe(str(base), chosen, rule, None, "bfloat16")
                if recipe is None:  # DARE: its own masks and scale, for the time alone
                    plain = method_of({"method": "ties"})
                    recipe = mergekit_recipe(str(base), chosen, plain, None, "bfloat16")
                    recipe["merge_method"] = method
                    recipe["parameters"] = {"density": 1 - METHODS[method]["drop_rate"]}
                (folder / "mergekit.yaml").write_text(yaml.safe_dump(recipe))
                program = programs / "mergekit-yaml"
                timed("mergekit", method, k, program, folder / "mergekit.yaml", out)
                if method in PAPER:
                    timed(
                        "paper", method, k, programs / "python",
                        Path(__file__).with_name("paper_merge.py"), PAPER[method], 1.0, out,
                        base, *chosen.values(),
                    )  # fmt: skip
    return found


def thresholds(clock: Clock, size: int) -> list[list[str]]:
    """Finding the threshold of TIES against sorting, on one tensor."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.002
    keep = int(0.2 * size)
    ways = {
        "ours": lambda: magnitude_threshold(lambda: [values], keep),
        "sort": lambda: values.abs().sort(descending=True).values[keep - 1].item(),
        "argsort (mergekit)": lambda: torch.argsort(values.abs(), descending=True)[:keep],
        "kthvalue (paper)": lambda: values.abs().kthvalue(size - keep + 1).values.item(),
    }
    assert ways["ours"]() == ways["sort"]() == ways["kthvalue (paper)"]()
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, way in ways.items():
            best[name] = min(best[name], clock.of(way))
    return [[n, f"{1e3 * s:.0f}", f"{s / best['ours']:.1f}"] for n, s in best.items()]


def report(size: str, forward: dict, ours: dict, theirs: dict) -> None:
    some = next(iter(ours.values()))
    evaluated = forward["seconds"]
    print(
        f"\n== {size}: {forward['parameters'] / 1e6:.1f}M parameters, {forward['tokens']} scored "
        f"tokens, forward pass {evaluated:.2f} s, copy {some['bandwidth'] / 1e9:.1f} GB/s"
    )
    rows = []
    for (method, k), t in ours.items():
        rows.append(
            [method, str(k), "resident" if t["resident"] else "streamed", f"{t['prepared']:.1f}",
             f"{t['merge']:.3f}", f"{t['passes']:.2f}",
             f"{100 * t['merge'] / evaluated:.2f}%",
             "" if math.isnan(t["both"]) else f"{t['both'] / (evaluated + t['memory']):.3f}"]
        )  # fmt: skip
    head = ["method", "k", "vectors", "prepare all s", "merge s", "memory passes", "/ forward"]
    table("ours", [*head, "merge and evaluate / floor"], rows)
    if not theirs:
        return
    rows = []
    for (name, method, k), found in sorted(theirs.items()):
        if method == "start":
            continue
        if found is None:
            rows.append([name, method, str(k), "out of memory", *[""] * 4])
            continue
        merged, peak = found
        mine, start = ours[method, k]["merge"] + evaluated, theirs[name, "start", 0][0]
        seconds = merged + forward["plainly"]
        rows.append(
            [name, method, str(k), f"{merged:.1f}", f"{seconds / mine:.2f}",
             f"{(seconds - start) / mine:.2f}", f"{merged / ours[method, k]['merge']:.0f}",
             f"{peak / 1e9:.2f}"]
        )  # fmt: skip
    head = ["peer", "method", "k", "merge+write+load s", "evaluated / ours", "without start / ours"]
    table("peers", [*head, "without evaluation / ours", "peak GB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["45M", "460M"], choices=SIZES)
    parser.add_argument("--k", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that are evaluated")
    parser.add_argument("--repeats", type=int, default=5, help="of our merges")
    parser.add_argument("--forwards", type=int, default=2, help="times of the forward pass")
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument(
        "--memory", type=int, help="bytes for vectors; default: as a job of evaluation takes"
    )
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--plainly", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keeps models and vectors for the next time")
    asked = parser.parse_args()
    if asked.plainly:
        print(json.dumps(evaluate_plainly(asked.plainly, asked.tokens)))
        return
    clock = Clock()
    threads = torch.get_num_threads()
    prepare_torch(threads)  # as a job does
    kind = "processor" if clock.processor else "clock"
    print(f"{threads} thread(s), seconds of the {kind}, torch {torch.__version__}")
    if torch.cuda.is_available():
        rate = matrix_rate(clock, torch.device("cuda"))
        print(
            f"{torch.cuda.get_device_name()}: bfloat16 matrix products at {rate / 1e12:.0f} TFLOP/s"
        )
    rows = thresholds(clock, 1 << 23)
    table("threshold of 8.4M values", ["way", "ms", "/ ours"], rows)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in asked.sizes:
            folder = (asked.folder or Path(scratch)) / size
            folder.mkdir(parents=True, exist_ok=True)
            base, experts = make_models(folder, size, max(asked.k))
            vectors = {name: vector_of(base, path) for name, path in experts.items()}
            forward = forward_pass(clock, base, asked)
            ours = {
                (method, k): times
                for method in asked.methods
                for k, times in merging(clock, base, vectors, METHODS[method], asked).items()
            }
            if torch.cuda.is_available():
                share = 2 * forward["parameters"] * forward["tokens"] / forward["seconds"] / rate
                print(f"{size}: the forward pass runs at {100 * share:.0f}% of the matrix rate")
            peak = lineage.peak_memory()
            if not asked.no_peers:
                forward["plainly"] = plainly(base, asked.tokens)["evaluate"]
                print(f"transformers' own loss: {forward['plainly']:.2f} s")
            theirs = {} if asked.no_peers else peers(clock, folder, base, experts, asked)
            report(size, forward, ours, theirs)
            print(f"\npeak resident memory of ours, mapped files included: {peak / 1e9:.2f} GB")
            results[size] = {
                "forward": forward,
                "ours": {f"{m} {k}": t for (m, k), t in ours.items()},
                "peers": {f"{p} {m} {k}": t for (p, m, k), t in theirs.items()},
            }
    if asked.folder:
        (asked.folder / "bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
