"""Recipes of an evaluation: which subsets of the pool are merged, and how the loss is measured."""

from typing import Annotated, Literal

from pydantic import Field

from mergelaw.artifacts.recipe import Distinct, Model, Seed

BASELINES = "baselines"  # replaces a method's name in the paths of the baselines' evaluations


class Sampling(Model):
    """Sampling design: which subsets of the pool are merged."""

    design: Literal["exhaustive", "ring", "difference"] = Field(
        "ring", description="which subsets are sampled where there are too many to take all"
    )
    k: Distinct[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="numbers of experts to merge; null: 1 to M"
    )
    circles: int = Field(
        3, ge=1, le=1000, description="independent circles; standard errors need at least three"
    )
    exhaustive_up_to: int = Field(
        128, ge=1, description="take all C(M,k) subsets where there are no more than this"
    )
    merges_per_shard: int = Field(128, ge=1, description="merges that one job evaluates")
    seed: Seed = Field(0, description="seed of the circles")


class Evaluation(Model):
    """Settings of a measurement of cross-entropy."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of weights and arithmetic; losses are summed in float64"
    )
    max_tokens: int = Field(2048, ge=8, description="longest document, in tokens")
    long_documents: Literal["refuse", "split", "truncate"] = Field(
        "refuse", description="what to do with an evaluation document above `max_tokens`"
    )
    batch_tokens: int = Field(
        8192, ge=8, description="tokens in one forward pass, padding included"
    )
    protocol: Literal["mergelaw", "merging_eval"] = Field(
        "mergelaw", description="merging_eval: chat format and masks as in the law's paper"
    )
