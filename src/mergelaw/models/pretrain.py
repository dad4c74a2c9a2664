"""Pre-train a base: its byte-level BPE tokenizer and its weights."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError, first_line
from mergelaw.models import causal_lm, trainer
from mergelaw.models.recipe import Pretraining

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
    """Train a tokenizer and a causal language model on the corpora; write both into ``folder``.

    ``state`` holds the trainer's state, saved every ``save_every`` seconds. Returns facts for the
    lineage. Raises MergelawError if the documents do not fill one sequence, if transformers refuses
    the architecture or its tokenizer, and if training diverges.
    """
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    documents = trainer.training_documents(corpora)
    random.Random(recipe.seed).shuffle(documents)
    tokenizer = train_tokenizer(recipe, documents)
    stream = mixture(recipe, documents, tokenizer)
    size = recipe.max_tokens
    blocks = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    if not blocks:
        raise MergelawError(
            f"pretraining: the mixture has {len(stream)} tokens, one sequence takes {size}; "
            "give its domains more training documents"
        )
    training = Trainer(
        model=new_model(recipe, tokenizer),
        args=trainer.training_arguments(TrainingArguments, recipe, recipe.seed, state),
        train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
    )
    facts = trainer.train(training, state, save_every)
    causal_lm.save(training.model, folder, "float32")
    tokenizer.save_pretrained(folder)
    check_tokenizer(tokenizer, folder)
    return {**facts, "mixture_tokens": len(stream)}


def texts(document: Document) -> Iterator[str]:
    """The messages of a document without their roles, then its response."""
    yield from (message["content"] for message in document.messages or [])
    yield document.response


def train_tokenizer(recipe: Pretraining, documents: Sequence[Document]) -> Any:
    """A byte-level BPE tokenizer with :data:`CHAT_TEMPLATE`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        (text for document in documents for text in texts(document)),
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


def mixture(recipe: Pretraining, documents: Sequence[Document], tokenizer: Any) -> list[int]:
    """Token ids of all documents in sequence; ``recipe.chat_share`` of the chats in chat format."""
    rng = random.Random(recipe.seed + 1)
    stream: list[int] = []
    for document in documents:
        if document.messages is not None and rng.random() < recipe.chat_share:
            answer = {"role": "assistant", "content": document.response}
            text = tokenizer.apply_chat_template([*document.messages, answer], tokenize=False)
        else:
            text = "\n".join(texts(document)) + "\n\n"
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return stream


def new_model(recipe: Pretraining, tokenizer: Any) -> Any:
    """A model of the recipe's architecture with seeded float32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = {"max_position_embeddings": recipe.max_tokens, **recipe.architecture}
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
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise MergelawError(
            f"pretraining.architecture: transformers refuses it ({first_line(error)}); change it"
        ) from None


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise MergelawError if the tokenizer, once saved and loaded, gives other ids.

    For some architectures, transformers loads a tokenizer class of their own.
    """
    saved = causal_lm.load_tokenizer(folder)
    text = "<|user|>What is 12 + 30?<|assistant|>42<|end|>\n\nzinc, Zn"
    if saved(text, verbose=False)["input_ids"] != tokenizer(text, verbose=False)["input_ids"]:
        raise MergelawError(
            "pretraining.architecture: transformers loads this model_type with a tokenizer of its "
            "own that changes the token ids; use llama or qwen3"
        )
