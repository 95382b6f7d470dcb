"""The search page: nothing from elsewhere, and what it does in a real browser."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi import FastAPI
from small_pictures import build_small_hybrid, photograph, pictured
from small_shop import LIMITS, Parts, client, local_app, open_parts, small_reranker

from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.serving.config import EventsConfig, ServeConfig
from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.page import FILES, page_policy, static_file
from recsys_ray.serving.routes import create_api

KEY = "correct horse battery staple"


# --- without a browser ----------------------------------------------------------------------------
def test_the_page_names_nothing_elsewhere_and_has_no_code_in_its_markup(small_index: Path) -> None:
    app = local_app(open_parts(small_index))

    async def get(path: str) -> Any:
        async with client(app) as http:
            return await http.get(path)

    for path, (_, kind) in FILES.items():
        answer = asyncio.run(get(path))
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"] == page_policy(())
        assert not re.findall(r"(?:https?:)?//[a-z]|@import|url\(|innerHTML|eval\(", answer.text), path
        assert "{{" not in answer.text
    page = static_file("index.html")
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {"data:,", "static/search.css", "static/search.js",
                                                                "docs"}
    assert not re.findall(r"\son\w+=|style=|<script>", page)
    assert "script-src 'self';" in page_policy(())
    assert "unsafe" not in page_policy(())


def test_images_come_from_configured_places_only(small_index: Path) -> None:
    assert "img-src data: https://img.shop.example;" in page_policy(["https://img.shop.example"])
    for bad in ("*", "https://a.example; script-src *", "javascript:", "https://a.example/path", "https:"):
        with pytest.raises(ValueError, match="image_hosts"):
            ServeConfig(index=small_index, image_hosts=(bad,))


def test_images_of_the_own_folder_and_nothing_else_are_served(small_index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "public"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "red sofa #1.jpg").write_bytes(photograph("red"))
    (folder / "catalogue.jsonl.gz").write_bytes(b"secret")
    (folder / "script.svg").write_text("<svg/>")
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    app = create_api(open_parts(small_index).gateway(), LIMITS, digest, image_folder=folder)

    async def get(path: str) -> Any:
        async with client(app) as http:
            return await http.get(path)

    found = asyncio.run(get("/product-images/images/red%20sofa%20%231.jpg"))
    assert (found.status_code, found.headers["content-type"]) == (200, "image/jpeg")    # without the key
    assert found.content == photograph("red")
    assert "img-src data: 'self';" in asyncio.run(get("/")).headers["content-security-policy"]
    for name in ("catalogue.jsonl.gz", "script.svg", "link.jpg", "..%2foutside.jpg", "%2e%2e/outside.jpg", "images", "",
                 "%00.jpg", "a" * 5000 + ".jpg", str(tmp_path / "outside.jpg"), "gone.jpg"):
        assert asyncio.run(get(f"/product-images/{name}")).status_code == 404, name
    plain = local_app(open_parts(small_index))
    assert not [one for one in plain.routes if "product-images" in getattr(one, "path", "")]


# --- in a browser ---------------------------------------------------------------------------------
@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application behind a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium found; install Debian's chromium or set CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def parts(small_index: Path, tmp_path_factory: pytest.TempPathFactory, tiny_pair_model: Callable[..., Path]) -> Parts:
    """A service of all stages that keeps events."""
    found = open_parts(small_index)
    cross = CrossEncoderConfig(model=str(tiny_pair_model()), max_tokens=32, device="cpu", dtype="float32")
    found.reranker = small_reranker(tmp_path_factory.mktemp("trees"), cross)
    found.events = EventLog(EventsConfig(directory=tmp_path_factory.mktemp("events"), flush_s=3600))
    return found


@pytest.fixture(scope="module")
def url(parts: Parts) -> Iterator[str]:
    with running(local_app(parts)) as found:
        yield found


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page in a fresh profile; at the end, that it asked nobody else and broke nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    requests, complaints = list[str](), list[str]()
    found.on("request", lambda request: requests.append(request.url))
    found.on("console", lambda message: complaints.append(message.text)   # a refused request is none
             if message.type == "error" and "Failed to load resource" not in message.text else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.goto(url)
    yield found
    context.close()
    assert [one for one in requests if not one.startswith((url, "data:"))] == []
    assert complaints == []


def ask(page: Any, query: str) -> None:
    page.keyboard.press("/")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")


def until(page: Any, condition: str) -> None:
    """Wait until the script expression holds; the page's policy does not let it wait by itself."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def titles(page: Any, where: str = "") -> list[str]:
    return [re.sub(r"^\d+ ", "", one) for one in page.locator(f"{where} .card .title").all_inner_texts()]


