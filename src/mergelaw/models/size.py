"""Size of a model: parameters, FLOPs and activations, from its configuration, without torch.

Standard decoders (grouped-query attention, a gated MLP or a mixture of them, RMS norms, or GPT-2's
older form) are counted exactly; other models as a Llama with their dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIED = {"gemma", "gemma2", "gemma3_text", "gpt2"}  # tied unless the configuration says otherwise
QKV_BIAS = {"qwen2", "qwen2_moe"}  # always, whatever the configuration says
HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}  # queries and keys are normalised head by head
WIDE_NORMS = {"olmo2", "olmoe"}  # queries and keys are normalised over all heads
FOUR_NORMS = {"gemma2", "gemma3_text"}  # a block has four norms instead of two
# Names of the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
OLDER = {"gpt2", "gpt_neox"}  # the MLP has no gate; all matrices and norms have biases


@dataclass(frozen=True)
class Size:
    """Parameter counts and widths of a decoder, with FLOPs and activations."""

    total: int  # parameters; a tied head counts once
    embedding: int  # of these: token and position embeddings, and an untied head
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    query: int  # heads x their width
    key_value: int  # key-value heads x their width
    idle: int = 0  # of the total: experts of a mixture that a token does not pass through
    joined: int = 0  # widths of a layer's experts, gates included, which are one tensor

    @property
    def non_embedding(self) -> int:
        """Parameters without embeddings and an untied head: the N of the scaling law."""
        return self.total - self.embedding

    @property
    def active(self) -> int:
        """Parameters that a token passes through; all, but for a mixture of experts."""
        return self.total - self.idle

    @property
    def largest(self) -> int:
        """Parameters of the largest tensor."""
        return self.hidden * max(self.vocab, self.intermediate, self.query, self.joined)

    def forward_flops(self, tokens: float, context: float) -> float:
        """FLOPs of a forward pass: 2 per token and weight, the head included, plus attention.

        Causal attention sees half of the context on average (Kaplan et al. 2020, appendix B).
        """
        weights = self.active - self.embedding + self.vocab * self.hidden
        return tokens * (2 * weights + 2 * self.layers * self.query * context)

    def activations(self, tokens: int, dtype: str, checkpointing: bool = False) -> float:
        """Bytes that autograd keeps of a forward pass over ``tokens`` tokens, logits included.

        transformers' decoders save in a layer, in float32, 4 bytes x 6 hidden, 4 query, 4 key-value
        and 4 intermediate widths. In bfloat16 (mixed precision) residual stream and norms stay
        fp32. Logits take 4 x 4 bytes: widened, log-softmax, gradients. Checkpointing keeps each
        layer's residual stream and all of one layer.
        """
        heads = self.query + self.key_value
        layer = 24 * self.hidden + 16 * heads + 16 * self.intermediate
        if dtype == "bfloat16":
            layer = 26 * self.hidden + 10 * heads + 8 * self.intermediate
        stream = 4 * self.hidden * self.layers
        kept = layer + stream if checkpointing else layer * self.layers
        return float(tokens * (kept + 12 * self.hidden + 16 * self.vocab))


def size_of_architecture(config: Mapping[str, Any]) -> Size | None:
    """Size of a transformers configuration (a ``config.json``); None if it lacks the widths."""
    config = {**config, **(config.get("text_config") or {})}  # of a multimodal model
    kind = config.get("model_type")

    def get(*names: str) -> int:
        return _first(config, *names)

    hidden, layers = get("hidden_size", "n_embd"), get("num_hidden_layers", "n_layer")
    heads, vocab = get("num_attention_heads", "n_head"), get("vocab_size")
    if not (hidden and layers and heads and vocab):
        return None
    older = kind in OLDER
    intermediate = get("intermediate_size", "n_inner") or 4 * hidden
    width = get("head_dim") or hidden // heads
    query, key_value = heads * width, (get("num_key_value_heads") or heads) * width
    heads_out = query + 2 * key_value
    attention = hidden * (heads_out + query)
    if kind in QKV_BIAS:
        attention += heads_out
    elif older or config.get("attention_bias"):
        attention += heads_out + hidden
    matrices = 2 if older else 3
    mlp = matrices * hidden * intermediate
    mixed, idle, joined = _mixture(config, hidden, layers, intermediate)
    if older or config.get("mlp_bias"):
        mlp += (matrices - 1) * intermediate + hidden
    if kind in HEAD_NORMS:
        attention += 2 * width
    elif kind in WIDE_NORMS:
        attention += query + key_value
    norm = 2 * hidden if older else hidden
    norms = (4 if kind in FOUR_NORMS else 2) * norm
    tied = config.get("tie_word_embeddings", kind in TIED)
    embedding = vocab * hidden * (1 if tied else 2)
    if kind == "gpt2":
        embedding += (get("n_positions", "max_position_embeddings") or 1024) * hidden
    dense = layers - len(_sparse_layers(config, layers))
    total = embedding + layers * (attention + norms) + norm + dense * mlp + mixed
    widths = vocab, hidden, intermediate, layers, query, key_value
    return Size(total, embedding, *widths, idle, joined)


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _sparse_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    """The layers whose MLP is a mixture of experts."""
    if not _first(config, *EXPERTS):
        return []
    start, step = _first(config, "first_k_dense_replace"), _first(config, "decoder_sparse_step")
    dense = config.get("mlp_only_layers") or []
    return [n for n in range(start, layers) if n not in dense and (n + 1) % (step or 1) == 0]


def _mixture(
    config: Mapping[str, Any], hidden: int, layers: int, intermediate: int
) -> tuple[int, int, int]:
    """Parameters of all mixtures of experts, those of them that a token skips, a layer's widths."""
    experts, chosen = _first(config, *EXPERTS), _first(config, "num_experts_per_tok", "moe_top_k")
    width = _first(config, "moe_intermediate_size") or intermediate
    shared = _first(config, "shared_expert_intermediate_size")
    always = hidden * experts + 3 * hidden * width * _first(config, "n_shared_experts")
    always += 3 * hidden * shared + (hidden if shared else 0)  # with a gate
    each, count = 3 * hidden * width, len(_sparse_layers(config, layers))
    idle = (experts - min(chosen or experts, experts)) * each
    return count * (always + experts * each), count * idle, 2 * experts * width


def size_of_nominal(billions: float) -> Size:
    """Size of a standard decoder with this many billions of parameters.

    It has 12 hidden^2 parameters a layer, a width of 128 for each layer (between Qwen2.5's 37 and
    115 and Llama 3's 128), and Qwen2.5's vocabulary, the largest common one except Gemma's.
    """
    layers = max(round((billions * 1e9 / (12 * 128**2)) ** (1 / 3)), 1)
    hidden, vocab = 128 * layers, 152_064
    embedding = min(2 * vocab * hidden, int(billions * 5e8))
    return Size(int(billions * 1e9), embedding, vocab, hidden, 4 * hidden, layers, hidden, hidden)


def count_parameters(model: Any) -> dict[str, int]:
    """Numbers of parameters of a loaded model: all, and without embeddings and an untied head."""
    from torch import nn

    layers = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if (head := model.get_output_embeddings()) is not None:
        layers.append(head)
    embedding = sum(weight.numel() for weight in {layer.weight for layer in layers})
    total = model.num_parameters()
    return {"parameters": total, "non_embedding": total - embedding}
