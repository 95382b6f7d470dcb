"""What LightGBM and a cross-encoder add to fused retrieval, on a shop whose truth is known and on one without any.

    python benchmarks/gbdt.py --config configs/bench_gbdt/full.yaml

Reviews are queries, their products the answers. The cross-encoder learns from train reviews (T1), the trees from
the earlier part of the valid ones (T2) and stop by the later part (T3), the weight of the fusion is chosen on both,
and everything is measured once, on test reviews (T4): all of them, also those whose product was not retrieved. Each
stage of a shop is a cell with a file of its own; a rerun makes only the missing ones.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import is_current, make_missing, merged, read_cell, write_cell
from gbdt_table import summary
from pair_lists import PairListsConfig, pair_lists, ranks_of_the_relevant, seconds

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config, main
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.negatives import NegativesConfig
from recsys_ray.data.pairs import PairsConfig
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.evaluation.metrics import MetricSpec, rank_judgments, score
from recsys_ray.evaluation.results import write_result
from recsys_ray.flow import FlowConfig, ensure_index
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.asked_lists import Asked, Labelled, as_lists, asked_lists, query_times, with_cross
from recsys_ray.ranking.features import FAMILIES, FEATURES
from recsys_ray.ranking.gbdt import GbdtConfig, GbdtRanker, fit, model_text
from recsys_ray.ranking.gbdt_workers import load_lists, save_lists
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.ranking.train_gbdt import fitting_part
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.lexical import LexicalConfig, LexicalStatistics
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.retrieval.query_sets import QuerySet, ReviewQueries, review_query_set
from recsys_ray.retrieval.retriever import Retriever, RetrieverConfig, refuse_candidates
from recsys_ray.retrieval.segments import LEXICON, Index, open_index
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig
from recsys_ray.training.cross_encoder_run import finetune_cross_encoder

log = logging.getLogger(__name__)

CROSS, LISTS, OURS, LIGHT = "cross", "lists", "both", "lightgbm"
CHOSEN_BY = MetricSpec.parse("nDCG@5")
SPLITS = ("valid", "test")


class JobConfig(Config):
    """Shops and sizes."""

    shops: dict[str, DemoShopConfig]
    null_shop: str                                  # the one where nothing may be gained
    work: Path = Path("runs/bench_gbdt")
    cells: Path = Path("benchmarks/results/gbdt")
    result: Path = Path("benchmarks/results/gbdt.json")
    num_buckets: int = 8
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu", max_tokens=64)
    queries: dict[str, int] = Field(default_factory=lambda: {"valid": 2000, "test": 1500})
    depth: int = Field(default=100, ge=100)         # candidates of each retriever
    kept: int = Field(default=100, ge=1)            # of them together, that are reranked
    weight_step: float = Field(default=0.1, gt=0, le=0.5)       # of the fusion weights tried
    pairs: PairsConfig = PairsConfig()              # of train reviews, for the cross-encoder
    negatives: NegativesConfig = NegativesConfig()
    finetune: dict[str, Any] = Field(default_factory=dict)      # keys of FinetuneCrossEncoderConfig
    cpu_seconds: dict[str, float]                   # of the cross-encoder's training, by shop
    cross_tokens: int = Field(default=96, ge=8)     # of query and text together
    cross_top: int = Field(default=20, ge=1)
    fit_share: float = Field(default=0.8, gt=0, lt=1)
    without_cross: float = Field(default=0.1, ge=0, lt=1)
    trees: GbdtConfig = GbdtConfig()
    ablated: tuple[str, ...] = tuple(FAMILIES)      # families left out, one at a time
    seed: int = 7
    parallel: int = Field(default=2, ge=1)
    cell: str | None = None                         # "shop/stage": this one only (what a worker process gets)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.null_shop not in self.shops or set(self.cpu_seconds) != set(self.shops):
            raise ValueError("null_shop is one of shops, and cpu_seconds has a number for each of them")
        return self

    def variants(self, shop: str) -> dict[str, GbdtConfig]:
        """The trees of a shop by name; the families are taken out of the first shop's alone."""
        found = {OURS: self.trees, LIGHT: self.trees.replace(without=("cross",))}
        if shop != self.null_shop:
            found |= {f"without {name}": self.trees.replace(without=(name,), start=0 if name == "fused" else
                                                            self.trees.start) for name in self.ablated if name != CROSS}
        return found


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, *config.cell.split("/"))
        return None
    stages = ([CROSS], [LISTS], ["*"])
    for names in stages:
        cells = [f"{shop}/{name}" for shop in config.shops
                 for name in (config.variants(shop) if names == ["*"] else names)]
        if names == [CROSS]:
            for shop in config.shops:
                if not is_made(config, f"{shop}/{CROSS}"):
                    _ready(config, shop)
        make_missing(__file__, cells, lambda name: is_made(config, name), config.work / "logs", config.parallel)
    found = {shop: {name: read_cell(cell_file(config, f"{shop}/{name}"))
                    for name in (CROSS, LISTS, *config.variants(shop))} for shop in config.shops}
    headline, tables = summary(found, config.null_shop, config.seed)
    command = f"python benchmarks/gbdt.py {' '.join(sys.argv[1:])}"
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    return write_result(config.result, command=command, headline=headline, tables=tables, seeds=[config.seed])


