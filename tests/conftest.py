"""Every test runs offline, on one thread, with the same examples each time."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("mergelaw", deadline=None, derandomize=True, database=None)
settings.load_profile("mergelaw")
