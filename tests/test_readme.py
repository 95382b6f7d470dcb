"""The README's figures are those of the committed results, and its commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def load_tables() -> object:
    spec = importlib.util.spec_from_file_location("readme_tables", REPO / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_are_made_from_the_results() -> None:
    assert load_tables().main(["--check"]) == 0  # type: ignore[attr-defined]


def test_a_table_shows_the_figures_of_its_result(tmp_path: Path) -> None:
    tables = load_tables()
    layout = {"demo": {"title": "T", "rows": [["share", "s", ".1%"], ["gone", "g", "d"]]}}
    page = "before\n<!-- table: demo -->\nold\n<!-- /table -->\nafter"
    assert "*Not measured yet.*" in tables.rewrite(page, layout, tmp_path)  # type: ignore[attr-defined]
    (tmp_path / "demo.json").write_text(json.dumps({
        "headline": {"s": 0.123}, "command": "make x", "created": "2026-01-01T00:00:00", "git_sha": "abc",
        "machine": {"cpu": "c", "cores": 2}}))
    made = tables.rewrite(page, layout, tmp_path)  # type: ignore[attr-defined]
    assert "| share | 12.3% |" in made
    assert "| gone | not measured |" in made
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter")


def test_every_make_command_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (REPO / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named
    assert named <= targets