# --- cells ----------------------------------------------------------------------------------------
def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-').replace(' ', '-')}.json"


def is_made(config: JobConfig, name: str) -> bool:
    """Whether the cell is there and current, with what it left below `work`, unless all that needs that is made too."""
    shop, stage = name.split("/")
    work = config.work / shop
    if not is_current(cell_file(config, name), _identity(config, shop, stage)):
        return False
    if stage == CROSS:
        return (work / "cross-encoder" / "CURRENT").is_file() or is_made(config, f"{shop}/{LISTS}")
    return stage != LISTS or all((work / f"{split}.npz").is_file() for split in SPLITS) or all(
        is_made(config, f"{shop}/{variant}") for variant in config.variants(shop))


def _identity(config: JobConfig, shop: str, stage: str) -> dict[str, Any]:
    """What a cell's figures depend on; a file with another one is made again."""
    known: dict[str, Any] = {
        "shop": config.shops[shop].identity(), "generator": [GENERATOR_VERSION, generator_hash()],
        "encoder": config.encoder.model_dump(mode="json"), "stage": stage, "seed": config.seed,
        **config.model_dump(mode="json", include={"pairs", "negatives", "finetune", "cross_tokens", "num_buckets"}),
        "cpu_seconds": config.cpu_seconds[shop]}
    if stage != CROSS:
        known |= {"features": FEATURES, **config.model_dump(mode="json", include={
            "queries", "depth", "kept", "weight_step", "cross_top", "fit_share", "without_cross"})}
    if stage not in (CROSS, LISTS):
        known |= {"trees": config.variants(shop)[stage].model_dump(mode="json")}
    return known


def _make_cell(config: JobConfig, shop: str, stage: str) -> None:
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    make = {CROSS: _train_cross, LISTS: _make_lists}.get(stage)
    document = _grow(config, shop, stage) if make is None else make(config, shop)
    write_cell(cell_file(config, f"{shop}/{stage}"), _identity(config, shop, stage),
               {"cell": [shop, stage], "cpu_seconds": round(time.process_time() - started, 1), **document})


# --- the shop and its cross-encoder ---------------------------------------------------------------
def _flow(config: JobConfig, shop: str) -> FlowConfig:
    work = config.work / shop
    public = work / "shop" / "public"
    return FlowConfig.model_validate({
        "work_dir": work, "shop": config.shops[shop].replace(output=work / "shop"),
        "prepare": {"source": {"format": "amazon_reviews", "products": str(public / "meta_Demo_Shop.jsonl.gz"),
                               "reviews": str(public / "Demo_Shop.jsonl.gz")}, "num_buckets": config.num_buckets},
        "embed": {"encoder": config.encoder.model_dump()}, "index": {}})


def _ready(config: JobConfig, shop: str) -> None:
    """The shop with its index, and the lists that its cross-encoder learns from."""
    flow, work = _flow(config, shop), config.work / shop
    with connected(RayConfig(no_progress_timeout_s=900)):
        assert flow.shop is not None
        make_demo_shop(flow.shop)
        ensure_index(flow)
        make_pairs(MakePairsConfig.model_validate({**config.pairs.model_dump(), "prepared": flow.prepare.output,
                                                   "output": work / "pairs"}))
        mine_negatives(MineNegativesConfig.model_validate({
            **config.negatives.model_dump(), "pairs": work / "pairs", "prepared": flow.prepare.output,
            "index": flow.index.output, "output": work / "mined", "encoder": config.encoder.model_dump()}))
    pair_lists(PairListsConfig(pairs=work / "mined", output=work / "pair-lists", seed=config.seed))


