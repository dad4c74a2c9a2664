"""Checks that an expert is a fine-tune of its base: configurations, tokenizers and tensors."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from math import fsum, isfinite, prod
from pathlib import Path
from typing import Any

from mergelaw.errors import MergelawError, first_line
from mergelaw.models.checkpoint import (
    COMPUTED,
    FLOATS,
    HEAD,
    Tensors,
    read_config,
    same_bits,
    vocabulary_size,
)
from mergelaw.models.parameters import build, parameters_of, values_of
from mergelaw.models.tokenizers import compare_tokenizers

# Settings of a configuration that its forward pass does not read, or that the tensors' shapes show.
UNREAD = re.compile(
    r"(?:.*_)?(?:bos|eos|pad|sep|decoder_start|image|video|audio|boi|eoi)_token_(?:id|index)"
    r"|.*drop(?:out|_rate)?.*|.*_pdrop|initializer_.*|.*_init(?:_.*)?|use_cache|use_mamba_kernels"
    r"|model_type|vocab_size|tie_word_embeddings|n_positions|n_ctx|max_window_layers"
    r"|use_sliding_window|summary_.*|pretraining_tp|router_(?:aux|z|jitter).*|aux_loss.*"
    r"|output_router_logits|output_attentions|reorder_and_upcast_attn|rope_parameters\.(?:.*\.)?type"
    r"|attn_implementation|_.*"
)
# Cosines of expert and base: unrelated models, and far ones. Matrices of LARGE elements count.
UNRELATED, FAR, LARGE = 0.04, 0.5, 1024
WEIGHTS = "weights"  # what `trust` calls the relation of an expert's weights to its base's
SAMPLED = 8  # matrices that a quick look reads


def settings(folder: Path) -> dict[str, Any]:
    """Settings of a checkpoint that its forward pass on text reads, by dotted key.

    Spellings and defaults are transformers'. Empty for an architecture that transformers does not
    know, which is refused as a base.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if read_config(folder)["model_type"] not in CONFIG_MAPPING:
        return {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a foreign configuration raises anything
        reason = first_line(error)
        raise MergelawError(
            f"{folder}: transformers cannot read its config.json ({reason}); correct it"
        ) from None
    text = config.get_text_config(decoder=True)
    shown, common = text.to_dict(), PreTrainedConfig().to_dict()
    # Keys that the configuration's class does not know are not read either.
    names = getattr(type(text), "__dataclass_fields__", shown).keys() - common.keys()
    flat = flatten({key: shown[key] for key in shown if key in names})
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "hidden_size", 0)
    defaults = {"head_dim": width // heads, "num_key_value_heads": heads, "n_inner": 4 * width}
    flat |= {key: value for key, value in defaults.items() if flat.get(key, 0) is None}
    return {key: value for key, value in flat.items() if not UNREAD.fullmatch(key)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def same_value(left: Any, right: Any) -> bool:
    """True for equal settings; activations are compared by their function, None is False."""
    if left == right or (left in (None, False) and right in (None, False)):
        return True
    if isinstance(left, str) and isinstance(right, str):
        import torch
        from transformers.activations import ACT2FN

        values = torch.linspace(-4, 4, 99)
        with suppress(KeyError):
            return torch.equal(ACT2FN[left](values), ACT2FN[right](values))
    return False


def different_settings(base: Tensors, expert: Tensors) -> dict[str, tuple[Any, Any]]:
    """Settings by which base and expert compute different things: the values of both, by key."""
    if base.config == expert.config:
        return {}
    ours, theirs = settings(base.folder), settings(expert.folder)
    ropes = {str(v) for side in (ours, theirs) for k, v in side.items() if k.endswith("rope_type")}
    return {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        # Only scaled rotary embeddings read how long sequences may be.
        if not (key == "max_position_embeddings" and ropes <= {"default"})
        and not same_value(ours.get(key), theirs.get(key))
    }


def check_trust(trust: Sequence[str], keys: Collection[str], folder: Path) -> set[str]:
    """The ``keys`` that ``trust`` names, whole or without sections. Refuses a name of none."""
    trusted: set[str] = set()
    for name in trust:
        matches = {key for key in keys if key == name or key.endswith(f".{name}")}
        if not matches:
            raise MergelawError(
                f"{folder}: trust names {name!r}, but its configuration has nothing of this name "
                "that differs from the base's and matters; remove it from trust"
            )
        trusted |= matches
    return trusted


def compare_settings(base: Tensors, expert: Tensors, trust: Sequence[str]) -> list[str]:
    """Refuse an expert whose forward pass differs from the base's by their configurations.

    Returns notes on the keys of ``trust``, which may differ.
    """
    different, where = different_settings(base, expert), expert.folder
    trusted, notes = check_trust(trust, {*different, WEIGHTS}, where), []
    for key, (ours, theirs) in different.items():
        values = f"its config.json has {key} {theirs}, the base's has {ours}"
        if key not in trusted:
            raise MergelawError(
                f"{where}: {values}, so a merge would not compute what the expert does; give an "
                f"expert that kept the base's configuration, or set trust: [{key}] beside its "
                "checkpoint to use the base's"
            )
        notes.append(f"{where}: {values}, which is used (trust)")
    return notes


def compare(
    base: Tensors,
    expert: Tensors,
    vocabulary: str = "refuse",
    trust: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Check that an expert fits its base. Returns names of tensors to merge, and notes for users.

    Both are arranged (:func:`parameters.open_arranged`). The expert's tensors get the base's names;
    it may lack tensors that transformers ignores. With ``vocabulary`` ``common_rows`` it may have
    another vocabulary size, and the settings in ``trust`` may differ. Raises MergelawError for the
    first thing that does not fit.
    """
    where = expert.folder
    ours, theirs = base.config["model_type"], expert.config["model_type"]
    if ours != theirs and theirs != (base.config.get("text_config") or {}).get("model_type"):
        raise MergelawError(
            f"{where}: model_type is {theirs}, the base's is {ours}; "
            "an expert must be a fine-tune of its base"
        )
    notes = compare_settings(base, expert, trust)
    rows = vocabulary_size(base.config), vocabulary_size(expert.config)
    check_rows(rows, where, vocabulary)
    notes += compare_tokenizers(base.folder, expert.folder, rows)
    names = {name for name in base.names() if not COMPUTED.search(name)}
    stored = align(base, expert, names)
    for name in sorted(stored):
        shapes = base.shape(name), expert.shape(name)
        resized = rows[0] != rows[1] and tuple(s[:1] for s in shapes) == ((rows[0],), (rows[1],))
        if shapes[0] != shapes[1] and not (resized and shapes[0][1:] == shapes[1][1:]):
            raise MergelawError(
                f"{where}: tensor {name!r} has shape {list(shapes[1])}, "
                f"the base's has {list(shapes[0])}"
            )
    merged = []
    for name in sorted(names):
        kinds = base.dtype(name), (expert if name in stored else base).dtype(name)
        if all(kind in FLOATS for kind in kinds):
            merged.append(name)
        elif kinds[0] != kinds[1] or (name in stored and not same_bits(base[name], expert[name])):
            raise MergelawError(
                f"{where}: tensor {name!r} is {kinds[1]} (the base's {kinds[0]}) and differs; "
                "only float32, bfloat16 and float16 can be merged"
            )
    return merged, notes


def check_rows(rows: tuple[int | None, int | None], folder: Path, vocabulary: str) -> None:
    """Refuse another vocabulary size (``rows``: the base's, the expert's) unless it is allowed."""
    if rows[0] != rows[1] and vocabulary == "refuse":
        raise MergelawError(
            f"{folder}: vocab_size is {rows[1]}, the base's is {rows[0]}; give an expert that kept "
            "the vocabulary, or set vocabulary: common_rows to merge the rows that both have"
        )


def align(base: Tensors, expert: Tensors, names: set[str]) -> set[str]:
    """Give the expert's tensors the base's names; returns those of ``names`` that it has.

    Where stored names differ, tensors are matched by the parameters that transformers loads them
    into. Raises MergelawError if one side has a parameter that the other lacks.
    """
    others = {name for name in expert.names() if not COMPUTED.search(name)}
    if names == others:
        return names
    ours, theirs = {name: name for name in names}, {name: name for name in others}
    needed = None
    with suppress(MergelawError):  # of an unknown architecture, names must be equal
        model = build(base.folder)
        ours, theirs = parameters_of(model, base), parameters_of(model, expert)
        if base.config["model_type"] != expert.config["model_type"]:
            theirs, needed = text_parameters(model, build(expert.folder), expert)
    by_parameter = {key: name for name, key in ours.items() if name in names}
    stored: dict[str, str] = {}  # the expert's name by the base's
    for name, key in theirs.items():
        new = by_parameter.get(key)
        twin = stored.setdefault(new, name) if new else None
        if twin is None:
            raise MergelawError(f"{expert.folder}: has a tensor {name!r} that the base has not")
        if twin != name and not same_bits(expert[name], expert[twin]):
            raise MergelawError(
                f"{expert.folder}: its tensors {twin!r} and {name!r} differ, but the base has one "
                "tensor for both; give a base whose embedding and head are not tied"
            )
    for key in sorted(by_parameter if needed is None else needed):
        if (missing := by_parameter.get(key, key)) not in stored:
            tied = missing == HEAD and expert.ties
            reason = ", as its config.json ties head and embedding" if tied else ""
            raise MergelawError(
                f"{expert.folder}: has no tensor {missing!r}{reason}; the base has it"
            )
    # Tensors that transformers ignores, such as those of multi-token prediction.
    stored |= {name: name for name in (names & others) - ours.keys() - theirs.keys()}
    expert.rename({name: new for new, name in stored.items()})
    return set(stored)


def text_parameters(model: Any, text: Any, expert: Tensors) -> tuple[dict[str, str], set[str]]:
    """Parameters of a text model by tensor, and all of them, named as in a multimodal ``model``."""
    prefixes = []
    for side in (text, model):
        embedding = side.get_input_embeddings()
        name = next(name for name, module in side.named_modules() if module is embedding)
        prefixes.append(name.rpartition(".")[0] + ".")

    def name_in_model(key: str) -> str:
        start, inner = prefixes
        return inner + key.removeprefix(start) if key.startswith(start) else key

    placed = {name: name_in_model(key) for name, key in parameters_of(text, expert).items()}
    return placed, {name_in_model(key) for key in values_of(text)}


def equal_rows(left: Any, right: Any) -> bool:
    """True if the rows that two tensors have in common are equal, in whatever dtypes."""
    rows = min(len(left), len(right)) if left.dim() else None
    return bool((left[:rows] == right[:rows]).all() if rows else left == right)


def matrices(base: Tensors, names: Sequence[str]) -> list[str]:
    """The large matrices among ``names``, which tell whether two models are related."""
    shapes = {name: base.shape(name) for name in names}
    return [n for n in names if len(shapes[n]) > 1 and prod(shapes[n]) >= LARGE]


def kinship(
    norms: Sequence[tuple[float, float, float]], folder: Path, trust: Sequence[str] = ()
) -> list[str]:
    """A note on an expert that differs much from its base.

    ``norms`` are those of base, expert and difference by matrix. If the mean of the matrices'
    cosines is near 0 and the difference larger than the base, as of two independent trainings, the
    expert is refused without ``weights`` in ``trust``. Raises MergelawError.
    """
    cosines = [
        (ours**2 + theirs**2 - apart**2) / 2 / (ours * theirs)
        for ours, theirs, apart in norms
        if ours and theirs
    ]
    cosine = fsum(cosines) / len(cosines) if cosines else 1.0
    if cosine >= FAR:
        return []
    ours, apart = (fsum(norm[side] ** 2 for norm in norms) ** 0.5 for side in (0, 2))
    figures = (
        f"the difference has {apart / ours:.2f} times the base's norm, the mean cosine of their "
        f"matrices is {cosine:.3f}; a fine-tune's is above 0.9"
    )
    if cosine >= UNRELATED or apart < 1.1 * ours:
        return [f"{folder}: differs much from its base ({figures}); check that it is of this base"]
    message = f"{folder}: has nothing in common with its base ({figures})"
    if WEIGHTS not in trust:
        raise MergelawError(
            f"{message}; give an expert that was fine-tuned from this base, or set trust: "
            f"[{WEIGHTS}] beside its checkpoint"
        )
    return [f"{message}; accepted (trust)"]


def sampled_kinship(
    base: Tensors, expert: Tensors, names: Sequence[str], trust: Sequence[str] = ()
) -> list[str]:
    """:func:`kinship` from the first elements of a few matrices.

    Refuses an expert that equals its base. Raises MergelawError.
    """
    rows = []
    stored = [name for name in names if name in expert]
    for name in matrices(base, stored)[:SAMPLED]:
        ours, theirs = (side[name].reshape(-1)[: 1 << 16].float() for side in (base, expert))
        common = min(len(ours), len(theirs))
        both = ours[:common], theirs[:common], theirs[:common] - ours[:common]
        first, second, apart = (float(values.norm()) for values in both)
        for side, norm in ((base, first), (expert, second)):
            if not isfinite(norm):
                raise MergelawError(
                    f"{side.folder}: tensor {name!r} holds NaN or Inf; train it again or leave it "
                    "out"
                )
        rows.append((first, second, apart))
    if not any(apart for _, _, apart in rows) and all(
        equal_rows(base[name], expert[name]) for name in stored
    ):
        raise equals_base(expert.folder)
    return kinship(rows, expert.folder, trust)


def equals_base(folder: Path) -> MergelawError:
    """The error for an expert without a difference from its base."""
    return MergelawError(f"{folder}: equals its base, so there is nothing to merge; leave it out")
