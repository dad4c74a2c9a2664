"""One merge by the paper's own code, in the peers' environment, as its command would make it.

    python paper_merge.py METHOD COEFFICIENT OUTPUT BASE EXPERT...

Its command imports a script that the package lacks; what follows is the rest of that command.
"""

import sys

import torch
from merge.merging_methods import MergingMethod
from transformers import AutoModelForCausalLM


def load(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


method, coefficient, output, base, *experts = sys.argv[1:]
merged = MergingMethod(merging_method_name=method).get_merged_model(
    merged_model=load(base),
    models_to_merge=[load(expert) for expert in experts],
    exclude_param_names_regex=[],
    scaling_coefficient=float(coefficient),
    param_value_mask_rate=0.8,
)
merged.to(torch.bfloat16).save_pretrained(output)