def _train_cross(config: JobConfig, shop: str) -> dict[str, Any]:
    work = config.work / shop
    artifact = finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate(merged(config.finetune, {
        "pairs": work / "pair-lists", "output": work / "cross-encoder", "max_tokens": config.cross_tokens,
        "max_cpu_seconds": config.cpu_seconds[shop], "seed": config.seed, "workers": {"count": 0, "threads": 1}})))
    return {"training": dict(artifact.manifest.facts)}


def _reranker(config: JobConfig, shop: str) -> Reranker:
    folder = open_artifact(config.work / shop / "cross-encoder", "cross_encoder").path / "cross_encoder"
    cross = CrossEncoderConfig(model=str(folder), device="cpu", max_tokens=config.cross_tokens)
    return Reranker(RerankConfig(cross_encoder=cross, cross_top=config.cross_top, depth=config.kept, one_title=False))


# --- lists ----------------------------------------------------------------------------------------
def _make_lists(config: JobConfig, shop: str) -> dict[str, Any]:
    """Candidates by the best fusion, with cross scores and features, kept below `work`; the ranks of what needs no
    trees."""
    flow = _flow(config, shop)
    index, encoder = open_index(flow.index.output), build_text_encoder(config.encoder)
    prepared = open_artifact(flow.prepare.output, "prepared")
    asked, deep, clock = {}, {}, [time.process_time()]
    for split in SPLITS:
        source = ReviewQueries(prepared=flow.prepare.output, split=split, max_queries=config.queries[split],
                               seed=config.seed)
        asked[split] = review_query_set(prepared.tables(f"reviews/{split}/"), source,
                                        LexicalStatistics.load(index.artifact.file(LEXICON)), LexicalConfig())
        retriever = Retriever(encoder, index, RetrieverConfig(depth=config.depth))
        queries = asked[split].queries
        deep[split] = retriever.retrieve(queries["query_id"].to_pylist(), queries["query"].to_pylist(),
                                         2 * config.depth)
    count = sum(one.queries.num_rows for one in asked.values())
    clock.append(time.process_time())
    fusion, curve = _best_fusion(config, asked["valid"], deep["valid"])
    document: dict[str, Any] = {"fusion": fusion.model_dump(mode="json"), "curve": curve,
                                "products": index.live_rows, "cpu_ms_a_query": {"retrieve": seconds(*clock, count)}}
    for split in SPLITS:
        document[split] = _of_split(config, shop, index, asked[split], refuse_candidates(
            deep[split], fusion, config.kept), split, document["cpu_ms_a_query"])
    others = {"bm25": FusionConfig(dense_weight=0.0), "dense": FusionConfig(dense_weight=1.0),
              "default fusion": FusionConfig()}
    document["test"]["ranks"] |= {name: _retrieved_ranks(asked["test"], refuse_candidates(
        deep["test"], one, config.kept), document["test"]["queries"]) for name, one in others.items()}
    return document


def _best_fusion(config: JobConfig, asked: QuerySet, deep: pa.Table) -> tuple[FusionConfig, list[dict[str, Any]]]:
    """Of convex and reciprocal-rank fusions with every weight the best on the valid queries."""
    curve = []
    for method in ("convex", "rrf"):
        for weight in np.round(np.arange(0, 1 + config.weight_step / 2, config.weight_step), 4):
            fusion = FusionConfig(method=method, dense_weight=float(weight))     # type: ignore[arg-type]
            ranked = rank_judgments(asked.judgments, [refuse_candidates(deep, fusion, config.kept)])
            curve.append({"method": method, "dense_weight": float(weight),
                          "ndcg5": float(np.nanmean(score(ranked, CHOSEN_BY)))})
    best = max(curve, key=lambda one: one["ndcg5"])
    return FusionConfig(method=best["method"], dense_weight=best["dense_weight"]), curve


