"""Which artefact was made from which: the manifests as a graph, and the graph as a drawing."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from recsys_ray.artifacts import Manifest
from recsys_ray.evaluation.plots import hash_text

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 220, 58, 48, 18
BOX_CHARS = 26      # of its first line


@dataclass(frozen=True)
class Node:
    """One artefact in the graph; `manifest` is None for a parent that is only known by reference."""

    reference: str
    column: int         # 0 = made from nothing here
    row: int
    manifest: Manifest | None


def lineage(manifests: Iterable[Manifest]) -> list[Node]:
    """The nodes of the graph in reading order: parents left of their children.

    Ties by kind, place and fingerprint, not by version, so that a repeated run gives the same order.
    """
    known = {manifest.reference: manifest for manifest in manifests}
    parents = {reference: sorted(set(manifest.parents.values())) for reference, manifest in known.items()}
    for reference in {parent for of in parents.values() for parent in of} - set(parents):
        parents[reference] = []
    column: dict[str, int] = {}

    def place(reference: str) -> int:
        if reference not in column:
            column[reference] = max((place(parent) + 1 for parent in parents[reference]), default=0)
        return column[reference]

    rows: dict[int, int] = {}
    nodes = []
    for reference in sorted(parents, key=lambda one: (place(one), *_order(one, known.get(one)))):
        row = rows.get(column[reference], 0)
        rows[column[reference]] = row + 1
        nodes.append(Node(reference, column[reference], row, known.get(reference)))
    return nodes


def _order(reference: str, manifest: Manifest | None) -> tuple[str, str, str]:
    if manifest is None:
        return reference.partition("/")[0], "", reference
    return manifest.kind, str(manifest.config.get("output", "")), manifest.fingerprint


def lineage_table(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """One row per artefact: kind, version, fingerprint, git sha, parents, rows, configuration as YAML."""
    rows = []
    for node in nodes:
        kind, _, version = node.reference.partition("/")
        manifest = node.manifest
        rows.append({
            "kind": kind, "version": version, "fingerprint": manifest.fingerprint if manifest else None,
            "git_sha": manifest.git_sha if manifest else None, "created": manifest.created if manifest else None,
            "parents": dict(sorted(manifest.parents.items())) if manifest else {},
            "files": len(manifest.files) if manifest else None, "rows": manifest.rows() if manifest else None,
            "config": yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True) if manifest else ""})
    return rows


def lineage_svg(nodes: list[Node]) -> str:
    """The graph as one `<svg>`: boxes in columns, curves from parent to child."""
    by_reference = {node.reference: node for node in nodes}
    width = (max(node.column for node in nodes) + 1) * (BOX_WIDTH + GAP_X) - GAP_X + 4
    height = (max(node.row for node in nodes) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 4
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" class="lineage">',
             "<title>How the artefacts of this report were made from each other</title>"]
    for node in nodes:
        for parent in sorted(set((node.manifest.parents if node.manifest else {}).values())):
            parts.append(_edge(by_reference[parent], node))
    parts += [_box(node) for node in nodes]
    return "".join([*parts, "</svg>"])


def _corner(node: Node) -> tuple[int, int]:
    return 2 + node.column * (BOX_WIDTH + GAP_X), 2 + node.row * (BOX_HEIGHT + GAP_Y)


def _edge(parent: Node, child: Node) -> str:
    (x1, y1), (x2, y2) = _corner(parent), _corner(child)
    x1, y1, y2 = x1 + BOX_WIDTH, y1 + BOX_HEIGHT // 2, y2 + BOX_HEIGHT // 2
    middle = (x1 + x2) // 2
    return f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}" class="edge"/>'


def _box(node: Node) -> str:
    x, y = _corner(node)
    kind, _, _ = node.reference.partition("/")
    name = _own_name(node.manifest) if node.manifest else "elsewhere"
    line = f"{node.manifest.fingerprint[:8]} · {node.manifest.rows():,} rows" if node.manifest else "not opened"
    tint = 1 + hash_text(kind) % 6
    return (f'<g><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="9" class="box"/>'
            f'<rect x="{x}" y="{y + 9}" width="4" height="{BOX_HEIGHT - 18}" style="fill:var(--series-{tint})"/>'
            f'<text x="{x + 14}" y="{y + 24}" class="kind">{html.escape(kind)}{html.escape(name)}</text>'
            f'<text x="{x + 14}" y="{y + 43}" class="small">{html.escape(line)}</text></g>')


def _own_name(manifest: Manifest) -> str:
    """The last folder of the artefact's output, where it says more than the kind and there is room for it."""
    output: Mapping[str, Any] | str = manifest.config.get("output", "")
    last = str(output).rstrip("/").rsplit("/", 1)[-1]
    said = set(re.split("[-_]", last)) <= {"", *re.split("[-_]", manifest.kind)}
    shown = last[:max(0, BOX_CHARS - len(manifest.kind) - 3)]
    return "" if said or len(shown) < min(3, len(last)) else f" · {shown}"
