"""Keys: the identity of an artifact, known before it is made.

A key is the hash of a stage's name and version, its recipe and the keys of its inputs. Its first
digits are part of the artifact's path, so an existing path needs no comparison of time stamps.
Every job of the workflow computes keys, so this module does not import torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# Raise a stage's version when its output changes for the same recipe and inputs: the stage and all
# that follow from it are then made again. tests/versions finds a change that was forgotten.
STAGES: dict[str, int] = {
    "corpus": 3,
    "overlap": 2,
    "base": 2,
    "expert": 3,
    "task_vector": 4,
    "design": 1,
    "learn": 2,
    "gradients": 1,
    "evaluate": 3,
    "fit": 7,
    "report": 6,
    "merge": 4,
}

KEY_DIGITS = 8  # of a key's 64, in paths; lineages hold all
KEYED = re.compile(rf".+@([0-9a-f]{{{KEY_DIGITS}}})")


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def stage_key(
    stage: str, recipe: Any, inputs: Mapping[str, str], version: int | None = None
) -> str:
    """Key (64 hexadecimal digits) of an artifact; ``inputs``: the keys of its inputs by name.

    ``version`` is the stage's; None: the present one.
    """
    version = STAGES[stage] if version is None else version
    return digest({"stage": stage, "version": version, "recipe": recipe, "inputs": dict(inputs)})


def digits(name: str) -> str | None:
    """The key's digits in the name of an artifact's folder; None for a name without a key."""
    match = KEYED.fullmatch(name)
    return match and match[1]
