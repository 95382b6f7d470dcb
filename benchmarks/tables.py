"""Rewrite the tables of README.md and docs/results.md from the committed result files: no figure there is typed.

    python benchmarks/tables.py            rewrite
    python benchmarks/tables.py --check    exit 1 when a page differs from what the results say

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; `tables.yaml` says which headline
figures of `results/NAME.json` it shows and how (`rows`), and which of its lists follow as tables (`records`). A layout
of `goals` shows figures of several files, each beside what it was to reach.
"""

from __future__ import annotations

import json
import operator
import re
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "results.md")
REACHED = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "=": operator.eq}
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z0-9_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def render(name: str, layout: dict[str, Any], results: Path) -> str:
    """The Markdown table of one result file, or a line that says it was not measured."""
    if "goals" in layout:
        return _goals(layout["goals"], results)
    path = results / f"{name}.json"
    if not path.is_file():
        return "*Not measured yet.*\n"
    result = json.loads(path.read_text("utf-8"))
    lines = [f"| {layout['title']} | |", "| --- | ---: |"]
    for label, key, form in layout["rows"]:
        value = result["headline"].get(key)
        lines.append(f"| {label} | {'not measured' if value is None else format(value, form)} |")
    for records in layout.get("records", []):
        lines += ["", *_record_lines(records, result["tables"])]
    machine = result["machine"]
    lines.append(f"\n`{result['command']}` on {machine['cpu']}, {machine['cores']} cores, "
                 f"{result['created'][:10]}, commit {result['git_sha'][:10]}.")
    return "\n".join(lines) + "\n"


def _goals(goals: list[list[Any]], results: Path) -> str:
    """A line a goal: what is measured, the figure, what it was to be, and whether it is; "" as a goal is none."""
    lines = ["| | | reached | goal | |", "| --- | --- | ---: | ---: | --- |"]
    for area, label, name, key, form, goal in goals:
        path = results / f"{name}.json"
        value = json.loads(path.read_text("utf-8"))["headline"].get(key) if path.is_file() else None
        shown = "not measured" if value is None else format(value, form)
        lines.append(f"| {area} | {label} | {shown} | {goal} | {_verdict(value, goal)} |")
    return "\n".join(lines) + "\n"


def _verdict(value: float | None, goal: str) -> str:
    if value is None or not goal:
        return ""
    comparison, _, limit = goal.partition(" ")
    wanted = float(limit.removesuffix("%")) / (100 if limit.endswith("%") else 1)
    return "met" if REACHED[comparison](value, wanted) else "**missed**"


def _record_lines(layout: dict[str, Any], tables: dict[str, Any]) -> list[str]:
    """A list of the result, one line an entry that is as `where` says.

    `at` and the columns' keys are dotted; the first column is a name.
    """
    columns = layout["columns"]
    lines = [f"| {' | '.join(label for label, _, _ in columns)} |", f"| ---{' | ---:' * (len(columns) - 1)} |"]
    for record in _value(tables, layout["at"]):
        if any(record[key] != value for key, value in layout.get("where", {}).items()):
            continue
        values = [(_value(record, key), form) for _, key, form in columns]
        lines.append(f"| {' | '.join('' if value is None else format(value, form) for value, form in values)} |")
    return lines


def _value(found: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        found = found[key]
    return found


def rewrite(text: str, layouts: dict[str, Any], results: Path) -> str:
    """`text` with every marked table made anew; an unknown table name raises KeyError."""
    return BLOCK.sub(lambda match: match[1] + render(match["name"], layouts[match["name"]], results) + match[3], text)


def main(arguments: list[str]) -> int:
    """Rewrite or check; returns the exit status."""
    layouts = yaml.safe_load((HERE / "tables.yaml").read_text("utf-8"))
    status = 0
    for page in PAGES:
        old = page.read_text("utf-8")
        new = rewrite(old, layouts, HERE / "results")
        if "--check" in arguments:
            status |= int(old != new)
        else:
            page.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
