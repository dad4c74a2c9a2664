"""What the configuration's models say about themselves: JSON schema and tables for people.

workflow/schemas/config.schema.json and the tables of config/README.md are made of this; a test
holds them against it.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mergelaw.artifacts.recipe import NAME_PATTERN
from mergelaw.config.schema import Base, Config, Corpus, Domain, Expert, Merge
from mergelaw.data.recipe import Source
from mergelaw.evaluation.recipe import Evaluation, Sampling
from mergelaw.merging.methods import registry
from mergelaw.models.recipe import Checkpoint, Lora, OpenRLHF, Pretraining, Training


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file, generated from the models.

    Looser than :func:`parse` where a file leaves open what is filled in: parts of `training` and
    `pretraining`, a method or an expert with all defaults.
    """
    models: list[type[BaseModel]] = [Config, Pretraining, Training]
    _, made = models_json_schema([(model, "validation") for model in models])
    defs = made["$defs"]
    null = {"type": "null"}
    for part in (Pretraining, Training):
        del defs[part.__name__]["required"]
        reference = {"$ref": f"#/$defs/{part.__name__}"}
        for owner in (Config, Base, Expert):
            setting = defs[owner.__name__]["properties"].get(part.__name__.lower(), {})
            if setting.pop("type", None) == "object":
                del setting["additionalProperties"]
                setting.update(reference)
            elif setting:
                setting["anyOf"] = [reference, null]
    members = [{"$ref": f"#/$defs/{method.__name__}"} for method in registry().values()]
    expert = [{"$ref": "#/$defs/Expert"}, null]
    for key, allowed in (("methods", [*members, null]), ("experts", expert), ("baselines", expert)):
        setting = defs["Config"]["properties"][key]
        named = setting if "patternProperties" in setting else setting["anyOf"][0]
        for pattern in named["patternProperties"]:
            named["patternProperties"][pattern] = {"anyOf": allowed}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergelaw configuration",
        "$ref": "#/$defs/Config",
        "$defs": dict(sorted(defs.items())),
    }


def tables() -> str:
    """The keys of a configuration as Markdown, a table for each model; for config/README.md."""
    models: list[type[BaseModel]] = [
        *(Config, Corpus, Domain, Source, Base, Checkpoint, Pretraining, Expert, Training),
        *(OpenRLHF, Lora, Sampling, Evaluation, Merge),
        *registry().values(),
    ]
    defs = schema()["$defs"]
    sections = []
    for model in models:
        entry = defs[model.__name__]
        lines = [
            f"### {model.__name__}",
            "",
            " ".join(entry["description"].split()).replace("*", r"\*").replace("_", r"\_"),
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key, setting in entry["properties"].items():
            default = f"`{json.dumps(setting['default'])}`" if "default" in setting else "required"
            if isinstance(setting.get("default"), dict):
                default = "its defaults" if setting["default"] else "none"
            meaning = setting.get("description", "name of the merge method")
            cells = (f"`{key}`", _type_words(setting), default, meaning)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _type_words(setting: Mapping[str, Any]) -> str:
    """A JSON schema in plain words."""
    if "$ref" in setting:
        name = setting["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in setting:
        return " or ".join(dict.fromkeys(map(_type_words, setting["anyOf"])))
    if "enum" in setting or "const" in setting:
        return ", ".join(f"`{value}`" for value in setting.get("enum", [setting.get("const")]))
    if "patternProperties" in setting:
        (entry,) = setting["patternProperties"].values()
        return f"by name: {_type_words(entry)}"
    kind = setting.get("type", "anything")
    if kind == "array":
        return f"list of {_type_words(setting['items'])}"
    if kind == "object":
        entry = setting["additionalProperties"]
        return "mapping" if entry is True else f"mapping to {_type_words(entry)}"
    words = {"string": "name" if setting.get("pattern") == NAME_PATTERN else "text"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {setting[limit]:g}" for limit, sign in limits.items() if limit in setting]
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()
