"""Recipe of a corpus: where its documents come from."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mergelaw.artifacts.recipe import Model
from mergelaw.errors import nearest


class Source(Model):
    """Where documents come from: exactly one of `synthetic`, `files` and `dataset`."""

    synthetic: str | None = Field(None, description="name of a generator of the demo's documents")
    files: list[str] | None = Field(
        None, min_length=1, description="JSON, JSONL or Parquet files of documents"
    )
    dataset: str | None = Field(
        None, description="a dataset of the Hugging Face hub, or a local folder of one"
    )
    revision: str | None = Field(
        None, description="commit or branch of the dataset; required for one of the hub"
    )
    config: str | None = Field(None, description="configuration name of the dataset")
    split: str = Field("train", description="split of the dataset")
    where: dict[str, str | int | bool] | None = Field(
        None, description="keep only records whose columns have these values"
    )
    invalid_records: Literal["refuse", "skip"] = Field(
        "refuse",
        description="records without a prompt, a response or text: stop with an error, or leave "
        "them out and count them",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(v is not None for v in (self.synthetic, self.files, self.dataset)) != 1:
            raise ValueError("give exactly one of 'synthetic', 'files' and 'dataset'")
        for key in sorted(self.model_fields_set):
            if key in ("revision", "config", "split") and self.dataset is None:
                raise ValueError(f"{key!r} goes with 'dataset' only; remove it")
            if key in ("where", "invalid_records") and self.synthetic is not None:
                raise ValueError(f"{key!r} goes with 'files' or 'dataset'; remove it")
        if self.dataset is not None and self.revision is None and is_hub_id(self.dataset):
            raise ValueError("a dataset of the hub needs its 'revision'; give the commit")
        if self.synthetic is not None:
            from mergelaw.demo.synthetic import DOMAINS

            if self.synthetic not in DOMAINS:
                raise ValueError(
                    f"no generator {self.synthetic!r}{nearest(self.synthetic, DOMAINS)}"
                )
        return self


def is_hub_id(dataset: str) -> bool:
    """Whether a dataset's name means one of the Hugging Face hub, not a local folder."""
    return not dataset.startswith((".", "/")) and not Path(dataset).is_dir()
