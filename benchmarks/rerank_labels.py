"""Does reranking help on human labels? Nested cross-validation over the queries of a judged catalogue.

    python benchmarks/rerank_labels.py --config configs/bench_rerank_labels/esci.yaml

Every query is reported once, by models that were neither trained nor chosen with it. Of the queries of the other
folds each half trains a cross-encoder that scores the other half, so the trees learn from scores of models that
had not seen the query; a reported query gets the mean of both. All cross-encoders start from one that learned from the
products themselves and knows no query. Each stage is a cell with a file of its own; a rerun makes the missing ones.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import is_current, make_missing, merged, read_cell, write_cell
from judged_answers import Problem
from pair_lists import PairListsConfig, pair_lists
from pair_mix import MixConfig, Part, mix_pairs
from rerank_pool import Pool, asked_of, judged_lists, load_pools, make_pools, save_pools
from rerank_table import summary
from retriever_ranks import Catalogue, read_catalogue

from recsys_ray.artifacts import find_artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.judged_pairs import query_folds
from recsys_ray.data.negatives import NegativesConfig
from recsys_ray.data.pairs import PairsConfig
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.evaluation.judgments import Counts, TableJudgments, merge_duplicates, read_judgments
from recsys_ray.evaluation.results import write_result
from recsys_ray.flow import FlowConfig, ensure_index
from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.ranking.asked_lists import Labelled, as_lists, reranked, retrieved
from recsys_ray.ranking.features import FEATURES
from recsys_ray.ranking.gbdt import GbdtConfig, GbdtRanker, fit, model_text
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.retrieval.query_sets import TableQueries, table_query_set
from recsys_ray.retrieval.segments import Index, open_index
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig
from recsys_ray.training.cross_encoder_run import finetune_cross_encoder

log = logging.getLogger(__name__)

POOL, START = "pool", "start"       # cells that know no judged query: what is reranked, what cross-encoders start from
HALVES = 2
STOP_IN = 5                         # of the queries fitted to, one of so many stops the rounds, or a training
WHOLE, JUDGED = "whole catalogue", "judged only"


class JobConfig(Config):
    """Which catalogue and labels, and how much is trained."""

    flow: FlowConfig
    queries: TableQueries
    judgments: TableJudgments
    relevant_gain: float = Field(default=1.0, gt=0)
    work: Path
    cells: Path
    result: Path
    folds: int = Field(default=3, ge=2)             # reported once each
    depth: int = Field(default=100, ge=100)         # products of each retriever
    kept: int = Field(default=100, ge=10)           # of them together, that are reranked
    weight_step: float = Field(default=0.05, gt=0, le=0.5)      # of the fusion weights tried
    pairs: PairsConfig                              # of the products themselves: what the start learns from
    most_pairs: int = Field(default=3000, ge=1)
    negatives: NegativesConfig = NegativesConfig()
    finetune: dict[str, Any] = Field(default_factory=dict)      # keys of FinetuneCrossEncoderConfig, of every training
    judged: dict[str, Any] = Field(default_factory=dict)        # the same, of those on judged queries
    start_cpu_seconds: float = Field(default=200, gt=0)
    cpu_seconds: float = Field(default=60, gt=0)    # of a training on judged queries
    mined: int = Field(default=10, ge=0)            # of a judged query: products that nobody judged, gain 0
    cross_tokens: int = Field(default=96, ge=8)
    cross_top: int = Field(default=30, ge=1)
    trees: GbdtConfig = GbdtConfig()
    seed: int = 7
    parallel: int = Field(default=2, ge=1)
    cell: str | None = None                         # this one only (what a worker process gets)

    @property
    def fusions(self) -> list[FusionConfig]:
        """The fusions tried; of equal ones the first is taken."""
        steps = sorted({*np.round(np.arange(0, 1 + self.weight_step / 2, self.weight_step), 4).tolist(),
                        FusionConfig().dense_weight})
        return [FusionConfig(method=method, dense_weight=one)       # type: ignore[arg-type]
                for method in ("convex", "rrf") for one in steps]


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, config.cell)
        return None
    trees = [f"{fold}/trees" for fold in range(config.folds)]
    crosses = [f"{fold}/cross-{half}" for fold in range(config.folds) for half in range(HALVES)]
    if not all(is_made(config, name) for name in trees):
        _ready(config)
        for some in ([POOL, START], crosses, trees):
            make_missing(__file__, some, lambda name: is_made(config, name), config.work / "logs", config.parallel)
    headline, tables = summary([read_cell(cell_file(config, name)) for name in trees], config.relevant_gain,
                               config.seed)
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    command = f"python benchmarks/rerank_labels.py {' '.join(sys.argv[1:])}"
    return write_result(config.result, command=command, headline=headline, tables=tables, seeds=[config.seed])


# --- cells ----------------------------------------------------------------------------------------
def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-')}.json"


def is_made(config: JobConfig, name: str) -> bool:
    """Whether the cell is there and current, with what it left below `work`, which may be gone."""
    left = {POOL: config.work / "pools.npz", START: config.work / "start" / "CURRENT"}.get(name)
    return is_current(cell_file(config, name), _identity(config, name)) and (left is None or left.is_file())


def _identity(config: JobConfig, name: str) -> dict[str, Any]:
    """What a cell's figures depend on; a file with another one is made again."""
    known: dict[str, Any] = {
        "cell": name, "source": config.flow.prepare.model_dump(mode="json", exclude={"output", "ray"}),
        "shop": config.flow.shop and config.flow.shop.identity(),
        "encoder": config.flow.embed.encoder.model_dump(mode="json"),
        **config.model_dump(mode="json", include={"queries", "judgments", "seed", "depth"})}
    training = {"pairs", "most_pairs", "negatives", "finetune", "start_cpu_seconds", "cross_tokens"}
    if name != POOL:
        known |= config.model_dump(mode="json", include=training)
    if "/" in name:
        known |= config.model_dump(mode="json", include={"folds", "judged", "cpu_seconds", "mined", "cross_top", "kept",
                                                           "weight_step"})
    if name.endswith("/trees"):
        known |= {"features": FEATURES, **config.model_dump(mode="json", include={"trees", "relevant_gain"})}
    return known


