"""Folders of YAML tables that people edit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

PACKAGED = "packaged"       # names the tables that come with the library
MAX_BYTES = 4 << 20         # of a table


def read_rules(folder: Path, known: Collection[str], noun: str, error: type[ValueError]
               ) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The tables of a folder in the order of their names, and their keys.

    `known` are the files that it may hold, `noun` is what errors call one ("a rule table"). Raises `error` for no
    such folder, none or an unknown table in it, and a table that is too large, not YAML, or has no keys at the top.
    """
    names = ", ".join(known)
    if not folder.is_dir():
        raise error(f"{folder}: no such folder of rules; name a folder with {names}, or {PACKAGED!r}")
    found = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    for path in found:
        if path.name not in known:
            raise error(f"{path}: not {noun}; a folder of rules holds {names}")
    if not found:
        raise error(f"{folder}: no {noun.split(' ', 1)[1]}; a folder of rules holds some of {names}")
    for path in found:
        yield path, _keys(path, noun, error)


def _keys(path: Path, noun: str, error: type[ValueError]) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise error(f"{path}: larger than {MAX_BYTES} bytes, not {noun}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise error(f"{path}: expected keys at the top, found {type(values).__name__}")
    return values
