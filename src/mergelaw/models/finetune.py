"""Fine-tune an expert on one device with TRL's SFTTrainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelaw.data import tokenize
from mergelaw.models import causal_lm, trainer
from mergelaw.models.checkpoint import read_config, vocabulary_size
from mergelaw.models.recipe import Training


def fine_tune(
    recipe: Training,
    seed: int,
    base: Path,
    corpora: Mapping[str, Path],
    folder: Path,
    state: Path,
    save_every: float,
) -> dict[str, Any]:
    """Train all weights of ``base`` on the corpora; write the expert into ``folder``.

    The loss is on responses and plain text. Weights are saved in the base's dtype. Returns facts
    for the lineage. Raises MergelawError for a refused document, and if training diverges.
    """
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    dtype, tokenizer = trainer.check_base(base), causal_lm.load_tokenizer(base)
    documents = trainer.training_documents(corpora)
    where = f"training documents of {', '.join(corpora)}"
    limits, rows = (recipe.max_tokens, recipe.long_documents), vocabulary_size(read_config(base))
    encoded = tokenize.encode(tokenizer, documents, *limits, where, rows=rows)
    model = causal_lm.load(base, "float32")
    causal_lm.check_windows(model, encoded.windows, where)
    if recipe.packing:
        causal_lm.check_packing(model, base)
    pad_with_an_embedded_token(tokenizer, len(model.get_input_embeddings().weight))
    arguments = trainer.training_arguments(
        SFTConfig,
        recipe,
        seed,
        state,
        max_length=recipe.max_tokens,
        packing=recipe.packing,
        activation_checkpointing=recipe.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": not recipe.packing},
    )
    training = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([example(window) for window in encoded.windows]),
        processing_class=tokenizer,
    )
    facts = trainer.train(training, state, save_every)
    causal_lm.save(training.model, folder, dtype)
    causal_lm.copy_companions(base, folder)
    return {
        **facts,
        "documents": encoded.documents,
        "long_documents": encoded.long_documents,
        "dropped_tokens": encoded.dropped_tokens,
    }


def pad_with_an_embedded_token(tokenizer: Any, rows: int) -> None:
    """Choose a padding token below ``rows``; no loss or attention sees which one it is."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if token is not None and token < rows:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
            return


def example(window: tokenize.Window) -> dict[str, list[int]]:
    """Token ids and labels of a window; the label -100 excludes a token from the loss."""
    ids, scored = list(window.ids), slice(window.start, window.stop)
    labels = [-100] * len(ids)
    labels[scored] = ids[scored]
    return {"input_ids": ids, "labels": labels}
