"""Reading configurations: YAML 1.2, checked before anything starts."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from mergelaw.config.checks import problems
from mergelaw.config.messages import clip, describe
from mergelaw.config.study import Config
from mergelaw.errors import MergelawError, system_message

# Configurations are written by hand. Larger ones are mistakes, such as aliases without end.
MAX_VALUES = 100_000
MAX_DEPTH = 32


class _Constructor(SafeConstructor):
    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise ConstructorError(None, None, "merge keys expand without end", node.start_mark)


def load(path: Path | str) -> Config:
    """Read and check a configuration. Raises MergelawError."""
    return parse(read_files([path]), str(path))


def parse_text(text: str, where: str) -> Config:
    """Check the text of a configuration. Raises MergelawError."""
    return parse(_parse_yaml(text.encode(), where), where)


def read(path: Path | str) -> Any:
    """The data of a YAML 1.2 file; a repeated key is an error. Raises MergelawError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise MergelawError(system_message(error)) from None
    data = _parse_yaml(content, str(path))
    _check_values(data, str(path))
    return data


def _parse_yaml(content: bytes, where: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(content.decode())
    except (YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error or type(error).__name__)
        reason = clip(reason.splitlines()[0], 120)
        raise MergelawError(f"{where}{line}: not valid YAML ({reason}); fix it") from None


def read_files(paths: Iterable[Path | str], settings: Iterable[str] = ()) -> dict[str, Any]:
    """Read YAML files and merge them as Snakemake merges its configuration files.

    Later files win, and ``settings`` (``key=value`` of ``--config``, values in YAML) over all. A
    file wins over the one that it includes. Nested mappings are merged. Raises MergelawError.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        for data in _with_included(Path(path)):
            _update(merged, data)
    for setting in settings:
        key, _, value = setting.partition("=")
        _update(merged, {key: _parse_yaml(value.encode(), f"--config {clip(setting)}")})
    return merged


def _with_included(path: Path, depth: int = 0) -> list[dict[str, Any]]:
    """The data of a file, after those of the file that its key ``include`` names."""
    data = read(path)
    if "include" not in data:
        return [data]
    name = data.pop("include")
    if not isinstance(name, str) or depth >= MAX_DEPTH:
        problem = "give the path of one file" if depth < MAX_DEPTH else "files include each other"
        raise MergelawError(f"{path}, include: {problem}")
    return [*_with_included(path.parent / name, depth + 1), data]


def _update(target: dict[str, Any], data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        if isinstance(value, Mapping):
            before = target.get(key)
            target[key] = dict(before) if isinstance(before, dict) else {}
            _update(target[key], value)
        else:
            target[key] = value


def parse(data: Any, where: str = "configuration") -> Config:
    """Check a configuration's data, as read from YAML or JSON. Raises MergelawError."""
    _check_values(data, where)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise MergelawError(f"{where}: {describe(error)}") from None
    for problem in problems(config):
        raise MergelawError(f"{where}: {problem}")
    return config


def _check_values(data: Any, where: str) -> None:
    """Require a mapping of finite size whose values JSON can hold. Raises MergelawError."""
    if not isinstance(data, dict):
        raise MergelawError(f"{where}: holds no keys with values; see config/README.md")
    pending: list[tuple[tuple[str, ...], Any]] = [((), data)]
    for _ in range(MAX_VALUES):
        if not pending:
            return
        place, value = pending.pop()
        problem = "is nested too deeply; flatten it" if len(place) > MAX_DEPTH else _problem(value)
        if problem:
            raise MergelawError(": ".join(filter(None, [where, ".".join(place[:8]), problem])))
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list):
            pairs = enumerate(value)
        pending += [((*place, clip(str(key))), entry) for key, entry in pairs]
    raise MergelawError(f"{where}: has over {MAX_VALUES:,} values; check its aliases")


def _problem(value: Any) -> str | None:
    """The reason why JSON cannot hold a value; None if it can."""
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            return f"the key {clip(str(key))} is not text; put it in quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; give a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large a number; give one below 2^63"
    if not isinstance(value, dict | list | str | int | float | None):
        return f"{clip(str(value))} is a {type(value).__name__}; put it in quotes if it is text"
    return None
