"""The figures of the README and docs/results.md are those of the committed results, and the commands exist."""

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


def test_a_goal_is_met_or_missed_or_not_measured(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"headline": {"s": 0.123}}))
    goals = [["A", "more", "demo", "s", ".1%", ">= 12%"], ["", "less", "demo", "s", ".2f", "< 0.1"],
             ["", "none", "demo", "s", ".2f", ""], ["", "gone", "absent", "s", ".2f", "> 0"]]
    page = load_tables().rewrite("<!-- table: all -->\n<!-- /table -->", {"all": {"goals": goals}},  # type: ignore[attr-defined]
                                 tmp_path)
    assert "| A | more | 12.3% | >= 12% | met |" in page
    assert "|  | less | 0.12 | < 0.1 | **missed** |" in page
    assert "|  | none | 0.12 |  |  |" in page
    assert "|  | gone | not measured | > 0 |  |" in page


def test_every_result_is_shown() -> None:
    shown = (REPO / "docs" / "results.md").read_text("utf-8")
    results = {path.stem for path in (REPO / "benchmarks" / "results").glob("*.json")}
    assert results
    assert not {name for name in results if f"<!-- table: {name} -->" not in shown}


def test_every_make_command_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (REPO / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named
    assert named <= targets
