"""Truth rows of planted products and reviewers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recsys_ray.data.demo_shop.catalogue import Catalogue
from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.formulas import effects
from recsys_ray.data.demo_shop.people import tastes
from recsys_ray.data.demo_shop.products import Product, products, set_bits
from recsys_ray.data.demo_shop.streams import Integers, uniforms, user_ids
from recsys_ray.data.demo_shop.survey import Survey, time_ms
from recsys_ray.data.demo_shop.vocabulary import departments, formulary

VISUAL = ("colour", "pattern", "neckline", "sleeve", "material")


def product_rows(catalogue: Catalogue, numbers: Integers, survey: Survey, imaged: int) -> list[dict[str, Any]]:
    """Rows of the truth's products table."""
    ids = catalogue.ids(numbers)
    groups = catalogue.ids(catalogue.content[numbers])
    first = time_ms(np.minimum(survey.first_seen[numbers], 1.0)).tolist()
    rows = []
    for place, product in enumerate(products(catalogue, numbers)):
        number = product.number
        seen = bool(np.isfinite(survey.first_seen[number]))
        attributes = attributes_of(product)
        rows.append({
            "product_id": ids[place], "department": product.department.key, "kind": product.kind.key,
            "kind_group": product.kind.group, **{facet: attributes.get(facet) for facet in VISUAL},
            "visible": number < imaged, "attributes": list(attributes.items()), "brand": product.brand,
            "line": product.line, "price_cents": product.price_cents, "quality": float(catalogue.fame.quality[number]),
            "duplicate_group": groups[place], "cold": bool(survey.cold[number]),
            "first_review_ms": first[place] if seen else None,
            "num_reviews": int(survey.standing.reviews[number]),
            "claims": concern_keys(product.claims), "helps": concern_keys(product.helps)})
    return rows


def attributes_of(product: Product) -> Mapping[str, str]:
    """Facet -> value of the attributes a product has."""
    facets = zip(product.department.facets, product.values, strict=True)
    return {facet.key: facet.values[value] for facet, value in facets if value >= 0}


def concern_keys(places: tuple[int, ...]) -> list[str]:
    """The names of concerns."""
    return [formulary().concerns[at].key for at in places]


def concern_rows(catalogue: Catalogue, config: DemoShopConfig, numbers: Integers) -> list[dict[str, Any]]:
    """Rows of the truth's concerns table: every beauty product against every concern."""
    concerns = formulary().concerns
    beauty = numbers[catalogue.department[numbers] == 0]
    slips = uniforms(config.seed, "label noise", beauty, len(concerns)) < config.clarity.label_noise
    ids = catalogue.ids(beauty)
    rows = []
    for place, product in enumerate(products(catalogue, beauty, with_recipes=True)):
        for at, effect in enumerate(effects(product.ingredients, concerns)):
            rows.append({
                "product_id": ids[place], "concern": effect.concern, "claimed": at in product.claims,
                "strength": effect.strength, "helps": effect.helps, "label": effect.helps != bool(slips[place, at]),
                "actives": effect.actives, "antagonists": effect.antagonists,
                "ingredients": list(product.ingredients) if at == 0 else None})
    return rows


def user_rows(catalogue: Catalogue, users: Integers) -> list[dict[str, Any]]:
    """Rows of the truth's users table: the tastes in each reviewer's own department."""
    who = tastes(catalogue, users)
    rows = []
    for at, name in enumerate(user_ids(catalogue.seed, users)):
        department = departments()[who.department[at]]
        liked = {facet.key: facet.values[int(who.values[at, place] * len(facet.values))]
                 for place, facet in enumerate(department.facets)}
        weights = {facet.key: float(who.weights[at, place]) for place, facet in enumerate(department.facets)}
        rows.append({
            "user_id": name, "department": department.key,
            "kind": department.kinds[int(who.kind[at] * len(department.kinds))].key,
            "price_level": float(who.price[at]), "likes": list(liked.items()), "weights": list(weights.items()),
            "concerns": concern_keys(set_bits(int(who.concerns[at])))})
    return rows
