"""Merging and evaluating on one GPU: its limits, and what share of them each step reaches.

    make bench-gpu                                   # at most eight minutes on a large card
    python benchmarks/gpu.py --device cpu --tiny     # every section in seconds, without a card

Models are Qwen2.5's by their dimensions, with random weights made on the device; nothing is
downloaded. Sections are ordered by worth. Each result is printed and written to gpu.json and gpu.md
as soon as it is there; a section that fails says why, and the next one runs; none starts after
``--minutes``.

Needs torch, transformers, numba, numpy, pydantic, safetensors, filelock, pyyaml, for learned
coefficients pandas and scipy too, and no other package of mergelaw's.
"""

import argparse
import gc
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mergelaw.data.tokenize import Window
from mergelaw.evaluation import cross_entropy
from mergelaw.merging import kernels
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.models.checkpoint import Tensors, mergeable

transformers.logging.disable_progress_bar()
# Of Qwen2.5's configurations.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
             "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
             "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
             "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
           "tie_word_embeddings": False},
}  # fmt: skip
METHODS = {
    "average": {"method": "average"},
    "ties": {"method": "ties", "density": 0.2},
    "dare_linear": {"method": "dare_linear", "drop_rate": 0.5},
}
POOL = [f"expert{number}" for number in range(8)]
TOKENS = 30_000
Row = dict[str, Any]


