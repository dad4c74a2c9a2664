"""How time and memory grow with parameters, k, the pool, evaluation tokens and number of merges.

    python benchmarks/growth.py --output growth.svg
    python benchmarks/growth.py --laws

Each point is a process of its own that runs the stage `evaluate` on random models. Processor
seconds and peak memory are fitted as a power of what grows, between the last two points, for at
small ones most is overhead. It ends with an error where a power is above 1.15. Of the merges it
tells how many bytes each leaves behind: a merge has a row, and a leak would show.

With ``--laws`` the stage `fit` is measured instead: one domain of 100,000 points, and 84 of 1,188.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import psutil

START = {"layers": 4, "width": 128, "k": 4, "pool": 8, "documents": 24, "merges": 32}
SWEEPS = {
    "parameters": [{"layers": layers, "width": 256} for layers in (2, 4, 8, 16)],
    "k": [{"k": k, "pool": 32, "width": 256} for k in (1, 2, 4, 8, 16)],
    "pool": [{"pool": pool, "merges": 8, "width": 256} for pool in (4, 8, 16, 32)],
    "tokens": [{"documents": documents} for documents in (24, 48, 96, 192)],
    "merges": [
        {"merges": merges, "layers": 1, "width": 16, "pool": 16, "documents": 2}
        for merges in (100, 1000, 10_000)
    ],
}
LIMIT = 1.15


def measure(settings: dict[str, int], folder: Path) -> dict[str, float]:
    """One point, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergelaw.artifacts import lineage, store
    from mergelaw.data import documents as corpus
    from mergelaw.data.recipe import Source, SplitRecipe
    from mergelaw.evaluation import read_rows
    from mergelaw.evaluation import shard as evaluate
    from mergelaw.evaluation.recipe import Evaluation
    from mergelaw.merging import task_vector
    from mergelaw.models import pretrain
    from mergelaw.models.recipe import Pretraining

    def artifact(name: str, stage: str, work) -> Path:
        store.make(folder / name, stage, {}, {}, lambda made, state: work(made) and None)
        return folder / name

    recipe = SplitRecipe(
        source=Source(synthetic="algebra"), train_documents=200,
        eval_documents=settings["documents"], seed=0,
    )  # fmt: skip
    train, documents = (
        artifact(split, "corpus", partial(corpus.write_split, recipe, split, {}))
        for split in ("train", "eval")
    )
    shape = Pretraining(architecture={}, domains=["x"], steps=1, learning_rate=1e-3, max_tokens=512)
    tokenizer = pretrain.train_tokenizer(shape, corpus.read_split(train))
    width = settings["width"]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=settings["layers"], num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 64, 1), max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def save(made: Path, model=model) -> None:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)

    base = artifact("base", "base", save)
    vectors = {}
    for number in range(settings["pool"]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape) * 1e-3
        expert = artifact(f"expert{number}", "expert", save)
        vectors[f"e{number}"] = artifact(
            f"vector{number}",
            "task_vector",
            lambda made, e=expert: task_vector.write(base, e, made),
        )
    del model, save
    # As many distinct subsets of k as are asked for, or else of other sizes too.
    names, k, rng = list(vectors), settings["k"], random.Random(0)
    chosen: set[tuple[str, ...]] = set()
    for size in (k, *(other for other in range(2, len(names) + 1) if other != k)):
        there, wanted = math.comb(len(names), size), settings["merges"] - len(chosen)
        if there <= wanted:
            chosen |= set(combinations(names, size))
        else:
            end = len(chosen) + wanted
            while len(chosen) < end:
                chosen.add(tuple(sorted(rng.sample(names, size), key=names.index)))
            break
    rows = [[len(subset), 0, i, list(subset)] for i, subset in enumerate(sorted(chosen))]
    plan = {
        "method": {"method": "average"},
        "evaluation": Evaluation().model_dump(),
        "domains": {"algebra": False},
        "labels": {"family": "f", "base": "b", "method": "m", "seed": 0, "N_nominal": None},
    }

    def run(part: list, name: str) -> Path:
        (folder / name).mkdir()
        evaluate.evaluate(
            plan, part, base, vectors, {"algebra": documents}, folder / "cells", name, folder / name
        )
        return folder / name

    run(rows[:1], "warm")
    before, start = anonymous(), time.process_time()
    made = run(rows, "all")
    seconds, memory = time.process_time() - start, anonymous() - before
    table = read_rows([made])
    return {
        "parameters": parameters,
        "k": k,
        "pool": len(names),
        "tokens": float(table["tokens"].iloc[0]),
        "merges": len(rows),
        "seconds": seconds,
        "merge_seconds": float(table["merge_seconds"].median()),
        "eval_seconds": float(table["eval_seconds"].median()),
        "memory": float(memory),
        "peak": float(lineage.peak_memory()),
    }


