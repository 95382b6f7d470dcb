"""Which generator made a shop: a version for people, a hash for certainty."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

GENERATOR_VERSION = "1.0"


@cache
def generator_hash() -> str:
    """The SHA-256 of the generator's own sources and tables, 64 hex digits."""
    root = Path(__file__).parent
    digest = hashlib.sha256(GENERATOR_VERSION.encode())
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")], key=lambda one: one.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