class Card:
    """The device, its limits as measured, and what the run may take."""

    def __init__(self, device: str, tiny: bool, folder: Path):
        self.device, self.tiny, self.folder = torch.device(device), tiny, folder
        self.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "processor"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def best(self, work: Callable[[], object], repeats: int = 5) -> float:
        work()  # what is compiled or allocated once
        return min(self.seconds(work) for _ in range(1 if self.tiny else repeats))

    def peak_gb(self) -> float | None:
        """Peak memory in GB since the last call; None on the processor."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)

    @cached_property
    def copy_rate(self) -> float:
        """Bytes read and written per second by a large copy on the device."""
        source = torch.ones(1 << (18 if self.tiny else 28), device=self.device)
        target = torch.empty_like(source)
        return 8 * source.numel() / self.best(lambda: target.copy_(source), 9)

    @cached_property
    def bus_rate(self) -> float:
        """Bytes per second from pinned host memory to the device."""
        pinned = self.device.type == "cuda"
        source = torch.ones(1 << (18 if self.tiny else 28), pin_memory=pinned)
        target = torch.empty_like(source, device=self.device)
        return 4 * source.numel() / self.best(lambda: target.copy_(source, non_blocking=True))

    @cached_property
    def matrix_rate(self) -> float:
        """FLOPs per second of a large bfloat16 matrix product."""
        size = 128 if self.tiny else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.best(lambda: a @ b, 9)

    def size(self, name: str) -> str:
        return "tiny" if self.tiny else name

    def model(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A model of random weights, made on the device."""
        shape = SHAPES[self.size(name)]
        config = transformers.Qwen2Config(
            max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, **shape
        )
        torch.manual_seed(0)
        with self.device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or self.dtype)
        return model.eval()

    def windows(self, model: Any) -> list[Window]:
        """Documents of 100 to 2,000 random tokens, 30,000 in all; three quarters are scored."""
        tokens, longest = (400, 60) if self.tiny else (TOKENS, 2000)
        generator = torch.Generator().manual_seed(0)
        windows: list[Window] = []
        while tokens > 0:
            length = int(torch.randint(longest // 20, longest, (1,), generator=generator))
            ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
            windows.append(Window(len(windows), tuple(ids), max(length // 4, 1), length))
            tokens -= length
        return windows

    def batches(self, model: Any, batch_tokens: int = 16384) -> list[cross_entropy.Batch]:
        return cross_entropy.batches(self.windows(model), batch_tokens, self.device)

    def saved(self, name: str, model: Any) -> Path:
        """The model as a checkpoint, as a base is kept."""
        folder = self.folder / self.size(name)
        if not folder.exists():
            model.save_pretrained(folder)
        return folder


def forward_flops(model: Any, batches: list[cross_entropy.Batch]) -> float:
    """FLOPs of a pass: 2 a weight and token, logits of scored positions only, causal attention."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - head * (2 - config.tie_word_embeddings)
    flops = 0.0
    for batch in batches:
        rows, length = batch.ids.shape
        attention = 2 * config.num_hidden_layers * config.hidden_size * length / 2
        flops += 2 * rows * (length * (weights + attention) + len(batch.keep) * head)
    return flops


def evaluate(model: Any, batches: list[cross_entropy.Batch]) -> Any:
    documents = 1 + max(int(batch.documents.max()) for batch in batches)
    return cross_entropy.nll(model, batches, documents)


class RandomVector:
    """A task vector of random values in memory: what the engine asks of a ``TaskVector``.

    The values of all tensors are slices of one buffer, so that vectors of 7B, 30 GB each, need as
    much memory as the largest tensor. ``place``: "device", "pinned" or "pageable" host memory (as
    mapped files are).
    """

    changed: frozenset[str] = frozenset()
    digest = "0" * 64

    def __init__(self, card: Card, base: Path, place: str):
        with Tensors(base) as tensors:
            self._sizes = {name: math.prod(tensors.shape(name)) for name in mergeable(tensors)}
        self.names, self.folder = sorted(self._sizes), card.folder
        self.elements = sum(self._sizes.values())
        pinned = place == "pinned" and card.device.type == "cuda"
        device = card.device if place == "device" else "cpu"
        self._values = torch.empty(max(self._sizes.values()), device=device, pin_memory=pinned)
        self._values.normal_(0, 1e-3)

    def size(self, name: str) -> int:
        return self._sizes[name]

    def part(self, name: str, start: int, stop: int, device: Any = None) -> Tensor:
        return self._values[start:stop].to(device, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[: self._sizes[name]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]


def merger(card: Card, model: Any, base: Path, method: str, place: str) -> Merger:
    """The engine with eight vectors: held on the device, or streamed from host memory."""
    vector: Any = RandomVector(card, base, place)
    pool = dict.fromkeys(POOL, vector)
    memory = 1 << 50 if place == "device" else 0
    return Merger(model, base, pool, method_of(METHODS[method]), memory, card.folder / "prepared")


# -- sections ------------------------------------------------------------------------------------


def limits(card: Card) -> Iterator[Row]:
    """What the card itself reaches."""
    yield {"what": "copy on the device", "GB/s": round(card.copy_rate / 1e9, 1)}
    yield {"what": "bfloat16 matrix product", "TFLOP/s": round(card.matrix_rate / 1e12, 2)}
    yield {"what": "copy from pinned host memory", "GB/s": round(card.bus_rate / 1e9, 1)}


def evaluation(*sizes: str) -> Callable[[Card], Iterator[Row]]:
    """Tokens a second by size and batch. Goal: 50% of the matrix rate at 7B, 40% at 0.5B."""

    def section(card: Card) -> Iterator[Row]:
        for size in sizes:
            model = card.model(size)
            for batch_tokens in (8192, 16384, 32768)[: 1 if card.tiny else None]:
                made = card.batches(model, batch_tokens)
                card.peak_gb()
                seconds = card.best(lambda made=made, model=model: evaluate(model, made), 3)
                tokens = sum(batch.ids.numel() for batch in made)
                share = forward_flops(model, made) / seconds / card.matrix_rate
                yield {
                    "model": card.size(size),
                    "batch tokens": batch_tokens,
                    "tokens/s": round(tokens / seconds),
                    "of matrix rate": f"{share:.0%}",
                    "seconds": round(seconds, 4),
                    "peak GB": card.peak_gb(),
                }
            del model

    return section


def merging(card: Card) -> Iterator[Row]:
    """Merges of 8 vectors on the device. Goal: 2 passes for sums, 3 for elections."""
    model = card.model("0.5B")
    base = card.saved("0.5B", model)
    elements = sum(parameter.numel() for parameter in model.parameters())
    moved = elements * (4 * len(POOL) + 4 + model.dtype.itemsize)
    for method in METHODS:
        card.peak_gb()
        start = time.perf_counter()
        with merger(card, model, base, method, "device") as merges:
            card.synchronize()
            prepared = time.perf_counter() - start
            seconds = card.best(lambda merges=merges: merges.merge(POOL))
            merges.merge([])
        yield {
            "model": card.size("0.5B"),
            "method": method,
            "prepare s": round(prepared, 3),
            "merge s": round(seconds, 5),
            "passes": round(seconds * card.copy_rate / moved, 2),
            "peak GB": card.peak_gb(),
        }


def merge_and_evaluate(size: str) -> Callable[[Card], Iterator[Row]]:
    """A merge of 8 vectors on the device, and its evaluation on 30,000 tokens."""

    def section(card: Card) -> Iterator[Row]:
        model = card.model(size)
        base = card.saved(size, model)
        for method in ("average", "ties"):
            with merger(card, model, base, method, "device") as merges:
                yield {"model": card.size(size), "method": method, **both(card, merges, model, 3)}
                merges.merge([])
            del merges  # its vectors fill most of a card
            gc.collect()
            if card.device.type == "cuda":
                torch.cuda.empty_cache()

    return section


def both(card: Card, merges: Merger, model: Any, repeats: int) -> Row:
    """Seconds of a merge and its evaluation, and the share that is not the forward pass."""
    made = card.batches(model)
    card.peak_gb()
    forward = card.best(lambda: evaluate(model, made), repeats)
    whole = card.best(lambda: (merges.merge(POOL), evaluate(model, made)), repeats)
    return {
        "vectors": "on the device" if merges.resident else "from the host",
        "seconds": round(whole, 4),
        "forward s": round(forward, 4),
        "not forward": f"{1 - forward / whole:.1%}",
        "peak GB": card.peak_gb(),
    }


def streamed(card: Card) -> Iterator[Row]:
    """Merges of 8 vectors from host memory. Goal: 80% of the bus."""
    model = card.model("7B")
    base = card.saved("7B", model)
    elements = sum(parameter.numel() for parameter in model.parameters())
    moved = elements * (4 * len(POOL) + model.dtype.itemsize)
    for place in ("pinned", "pageable"):
        with merger(card, model, base, "average", place) as merges:
            card.peak_gb()
            seconds = card.seconds(lambda merges=merges: merges.merge(POOL))
            yield {
                "model": card.size("7B"),
                "host memory": place,
                "merge s": round(seconds, 4),
                "GB/s": round(moved / seconds / 1e9, 1),
                "of bus": f"{moved / seconds / card.bus_rate:.0%}",
                "peak GB": card.peak_gb(),
            }
            if place == "pinned":
                yield {"model": card.size("7B"), **both(card, merges, model, 1)}
            merges.merge([])


def accuracy(card: Card) -> Iterator[Row]:
    """Losses against float32 on the processor, and whether they repeat bit for bit."""
    small = Card("cpu", True, card.folder)
    reference = small.model("tiny", torch.float32)
    exact = evaluate(reference, small.batches(reference))
    for dtype in (torch.float32, torch.bfloat16):
        model = small.model("tiny", torch.float32).to(card.device, dtype)
        made = Card(str(card.device), True, card.folder).batches(model)
        first, second = evaluate(model, made), evaluate(model, made)
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "largest relative difference": f"{abs(first / exact - 1).max():.1e}",
            "of the sum": f"{abs(first.sum() / exact.sum() - 1):.1e}",
            "the same bits twice": first.tobytes() == second.tobytes(),
        }


def learned(size: str) -> Callable[[Card], Iterator[Row]]:
    """One gradient of the coefficients of 8 vectors, beside a forward pass of the documents."""

    def section(card: Card) -> Iterator[Row]:
        from mergelaw.decide.calibration import Calibration, divide

        model = card.model(size)
        base = card.saved(size, model)
        domains = {"all": [[window] for window in card.windows(model)]}
        documents = divide(domains, 4096, card.device)
        place = "device" if size == "0.5B" else "pinned"
        card.peak_gb()
        with (
            merger(card, model, base, "average", place) as merges,
            Calibration(model, merges, POOL, documents) as objective,
        ):
            coefficients = np.full((len(POOL), len(objective.tensors)), 1 / len(POOL))
            loss = card.seconds(lambda: objective.loss(coefficients, "all"))
            # Each is computed once for the same coefficients.
            forward = card.seconds(lambda: objective.loss(coefficients * 1.01, "all"))
            gradient = card.seconds(lambda: objective.gradient(coefficients, "all"))
            again = card.seconds(lambda: objective.gradient(coefficients * 1.01, "all"))
        yield {
            "model": card.size(size),
            "vectors": "on the device" if merges.resident else "from the host",
            "merge and loss s": round(min(loss, forward), 4),
            "merge and gradient s": round(min(gradient, again), 4),
            "in losses": round(min(gradient, again) / min(loss, forward), 2),
            "peak GB": card.peak_gb(),
        }

    return section


def captured(card: Card) -> Iterator[Row]:
    """A forward pass recorded once and replayed (CUDA graph), for models that launches slow down.

    A merge overwrites parameters in place, so a recording would hold for all merges of a base. On
    the processor nothing is recorded.
    """
    model = card.model("0.5B")
    made = card.batches(model, 8192)
    keep = [torch.tensor(batch.keep, device=card.device) for batch in made]

    def logits(number: int) -> Tensor:
        ids = made[number].ids
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep[number]).logits

    with torch.inference_mode():
        card.peak_gb()
        eager = card.best(lambda: [logits(n) for n in range(len(made))], 3)
        wanted, memory = [logits(n).sum(dtype=torch.float64) for n in range(len(made))], None
        replays: list[Callable[[], object]] = []
        results: list[Tensor] = []
        for number in range(len(made)):
            if card.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=memory):
                    results.append(logits(number))
                memory, replay = graph.pool(), graph.replay
            else:
                results.append(logits(number))
                replay = partial(logits, number)
            replays.append(replay)
            replay()
            card.synchronize()
            wanted[number] = wanted[number] == results[number].sum(dtype=torch.float64)
        seconds = card.best(lambda: [replay() for replay in replays], 3)
    flops = forward_flops(model, made)
    yield {
        "model": card.size("0.5B"),
        "eager s": round(eager, 4),
        "of matrix rate": f"{flops / eager / card.matrix_rate:.0%}",
        "replayed s": round(seconds, 4),
        "replayed, of matrix rate": f"{flops / seconds / card.matrix_rate:.0%}",
        "the same sums": all(map(bool, wanted)),
        "peak GB": card.peak_gb(),
    }


def compiled_rules(card: Card) -> Iterator[Row]:
    """Sums and elections of 8 vectors as torch.compile fuses them, against the engine's."""
    size = 1 << (12 if card.tiny else 26)
    base, *vectors = (torch.randn(size, device=card.device) for _ in range(1 + len(POOL)))
    out = torch.empty(size, device=card.device, dtype=card.dtype)
    moved = size * (4 * len(POOL) + 4 + out.element_size())
    backend = "inductor" if card.device.type == "cuda" else "eager"
    for method in ("average", "ties"):
        rule = method_of(METHODS[method]).rule([1.0] * len(POOL))
        kernels.merge(base, vectors, rule, out)
        wanted = out.clone()

        def plain(rule: kernels.Rule = rule) -> None:
            out.copy_(base + kernels._by_torch(vectors, rule))

        fused = torch.compile(plain, backend=backend)
        seconds = [card.best(work) for work in (plain, fused)]
        passes = [round(s * card.copy_rate / moved, 2) for s in seconds]
        yield {
            "method": method,
            "engine, passes": passes[0],
            "compiled, passes": passes[1],
            "the same bits": torch.equal(out, wanted),
        }


SECTIONS: dict[str, Callable[[Card], Iterator[Row]]] = {
    "limits": limits,
    "evaluation": evaluation("0.5B", "7B"),
    "merging on the device": merging,
    "merge and evaluate, 0.5B": merge_and_evaluate("0.5B"),
    "accuracy": accuracy,
    "streamed from the host, 7B": streamed,
    "merge and evaluate, 1.5B": merge_and_evaluate("1.5B"),
    "evaluation, 1.5B": evaluation("1.5B"),
    "learned coefficients, 0.5B": learned("0.5B"),
    "captured forward, 0.5B": captured,
    "learned coefficients, 7B": learned("7B"),
    "compiled rules": compiled_rules,
}


@dataclass
class Report:
    """Results so far, printed and written as they come."""

    folder: Path
    head: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, section: str, row: Row) -> None:
        self.sections.setdefault(section, {"rows": []})["rows"].append(row)
        print(
            f"{section}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )
        self.write()

    def end(self, section: str, **facts: Any) -> None:
        self.sections.setdefault(section, {"rows": []}).update(facts)
        if "reason" in facts:
            print(f"{section}: {facts['reason']}", flush=True)
        self.write()

    def write(self) -> None:
        result = {"card": self.head, "sections": self.sections}
        (self.folder / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        lines = ["# Merging and evaluating on a GPU", "", self.head]
        for name, section in self.sections.items():
            lines += ["", f"## {name}"]
            columns: list[str] = []
            for row in section["rows"]:
                if list(row) != columns:
                    columns = list(row)
                    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines.append(f"| {' | '.join(map(str, row.values()))} |")
            lines += ["", section["reason"]] if "reason" in section else []
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(card: Card, report: Report, minutes: float) -> bool:
    """Run every section that there is time for; whether none failed."""
    deadline = time.monotonic() + 60 * minutes
    for name, section in SECTIONS.items():
        start = time.monotonic()
        if start > deadline:
            report.end(name, reason=f"not begun: {minutes:g} minutes are over")
            continue
        try:
            for row in section(card):
                report.add(name, row)
                if time.monotonic() > deadline:
                    report.end(name, reason=f"cut short: {minutes:g} minutes are over")
                    break
        except Exception as error:  # whatever a driver or a full card raises
            traceback.print_exc()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            report.end(name, failed=True, reason=f"failed: {type(error).__name__}: {reason}")
        report.end(name, seconds=round(time.monotonic() - start, 1))
        gc.collect()  # models have cycles
        if card.device.type == "cuda":
            torch.cuda.empty_cache()
    return not any("failed" in section for section in report.sections.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="a folder")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        card = Card(asked.device, asked.tiny, Path(folder))
        head = f"{card.name}, torch {torch.__version__}, transformers {transformers.__version__}"
        print(head, flush=True)
        return 0 if run(card, Report(asked.output, head), asked.minutes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