def fit_laws(domains: int, bases: int, levels: int) -> str:
    """Seconds and peak memory of all fits of simulated points, as a line."""
    import numpy as np
    import pandas as pd

    from mergelaw.artifacts import lineage
    from mergelaw.laws import fit_all

    noise = np.random.default_rng(0)
    N, k = (
        axis.ravel()
        for axis in np.meshgrid(np.geomspace(0.05, 70, bases), np.arange(1, levels + 1))
    )
    tables = []
    for domain in range(domains):
        ce = 0.6 + 0.3 * N**-0.35 + (0.2 + 0.01 * domain) * N**-0.05 / (k + 0.5)
        ce += 1e-3 * noise.standard_normal(len(N))
        names = {"method": "average", "family": "", "domain": f"domain{domain}", "M": levels}
        base = [f"b{size:.4g}" for size in N]
        tables.append(pd.DataFrame({**names, "base": base, "N": N, "k": k, "ce": ce}))
    wall, start = time.perf_counter(), time.process_time()
    study = fit_all(pd.concat(tables, ignore_index=True))
    study.to_dict()
    wall, seconds = time.perf_counter() - wall, time.process_time() - start
    return (
        f"{domains} x {len(N):,} points of {bases} bases: {len(study.fits)} fits, {wall:.0f} s, "
        f"{seconds:.0f} s of the processor, peak {lineage.peak_memory() / 1e9:.2f} GB"
    )


def anonymous() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def point(settings: dict[str, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, __file__, "--point", json.dumps(settings), "--output", folder],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
            },
        )
    if run.returncode:
        raise SystemExit(f"{settings}: status {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def plot(found: dict[str, list[dict[str, float]]], output: Path) -> None:
    import altair as alt
    import pandas as pd

    panels = []
    for name, points in found.items():
        data = pd.DataFrame(points)
        data["gigabytes"] = data["peak"] / 1e9
        for what, unit in (("seconds", "processor seconds"), ("gigabytes", "peak memory, GB")):
            panels.append(
                alt.Chart(data, width=180, height=140)
                .mark_line(point=True)
                .encode(
                    alt.X(name, scale=alt.Scale(type="log", nice=False)),
                    alt.Y(what, scale=alt.Scale(type="log"), title=unit),
                )
            )
    alt.concat(*panels, columns=2).save(output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    parser.add_argument("--output", type=Path, default=Path("growth.svg"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--laws", action="store_true", help="measure fits of many points")
    asked = parser.parse_args()
    if asked.laws:
        for sizes in ((1, 100, 1000), (84, 12, 99)):
            print(fit_laws(*sizes), flush=True)
        return 0
    if asked.point:
        print(json.dumps(measure(json.loads(asked.point), asked.output)))
        return 0
    found: dict[str, list[dict[str, float]]] = {}
    bad = []
    for name in asked.sweeps:
        print(f"{name:>12}   seconds   merge s    eval s  memory MB   peak MB")
        for change in SWEEPS[name]:
            one = point(START | change)
            found.setdefault(name, []).append(one)
            print(
                f"{one[name]:12.0f} {one['seconds']:9.2f} {one['merge_seconds']:9.5f} "
                f"{one['eval_seconds']:9.4f} {one['memory'] / 1e6:10.1f} {one['peak'] / 1e6:9.0f}",
                flush=True,
            )
        before, last = found[name][-2:]
        grown = math.log(last[name] / before[name])
        exponents = {
            what: math.log(last[what] / before[what]) / grown for what in ("seconds", "peak")
        }
        print("  grows as a power of", {w: round(e, 2) for w, e in exponents.items()})
        bad += [f"{what} with {name}" for what, e in exponents.items() if e > LIMIT]
        if name == "merges":
            each = (last["memory"] - before["memory"]) / (last["merges"] - before["merges"])
            print(f"  {each:.0f} bytes stay behind for each merge (its cell's row among them)")
    plot(found, asked.output)
    print(f"plot: {asked.output}")
    if bad:
        print(f"worse than linear: {', '.join(bad)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