def test_a_question_is_answered_with_why_and_how_long(page: Any) -> None:
    page.locator("#query").blur()
    ask(page, "oak table")
    assert len(titles(page)) == 24
    assert page.locator(".legend span").all_inner_texts()[0].startswith("encode ")
    assert page.locator(".card .gist").first.inner_text()
    assert page.locator(".card .picture img").count() == 0
    assert "oak+table" in page.url
    assert page.locator("#status").inner_text().endswith("products ranked")


def test_the_keyboard_is_enough(page: Any, parts: Parts) -> None:
    page.locator("#query").blur()
    ask(page, "red sofa")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.dataset.id"
    first = page.evaluate(focused)
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    assert second not in (None, first)
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == first
    page.keyboard.press("Enter")
    panel = page.locator(".card .why")
    assert "fused" in panel.inner_text()
    assert "What moved it" in panel.inner_text()
    page.keyboard.press("Escape")
    assert panel.count() == 0
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('.card').length === 0")
    until(page, "!document.getElementById('welcome').hidden")
    assert parts.events is not None
    parts.events.flush()
    events = pq.read_table(parts.events.directory / "events").to_pylist()
    assert (first, "click") in {(one["product_id"], one["kind"]) for one in events}


def test_side_by_side_shows_three_systems_and_the_same_product_in_each(page: Any) -> None:
    page.locator("#query").blur()
    ask(page, "oak table")
    page.locator("text=Side by side").first.click()
    page.wait_for_selector(".compare .system:nth-child(3)")
    columns = [titles(page, f".system:nth-child({number})") for number in (1, 2, 3)]
    assert all(len(one) == 10 for one in columns)
    assert columns[0] != columns[2]
    assert page.locator(".system h2").all_inner_texts() == ["Words alone", "Retrieval", "Full graph"]
    assert page.locator(".system:nth-child(3) .legend").inner_text().count("ms") == 6
    page.locator(".system:nth-child(1) .card").first.hover()
    assert page.locator(".card.same").count() >= 1
    assert "mode=compare" in page.url
    page.reload()
    page.wait_for_selector(".compare .system:nth-child(3)")
    assert titles(page, ".system:nth-child(1)") == columns[0]


def test_filters_and_order_hold_and_can_be_taken_off(page: Any) -> None:
    page.locator("#query").blur()
    ask(page, "chair")
    page.locator("#category").select_option("seating")
    page.locator("#sort").select_option("price_asc")
    page.locator("#price_max").fill("60")
    page.locator("#price_max").press("Enter")
    until(page, "[...document.querySelectorAll('.price')].length > 2 && "
                "[...document.querySelectorAll('.price')].every(one => Number(one.textContent) <= 60)")
    prices = [float(one) for one in page.locator(".price").all_inner_texts()]
    assert prices == sorted(prices)
    assert "category=seating" in page.url
    page.locator("#clear").click()
    until(page, "[...document.querySelectorAll('.price')].some(one => Number(one.textContent) > 60)")
    assert "category" not in page.url


def test_a_concern_is_chosen_and_an_answer_says_what_it_rests_on(page: Any) -> None:
    page.locator("#query").blur()
    ask(page, "red sofa")
    page.locator("#concern").select_option("acne")
    until(page, "document.querySelectorAll('.card').length > 0 && document.querySelectorAll('.card').length <= 12")
    assert "concern=acne" in page.url
    page.locator(".card").first.click()
    assert "acne (0.9) because of salicylic acid, zinc pca" in page.locator(".card .why").inner_text()
    page.locator("#clear").click()


