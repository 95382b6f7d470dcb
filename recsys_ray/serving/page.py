"""The search page: four static files that come with the package, and a policy that lets nothing else in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request
from starlette.responses import Response

FILES = {"/": ("index.html", "text/html"), "/static/search.css": ("search.css", "text/css"),
         "/static/search.js": ("search.js", "text/javascript"),
         "/static/pictures.js": ("pictures.js", "text/javascript")}
PAGE_PATHS = frozenset(FILES)
IMAGE_HOSTS = "{{ image_hosts }}"       # in the page: origins it may show products' images from
PICTURES = "{{ pictures }}"             # in the page: whether the service answers pictures


def page_policy(image_hosts: Sequence[str]) -> str:
    """The Content-Security-Policy of the page: this service, and images from `image_hosts`."""
    return ("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
            f"img-src {' '.join(['data:', *image_hosts])}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


@cache
def static_file(name: str) -> str:
    """One of the page's files."""
    return (files("recsys_ray.serving") / "static" / name).read_text(encoding="utf-8")


def add_page(app: FastAPI, image_hosts: Sequence[str], *, pictures: bool = False) -> None:
    """Serve the page at `/` and its other files below `/static`."""
    headers = {"content-security-policy": page_policy(image_hosts), "x-content-type-options": "nosniff",
               "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    def endpoint(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            text = static_file(name).replace(IMAGE_HOSTS, " ".join(image_hosts)).replace(PICTURES, str(pictures))
            return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)

        return answer

    for path, (name, kind) in FILES.items():
        app.add_api_route(path, endpoint(name, kind), include_in_schema=False)
