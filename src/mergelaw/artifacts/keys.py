"""Keys: what an artifact will be, known before it is made.

A key is the hash of a stage's name and version, its recipe and the keys of its inputs. It is part
of the artifact's path, so a path that exists is right, whatever its time stamp and whoever made it.
Nothing here imports torch: every job of the workflow computes keys while the workflow is parsed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Raise a stage's version when the meaning of its output changes: the stage and what follows from
# it are then made again.
STAGES: dict[str, int] = {
    "corpus": 1,
    "overlap": 1,
    "base": 1,
    "expert": 1,
    "task_vector": 2,
    "plan": 1,
    "evaluate": 1,
    "fit": 4,
    "report": 3,
    "merge": 1,
}

KEY_DIGITS = 8


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def stage_key(stage: str, recipe: Any, inputs: Mapping[str, str]) -> str:
    """Key (8 hexadecimal digits) of what ``stage`` makes of ``recipe`` and the inputs' keys."""
    identity = {"stage": stage, "version": STAGES[stage], "recipe": recipe, "inputs": dict(inputs)}
    return digest(identity)[:KEY_DIGITS]
