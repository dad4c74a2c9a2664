"""Configuration of the models: bases and experts."""

from typing import ClassVar

from pydantic import Field

from mergelaw.artifacts.recipe import Distinct, Model, Name
from mergelaw.config.partial import Partial
from mergelaw.evaluation.recipe import Sampling
from mergelaw.models.recipe import Checkpoint, ExpertCheckpoint, Pretraining, Training


class Base(Checkpoint):
    """A base model: exactly one of `path`, `hub` and `pretraining`."""

    _kinds: ClassVar[tuple[str, ...]] = ("path", "hub", "pretraining")

    pretraining: Partial[Pretraining] | None = Field(
        None, description="pre-train it; what differs from the study's `pretraining`"
    )
    training: Partial[Training] = Field(
        {}, validate_default=True, description="what differs from the study's `training`"
    )
    sampling: Sampling = Field(
        {}, validate_default=True, description="what differs from the study's `sampling`"
    )
    N: float | None = Field(
        None, gt=0, description="nominal size in billions; needed until a hub model is fetched"
    )


class Expert(Model):
    """An expert: trained by the workflow on its domains, or ready-made checkpoints."""

    domains: Distinct[Name] | None = Field(
        None, description="domains that it is trained on or made for; null: the domain of its name"
    )
    training: Partial[Training] = Field(
        {}, validate_default=True, description="what differs from the study and the base"
    )
    checkpoints: dict[Name, ExpertCheckpoint] | None = Field(
        None,
        min_length=1,
        description="ready-made: its checkpoint for each base that it has, by base",
    )
