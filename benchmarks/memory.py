"""Peak anonymous memory of task vectors and merges, against the experts' size.

    python benchmarks/memory.py [--experts 8] [--layers 24] [--width 1024] [--folder DIR]

Makes a base and experts of random values in bfloat16 in a temporary folder (by default of 464
million parameters each), and then, each in a process of its own: their task vectors, materialised
and derived; a merge of all written out as a checkpoint; a merge of all into the resident model,
streamed; and a gradient in learned coefficients. Anonymous memory is heap and stacks; mapped files,
which the system may drop at any moment, are not counted. What the libraries and the resident model
take is told apart.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ({"method": "average"}, {"method": "ties", "density": 0.2})
STORAGES = ("materialised", "derived")


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("benchmarks/memory.py: needs Linux, which tells anonymous memory apart")


class Peak:
    """The highest anonymous memory within, above what there was before; and the seconds."""

    def __enter__(self) -> "Peak":
        self.before = self.highest = anonymous()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        self.clock = time.perf_counter()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self.clock
        self.done.set()
        self.watcher.join()
        self.bytes = max(self.highest, anonymous()) - self.before


# -- models ------------------------------------------------------------------------------------


def config_of(layers: int, width: int) -> dict:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": width,
        "intermediate_size": 2816 * width // 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def layout_of(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    return {name: ("BF16", tuple(p.shape)) for name, p in model.named_parameters()}


def write_model(folder: Path, config: dict, layout: dict, base: Path | None, seed: int) -> Path:
    """Random values, or a base's with noise of a hundredth of their size; piece by piece."""
    import torch

    from mergelaw.models.checkpoint import WEIGHTS, Tensors, Writer

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # One block of noise, turned a little further from piece to piece: random enough, and quick.
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 0.02
    turn = 0

    def values(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        nonlocal turn
        size = math.prod(shape)
        for start in range(0, size, len(block)):
            turn += 1
            noise = block.roll(1009 * turn)[: size - start]
            if before is not None:
                plain = before[name].view(-1)[start : start + len(noise)].float()
                noise = plain + noise * 0.05
            yield noise.bfloat16()

    before = Tensors(base) if base else None
    with Writer(folder / WEIGHTS, layout) as writer:
        for name, (_, shape) in layout.items():
            writer.write_pieces(name, values(name, shape))
    return folder


def artifact(folder: Path, stage: str, source: Path) -> Path:
    from mergelaw.artifacts import store
    from mergelaw.models import hub

    store.make(folder, stage, {}, {}, lambda work, state: hub.link(source, work))
    return folder


# -- what is measured --------------------------------------------------------------------------


def step(folder: Path, what: str, storage: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    from mergelaw.artifacts import store
    from mergelaw.merging import engine as merge
    from mergelaw.merging import task_vector
    from mergelaw.merging.methods import method_of
    from mergelaw.models import causal_lm

    torch.set_num_threads(1)
    base = folder / "base"
    experts = {path.name: path for path in sorted((folder / "experts").iterdir())}
    experts = {name: path for name, path in experts.items() if not name.startswith(".")}
    if what == "task vectors":

        def work(made: Path, expert: Path) -> dict[str, Any]:
            return task_vector.write(base, expert, made, storage, trust=["weights"])

        with Peak() as peak:
            for name, expert in experts.items():
                inputs = {"base": base, "expert": expert}
                place = folder / storage / name
                store.make(place, "task_vector", {}, inputs, lambda m, s, e=expert: work(m, e))
        return {"bytes": peak.bytes, "seconds": peak.seconds}
    method = method_of(recipe)
    pool = {name: task_vector.TaskVector(folder / storage / name) for name in experts}
    if what == "written out":
        with tempfile.TemporaryDirectory(dir=folder) as out, Peak() as peak:
            merge.write_merge(base, pool, method, None, Path(out))
        return {"bytes": peak.bytes, "seconds": peak.seconds}
    if what == "gradient":
        return gradient(base, pool, method)
    model = causal_lm.load(base, "bfloat16")
    with Peak() as peak, merge.Merger(model, base, pool, method, memory=0) as merger:
        merger.merge(list(pool))
    return {"bytes": peak.bytes, "seconds": peak.seconds}


def gradient(base: Path, pool: dict[str, Any], method: Any) -> dict[str, Any]:
    """A gradient of 256 tokens in the coefficients; activations are computed again."""
    import numpy as np

    from mergelaw.data.tokenize import Window
    from mergelaw.decide.calibration import Calibration, divide, save_memory
    from mergelaw.merging import engine as merge
    from mergelaw.models import causal_lm

    model = causal_lm.load(base, "bfloat16")
    save_memory(model, base, {"batch_tokens": 64, "max_tokens": 64, "dtype": "bfloat16"}, 0)
    windows = [[Window(n, tuple(range(n, n + 64)), 32, 64)] for n in range(4)]
    documents = divide({"random": windows}, 64, model.device)
    with (
        Peak() as peak,
        merge.Merger(model, base, pool, method, memory=0) as merger,
        Calibration(model, merger, list(pool), documents) as objective,
    ):
        objective.gradient(np.full((len(pool), len(objective.tensors)), 1 / len(pool)), "all")
    return {"bytes": peak.bytes, "seconds": peak.seconds}


def write_all(folder: Path, experts: int, layers: int, width: int) -> dict[str, Any]:
    config = config_of(layers, width)
    layout = layout_of(config)
    base = write_model(folder / "base.source", config, layout, None, 0)
    (folder / "experts").mkdir()
    for number in range(experts):
        source = write_model(folder / f"e{number}.source", config, layout, base, 1 + number)
        artifact(folder / "experts" / f"e{number}", "expert", source)
    artifact(folder / "base", "base", base)
    sizes = [2 * math.prod(shape) for _, shape in layout.values()]
    return {"one": sum(sizes), "largest": max(sizes)}


def in_a_process(name: str, *arguments: Any) -> dict[str, Any]:
    """Of its own, so that nothing is left over from what was before."""
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, __file__, "--step", json.dumps([name, *arguments])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | quiet,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where to put the models, for a while")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        name, folder, *rest = json.loads(given.step)
        print(json.dumps({"write": write_all, "measure": step}[name](Path(folder), *rest)))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes = in_a_process("write", folder, given.experts, given.layers, given.width)
        one, largest, whole = sizes["one"], sizes["largest"], given.experts * sizes["one"]
        print(
            f"{given.experts} experts of {one / 2e6:.0f} million parameters in bfloat16: "
            f"{whole / 1e6:,.0f} MB; largest tensor: {largest / 1e6:,.0f} MB, in float32 "
            f"{2 * largest / 1e6:,.0f} MB"
        )
        print(f"{'':<32}{'task vectors':<14}{'anonymous':>12}{'of the experts':>16}{'time':>9}")
        asked: list[tuple[str, dict[str, Any]]] = [("task vectors", {})]
        asked += [(w, recipe) for recipe in METHODS for w in ("written out", "into the model")]
        asked.append(("gradient", {"method": "learned"}))
        for what, recipe in asked:
            for storage in STORAGES:
                found = in_a_process("measure", folder, what, storage, recipe)
                title = f"{recipe['method']} of {given.experts}, {what}" if recipe else what
                print(
                    f"{title:<32}{storage:<14}{found['bytes'] / 1e6:>9,.0f} MB"
                    f"{found['bytes'] / whole:>16.1%}{found['seconds']:>7.1f} s",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
