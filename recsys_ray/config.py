"""Frozen, strict configuration: one YAML file plus dotted overrides, the same for every job.

A job defines one subclass of `Config`; `load_config` reads it and `main` is the whole command line:
`--config FILE [--print-config] key.path=value ...`. A misspelt key or a bad value fails before any
work starts and names the key.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_CONFIG_BYTES = 1 << 20  # a YAML alias bomb needs no more than this to be worth refusing


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the mend."""


class Config(BaseModel):
    """Base of every configuration: frozen values, no unknown keys, no live objects."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """16 hex digits that are equal exactly when two configurations are equal."""
        return fingerprint(self.model_dump(mode="json"))

    @classmethod
    def chosen_for(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class that reads these values: this one; a family of configurations chooses one of its members."""
        return cls

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


AnyConfig = TypeVar("AnyConfig", bound=Config)


def fingerprint(value: object) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def load_config(cls: type[AnyConfig], path: str | Path | None, overrides: Sequence[str] = ()) -> AnyConfig:
    """The configuration of type `cls` from a YAML file and `key.path=value` overrides.

    Errors: `ConfigError` for a missing file, a key that `cls` does not have (with the nearest
    legal one), a value of the wrong type, or an override that is not `key=value`.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    chosen = cls.chosen_for(values)
    try:
        return chosen.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, chosen, path)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, not a configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"{override!r}: an override has the form key.path=value")
    *parents, leaf = dotted.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {name!r} holds a value, not a group of keys")
        node = child
    try:
        node[leaf] = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        node[leaf] = text  # e.g. a value with a colon that YAML cannot parse: keep it as the text it is


def _explain(error: ValidationError, cls: type[Config], path: str | Path | None) -> str:
    lines = [f"{path or 'configuration'}: {error.error_count()} problem(s) for {cls.__name__}"]
    for problem in error.errors(include_url=False, include_input=True):
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(cls), n=1)
            message = "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
        elif problem["type"] != "missing":
            message += f" (got {problem['input']!r})"
        lines.append(f"  {key or '(top level)'}: {message}")
    return "\n".join(lines)


def _known_keys(cls: type[BaseModel]) -> list[str]:
    """Every field name of a configuration and of the configurations inside it."""
    names: list[str] = []
    for name, field in cls.model_fields.items():
        names.append(name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names.extend(_known_keys(part))
    return names


def main(cls: type[AnyConfig], run: Callable[[AnyConfig], object], argv: Sequence[str] | None = None) -> int:
    """The command line of a job: parse, load, log the fingerprint, run; returns the exit status.

    A configuration error, or a `ValueError` or `OSError` about the user's input, prints one message
    and exits with 2; anything else is a defect and keeps its traceback.
    """
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the job's configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of single keys")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request is no progress
    try:
        config = load_config(cls, args.config, args.overrides)
        if args.print_config:
            sys.stdout.write(config.to_yaml())
            return 0
        logging.getLogger(run.__module__).info("%s %s", cls.__name__, config.digest())
        run(config)
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
