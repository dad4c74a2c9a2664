"""Run the Trainer of transformers or TRL so that a killed training resumes.

The trainer's state is saved every few minutes into a folder that survives a kill. A resumed run
ends with the same bits as an uninterrupted one on the same device and number of threads.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergelaw.data import documents as corpus
from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import Tensors, mergeable
from mergelaw.models.recipe import Optimisation

PROGRESS_SECONDS = 10
LOSSES = 100  # entries of a training's losses that lineage keeps


def training_documents(corpora: Mapping[str, Path]) -> list[corpus.Document]:
    """The training split of every corpus, in order."""
    return [d for path in corpora.values() for d in corpus.read_split(path)]


def training_arguments(
    cls: Any, recipe: Optimisation, seed: int, state: Path, **options: Any
) -> Any:
    """The recipe as transformers' TrainingArguments, or as their subclass ``cls``."""
    import torch

    micro_batch = recipe.micro_batch_size or recipe.batch_size
    cpu = not torch.cuda.is_available()
    arguments = cls(
        output_dir=str(state),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1.0,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe.batch_size // micro_batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        warmup_steps=recipe.warmup,
        lr_scheduler_type=recipe.schedule,
        bf16=recipe.dtype == "bfloat16",
        seed=seed,
        data_seed=seed,
        full_determinism=True,
        use_cpu=cpu,
        save_strategy="no",
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="steps",
        dataloader_pin_memory=not cpu,
        **options,
    )
    # With several GPUs, the Trainer would multiply the batch by their number. No public option
    # limits it to one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train(trainer: Any, state: Path, save_every: float) -> dict[str, Any]:
    """Train, from the last whole state in ``state`` if one exists. Returns facts for the lineage.

    ``save_every`` is in seconds. Raises MergelawError if the weights end as NaN or Inf.
    """
    import torch
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(save_and_report(save_every))
    last = last_state(state)
    # Full determinism fills every new buffer with NaN, which takes half the time of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    check_finite(trainer.model.named_parameters())
    # The trainer's own mean loss forgets the steps before a resume.
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "resumed_at_step": step_of(last) if last else None,
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        **summarise_losses([(entry["step"], entry["loss"]) for entry in history]),
    }


def save_and_report(save_every: float) -> Any:
    """A callback that saves the state every ``save_every`` seconds and prints progress."""
    from transformers import TrainerCallback

    class SaveAndReport(TrainerCallback):
        started = saved = shown = time.monotonic()
        first = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started, self.first = time.monotonic(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() - self.saved >= save_every and state.global_step < state.max_steps:
                self.saved = time.monotonic()
                control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            now, logs = time.monotonic(), more["logs"]
            if now - self.shown > PROGRESS_SECONDS and "loss" in logs:
                self.shown, step, last = now, state.global_step, state.max_steps
                left = (now - self.started) / (step - self.first) * (last - step)
                print(
                    f"mergelaw: step {step} of {last}, loss {logs['loss']:.3f}, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    return SaveAndReport()


def step_of(state: Path) -> int:
    return int(state.name.split("-")[1])


def last_state(folder: Path) -> Path | None:
    """The newest whole ``checkpoint-STEP`` below ``folder``; incomplete ones are deleted."""
    last = None
    for path in sorted(folder.glob("checkpoint-*"), key=step_of):
        try:  # the trainer writes this file last, so the state before it is whole
            json.loads((path / "trainer_state.json").read_text())
            last = path
        except (OSError, ValueError):
            shutil.rmtree(path)
    return last


def check_finite(
    parameters: Iterable[tuple[str, Any]],
    where: str = "training: ended with",
    advice: str = "lower the learning rate",
) -> None:
    """Raise MergelawError for the first parameter that holds NaN or Inf."""
    import torch

    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise MergelawError(f"{where} NaN or Inf in {name!r}; {advice}")


def check_base(base: Path) -> str:
    """Refuse a base whose weights hold NaN or Inf; returns their dtype."""
    with Tensors(base) as stored:
        tensors = ((name, stored[name]) for name in mergeable(stored))
        check_finite(tensors, f"{base}: the base holds", "give another base")
        return stored.float_dtype()


def summarise_losses(losses: list[tuple[int, float]]) -> dict[str, Any]:
    """The mean of (step, loss) pairs, and their means over at most :data:`LOSSES` equal parts.

    Each part is [its last step, its mean loss].
    """
    size = max(-(-len(losses) // LOSSES), 1)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    means = [[part[-1][0], statistics.fmean(loss for _, loss in part)] for part in parts]
    mean = statistics.fmean(loss for _, loss in losses) if losses else None
    return {"train_loss": mean, "losses": means}
