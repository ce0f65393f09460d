"""Settings as frozen dataclasses, read from one YAML file and `key=value` overrides, and nothing else.

Unknown keys fail with the nearest known name, and values are checked against their types. Which settings there are, and
which of them clash, is said where they are defined (`config`, `rlvr_config`). Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

SettingsT = TypeVar("SettingsT")


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file as nested dicts, with `section.key=value` overrides (values parsed as YAML) over it.

    Raises:
        ValueError: broken YAML (place given), or an override without a value.
        FileNotFoundError: no such file.
    """
    tree: Any = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"config file {path} does not exist")
        tree = _parse(Path(path).read_bytes(), f"config file {path}") or {}
        if not isinstance(tree, dict):
            raise ValueError(f"config file {path}: must be a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: write it as key=value, for instance objective.penalty=0.05")
        _set(tree, key.strip(), _parse(value, f"override {override!r}"))
    return tree


def build(cls: type[SettingsT], tree: Mapping[str, Any]) -> SettingsT:
    """An instance of the dataclass `cls`; ValueError: unknown key (nearest known name given) or wrong type."""
    settings: SettingsT = _build(cls, tree, "", cls)
    return settings


def to_dict(config: object) -> dict[str, Any]:
    """Nested plain dict of a config dataclass."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]


def known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key, depth first."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from known_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _parse(text: str | bytes, where: str) -> Any:
    """Read YAML; ValueError with `where` and, if known, the line and column of the mistake."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{place}: is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # undecodable bytes, or a date that does not exist
        raise ValueError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from error


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {dotted}: {section!r} is a value, not a section")
    tree[leaf] = value


def _build(cls: type, tree: Mapping[str, Any], prefix: str, root: type) -> Any:
    hints = get_type_hints(cls)
    names = {item.name for item in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in names:
            raise ValueError(_unknown_key(dotted, root))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{dotted}: is a section with keys of its own, got {value!r}")
            expand = getattr(hint, "with_preset", dict)  # a section may say where its other settings start from
            settings = expand(value)
            arguments[key] = _build(hint, settings, f"{dotted}.", root)  # type: ignore[arg-type]
        else:
            arguments[key] = _convert(dotted, hint, value)
    return cls(**arguments)


def _unknown_key(dotted: str, root: type) -> str:
    keys = list(known_keys(root))
    leaf = dotted.rpartition(".")[2]
    near = difflib.get_close_matches(dotted, keys, n=1) or [
        key for key in keys for match in difflib.get_close_matches(leaf, [key.rpartition(".")[2]], n=1) if match
    ]
    hint = f"; did you mean {near[0]!r}?" if near else f"; sections are {sorted({k.split('.')[0] for k in keys})}"
    return f"unknown config key {dotted!r}{hint}"


def _convert(dotted: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{dotted}: must be one of {list(get_args(hint))}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{dotted}: must be a list, got {value!r}")
        return tuple(_convert(dotted, get_args(hint)[0], item) for item in value)
    assert get_origin(hint) not in (Union, UnionType), f"{dotted}: optional settings are not supported"
    if hint is float and isinstance(value, str):
        value = _number(dotted, value)  # YAML reads 1e-4 as text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{dotted}: must be of type {hint.__name__}, got {value!r}")
    return value


def _number(dotted: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{dotted}: must be a number, got {text!r}") from None
