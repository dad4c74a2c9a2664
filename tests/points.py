"""Points of a study that follow the merging law, with noise."""

import numpy as np
import pandas as pd

from mergelaw.laws.law import MERGING

JOINT = {"L_star": 0.4, "B": 0.3, "A0": 0.08, "beta": 0.4, "gamma": 0.1, "b": 0.3}
SIZES = [0.5, 1.5, 3.0, 7.0, 14.0]


def study(noise=2e-4, M=9, sizes=SIZES, k=None, seed=0, method="average", **change):
    N, ks = (a.ravel() for a in np.meshgrid(sizes, np.arange(1, M + 1) if k is None else k))
    random = np.random.default_rng(seed)
    ce = MERGING.predict({**JOINT, **change}, N=N, k=ks) + noise * random.standard_normal(len(N))
    return pd.DataFrame(
        {
            "method": method,
            "family": "ours",
            "base": [f"{n:g}B" for n in N],
            "N": N,
            "k": ks,
            "domain": "macro",
            "ce": ce,
            "M": M,
        }
    )
