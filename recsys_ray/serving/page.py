"""The search page: four static files that come with the package, and a policy that lets nothing else in.

Products' images are shown from configured origins, or from a folder that this service serves itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response

from recsys_ray.serving.errors import ApiError

FILES = {"/": ("index.html", "text/html"), "/static/search.css": ("search.css", "text/css"),
         "/static/search.js": ("search.js", "text/javascript"),
         "/static/pictures.js": ("pictures.js", "text/javascript")}
PAGE_PATHS = frozenset(FILES)
IMAGE_HOSTS = "{{ image_hosts }}"       # in the page: origins it may show products' images from
PICTURES = "{{ pictures }}"             # in the page: whether the service answers pictures
OWN_IMAGES = "{{ own_images }}"         # in the page: whether the service has products' images itself
IMAGE_PATH = "/product-images/"
IMAGE_KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
               ".gif": "image/gif", ".avif": "image/avif"}     # none that could hold a script


def page_policy(image_hosts: Sequence[str], own_images: bool = False) -> str:
    """The Content-Security-Policy of the page: this service, and images from `image_hosts`."""
    images = ["data:", *(["'self'"] if own_images else []), *image_hosts]
    return ("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
            f"img-src {' '.join(images)}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


@cache
def static_file(name: str) -> str:
    """One of the page's files."""
    return (files("recsys_ray.serving") / "static" / name).read_text(encoding="utf-8")


def add_page(app: FastAPI, image_hosts: Sequence[str], *, pictures: bool = False, image_folder: Path | None = None
             ) -> None:
    """Serve the page at `/`, its other files below `/static`, and the images of the folder."""
    own_images = image_folder is not None
    headers = {"content-security-policy": page_policy(image_hosts, own_images), "x-content-type-options": "nosniff",
               "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    filled = {IMAGE_HOSTS: " ".join(image_hosts), PICTURES: str(pictures), OWN_IMAGES: str(own_images)}

    def endpoint(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            text = static_file(name)
            for blank, value in filled.items():
                text = text.replace(blank, value)
            return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)

        return answer

    for path, (name, kind) in FILES.items():
        app.add_api_route(path, endpoint(name, kind), include_in_schema=False)
    if image_folder is not None:
        _add_images(app, image_folder.resolve())


def _add_images(app: FastAPI, folder: Path) -> None:
    @app.get(f"{IMAGE_PATH}{{name:path}}", include_in_schema=False)
    async def image(name: str) -> Response:
        found = await asyncio.to_thread(image_file, folder, name)
        if found is None:
            raise ApiError(404, "not_found", "no such image")
        return FileResponse(found, media_type=IMAGE_KINDS[found.suffix.lower()], headers={
            "x-content-type-options": "nosniff", "cache-control": "public, max-age=3600"})


def image_file(folder: Path, name: str) -> Path | None:
    """The image of that name below `folder`, links followed; None for anything else, or anything outside of it."""
    try:
        found = (folder / name).resolve()
        inside = found.is_relative_to(folder) and found.suffix.lower() in IMAGE_KINDS and found.is_file()
    except (OSError, ValueError):       # a name that no file system takes
        return None
    return found if inside else None
