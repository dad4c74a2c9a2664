"""The size of a model: parameter counts from a configuration alone, by arithmetic, without torch.

What a job asks a cluster for, and what a study will cost, has to be known before a model is loaded
or even fetched. Decoders of the usual kind (grouped-query attention, a gated MLP, RMS norms, or
GPT-2's older form) are counted exactly; of an unusual one the count is that of a Llama of its
dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelaw.config import Config
from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import read_config

TIED = {"gemma", "gemma2", "gemma3_text", "gpt2"}  # where a configuration does not say
QKV_BIAS = {"qwen2"}  # by architecture, not by configuration
HEAD_NORMS = {"qwen3", "gemma3_text"}  # queries and keys are normalised head by head
WIDE_NORMS = {"olmo2"}  # or all heads at once
FOUR_NORMS = {"gemma2", "gemma3_text"}  # a block has four norms instead of two
UNGATED = {"gpt2", "gpt_neox"}


@dataclass(frozen=True)
class Size:
    """Parameter counts of a decoder, and the widths that its memory and FLOPs follow from."""

    total: int  # parameters; a tied head counts once
    embedding: int  # of these: token and position embeddings, and an untied head
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    query: int  # heads x their width
    key_value: int  # key-value heads x their width
    largest: int  # parameters of the largest tensor

    @property
    def non_embedding(self) -> int:
        """The N of the scaling law."""
        return self.total - self.embedding


def size_of_architecture(config: Mapping[str, Any]) -> Size | None:
    """The size of a transformers configuration (a ``config.json``); None if it gives no widths."""
    kind = config.get("model_type")

    def get(*names: str) -> int | None:
        return next((int(config[name]) for name in names if config.get(name)), None)

    hidden, layers = get("hidden_size", "n_embd"), get("num_hidden_layers", "n_layer")
    heads, vocab = get("num_attention_heads", "n_head"), get("vocab_size")
    if hidden is None or layers is None or heads is None or vocab is None:
        return None
    gated = kind not in UNGATED
    intermediate = get("intermediate_size", "n_inner") or (None if gated else 4 * hidden)
    if intermediate is None:
        return None
    width = get("head_dim") or hidden // heads
    query, key_value = heads * width, (get("num_key_value_heads") or heads) * width
    attention = 2 * hidden * query + 2 * hidden * key_value
    mlp = (3 if gated else 2) * hidden * intermediate
    if gated:
        norm = hidden
        if kind in QKV_BIAS:
            attention += query + 2 * key_value
        elif config.get("attention_bias"):
            attention += query + 2 * key_value + hidden
        if config.get("mlp_bias"):
            mlp += 2 * intermediate + hidden
    else:  # biases everywhere, also in the norms
        norm = 2 * hidden
        attention += query + 2 * key_value + hidden
        mlp += intermediate + hidden
    if kind in HEAD_NORMS:
        attention += 2 * width
    elif kind in WIDE_NORMS:
        attention += query + key_value
    norms = (4 if kind in FOUR_NORMS else 2) * norm
    tied = config.get("tie_word_embeddings")
    tied = kind in TIED if tied is None else tied
    embedding = vocab * hidden * (1 if tied else 2)
    if kind == "gpt2":
        embedding += (get("n_positions", "max_position_embeddings") or 1024) * hidden
    total = embedding + layers * (attention + mlp + norms) + norm
    largest = max(vocab * hidden, hidden * intermediate, hidden * query)
    return Size(total, embedding, vocab, hidden, intermediate, layers, query, key_value, largest)


def size_of_nominal(billions: float) -> Size:
    """A decoder of about this nominal size, where nothing else is known of it.

    Twelve hidden^2 parameters a layer, 128 units of width for each layer (between Qwen2.5's 37 and
    115 and Llama 3's 128), and Qwen2.5's vocabulary, the largest of the common ones but Gemma's.
    """
    layers = max(round((billions * 1e9 / (12 * 128**2)) ** (1 / 3)), 1)
    hidden = 128 * layers
    vocab = 152_064
    embedding = min(2 * vocab * hidden, int(billions * 5e8))
    return Size(
        total=int(billions * 1e9),
        embedding=embedding,
        vocab=vocab,
        hidden=hidden,
        intermediate=4 * hidden,
        layers=layers,
        query=hidden,
        key_value=hidden,
        largest=vocab * hidden,
    )


def size_of_base(config: Config, base: str) -> Size:
    """The size of a study's base, from the best that is at hand: its recipe, the ``config.json`` of
    its folder or of the hub's cache, its nominal N. MergelawError where there is none of these."""
    given = config.bases[base]
    architecture: Mapping[str, Any] | None = None
    if given.pretraining is not None:
        recipe = config.pretraining_of(base)
        architecture = {"vocab_size": recipe.vocab_size} | recipe.architecture
        architecture.setdefault("max_position_embeddings", recipe.max_tokens)
    elif given.path is not None:
        architecture = read_config(Path(given.path))
    elif given.hub is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(given.hub, "config.json", revision=given.revision)
        architecture = read_config(Path(cached).parent) if isinstance(cached, str) else None
    size = size_of_architecture(architecture) if architecture else None
    if size is None and given.N is not None:
        size = size_of_nominal(given.N)
    if size is None:
        raise MergelawError(
            f"bases.{base}: its size is not known before it is fetched; give its 'N' in billions"
        )
    return size


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of a loaded model: all of them, and without embeddings and an untied head."""
    from torch import nn

    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(head.weight)
    embedding = sum(weight.numel() for weight in embeddings)
    return {"parameters": total, "non_embedding": total - embedding}