def test_more_results_come_when_asked_for(page: Any) -> None:
    page.locator("#query").blur()
    ask(page, "red")
    before = titles(page)
    page.locator(".more").click()
    until(page, f"document.querySelectorAll('.card').length > {len(before)}")
    after = titles(page)
    assert after[:len(before)] == before
    assert len(set(after)) == len(after)


def test_what_is_wrong_is_said(page: Any, url: str) -> None:
    page.locator("#query").blur()
    ask(page, "sofa")
    page.locator("#price_min").fill("9")
    page.locator("#price_max").fill("3")
    with page.expect_response("**/v1/search"):
        page.locator("#price_max").press("Enter")
    page.wait_for_selector("#status.error")
    assert "price_min is larger than price_max" in page.locator("#status").inner_text()


def test_a_key_is_asked_for(browser: Any, small_index: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with running(create_api(open_parts(small_index).gateway(), LIMITS, digest)) as url:
        page = browser.new_page()
        page.goto(f"{url}/?q=sofa")
        page.wait_for_selector("#key:visible")
        assert page.locator(".card").count() == 0
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Enter")
        page.wait_for_selector(".card")
        assert not page.locator("#key").is_visible()
        page.close()


def test_a_title_is_text_whatever_it_says(browser: Any, parts: Parts) -> None:
    wicked = "<img src=x onerror=alert(1)>"
    gateway = parts.gateway()
    search = gateway.search

    async def changed(*arguments: Any) -> Any:
        answer = await search(*arguments)
        return answer.model_copy(update={"items": [
            answer.items[0].model_copy(update={"title": wicked, "image_url": "https://elsewhere.example/a.png"})]})

    gateway.search = changed  # type: ignore[method-assign]
    with running(create_api(gateway, LIMITS)) as url:
        page = browser.new_page()
        requests = list[str]()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{url}/?q=sofa")
        page.wait_for_selector(".card")
        assert titles(page) == [wicked]
        assert page.locator(".card img").count() == 0
        assert all(one.startswith((url, "data:")) for one in requests)
        page.close()


def test_cards_show_images_of_the_own_folder(browser: Any, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(photograph("blue"))
    gateway = parts.gateway()
    search = gateway.search

    async def changed(*arguments: Any) -> Any:
        answer = await search(*arguments)
        urls = ["a b.png", "gone.png", "https://elsewhere.example/a.png", "/static/a.png"]
        return answer.model_copy(update={"items": [one.model_copy(update={"image_url": url})
                                                   for one, url in zip(answer.items, urls, strict=False)]})

    gateway.search = changed  # type: ignore[method-assign]
    with running(create_api(gateway, LIMITS, image_folder=tmp_path)) as url:
        page = browser.new_page()
        page.goto(f"{url}/?q=sofa")
        until(page, "document.querySelectorAll('.card').length === 4 && "
                    "[...document.querySelectorAll('.card img')].filter(one => one.naturalWidth > 0).length === 1")
        until(page, "document.querySelectorAll('.card img').length === 1")      # what is gone is drawn instead
        page.close()


def test_a_picture_is_asked_with_and_products_show_what_looks_like_them(browser: Any, small_index: Path, tmp_path: Path
                                                                        ) -> None:
    (tmp_path / "blue.png").write_bytes(photograph("blue", (900, 700)))
    with running(pictured(open_parts(small_index), build_small_hybrid(tmp_path))) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#picture").set_input_files(tmp_path / "blue.png")
        page.wait_for_selector(".card")
        assert all("blue" in one for one in titles(page)[:15])
        assert page.locator("#preview").get_attribute("src").startswith("data:image/jpeg")
        page.locator("#query").blur()
        ask(page, "mirror")
        until(page, "document.querySelector('.card .title').textContent.includes('blue mirror')")
        page.locator("#drop").click()
        until(page, "document.getElementById('asked').hidden && [...document.querySelectorAll('.card .title')]"
                    ".slice(0, 10).some(one => !one.textContent.includes('blue'))")
        page.locator(".card:has-text('red') .alike").first.press("Enter")
        until(page, "document.getElementById('asked_text').textContent.startsWith('looks like red')")
        until(page, "[...document.querySelectorAll('.card .title')].slice(0, 10).every(one => "
                    "one.textContent.includes('red'))")
        assert not page.locator("#filters").is_visible()
        page.close()
