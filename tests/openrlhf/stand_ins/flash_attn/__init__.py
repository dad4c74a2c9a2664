"""Stands in for flash-attn, which needs CUDA to be built, so that OpenRLHF runs on a CPU.

What it holds is imported, but never called, without packing. And it makes the processor count as
the GPUs that OpenRLHF expects: as many as STAND_IN_GPUS says.
"""

import os

import torch

torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda device=None: None
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.device_count = lambda: int(os.environ.get("STAND_IN_GPUS", "1"))
torch.cuda.get_device_name = lambda device=None: "cpu"