def _make_cell(config: JobConfig, name: str) -> None:
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    catalogue, problem = read_catalogue(config.flow.prepare.output), _problem(config)
    if name == POOL:
        document = _make_pool(config, catalogue, problem)
    elif name == START:
        document = {"training": _train(config, config.work / "start", config.work / "start-lists", "minilm",
                                       config.finetune, config.start_cpu_seconds)}
    else:
        fold, _, stage_name = name.partition("/")
        make = _cross if stage_name.startswith("cross-") else _trees
        document = make(config, int(fold), stage_name, catalogue, problem)
    write_cell(cell_file(config, name), _identity(config, name), {
        "cell": name, "products": len(catalogue.texts), "cpu_seconds": round(time.process_time() - started, 1),
        **document})


# --- what cells share -----------------------------------------------------------------------------
def _ready(config: JobConfig) -> None:
    """The catalogue with its index, and the lists made of its products."""
    prepared, work = config.flow.prepare.output, config.work
    with connected(RayConfig(no_progress_timeout_s=900)):
        ensure_index(config.flow)
        make_pairs(MakePairsConfig.model_validate({**config.pairs.model_dump(), "prepared": prepared,
                                                   "output": work / "pairs"}))
        mix_pairs(MixConfig(prepared=prepared, parts=(Part(pairs=work / "pairs", most=config.most_pairs),),
                            output=work / "few-pairs", seed=config.seed))
        mine_negatives(MineNegativesConfig.model_validate({
            **config.negatives.model_dump(), "pairs": work / "few-pairs", "prepared": prepared,
            "index": config.flow.index.output, "output": work / "mined",
            "encoder": config.flow.embed.encoder.model_dump()}))
    pair_lists(PairListsConfig(pairs=work / "mined", output=work / "start-lists", seed=config.seed))


def _problem(config: JobConfig) -> Problem:
    asked = table_query_set(config.queries).queries
    judged, _ = read_judgments(config.judgments, open_artifact(config.flow.prepare.output, "prepared"))
    return Problem.of(asked, merge_duplicates(judged, Counts()), config.relevant_gain)


def _gains(problem: Problem) -> dict[str, dict[str, float]]:
    return {query: dict(of_query) for query, of_query in Labelled.of(problem.judgments).gains.items()}


