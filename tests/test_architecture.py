"""The rules of the house, kept by tests: where Ray may be, what files may be called, how long they get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "recsys_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

RAY_MODULES = {  # everything else is a pure function on Arrow, numpy or torch
    "runtime.py", "flow.py", "data/sources/readers.py", "data/pipeline.py", "data/training_pairs.py",
    "data/extract_keywords.py", "data/reranker_data.py", "retrieval/embed.py", "retrieval/index_build.py",
    "retrieval/mining.py", "ranking/gbdt_workers.py", "serving/app.py", "serving/deployments.py",
    "serving/measures.py", "training/launch.py",
    "training/pair_passes.py", "training/sweep.py", "piecework.py",
}
JUNK_DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}
HEAVY = {"torch", "faiss", "ray", "sentence_transformers", "transformers", "matplotlib", "openvino"}
HEAVY_AT_TOP = {"torch", "faiss", "ray"}  # allowed at the top only where the module is about it
UNSAFE_CALLS = {"pickle.load", "pickle.loads", "yaml.load", "joblib.load", "eval", "exec", "os.system"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").split(".")[0]}
    return set()


def all_imports(path: Path) -> set[str]:
    return set().union(*(imported(node) for node in ast.walk(ast.parse(path.read_text("utf-8")))))


def test_the_package_was_found() -> None:
    assert len(MODULES) > 20


def test_ray_is_imported_only_at_the_edge() -> None:
    users = {relative(path) for path in MODULES if "ray" in all_imports(path)}
    assert users <= RAY_MODULES, f"Ray crept into {sorted(users - RAY_MODULES)}"
    assert not RAY_MODULES - {relative(path) for path in MODULES}, "RAY_MODULES names a module that is gone"


def test_no_junk_drawers() -> None:
    named = [relative(path) for path in MODULES if {part.removesuffix(".py") for part in path.parts} & JUNK_DRAWERS]
    assert not named


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 400, f"{relative(path)} has {len(lines)} lines: one concept each"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{relative(path)}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    if path.name != "__init__.py" or len(tree.body) > 0:
        assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{relative(path)}: {node.name} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_unsafe_is_loaded(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in UNSAFE_CALLS, f"{relative(path)}:{node.lineno} {name}"
        assert keywords.get("allow_pickle") != "True", f"{relative(path)}:{node.lineno}"
        assert name != "torch.load" or keywords.get("weights_only") == "True", f"{relative(path)}:{node.lineno}"
        assert keywords.get("shell") != "True", f"{relative(path)}:{node.lineno}"


def test_importing_the_light_modules_stays_light() -> None:
    """Configurations are loaded by drivers and tests all the time: they must not pull in models or Ray."""
    light = ["config", "ids", "schema", "artifacts", "data.preprocess", "retrieval.filters", "evaluation.metrics",
             "models.registry", "serving.api"]
    code = "import sys\n" + "\n".join(f"import recsys_ray.{name}" for name in light)
    code += f"\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_library_does_not_print() -> None:
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if ast.unparse(call.func) == "print"], relative(path)


def test_packages_of_a_lower_floor_do_not_know_the_upper_ones() -> None:
    """data -> models -> retrieval -> evaluation -> serving: one direction, no back and forth."""
    floors = ["data", "models", "retrieval", "serving"]
    for path in MODULES:
        floor = relative(path).split("/")[0]
        if floor not in floors:
            continue
        above = {f"recsys_ray.{name}" for name in floors[floors.index(floor) + 1:]}
        tree = ast.parse(path.read_text("utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        used = {".".join(module.split(".")[:2]) for module in modules}
        assert not used & above, f"{relative(path)} imports {sorted(used & above)}"
