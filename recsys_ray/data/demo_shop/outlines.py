"""Outlines of products as polygons in a unit square; later ones lie on (or cut into) earlier ones."""

from __future__ import annotations

from collections.abc import Mapping

from recsys_ray.data.demo_shop.products import Product

Polygon = list[tuple[float, float]]
Layer = tuple[Polygon, bool]        # points, and whether they fill or cut out

LENGTHS = {"top": 0.72, "warm_top": 0.76, "dress": 0.96, "night": 0.88, "jacket": 0.82}
SLEEVES = {     # how far down a sleeve goes (0: none, 1: wrist), its width at the shoulder and at its end
    "sleeveless": (0.0, 0.0, 0.0), "cap": (0.16, 0.10, 0.08), "short": (0.36, 0.11, 0.11), "elbow": (0.62, 0.10, 0.08),
    "long": (1.0, 0.10, 0.07), "bell": (1.0, 0.09, 0.20), "puff": (0.5, 0.19, 0.07),
}
FLARES = {"slim": -0.05, "loose": 0.07, "plus": 0.09, "maternity": 0.08}


def outline(product: Product, values: Mapping[str, str]) -> list[Layer]:
    """The layers of a product's picture, with the attributes that shape it."""
    drawer = {"fashion": garment, "furniture": piece_of_furniture, "books": book}.get(product.department.key, bottle)
    return drawer(product.kind.group, values)


def garment(group: str, values: Mapping[str, str]) -> list[Layer]:
    """A body with two sleeves and what the neckline leaves open."""
    hem = LENGTHS.get(group, 0.75)
    flare = FLARES.get(values.get("fit", ""), 0.0) + (0.14 if group == "dress" else 0.0)
    body = [(0.34, 0.16), (0.66, 0.16), (0.68, 0.45), (0.68 + flare, hem), (0.32 - flare, hem), (0.32, 0.45)]
    layers: list[Layer] = [(body, True)]
    reach, top, end = SLEEVES.get(values.get("sleeve", "long"), SLEEVES["long"])
    if reach:
        for side in (-1, 1):
            shoulder, hand = 0.5 + side * 0.16, 0.5 + side * (0.16 + 0.24 * reach)
            low = 0.16 + 0.52 * reach
            layers.append(([(shoulder, 0.16), (shoulder + side * top * 0.7, 0.16 + top * 0.5),
                            (hand + side * end * 0.5, low), (hand - side * end * 0.5, low),
                            (shoulder, 0.16 + top * 1.6)], True))
    return layers + neck(values.get("neckline", "crew"))


def neck(name: str) -> list[Layer]:
    """The opening (or the collar) of a neckline."""
    collar: Polygon = [(0.42, 0.07), (0.58, 0.07), (0.58, 0.18), (0.42, 0.18)]
    shapes: dict[str, list[Layer]] = {
        "crew": [(_arc(0.08, 0.05), False)], "v_neck": [([(0.41, 0.15), (0.59, 0.15), (0.5, 0.36)], False)],
        "scoop": [(_arc(0.11, 0.17), False)], "turtle": [(collar, True)],
        "boat": [(_arc(0.16, 0.035), False)],
        "square": [([(0.40, 0.15), (0.60, 0.15), (0.60, 0.29), (0.40, 0.29)], False)],
        "off_shoulder": [([(0.2, 0.1), (0.8, 0.1), (0.8, 0.24), (0.2, 0.24)], False)],
        "cowl": [(_arc(0.13, 0.10), False), (_arc(0.10, 0.05), True)],
    }
    return shapes[name]


def _arc(half_width: float, depth: float) -> Polygon:
    steps = [step / 8 for step in range(-8, 9)]
    return [(0.5 - half_width, 0.14), *((0.5 + half_width * step, 0.155 + depth * (1 - step * step)) for step in steps),
            (0.5 + half_width, 0.14)]


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def piece_of_furniture(group: str, values: Mapping[str, str]) -> list[Layer]:
    """A seat, a table, a cupboard or a bed."""
    wide = {"compact": 0.08, "narrow": 0.14, "large": -0.08}.get(values.get("size", ""), 0.0)
    left, right = 0.14 + wide, 0.86 - wide
    legs: list[Layer] = [(_box(at, 0.72, at + 0.05, 0.9), True) for at in (left, right - 0.05)]
    if group == "seat":
        return [(_box(left, 0.3, right, 0.6), True), (_box(left, 0.52, right, 0.74), True),
                (_box(left + 0.1, 0.5, right - 0.1, 0.52), False), *legs]
    if group in ("table", "work"):
        return [(_box(left, 0.42, right, 0.5), True), (_box(left + 0.02, 0.5, left + 0.07, 0.9), True),
                (_box(right - 0.07, 0.5, right - 0.02, 0.9), True)]
    if group == "bed":
        return [(_box(left, 0.26, left + 0.08, 0.82), True), (_box(left, 0.54, right, 0.72), True), *legs]
    shelves: list[Layer] = [(_box(left + 0.05, at, right - 0.05, at + 0.02), False) for at in (0.32, 0.5, 0.68)]
    return [(_box(left, 0.14, right, 0.88), True), *shelves]


def book(group: str, values: Mapping[str, str]) -> list[Layer]:
    """A cover with a title block; thick for sets."""
    thick = 0.1 if values.get("format") == "box_set" else 0.0
    return [(_box(0.28 - thick, 0.12, 0.72 + thick, 0.9), True), (_box(0.34, 0.24, 0.66, 0.32), False),
            (_box(0.4, 0.7, 0.6, 0.73), False)]


def bottle(group: str, values: Mapping[str, str]) -> list[Layer]:
    """What the stuff comes in."""
    label: Layer = (_box(0.4, 0.6, 0.6, 0.72), False)
    shapes: dict[str, list[Layer]] = {
        "jar": [(_box(0.26, 0.48, 0.74, 0.84), True), (_box(0.24, 0.38, 0.76, 0.46), True)],
        "tube": [([(0.32, 0.12), (0.68, 0.12), (0.6, 0.78), (0.4, 0.78)], True), (_box(0.42, 0.8, 0.58, 0.9), True)],
        "pump": [(_box(0.34, 0.36, 0.66, 0.9), True), (_box(0.46, 0.18, 0.54, 0.36), True),
                 (_box(0.3, 0.16, 0.54, 0.2), True)],
        "dropper": [(_box(0.36, 0.46, 0.64, 0.9), True), (_box(0.46, 0.14, 0.54, 0.46), True)],
        "refill": [([(0.26, 0.2), (0.74, 0.2), (0.8, 0.9), (0.2, 0.9)], True)],
        "set": [(_box(0.14, 0.5, 0.38, 0.9), True), (_box(0.42, 0.36, 0.6, 0.9), True),
                (_box(0.64, 0.56, 0.88, 0.9), True)],
        "bundle": [(_box(at, 0.4, at + 0.2, 0.9), True) for at in (0.14, 0.4, 0.66)],
        "travel": [(_box(0.4, 0.56, 0.6, 0.9), True), (_box(0.45, 0.48, 0.55, 0.56), True)],
    }
    return [*shapes.get(values.get("pack", ""), shapes["pump"]), label]
