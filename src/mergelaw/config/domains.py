"""Configuration of domains: the documents that experts are trained and merges evaluated on."""

from pydantic import Field

from mergelaw.artifacts.recipe import Model
from mergelaw.data.recipe import Source


class Corpus(Model):
    """Numbers of documents for every domain that does not give its own."""

    train_documents: int | None = Field(
        None, ge=0, description="training documents per domain; null: all that are left"
    )
    eval_documents: int = Field(200, ge=1, description="evaluation documents per domain")
    calibration_documents: int = Field(
        12, ge=0, description="documents per domain to fit merging coefficients to"
    )
    confirm_documents: int = Field(
        0, ge=0, description="documents per domain that only the merges to write are measured on"
    )


class Domain(Model):
    """A domain: documents to train its expert on, and to evaluate every merge on."""

    source: Source = Field(description="where the documents come from")
    eval_source: Source | None = Field(
        None, description="where the evaluation documents come from; null: from `source`"
    )
    train_documents: int | None = Field(
        None, ge=0, description="training documents; null: as in `corpus`"
    )
    eval_documents: int | None = Field(
        None, ge=1, description="evaluation documents; null: as in `corpus`"
    )
    calibration_documents: int | None = Field(
        None, ge=0, description="calibration documents; null: as in `corpus`, none if `held_out`"
    )
    held_out: bool = Field(False, description="only evaluate on it; no expert is trained on it")
