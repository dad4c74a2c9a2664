"""Pre-training a base and fine-tuning an expert, seeded and resumable.

transformers' Trainer and TRL's SFTTrainer do the work. Both save their state by the clock into a
folder that outlives a kill; a resumed run ends with the bits of an undisturbed one (same device,
same number of threads).
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergelaw.data import documents as corpus
from mergelaw.data import tokenize as tokens
from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import COMPANIONS, Tensors, read_config
from mergelaw.models.recipe import Optimisation, Pretraining, Training

PROGRESS_SECONDS = 10
LOSSES = 100  # entries that lineage keeps of a training's losses
END = "<|end|>"
SPECIAL = ("<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pretrain(
    recipe: Pretraining, corpora: Mapping[str, Path], folder: Path, state: Path, save_every: float
) -> dict[str, Any]:
    """Train a tokenizer and a causal language model from nothing; write both into ``folder``."""
    import random

    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    documents = [d for path in corpora.values() for d in corpus.read(path / "train.parquet")]
    random.Random(recipe.seed).shuffle(documents)
    tokenizer = train_tokenizer(recipe, documents)
    rng = random.Random(recipe.seed + 1)
    stream: list[int] = []
    for document in documents:
        text = plain = "\n".join(
            [*(m["content"] for m in document.messages or []), document.response]
        )
        if document.messages is not None and rng.random() < recipe.chat_share:
            answer = {"role": "assistant", "content": document.response}
            text = tokenizer.apply_chat_template([*document.messages, answer], tokenize=False)
        text += "\n\n" if text is plain else ""
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = recipe.max_tokens
    blocks = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    if not blocks:
        raise MergelawError(
            f"pretraining: the mixture has {len(stream)} tokens, one sequence takes {size}; "
            "give its domains more training documents"
        )
    architecture = {"max_position_embeddings": size, **recipe.architecture}
    model_type = architecture.pop("model_type")
    try:
        config = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **architecture,
        )
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise MergelawError(
            f"pretraining.architecture: transformers refuses it ({str(error).splitlines()[0]})"
        ) from None
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, recipe, recipe.seed, state),
        train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        callbacks=[by_the_clock(save_every)],
    )
    facts = run(trainer, state)
    save(trainer.model, tokenizer, folder)
    check_tokenizer(tokenizer, folder)
    return {**facts, "mixture_tokens": len(stream)}


def train_tokenizer(recipe: Pretraining, documents: list[corpus.Document]) -> Any:
    """A byte-level BPE tokenizer with this house's chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = ([*(m["content"] for m in d.messages or []), d.response] for d in documents)
    core.train_from_iterator(
        (text for group in texts for text in group),
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=END,
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_tokens,
    )


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Some architectures bring their own tokenizer class, which gives other ids when reloaded."""
    again = load_tokenizer(folder)
    text = "<|user|>What is 12 + 30?<|assistant|>42<|end|>\n\nzinc, Zn"
    if again(text, verbose=False)["input_ids"] != tokenizer(text, verbose=False)["input_ids"]:
        raise MergelawError(
            "pretraining.architecture: transformers gives this model_type a tokenizer of its own "
            "that changes the token ids; use llama or qwen3"
        )


def fine_tune(
    recipe: Training,
    seed: int,
    base: Path,
    corpora: Mapping[str, Path],
    folder: Path,
    state: Path,
    save_every: float,
) -> dict[str, Any]:
    """Full fine-tuning of ``base`` on the corpora's training documents, by TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(base)
    documents = [d for path in corpora.values() for d in corpus.read(path / "train.parquet")]
    where = f"training documents of {', '.join(corpora)}"
    encoded = tokens.encode(tokenizer, documents, recipe.max_tokens, recipe.long_documents, where)
    rows = [
        {
            "input_ids": list(window.ids),
            "labels": [
                token if window.start <= place < window.stop else -100
                for place, token in enumerate(window.ids)
            ],
        }
        for window in encoded.windows
    ]
    model = load(base, "float32")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(
        model=model,
        args=arguments(
            SFTConfig,
            recipe,
            seed,
            state,
            max_length=recipe.max_tokens,
            packing=recipe.packing,
            activation_checkpointing=recipe.gradient_checkpointing,
            dataset_kwargs={"skip_prepare_dataset": not recipe.packing},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[by_the_clock(save_every)],
    )
    facts = run(trainer, state)
    with Tensors(base) as stored:
        dtype = stored.float_dtype()
    save(trainer.model, None, folder, dtype)
    for name in COMPANIONS:
        if (base / name).exists() and not (folder / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
    return {
        **facts,
        "documents": encoded.documents,
        "long_documents": encoded.long_documents,
        "dropped_tokens": encoded.dropped_tokens,
    }


def trainers() -> dict[str, Callable[..., dict[str, Any]]]:
    """What fine-tunes an expert, by the name of the configuration; all take the same arguments."""
    from mergelaw.models import openrlhf

    return {"trl": fine_tune, "openrlhf": openrlhf.fine_tune}


def load(folder: Path, dtype: str, device_map: Any = None) -> Any:
    """A causal language model from a checkpoint folder, never running the checkpoint's code."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        kind = read_config(folder)["model_type"]
        raise MergelawError(
            f"{folder}: transformers cannot load this {kind} model "
            f"({str(error).strip().splitlines()[0]})"
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, never running the checkpoint's code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a half-copied or foreign one raises
        raise MergelawError(
            f"{folder}: transformers cannot load its tokenizer "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0]}); copy its "
            "files into the checkpoint"
        ) from None


def arguments(cls: Any, recipe: Optimisation, seed: int, state: Path, **more: Any) -> Any:
    """Our recipe in the words of transformers' TrainingArguments."""
    import torch

    micro = recipe.micro_batch_size or recipe.batch_size
    cpu = not torch.cuda.is_available()
    made = cls(
        output_dir=str(state),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1.0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
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
        **more,
    )
    # Of several GPUs it would take all, each with a batch of its own: more documents a step than
    # the recipe says.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def by_the_clock(save_every: float) -> Any:
    """A callback that saves the trainer's state and tells how far it is, each in its seconds."""
    from transformers import TrainerCallback

    class ByTheClock(TrainerCallback):
        started = saved = shown = time.monotonic()
        first = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.started, self.first = time.monotonic(), state.global_step

        def on_step_end(self, args, state, control, **kwargs):
            if time.monotonic() - self.saved >= save_every and state.global_step < state.max_steps:
                self.saved = time.monotonic()
                control.should_save = True
            return control

        def on_log(self, args, state, control, logs=None, **kwargs):
            now = time.monotonic()
            if now - self.shown > PROGRESS_SECONDS and logs and "loss" in logs:
                self.shown, step, last = now, state.global_step, state.max_steps
                left = (now - self.started) / (step - self.first) * (last - step)
                print(
                    f"mergelaw: step {step} of {last}, loss {logs['loss']:.3f}, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    return ByTheClock()


def run(trainer: Any, state: Path) -> dict[str, Any]:
    """Train from the last whole state on, or from the beginning; check what came out."""
    import torch
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last = None
    for path in sorted(state.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:  # written last by the trainer: the state before it is whole
            json.loads((path / "trainer_state.json").read_text())
            last = path
        except (OSError, ValueError):
            shutil.rmtree(path)
    # Asked for by full determinism: every fresh buffer is filled with NaN, half of a tiny step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    for name, parameter in trainer.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MergelawError(
                f"training diverged: parameter {name!r} holds NaN or Inf; lower the learning rate"
            )
    # Of every step, for the trainer's own averages forget what was before a resume.
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "resumed_at_step": int(last.name.split("-")[1]) if last else None,
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        **curve([(entry["step"], entry["loss"]) for entry in history]),
    }


def curve(losses: list[tuple[int, float]]) -> dict[str, Any]:
    """(step, loss) of every step as lineage keeps them: their mean, and the means of parts of equal
    size with the step at which each ends."""
    size = -(-len(losses) // LOSSES)
    parts = [losses[start : start + size] for start in range(0, len(losses), max(size, 1))]
    means = [[part[-1][0], statistics.fmean(loss for _, loss in part)] for part in parts]
    whole = statistics.fmean(loss for _, loss in losses) if losses else None
    return {"train_loss": whole, "losses": means}


def save(model: Any, tokenizer: Any, folder: Path, dtype: str = "float32") -> None:
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
