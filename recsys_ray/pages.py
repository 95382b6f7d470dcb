"""The pages that stages write and the service shows: one HTML file each that needs nothing else.

A package's templates lie in its `templates` folder and extend `page.html` of this one.
"""

from __future__ import annotations


def render_page(module: str, template: str, **values: object) -> str:
    """A template beside a module (its `__name__`) as HTML text.

    Every text is escaped but our own SVG (`| svg`), and a missing name is an error. Other filters: `figure` (12,345 or
    0.571, a dash for none), `score` (three decimals), `price` (of cents).
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loaders = [PackageLoader(package) for package in (module.rpartition(".")[0], "recsys_ray")]
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"svg": Markup, "figure": _figure, "score": _score, "price": _price}
    return environment.get_template(template).render(values)


def _figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _price(cents: int | None) -> str:
    return "" if cents is None else f"{cents / 100:,.2f}"
