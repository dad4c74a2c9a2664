"""How long does the whole analysis of the paper's grid take? Fits, intervals, files, report.

Seven sizes, k = 1..9, nine domains and four methods, three rings of nine experts each: simulated
evaluation rows in, laws and report out, as the stages `fit` and `report` make them.

    python benchmarks/analysis.py
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.evaluation.design import sample
from mergelaw.laws.fits import fit_study, write
from mergelaw.laws.law import MERGING
from mergelaw.report.page import write_report

SIZES = (0.5, 1.5, 3, 7, 14, 32, 72)
METHODS = {"average": 0.1, "task_arithmetic": 0.0, "ties": 0.6, "dare": 0.2}
EXPERTS = [f"expert{i}" for i in range(9)]
DOCUMENTS = 100


def simulate(seed: int) -> pd.DataFrame:
    """Evaluation rows: the law, a random effect of each expert and pair, the documents'."""
    random = np.random.default_rng(seed)
    rows = []
    tokens = random.integers(200, 2000, (9, DOCUMENTS))
    texts = 0.2 * random.standard_normal((9, DOCUMENTS))
    for N in SIZES:
        design = {"design": "ring", "k": None, "circles": 3, "exhaustive_up_to": 9}
        plan = sample(EXPERTS, **design, subsets_per_k=9, seed=0, base=f"b{N}")
        for method, b in METHODS.items():
            effects = 0.02 * random.standard_normal((9, 9, 9))
            for subset in plan:
                if not subset.k:
                    continue
                at = [EXPERTS.index(name) for name in subset.experts]
                for domain in range(9):
                    law = {"L_star": 0.2 + 0.05 * domain, "B": 0.2, "beta": 0.4}
                    law |= {"A0": 0.1, "gamma": 0.02, "b": b}
                    loss = float(MERGING.predict(law, N=N, k=subset.k))
                    loss += effects[domain][np.ix_(at, at)].mean()
                    loss += 5e-4 * random.standard_normal()
                    nll = tokens[domain] * (loss + texts[domain])
                    rows.append(
                        {"method": method, "family": "grid", "base": f"b{N}", "N": N, "N_total": N,
                         "seed": 1, "k": subset.k, "replicate": subset.replicate,
                         "experts": list(subset.experts), "merge": "+".join(subset.experts),
                         "role": "merge", "domain": f"domain{domain}", "held_out": False,
                         "ce": nll.sum() / tokens[domain].sum(), "finite": True,
                         "document_nll": nll, "document_tokens": tokens[domain]}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    rows = simulate(parser.parse_args().seed)
    print(f"{len(rows):,} cells of {len(SIZES)} sizes and {len(METHODS)} methods")
    with tempfile.TemporaryDirectory() as folder:
        clocks = [(time.perf_counter(), time.process_time())]
        told = write(fit_study(rows, [rows]), Path(folder) / "laws")
        clocks.append((time.perf_counter(), time.process_time()))
        write_report(Path(folder) / "laws", rows, Path(folder) / "report", title="grid", facts={})
        clocks.append((time.perf_counter(), time.process_time()))
    print(", ".join(f"{count} {name}" for name, count in told.items()))
    for name, (first, before), (last, after) in zip(
        ("fits, intervals and files", "report"), clocks, clocks[1:], strict=False
    ):
        print(f"{name}: {last - first:.1f} s, {after - before:.1f} s of the processor")


if __name__ == "__main__":
    main()
