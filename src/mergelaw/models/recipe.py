"""Recipes of models: external checkpoints, pre-training and fine-tuning."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mergelaw.artifacts.recipe import Distinct, LocalPath, Model, Name, Seed


class Checkpoint(Model):
    """An external model or LoRA adapter: exactly one of `path` and `hub`."""

    _kinds: ClassVar[tuple[str, ...]] = ("path", "hub")

    path: LocalPath | None = Field(None, description="a local Hugging Face folder")
    hub: str | None = Field(None, description="a model id of the Hugging Face hub")
    revision: str | None = Field(None, description="commit or branch; required with `hub`")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(getattr(self, kind) is not None for kind in self._kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(map(repr, self._kinds))}")
        if self.hub is not None and self.revision is None:
            raise ValueError("a hub model needs its 'revision'; give the commit")
        if self.hub is None and self.revision is not None:
            raise ValueError("'revision' goes with 'hub' only; remove it")
        return self


class ExpertCheckpoint(Checkpoint):
    """A ready-made expert, a model or LoRA adapter: exactly one of `path` and `hub`."""

    trust: Distinct[str] | None = Field(
        None, description="keys of its config.json that may differ (the base's count), or `weights`"
    )


class Optimisation(Model):
    """Optimiser settings that pre-training and fine-tuning share."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; or give `epochs`")
    epochs: float | None = Field(None, gt=0, description="passes over the training documents")
    batch_size: int = Field(16, ge=1, description="sequences per optimiser step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per pass; null: all")
    max_tokens: int = Field(2048, ge=8, description="longest sequence, in tokens")
    learning_rate: float = Field(gt=0, lt=1, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps that warm up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision, saved in the base's dtype"
    )

    @model_validator(mode="after")
    def _duration(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("'batch_size' must be a multiple of 'micro_batch_size'")
        return self


class Pretraining(Optimisation):
    """Pre-training of a base: tokenizer, architecture, documents and optimiser."""

    architecture: dict[str, Any] = Field(description="transformers' `model_type` and its fields")
    vocab_size: int = Field(512, ge=260, description="size of the byte-level BPE tokenizer")
    domains: Distinct[Name] = Field(description="domains whose documents are mixed")
    chat_share: float = Field(0.02, ge=0, le=1, description="share of documents in chat format")
    seed: Seed = Field(0, description="seed of weights and data order")


class Lora(Model):
    """A low-rank adapter, trained instead of all weights and merged into them at the end."""

    rank: int = Field(ge=1, description="rank of the adapter")
    alpha: int = Field(16, ge=1, description="the adapter is scaled by alpha / rank")
    target_modules: list[str] | None = Field(
        None, min_length=1, description="names of the layers; null: every linear layer"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")


class OpenRLHF(Model):
    """Options of `trainer: openrlhf`, named as OpenRLHF names them."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="GPUs share the optimiser state (1), also gradients (2), also weights (3)"
    )
    adam_offload: bool = Field(False, description="keep the optimiser state in host memory")
    ring_attn_size: int = Field(
        1, ge=1, description="GPUs that share one long sequence; needs `packing`"
    )
    attn_implementation: Literal["flash_attention_2", "flash_attention_3", "sdpa", "eager"] = Field(
        "flash_attention_2", description="`packing` needs a flash attention"
    )
    lora: Lora | None = Field(None, description="train an adapter; null: train all weights")


class Training(Optimisation):
    """Fine-tuning of experts. The loss is on the responses alone."""

    trainer: Literal["trl", "openrlhf"] = Field(
        "trl", description="trl: TRL's SFTTrainer; openrlhf: OpenRLHF's command line"
    )
    packing: bool = Field(
        False, description="several documents in one sequence, without attention across them"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    long_documents: Literal["refuse", "split", "truncate"] = Field(
        "refuse", description="what to do with a training document above `max_tokens`"
    )
    openrlhf: OpenRLHF | None = Field(None, description="options of `trainer: openrlhf`")

    @model_validator(mode="after")
    def _trainer_options(self) -> Self:
        if self.trainer != "openrlhf":
            if self.openrlhf is not None:
                raise ValueError("'openrlhf' goes with 'trainer: openrlhf' only; remove it")
            return self
        options = self.openrlhf or OpenRLHF()
        flash = options.attn_implementation.startswith("flash")
        if self.dtype != "bfloat16":
            raise ValueError("'trainer: openrlhf' trains in bfloat16; set 'dtype: bfloat16'")
        if self.long_documents == "split":
            raise ValueError("'trainer: openrlhf' cannot split 'long_documents'; truncate them")
        if self.packing and not flash:
            raise ValueError("'packing' needs a flash attention in 'openrlhf.attn_implementation'")
        if options.ring_attn_size > 1 and not self.packing:
            raise ValueError("'openrlhf.ring_attn_size' needs 'packing: true'")
        return self
