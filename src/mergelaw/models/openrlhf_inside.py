"""Answer questions within OpenRLHF's environment: JSON on stdin, JSON as stdout's last line.

    versions    of the packages that matter to a training
    machine     whether modules import, which GPUs there are, the token ids of texts
    losses      of the training's log

The file is passed to that environment's Python as a text, so it imports nothing of mergelaw.
"""

import json
import sys
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PACKAGES = ("openrlhf", "deepspeed", "transformers", "torch", "flash-attn", "peft", "datasets")


def versions(data: Any) -> dict[str, str]:
    """Versions of Python and of the installed :data:`PACKAGES`."""
    installed = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def machine(data: Any) -> dict[str, Any]:
    """Number and name of the GPUs and token ids of texts, or the module that does not import."""
    for module in data["modules"]:
        try:
            import_module(module)
        except Exception as error:  # a half-installed package raises anything
            return {"broken": f"{module}: {type(error).__name__}: {error}"}
    import torch
    from transformers import AutoTokenizer

    gpus = torch.cuda.device_count()
    tokenizer = AutoTokenizer.from_pretrained(data["model"])
    ids = tokenizer(data["texts"], add_special_tokens=False, verbose=False)["input_ids"]
    return {"gpus": gpus, "device": torch.cuda.get_device_name(0) if gpus else "cpu", "ids": ids}


def losses(log: Any) -> list[tuple[int, float]]:
    """(step, loss) of the first process. A resumed training logs steps again; the last counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    by_step: dict[int, float] = {}
    for path in sorted(Path(log).rglob("events.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path)).Reload()
        if "train/loss_mean" in events.Tags()["scalars"]:
            by_step |= {event.step: event.value for event in events.Scalars("train/loss_mean")}
    return sorted(by_step.items())


if __name__ == "__main__":
    answers = {"versions": versions, "machine": machine, "losses": losses}
    print(json.dumps(answers[sys.argv[1]](json.load(sys.stdin))))
