"""Documentation of configurations, generated from the models: JSON schema and Markdown tables.

python config/reference.py     writes workflow/schemas/config.schema.json and the tables of
                               config/README.md; tests compare them
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelaw.artifacts.recipe import NAME_PATTERN
from mergelaw.config.study import Config


def schema() -> dict[str, Any]:
    """JSON schema of a configuration file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "mergelaw configuration",
    }


def tables() -> str:
    """The keys of a configuration as Markdown, one table for each model."""
    study = schema()
    models = study.pop("$defs") | {"Config": study}
    sections: dict[str, str] = {}
    pending = ["Config"]
    while pending:
        name = pending.pop(0)
        if name not in sections:
            sections[name] = _table(name, models[name])
            pending = re.findall(r"#/\$defs/(\w+)", json.dumps(models[name])) + pending
    return "\n\n".join(sections.values())


def _table(name: str, model: Mapping[str, Any]) -> str:
    lines = [
        f"### {name}",
        "",
        " ".join(model["description"].split()).replace("*", r"\*").replace("_", r"\_"),
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for key, setting in model["properties"].items():
        default = f"`{json.dumps(setting['default'])}`" if "default" in setting else "none"
        if key in model.get("required", []):
            default = "required"
        elif isinstance(setting.get("default"), dict):
            default = "its defaults" if setting["default"] else "none"
        meaning = setting.get("description", "name of the merge method")
        cells = (f"`{key}`", _type_words(setting), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def _type_words(setting: Mapping[str, Any]) -> str:
    """A JSON schema in plain words."""
    if "$ref" in setting:
        name = setting["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in setting:
        return " or ".join(map(_type_words, setting["anyOf"]))
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


def main() -> None:
    """Write the schema and the tables."""
    root = Path(__file__).parents[1]
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    (root / "workflow" / "schemas" / "config.schema.json").write_text(text, encoding="utf-8")
    readme = root / "config" / "README.md"
    start, end = "<!-- tables -->", "<!-- end of tables -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n{tables()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
