"""Tiny checkpoints, experts and task vectors, made on the spot.

The first half needs no transformers: a checkpoint is a config and tensors. The second half makes
real models with a tokenizer that was trained on the spot.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergelaw.artifacts import store
from mergelaw.data.documents import Document
from mergelaw.merging import task_vector
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models import checkpoint, hub
from mergelaw.models.checkpoint import COMPANIONS, INDEX, WEIGHTS, Tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Checkpoints as tensors


def write_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint folder of these tensors, in ``shards`` files with an index where several."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "tiny", "vocab_size": 4} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as its files hold them."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor: equal bytes, equal bits, also of zeros and NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_expert(
    base: Path,
    folder: Path,
    scale: float = 0.01,
    seed: int = 1,
    dtype: str | None = None,
    shards: int = 1,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A fine-tune of ``base``: noise of ``scale`` on every floating tensor, the rest copied.

    ``tensors`` replaces (or adds) tensors of the expert.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    with Tensors(base) as before:
        for name in before.names():
            tensor = before[name]
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * scale
                tensor = (tensor.float() + noise).to(DTYPES[dtype] if dtype else tensor.dtype)
            made[name] = tensor.clone()
        config = before.config
    write_tensors(folder, {**made, **(tensors or {})}, config, shards)
    for name in COMPANIONS:
        if name != "config.json" and (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    return folder


def as_artifact(source: Path, stage: str) -> Path:
    """The artifact that the pipeline makes of a checkpoint or adapter from outside."""
    folder = source.with_name(f"{source.name}@artifact")
    store.make(folder, stage, {}, {}, lambda work, state: hub.link(source, work))
    return folder


def write_task_vector(base: Path, expert: Path, folder: Path, **how: Any) -> TaskVector:
    """The task vector as the artifact that the pipeline makes of it."""
    inputs = {}
    if how.get("storage") == "derived" or checkpoint.is_adapter(expert):  # it reads them again
        inputs = {"base": as_artifact(base, "base"), "expert": as_artifact(expert, "expert")}

    def work(made: Path, state: Path) -> dict[str, Any]:
        return task_vector.write(base, expert, made, **how)

    store.make(folder, "task_vector", {}, inputs, work)
    return TaskVector(folder)


class InMemory:
    """A task vector of one tensor ``w`` in memory."""

    names = ("w",)

    def __init__(self, values: torch.Tensor, digest: str = "digest"):
        self.values, self.digest = values, digest

    def size(self, name: str) -> int:
        return len(self.values)

    def part(self, name: str, start: int, stop: int, device: Any = None) -> torch.Tensor:
        return self.values[start:stop]

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [("w", self.values)]


def write_pool(base: Path, folder: Path, size: int, scale: float = 0.01) -> dict[str, TaskVector]:
    """Task vectors of ``size`` experts by name, in canonical order."""
    pool = {}
    for number in range(size):
        name = f"expert{number}"
        expert = write_expert(base, folder / name, scale, seed=100 + number)
        pool[name] = write_task_vector(base, expert, folder / f"vector{number}")
    return pool


# Real models

TEXTS = (
    "The algebra is solved: 12 + 30 = 42, and x is 7.",
    "Zinc (Zn) has atomic number 30; its melting point is 419 degrees.",
    "def area(r):\n    return 3 * r ** 2\n",
    "A triangle with sides 3, 4 and 5 has a right angle.",
    "The fox, the dog and the heron are animals of the northern woods.",
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "gpt2": {},
}


@cache
def tokenizer(bos: bool = False) -> Any:
    """A byte-level tokenizer of about 320 tokens with the house's chat format."""
    from mergelaw.models.pretrain import train_tokenizer

    documents = [Document(str(i), None, text) for i, text in enumerate(TEXTS)]
    made = train_tokenizer(SimpleNamespace(vocab_size=320, max_tokens=256), documents)  # type: ignore[arg-type]
    if bos:
        made.add_special_tokens({"bos_token": "<|begin|>"})
    return made


def write_checkpoint(
    folder: Path,
    model_type: str = "llama",
    tied: bool = True,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    bos: bool = False,
    max_tokens: int = 256,
    **architecture: Any,
) -> Path:
    """A decoder of about 30,000 parameters with random weights, and its tokenizer.

    ``architecture`` overrides what the configuration says (``hidden_size=32``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = tokenizer(bos)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": max_tokens,
        "initializer_range": 0.2,  # wide, so that the model's losses differ from token to token
        **ARCHITECTURES[model_type],
        **architecture,
    }
    if model_type == "gpt2":
        settings.pop("intermediate_size")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(ours),
        pad_token_id=ours.pad_token_id,
        eos_token_id=ours.eos_token_id,
        bos_token_id=ours.bos_token_id,
        tie_word_embeddings=tied,
        **settings,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.save_pretrained(folder)
    ours.save_pretrained(folder)
    if shards > 1:
        tensors = read_tensors(folder)
        config_text = json.loads((folder / "config.json").read_text())
        (folder / WEIGHTS).unlink()
        write_tensors(folder, tensors, config_text, shards)
    return folder


def write_adapter(base: Path, folder: Path, kind: str = "LoraConfig", **config: Any) -> Path:
    """An adapter as peft saves it, with random weights, in the dtype of its base.

    ``kind`` is the name of peft's class of configurations.
    """
    import peft

    with Tensors(base) as tensors:
        dtype = tensors.float_dtype()
    torch.manual_seed(1)
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", **config)
    wrapped = peft.get_peft_model(load(base, dtype), settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    """The resident model of a checkpoint, as an evaluation loads it."""
    from mergelaw.models import causal_lm

    return causal_lm.load(folder, dtype).eval()


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """A file of records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def documents(chat: bool, count: int = 12) -> list[Document]:
    """Documents of very different lengths, with or without a prompt."""
    made = []
    for number in range(count):
        text = " ".join(TEXTS[(number + i) % len(TEXTS)] for i in range(1 + number % 4))
        text = text[: 10 + 17 * number]
        messages = [{"role": "user", "content": f"Question {number}?"}] if chat else None
        made.append(Document(f"document{number}", messages, text))
    return made
