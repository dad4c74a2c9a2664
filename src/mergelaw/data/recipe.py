"""Recipes of a domain's documents: their source, and how it is split."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mergelaw.artifacts.recipe import LocalPath, Model
from mergelaw.errors import nearest

PLACE = re.compile(r"\{([^{}]+)\}")  # of a column in a template
Column = Literal["messages", "system", "history", "prompt", "context", "response", "text"]


class Source(Model):
    """Source of documents: exactly one of `synthetic`, `files` and `dataset`."""

    synthetic: str | None = Field(None, description="name of a generator of the demo's documents")
    files: list[LocalPath] | None = Field(
        None, min_length=1, description="JSON, JSONL, CSV, Parquet or text files, folders or globs"
    )
    dataset: LocalPath | None = Field(
        None, description="a dataset of the Hugging Face hub, or a local folder of one"
    )
    revision: str | None = Field(
        None, description="commit or branch of the dataset; required for one of the hub"
    )
    config: str | None = Field(None, description="configuration name of the dataset")
    split: str = Field("train", description="split of the dataset")
    columns: dict[Column, str] | None = Field(
        None, description="columns of the records to use, or templates of columns, by content"
    )
    where: dict[str, str | int | bool] | None = Field(
        None, description="keep only records whose columns have these values"
    )
    invalid_records: Literal["refuse", "skip"] = Field(
        "refuse", description="records without prompt, response or text: stop, or leave them out"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(v is not None for v in (self.synthetic, self.files, self.dataset)) != 1:
            raise ValueError("give exactly one of 'synthetic', 'files' and 'dataset'")
        for key in sorted(self.model_fields_set):
            if key in ("revision", "config", "split") and self.dataset is None:
                raise ValueError(f"{key!r} goes with 'dataset' only; remove it")
            if key in ("columns", "where", "invalid_records") and self.synthetic is not None:
                raise ValueError(f"{key!r} goes with 'files' or 'dataset'; remove it")
        main = {*(self.columns or ["text"])} - {"system", "history", "context"}
        if main not in ({"messages"}, {"prompt", "response"}, {"text"}):
            raise ValueError("'columns' names 'messages', 'prompt' and 'response', or 'text'")
        if self.dataset is not None and self.revision is None and is_hub_id(self.dataset):
            raise ValueError("a dataset of the hub needs its 'revision'; give the commit")
        if self.synthetic is not None:
            from mergelaw.demo.synthetic import DOMAINS

            if self.synthetic not in DOMAINS:
                raise ValueError(
                    f"no generator {self.synthetic!r}{nearest(self.synthetic, DOMAINS)}"
                )
        return self

    @property
    def is_local(self) -> bool:
        """True for local files or a local folder, False for a hub dataset or a generator."""
        return self.files is not None or (self.dataset is not None and not is_hub_id(self.dataset))

    def used_columns(self) -> list[str]:
        """The columns of records that ``columns`` names, in templates too."""
        names = (self.columns or {}).values()
        return [c for name in names for c in (PLACE.findall(name) if "{" in name else [name])]

    def __str__(self) -> str:
        """The source in words, for messages."""
        if self.synthetic is not None:
            return f"the synthetic domain {self.synthetic}"
        if self.dataset is not None:
            return f"{self.dataset} [{self.split}]"
        first, *others = self.files or []
        return f"{first} and others ({1 + len(others)} paths)" if others else first


def is_hub_id(dataset: str) -> bool:
    """True for the name of a dataset of the Hugging Face hub, False for a local folder."""
    return not dataset.startswith((".", "/")) and not Path(dataset).is_dir()


SPLITS = ("train", "eval", "calibration", "confirm")


class SplitRecipe(Model):
    """Splits of a domain's documents: their sources and sizes."""

    source: Source
    eval_source: Source | None = None  # None: evaluation documents come from `source`
    eval_documents: int
    train_documents: int | None  # None: all that are left
    calibration_documents: int = 0
    confirm_documents: int = 0
    at_most: tuple[str, ...] = ()  # splits that take fewer documents where the source has fewer
    seed: int

    def splits(self) -> list[str]:
        """The splits that are not empty."""
        return [split for split in SPLITS if getattr(self, f"{split}_documents") != 0]

    def counts(self, documents: int) -> dict[str, int]:
        """Documents of each split of a source with so many; their sum may be more than it has."""
        evaluation, calibration = self.eval_documents, self.calibration_documents
        confirm = self.confirm_documents
        documents -= confirm
        if "calibration" in self.at_most:
            most = documents // 4 if "eval" in self.at_most else documents - evaluation
            calibration = min(calibration, max(most, 0))
        if "eval" in self.at_most:
            evaluation = min(evaluation, max(documents - calibration, 1))
        rest = max(documents - evaluation - calibration, 1)
        train = rest if self.train_documents is None else self.train_documents
        return {"eval": evaluation, "train": train, "confirm": confirm, "calibration": calibration}

    def part(self, split: str) -> Self:
        """The part of the recipe that defines ``split``: one source and its splits."""
        if self.eval_source is None:
            return self
        if split not in ("eval", "confirm"):
            others = {"eval_source": None, "eval_documents": 0, "confirm_documents": 0}
            return self.model_copy(update=others)
        others = {"eval_source": None, "train_documents": 0, "calibration_documents": 0}
        return self.model_copy(update={**others, "source": self.eval_source})