def _of_split(config: JobConfig, shop: str, index: Index, asked: QuerySet, candidates: pa.Table, split: str,
              cost: dict[str, float]) -> dict[str, Any]:
    flow = _flow(config, shop)
    prepared = open_artifact(flow.prepare.output, "prepared")
    texts = dict(zip(asked.queries["query_id"].to_pylist(), asked.queries["query"].to_pylist(), strict=True))
    times, clock = query_times(prepared, list(texts)), [time.process_time()]
    plain = list(asked_lists(candidates, texts, index, config.kept, prepared, times))
    clock.append(time.process_time())
    lists = list(with_cross(plain, _reranker(config, shop)))
    clock.append(time.process_time())
    assert asked.judgments is not None
    labelled = Labelled.of(asked.judgments)
    table, _, names = as_lists(lists, labelled, without_cross=config.without_cross if split == "valid" else 0.0,
                               seed=config.seed)
    clock.append(time.process_time())
    for at, name in enumerate(("rows and statistics", "cross-encoder", "features")):
        cost[name] = seconds(clock[at], clock[at + 1], len(lists))
    save_lists(config.work / shop / f"{split}.npz", table)
    np.savez(config.work / shop / f"{split}-rows.npz",
             row_ids=np.concatenate([one.candidates.row_ids for one in lists]))
    every = [*names, *sorted(set(texts) - set(names))]      # those without any answer last: they have rank 0
    users = _users(config, shop, split)
    products = dict(zip(asked.queries["query_id"].to_pylist(), asked.queries["unit_id"].to_pylist(), strict=True))
    return {"queries": every, "earlier": fitting_part(names, times, config.fit_share, config.seed).tolist(),
            "products": np.unique([products[one] for one in every], return_inverse=True)[1].tolist(),
            "users": np.unique([users[one] for one in every], return_inverse=True)[1].tolist(),
            "ranks": {"fused": _ranks(lists, table.labels, lambda one: one.candidates.fused),
                      "cross-encoder": _ranks(lists, table.labels, _by_cross)}}


def _by_cross(one: Asked) -> np.ndarray:
    """Scores that order a list as the reranker does with the cross-encoder alone."""
    order = Reranker(RerankConfig(one_title=False)).order(one.query, one.candidates, one.cross)
    scores = np.empty(len(order.places))
    scores[order.places] = -np.arange(len(order.places))
    return scores


def _ranks(lists: Sequence[Asked], labels: np.ndarray, scores: Any) -> list[int]:
    sizes = np.array([len(one.product_ids) for one in lists])
    return ranks_of_the_relevant(np.concatenate([scores(one) for one in lists]), labels,
                                 np.concatenate([one.candidates.row_ids for one in lists]), sizes)


def _retrieved_ranks(asked: QuerySet, candidates: pa.Table, query_ids: Sequence[str]) -> list[int]:
    assert asked.judgments is not None
    return [int(one) for one in rank_judgments(asked.judgments, [candidates], query_ids).rank]


def _users(config: JobConfig, shop: str, split: str) -> dict[str, str]:
    prepared = open_artifact(_flow(config, shop).prepare.output, "prepared")
    reviews = pa.concat_tables(prepared.tables(f"reviews/{split}/", ["review_id", "user_id"]))
    return dict(zip(reviews["review_id"].to_pylist(), map(str, reviews["user_id"].to_pylist()), strict=True))


# --- trees ----------------------------------------------------------------------------------------
def _grow(config: JobConfig, shop: str, variant: str) -> dict[str, Any]:
    trees, work = config.variants(shop)[variant], config.work / shop
    known = read_cell(cell_file(config, f"{shop}/{LISTS}"))
    lists, test = load_lists(work / "valid.npz"), load_lists(work / "test.npz")
    earlier = np.array(known["valid"]["earlier"], dtype=bool)
    fitted = fit(lists.take(earlier), lists.take(~earlier), trees, trees.label_gain or (0.0, 1.0))
    ranker = GbdtRanker.of(model_text(fitted), None, {}, trees.start)
    with np.load(work / "test-rows.npz", allow_pickle=False) as arrays:
        row_ids = arrays["row_ids"]
    started = time.process_time()
    ranks = {variant: ranks_of_the_relevant(ranker.score(test.features), test.labels, row_ids, test.sizes)}
    cost = seconds(started, time.process_time(), len(test.sizes))
    if variant == OURS:     # the same trees when the cross-encoder is late
        late = test.features.copy()
        late[:, [FEATURES.index(name) for name in FAMILIES[CROSS]]] = np.nan
        ranks["both, cross-encoder late"] = ranks_of_the_relevant(ranker.score(late), test.labels, row_ids, test.sizes)
    return {"rounds": fitted.rounds, "stop_ndcg": fitted.stop_ndcg, "importance": ranker.importance(), "ranks": ranks,
            "cpu_ms_a_query": cost}


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
