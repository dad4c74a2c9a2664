"""Process settings of a command: progress bars, threads, garbage collection and memory."""

import atexit
import ctypes
import gc
import os
import platform


def quiet() -> None:
    """Turn off progress bars in logs; use one linear-algebra thread for reproducible bits.

    Libraries read these settings once, when they are imported.
    """
    os.environ.update(
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        OPENBLAS_NUM_THREADS="1",
    )


def collect_less() -> None:
    """Collect garbage less often.

    Importing torch and transformers creates millions of lasting objects. Searching them for garbage
    takes a fifth of the import's time, and as much again at exit.
    """
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)


def prepare_torch(threads: int) -> None:
    """Fix the number of threads, which affects bits, and keep freed memory.

    glibc maps an activation when it is allocated and unmaps it when it is freed. A forward pass on
    a processor spent up to a third of its time on such pages.
    """
    import torch

    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)
