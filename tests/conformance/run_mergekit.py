"""Run merges by mergekit, in its own environment: python run_mergekit.py jobs.json

Each job is {"config": mergekit's YAML, "output": folder, "masks": file or null}. With masks, the
Bernoulli draws of DARE are replaced: the file holds the mask of a tensor by the SHA-256 of its
difference from the base. Everything else is mergekit's.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

draw, choose = torch.bernoulli, sparsify.bernoulli


def given(masks):
    def bernoulli(tensor, *args, **more):
        name = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        torch.bernoulli = lambda likelihood: masks[name].view_as(likelihood).to(likelihood.dtype)
        try:
            return choose(tensor, *args, **more)
        finally:
            torch.bernoulli = draw

    return bernoulli


for job in json.loads(Path(sys.argv[1]).read_text()):
    config = Path(job["config"])
    sparsify.bernoulli = given(load_file(job["masks"])) if job["masks"] else choose
    os.chdir(config.parent)  # paths in it are relative to it
    merge = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    run_merge(merge, job["output"], MergeOptions())