def _halves(config: JobConfig, problem: Problem, fold: int) -> tuple[list[str], list[list[str]]]:
    """(the queries reported, the two halves of the others)."""
    places = query_folds(problem.query_ids, config.folds, config.seed)
    rest = [one for one in problem.query_ids if places[one] != fold]
    halves = query_folds(rest, HALVES, config.seed)
    return ([one for one in problem.query_ids if places[one] == fold],
            [[one for one in rest if halves[one] == half] for half in range(HALVES)])


def _make_pool(config: JobConfig, catalogue: Catalogue, problem: Problem) -> dict[str, Any]:
    encoder = build_text_encoder(config.flow.embed.encoder)
    pools = make_pools(encoder, config.flow.embed.output, catalogue, problem, config.depth)
    save_pools(config.work / "pools.npz", pools)
    return {"queries": len(pools), "pooled": sum(len(one.places) for one in pools.values())}


# --- cross-encoders -------------------------------------------------------------------------------
def _train(config: JobConfig, output: Path, lists: Path, model: str, settings: dict[str, Any], cpu_seconds: float
           ) -> dict[str, Any]:
    artifact = finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate(merged(settings, {
        "pairs": lists, "output": output, "model": model, "max_tokens": config.cross_tokens, "seed": config.seed,
        "max_cpu_seconds": cpu_seconds, "workers": {"count": 0, "threads": 1}})))
    return dict(artifact.manifest.facts)


def _cross(config: JobConfig, fold: int, stage_name: str, catalogue: Catalogue, problem: Problem) -> dict[str, Any]:
    """A cross-encoder of one half, and its scores for the other half and the reported queries."""
    half = int(stage_name.removeprefix("cross-"))
    reported, halves = _halves(config, problem, fold)
    pools, gains, work = load_pools(config.work / "pools.npz"), _gains(problem), config.work / str(fold) / stage_name
    parts = query_folds(halves[half], STOP_IN, config.seed)
    tables = judged_lists(pools, halves[half], gains, catalogue, config.mined, config.seed,
                          [one for one in parts if parts[one] == 0])
    key = fingerprint([sorted(halves[half]), config.mined, config.seed, config.depth])
    if find_artifact(work / "lists", "reranker_pairs", key) is None:
        with stage(work / "lists", "reranker_pairs", key) as staging:
            staging.commit([staging.write_table(f"pairs/{split}/lists.parquet", table)
                            for split, table in tables.items()], config=config)
    start = open_artifact(config.work / "start", "cross_encoder").path / "cross_encoder"
    facts = _train(config, work / "model", work / "lists", str(start), merged(config.finetune, config.judged),
                   config.cpu_seconds)
    folder = open_artifact(work / "model", "cross_encoder").path / "cross_encoder"
    model = CrossEncoder(CrossEncoderConfig(model=str(folder), device="cpu", max_tokens=config.cross_tokens))
    fusion = _best_fusion(config, pools, catalogue, problem.only([one for some in halves for one in some]))
    told = {one: _scores(config, model, pools[one], fusion, gains[one], catalogue)
            for one in (*halves[1 - half], *reported)}
    return {"training": facts, "scores": told}


def _scores(config: JobConfig, model: CrossEncoder, pool: Pool, fusion: FusionConfig, known: dict[str, float],
            catalogue: Catalogue) -> dict[str, float]:
    """Of the products at the top, and of the judged ones."""
    heads = set(pool.head(fusion, catalogue.row_ids, config.cross_top)[0].tolist())
    heads |= {at for at, place in enumerate(pool.places.tolist()) if catalogue.product_ids[place] in known}
    places = pool.places[sorted(heads)].tolist()
    found = model.score([pool.query] * len(places), [catalogue.texts[place] for place in places])
    return {catalogue.product_ids[place]: round(float(one), 5) for place, one in zip(places, found, strict=True)}


