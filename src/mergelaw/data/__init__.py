"""Documents of a domain: read from its source, deduplicated, split by content, tokenised."""

from mergelaw.data.documents import Document, check_overlap, read_split, split_identity, write_split
from mergelaw.data.inspection import Inspection, inspect
from mergelaw.data.recipe import SPLITS, Source, SplitRecipe

__all__ = [
    "SPLITS",
    "Document",
    "Inspection",
    "Source",
    "SplitRecipe",
    "check_overlap",
    "inspect",
    "read_split",
    "split_identity",
    "write_split",
]
