"""TOML files that are read into records: each field of a dataclass by its name and type, all problems at once."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.errors import TargetError, unknown


def read_table(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds. Raises TargetError where it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not valid TOML: {error}.") from None


def problems(kind: type, table: Mapping[str, Any]) -> list[str]:
    """Say which fields of a dataclass, its name aside, a table lacks, has of a wrong type, or has beside them."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "name"}
    found = [unknown("field", key, fields) for key in table if key not in fields]
    for key, field in fields.items():
        if key in table:
            found += _wrong(key, table[key], str(field.type))
        elif field.default is dataclasses.MISSING:
            found.append(f"{key} is missing.")
    return found


def values(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with its lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _wrong(key: str, value: Any, annotation: str) -> list[str]:
    """Say what is wrong with the type of one field's value."""
    if items := re.match(r"tuple\[(\w+)", annotation):
        fits = type(value) is list and all(type(item).__name__ == items[1] for item in value)
        wanted = f"list of {items[1]}"
    else:
        fits, wanted = type(value).__name__ == annotation, annotation
    return [] if fits else [f"{key} should be a {wanted}, found {value!r}."]