# --- trees ----------------------------------------------------------------------------------------
def _trees(config: JobConfig, fold: int, stage_name: str, catalogue: Catalogue, problem: Problem) -> dict[str, Any]:
    """Trees of all the other queries, and every system's answers to the reported ones."""
    reported, halves = _halves(config, problem, fold)
    pools, index = load_pools(config.work / "pools.npz"), open_index(config.flow.index.output)
    told = [read_cell(cell_file(config, f"{fold}/cross-{half}"))["scores"] for half in range(HALVES)]
    inner = sorted(one for half in halves for one in half)
    fusion = _best_fusion(config, pools, catalogue, problem.only(inner))
    cross = {one: told[1 - half][one] for half in range(HALVES) for one in halves[half]}    # by the other half's model
    cross |= {one: {product: (score + told[1][one][product]) / 2 for product, score in told[0][one].items()}
              for one in reported}
    parts, gains = query_folds(inner, STOP_IN, config.seed), _gains(problem)
    known = Labelled.of(problem.judgments)
    lists, label_gain, names = as_lists(
        (asked_of(one, pools[one], fusion, catalogue, index, config.kept,
                  _top(config, pools[one], fusion, catalogue, cross[one])) for one in inner), known,
        config.trees.label_gain)
    stops = np.array([parts[one] == 0 for one in names])
    rankers, grown = {}, {}
    for name, trees in (("both", config.trees), ("lightgbm", config.trees.replace(without=("cross",)))):
        fitted = fit(lists.take(~stops), lists.take(stops), trees, label_gain)
        rankers[name] = GbdtRanker.of(model_text(fitted), None, {}, trees.start)
        grown[name] = {"rounds": fitted.rounds, "stop_ndcg": fitted.stop_ndcg,
                       "importance": dict(list(rankers[name].importance().items())[:20])}
    answers = _answers(config, reported, pools, fusion, catalogue, index, cross, gains, rankers)
    asked = problem.only(reported)
    judgments = asked.judgments.filter(pa.array([one in set(reported) for one in
                                                 asked.judgments["query_id"].to_pylist()]))
    return {"fusion": fusion.model_dump(mode="json"), "trees": grown, "query_ids": reported,
            "judgments": {name: judgments[name].to_pylist() for name in ("query_id", "product_id", "gain")},
            "answers": answers}


def _best_fusion(config: JobConfig, pools: dict[str, Pool], catalogue: Catalogue, problem: Problem) -> FusionConfig:
    """The fusion with the best nDCG@10 of the queries."""
    def figure(fusion: FusionConfig) -> float:
        tables = []
        for one in problem.query_ids:
            places = pools[one].places[pools[one].head(fusion, catalogue.row_ids, config.kept)[0]].tolist()
            tables.append(pa.table({"query_id": [one] * len(places),
                                    "product_id": [catalogue.product_ids[place] for place in places],
                                    "rank": pa.array(range(1, len(places) + 1), pa.int32())}))
        return float(np.nanmean(problem.score(tables)[:, 0]))

    return max(config.fusions, key=figure)


def _top(config: JobConfig, pool: Pool, fusion: FusionConfig, catalogue: Catalogue, scores: dict[str, float],
         also: Any = ()) -> dict[str, float]:
    """Of the cross scores those that a service would have: of the best by this fusion (and of `also`)."""
    near = {catalogue.product_ids[place]
            for place in pool.places[pool.head(fusion, catalogue.row_ids, config.cross_top)[0]].tolist()} | set(also)
    return {product: score for product, score in scores.items() if product in near}


def _answers(config: JobConfig, reported: list[str], pools: dict[str, Pool], fusion: FusionConfig,
             catalogue: Catalogue, index: Index, cross: dict[str, dict[str, float]],
             gains: dict[str, dict[str, float]], rankers: dict[str, GbdtRanker]) -> dict[str, Any]:
    """{scope: {system: {query: products, best first}}}; `judged only` also ranks what retrieval did not reach."""
    plain = RerankConfig(one_title=False, depth=100_000)
    systems = {"retrieval": None, "cross-encoder": Reranker(plain),
               **{name: Reranker(plain, ranker) for name, ranker in rankers.items()}}
    found: dict[str, Any] = {scope: {name: {} for name in systems} for scope in (WHOLE, JUDGED)}
    for query_id in reported:
        for scope, also in ((WHOLE, ()), (JUDGED, tuple(gains[query_id]))):
            pool = pools[query_id]
            asked = asked_of(query_id, pool, fusion, catalogue, index, config.kept,
                             _top(config, pool, fusion, catalogue, cross[query_id], also), also)
            for name, reranker in systems.items():
                answer = retrieved(asked) if reranker is None else reranked(asked, reranker)
                products = answer["product_id"].to_pylist()
                found[scope][name][query_id] = products if scope == WHOLE else [
                    product for product in products if product in gains[query_id]]
    return found


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
