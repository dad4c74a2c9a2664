"""What is asked of the interpreter that OpenRLHF is installed for: JSON on stdin, JSON on the last
line of stdout. It runs there as a text, so it imports nothing of mergelaw.

    versions    of the packages that make a training; imports nothing
    machine     whether OpenRLHF can be imported, which GPUs it sees, how its tokenizer cuts texts
    losses      what the training logged
"""

import json
import sys
from importlib import import_module, metadata
from pathlib import Path

PACKAGES = (
    "openrlhf",
    "deepspeed",
    "transformers",
    "torch",
    "flash-attn",
    "ring-flash-attn",
    "peft",
    "datasets",
)


def versions() -> dict:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(question: dict) -> dict:
    for module in question["modules"]:
        try:
            import_module(module)
        except Exception as error:  # whatever a half-installed package raises
            return {"broken": f"{module}: {type(error).__name__}: {error}"}
    import torch
    from transformers import AutoTokenizer

    gpus = torch.cuda.device_count()
    memory = [torch.cuda.mem_get_info(device)[1] for device in range(gpus)]
    tokenizer = AutoTokenizer.from_pretrained(question["model"])
    ids = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in question["texts"]
    ]
    name = torch.cuda.get_device_name(0) if gpus else "cpu"
    return {"gpus": gpus, "memory": min(memory, default=0), "device": name, "ids": ids}


def losses(question: dict) -> dict:
    """By step, as the first process counts them. A resumed training has logged some steps twice, of
    which the last counts, and may lack some before the kill."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for path in sorted(Path(question["log"]).rglob("events.*"), key=lambda p: p.stat().st_mtime):
        events = EventAccumulator(str(path)).Reload()
        if "train/loss_mean" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss_mean")}
    return {"losses": sorted(found.items())}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    told = {"versions": lambda _: versions(), "machine": machine, "losses": losses}[sys.argv[1]]
    print(json.dumps(told(asked)))
