"""Keywords through a server: asked once, resumed, quarantined, and then in the place of the offline extractor's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, Sent, chat_server, honest

from recsys_ray.artifacts import Artifact, ArtifactError
from recsys_ray.data import extract_keywords as shell
from recsys_ray.data.extract_keywords import ExtractKeywordsConfig, extract_keywords
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs

pytestmark = pytest.mark.ray

START, HOUR_MS = 1_500_000_000_000, 3_600_000
LONG = "A mug of stoneware. " + "It keeps tea warm in winter and it stands on every table. " * 8
QUIET = {"progress": False}


def word(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:03d}")


def write_shop(folder: Path) -> dict[str, Any]:
    products = [{"parent_asin": f"P{number}", "title": f"Mug {number}",
                 "description": [LONG if number == 2 else f"short {word(number)} text"]} for number in range(6)]
    reviews = [{"parent_asin": f"P{number % 5}", "asin": "V", "user_id": f"U{number}", "rating": 5.0, "title": "t",
                "text": "love it" if number % 8 == 7 else
                f"Bought for friend{word(number)} to use in season{word(number)} because reason{word(number)} counts",
                "verified_purchase": True, "timestamp": START + number * HOUR_MS, "helpful_vote": 0}
               for number in range(40)]
    for name, rows in (("meta", products), ("reviews", reviews)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": {"format": "amazon_reviews", "products": str(folder / "meta.jsonl"),
                       "reviews": str(folder / "reviews.jsonl")},
            "num_buckets": 2, "split": {"train_end_ms": START + 29 * HOUR_MS, "valid_end_ms": START + 34 * HOUR_MS},
            "ray": QUIET}


@pytest.fixture(scope="module")
def shop(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Artifact]:
    """The configuration of a preparation, and what it gave."""
    folder = tmp_path_factory.mktemp("shop")
    config = write_shop(folder)
    return config, prepare(PrepareConfig.model_validate({**config, "output": folder / "prepared"}))


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def config_for(prepared: Artifact, output: Path, url: str | None, **change: Any) -> ExtractKeywordsConfig:
    llm = None if url is None else {"base_url": url, "model": "m", "timeout_s": 1, "max_retries": 0, "concurrency": 4}
    return ExtractKeywordsConfig.model_validate({
        "prepared": prepared.path.parents[1], "output": output, "llm": llm, "unit_rows": 7, "summary_chars": 60,
        "ray": QUIET, **change})


def rows_of(artifact: Artifact, prefix: str) -> list[dict[str, Any]]:
    return [row for table in artifact.tables(prefix) for row in table.to_pylist()]


def test_every_review_has_its_own_keywords_with_its_product(
    shop: tuple[dict[str, Any], Artifact], server: ChatServer, tmp_path: Path,
) -> None:
    _, prepared = shop
    config = config_for(prepared, tmp_path / "keywords", server.url)
    artifact = extract_keywords(config)
    reviews = {row["review_id"]: row for row in rows_of(prepared, "reviews/")}
    found = rows_of(artifact, "keywords/")
    assert {row["review_id"] for row in found} == set(reviews)
    for row in found:
        said = reviews[row["review_id"]]
        assert row["product_id"] == said["product_id"]
        assert row["split"] == said["split"]
        own = said["text"].split()[2].removeprefix("friend") if "friend" in said["text"] else None
        assert row["keywords"] == ([] if own is None else [f"friend{own}", f"season{own}", f"reason{own}"])
        assert row["who"] == row["keywords"][:1]
    summaries = rows_of(artifact, "summaries/")
    assert [row["product_id"] for row in summaries] == ["P2"]
    assert 0 < len(summaries[0]["summary"]) <= 60
    counts = artifact.manifest.facts["counts"]
    assert (counts["asked"], counts["too short to ask"], counts["reviews with keywords"]) == (36, 5, 35)
    assert len(server.requests) == 36
    assert extract_keywords(config).manifest.version == artifact.manifest.version
    wider = extract_keywords(config.replace(min_words=1))       # other options: what is known is not asked again
    assert wider.manifest.facts["counts"]["answers kept"] >= 36
    assert len(server.requests) == 36


def test_what_cannot_be_used_is_set_aside_and_what_was_not_answered_is_asked_again(
    shop: tuple[dict[str, Any], Artifact], server: ChatServer, tmp_path: Path,
) -> None:
    def poor(sent: Sent, _: int) -> Reply:
        text = sent.get("review", "")
        if word(1) in text:
            return Reply("I would rather not")
        if word(2) in text:
            return Reply(status=500)
        if word(3) in text:
            return Reply(json.dumps({"id": sent["id"], "who": ["somebody else"], "when": [], "why": []}))
        return honest(sent)

    server.behave = poor
    config = config_for(shop[1], tmp_path / "keywords", server.url)
    first = extract_keywords(config)
    aside = {row["reason"]: row for row in rows_of(first, "quarantine/")}
    assert set(aside) == {"no JSON object in the answer", "none of the phrases is about the text",
                          "no answer after 0 retries: InternalServerError"}
    assert word(1) in aside["no JSON object in the answer"]["row"]
    assert len(rows_of(first, "keywords/")) == 40 - 3
    assert first.manifest.facts["counts"]["without an answer"] == 1
    server.behave = lambda sent, _: honest(sent)
    before = len(server.requests)
    second = extract_keywords(config)       # the same command
    assert second.manifest.version != first.manifest.version
    assert len(server.requests) == before + 3
    assert len(rows_of(second, "keywords/")) == 40


def test_a_server_that_is_down_ends_the_run_and_the_next_goes_on(
    shop: tuple[dict[str, Any], Artifact], server: ChatServer, tmp_path: Path,
) -> None:
    server.behave = lambda sent, number: honest(sent) if number < 12 else Reply(status=503)
    config = config_for(shop[1], tmp_path / "keywords", server.url)
    with pytest.raises(ValueError, match="run the job again"):
        extract_keywords(config)
    assert not (tmp_path / "keywords/CURRENT").exists()
    server.behave = lambda sent, _: honest(sent)
    before = len(server.requests)
    artifact = extract_keywords(config)
    assert len(server.requests) - before <= 36 - 7      # at least one whole unit was kept
    assert not list(artifact.path.rglob("scratch"))
    silent = artifact.manifest.facts["counts"]["without an answer"]     # the few of a unit that was mostly answered
    assert len(rows_of(artifact, "keywords/") + rows_of(artifact, "summaries/")) == 41 - silent
    assert len(rows_of(extract_keywords(config), "keywords/")) == 40


def test_a_refused_key_ends_the_run_with_the_mend(
    shop: tuple[dict[str, Any], Artifact], server: ChatServer, tmp_path: Path,
) -> None:
    server.behave = lambda *_: Reply(status=401)
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY"):
        extract_keywords(config_for(shop[1], tmp_path / "keywords", server.url))


def test_prepared_texts_pairs_and_queries_take_the_stored_keywords(
    shop: tuple[dict[str, Any], Artifact], server: ChatServer, tmp_path: Path,
) -> None:
    config, prepared = shop
    extract_keywords(config_for(prepared, tmp_path / "keywords", server.url))
    told = PrepareConfig.model_validate({**config, "output": tmp_path / "prepared", "keywords": tmp_path / "keywords"})
    again = prepare(told)
    assert again.manifest.parents["keywords"].startswith("keywords/")
    assert prepare(told).manifest.version == again.manifest.version
    texts = {row["product_id"]: row for row in rows_of(again, "product_text/")}
    assert f"friend{word(0)}" in texts["P0"]["keywords"]
    assert "bought" not in texts["P0"]["text"].lower()      # what the offline extractor would have kept
    summary = next(row["summary"] for row in rows_of(again, "products/") if row["product_id"] == "P2")
    assert f"[Description Summary] {summary}" in texts["P2"]["text"]
    pairs = make_pairs(MakePairsConfig.model_validate({"prepared": tmp_path / "prepared", "output": tmp_path / "pairs",
                                                       "query_type": "keywords", "ray": QUIET}))
    rows = rows_of(pairs, "pairs/train/")
    assert len(rows) == 27      # of thirty train reviews three say nothing
    for row in rows:
        friend, season, reason = row["query"].split()
        assert friend.removeprefix("friend") == season.removeprefix("season") == reason.removeprefix("reason")
        assert friend not in row["text"]


def test_the_offline_extractor_in_its_artefact_gives_the_same_shop(
    shop: tuple[dict[str, Any], Artifact], tmp_path: Path,
) -> None:
    config, prepared = shop
    stored = extract_keywords(config_for(prepared, tmp_path / "keywords", None, min_words=1))
    assert stored.manifest.facts["extractor"] == "offline"
    again = prepare(PrepareConfig.model_validate({**config, "output": tmp_path / "prepared",
                                                  "keywords": tmp_path / "keywords"}))
    assert again.manifest.fingerprint != prepared.manifest.fingerprint
    for prefix in ("product_text/", "products/", "product_stats/"):
        assert rows_of(again, prefix) == rows_of(prepared, prefix)
    assert all(row["keywords"] is not None for row in rows_of(again, "reviews/"))
    assert all(row["keywords"] is None for row in rows_of(prepared, "reviews/"))


def test_reviews_without_stored_keywords_are_counted_not_guessed(
    shop: tuple[dict[str, Any], Artifact], tmp_path: Path,
) -> None:
    config, prepared = shop
    few = extract_keywords(config_for(prepared, tmp_path / "keywords", None, splits=("train",),
                                      max_reviews_per_product=2))
    assert len(rows_of(few, "keywords/")) == 2 * 5
    again = prepare(PrepareConfig.model_validate({**config, "output": tmp_path / "prepared",
                                                  "keywords": tmp_path / "keywords"}))
    assert again.manifest.facts["counts"]["values/reviews without stored keywords"] == 30
    assert sum(bool(row["keywords"]) for row in rows_of(again, "reviews/")) <= 10


def test_keywords_of_other_buckets_are_refused(shop: tuple[dict[str, Any], Artifact], tmp_path: Path) -> None:
    config, prepared = shop
    extract_keywords(config_for(prepared, tmp_path / "keywords", None))
    with pytest.raises(ArtifactError, match="2 buckets where the shop has 3"):
        prepare(PrepareConfig.model_validate({**config, "num_buckets": 3, "output": tmp_path / "prepared",
                                              "keywords": tmp_path / "keywords"}))
    assert shell.KIND == "keywords"
