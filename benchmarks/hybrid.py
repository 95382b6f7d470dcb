"""Text and pictures together against each alone: queries of words and of photographs, on planted judgments.

    python benchmarks/hybrid.py --config configs/bench_hybrid/full.yaml

For every seed a demo shop with a picture of each product is made, prepared, embedded and indexed by the package's own
stages (a rerun reuses them). Queries of words are the shop's graded ones about fashion, whose colour, pattern, neckline
and sleeve can be seen. Queries of photographs are new pictures of products: other light, other place, other noise than
the picture in the catalogue. They are judged by what was planted: 3 for the same kind with at least all but one of the
visible attributes equal, 2 for the same kind with half of them, 1 for another kind of its group with all but one.
Queries of both are a photograph with the words of its kind and of an occasion, which no picture shows; what is not made
for the occasion loses two grades.

The network knows pictures alone, so words meet pictures, and pictures texts, by the guesses that the index learned from
the catalogue (no query and no judgment is in them). Text alone is alpha 1, pictures alone alpha 0; alpha of the hybrid
is chosen on one half of the queries and measured on the other, and the other way round. Intervals resample queries.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.artifacts import write_text
from recsys_ray.config import Config, main
from recsys_ray.data.demo_shop import DemoShopConfig
from recsys_ray.data.demo_shop.catalogue import build_catalogue
from recsys_ray.data.demo_shop.images import draw
from recsys_ray.data.demo_shop.products import products
from recsys_ray.data.demo_shop.streams import uniforms
from recsys_ray.data.image_files import ImageTable
from recsys_ray.data.images import Pixels
from recsys_ray.data.preprocess import clean_query
from recsys_ray.evaluation.metrics import MetricSpec
from recsys_ray.evaluation.plots import curves
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Resampling, Units, compare_columns, mean_intervals
from recsys_ray.flow import FlowConfig, ensure_index
from recsys_ray.models.attribute_adapter import ImageTowerConfig, load_image_tower
from recsys_ray.models.image_encoder import ImageEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images
from recsys_ray.retrieval.fusion import tune_dense_weight
from recsys_ray.retrieval.hybrid_build import BuildHybridConfig, build_hybrid
from recsys_ray.retrieval.hybrid_index import open_hybrid
from recsys_ray.retrieval.hybrid_search import HybridSearcher
from recsys_ray.retrieval.hybrid_weights import alpha_curve
from recsys_ray.runtime import RayConfig, connected

log = logging.getLogger(__name__)

VISIBLE = ("colour", "pattern", "neckline", "sleeve")
DEPARTMENT, UNSEEN = "fashion", "occasion"
OTHER_DAY = 1_000_003           # added to the shop's seed for the photographs' own light and noise
STYLE = (":root{--ink:#1d1f23;--muted:#656a73;--line:#e0e0da;--font:sans-serif;--series-1:#4c78a8;--series-2:#e45756;"
         "--series-3:#59a14f}")
Floats = npt.NDArray[np.float64]


class JobConfig(Config):
    """How large the shops are and what is asked."""

    work: Path = Path("runs/bench_hybrid")
    result: Path = Path("benchmarks/results/hybrid.json")
    seeds: tuple[int, ...] = (7,)
    products: int = Field(default=3000, ge=500)
    reviews: int = Field(default=24_000, ge=1000)
    queries: int = Field(default=1000, ge=20)       # of words, all departments; those about fashion are used
    photographs: int = Field(default=400, ge=10)
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu")
    images: ImageEncoderConfig = ImageEncoderConfig(device="cpu")
    alphas: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(21))
    metric: MetricSpec = MetricSpec(measure="nDCG", k=10)
    samples: int = Field(default=2000, ge=100)
    ray: RayConfig = RayConfig()


class Asked:
    """The values of one kind of query under every alpha, pooled over the seeds."""

    def __init__(self, alphas: tuple[float, ...]) -> None:
        self.alphas, self.values = alphas, list[Floats]()

    def add(self, values: Floats) -> None:
        """(A, Q) of one seed; queries without any relevant product are NaN and left out."""
        self.values.append(values[:, ~np.isnan(values).any(axis=0)])

    def systems(self, seed: int) -> tuple[Floats, list[float]]:
        """((Q, 3): text alone, pictures alone, hybrid with alpha of the other half; those alphas)."""
        rows, chosen = [], []
        for values in self.values:
            found = tune_dense_weight(self.alphas, values, folds=2, seed=seed)
            alone = [values[self.alphas.index(alpha)] for alpha in (1.0, 0.0)]
            rows.append(np.stack([*alone, found.out_of_fold], 1))
            chosen += sorted(set(found.query_weights.tolist()))
        return np.concatenate(rows), chosen


def run(config: JobConfig) -> Path:
    """Measure every seed and write the result and the curve; returns the result's path."""
    kinds = {name: Asked(config.alphas) for name in ASK}
    guesses: dict[str, Any] = {}
    with connected(config.ray):
        for seed in config.seeds:
            searcher, flow = _searcher(config, seed)
            guesses[str(seed)] = {f"{source} to {target}": one.held_out_cosine
                                  for (source, target), one in searcher.index.projections.items()}
            for name, asked in kinds.items():
                asked.add(ASK[name](config, flow, searcher))
                log.info("seed %d, %s: %d queries", seed, name, asked.values[-1].shape[1])
    headline, tables = _figures(config, kinds)
    plot = config.result.with_suffix(".svg")
    write_text(plot, _curve(config, kinds))
    return write_result(config.result, command=f"python benchmarks/hybrid.py {' '.join(sys.argv[1:])}",
                        headline=headline, seeds=config.seeds, tables={
                            **tables, "learned guesses, held-out cosine": guesses, "curve": str(plot),
                            "setting": config.model_dump(mode="json")})


def _searcher(config: JobConfig, seed: int) -> tuple[HybridSearcher, FlowConfig]:
    work = config.work / f"seed-{seed}"
    shop = DemoShopConfig(output=work / "shop", seed=seed, products=config.products, reviews=config.reviews,
                          queries=config.queries, image_products=config.products)
    source = {"format": "amazon_reviews", "products": str(work / "shop/public/meta_Demo_Shop.jsonl.gz"),
              "reviews": str(work / "shop/public/Demo_Shop.jsonl.gz")}
    flow = FlowConfig.model_validate({
        "work_dir": work, "shop": shop.model_dump(), "prepare": {"source": source, "num_buckets": 8},
        "embed": {"encoder": config.encoder.model_dump()}, "index": {"vector": {"kind": "flat"}}})
    ensure_index(flow)
    embed_images(EmbedImagesConfig(images=ImageTable(path=str(work / "shop/public/images")), output=work / "pictures",
                                   encoder=config.images))
    build_hybrid(BuildHybridConfig(index=work / "index", images=work / "pictures", output=work / "hybrid"))
    return HybridSearcher(open_hybrid(work / "hybrid"), build_text_encoder(config.encoder),
                          load_image_tower(ImageTowerConfig(encoder=config.images))), flow


def _words(config: JobConfig, flow: FlowConfig, searcher: HybridSearcher) -> Floats:
    """(A, Q) of the shop's graded queries about fashion."""
    truth = flow.work_dir / "shop/truth"
    queries = pq.read_table(truth / "queries.parquet")
    about = pa.array([DEPARTMENT in slices for slices in queries["slices"].to_pylist()])
    queries = queries.filter(about)
    directions = searcher.of_texts([clean_query(one) for one in queries["query"].to_pylist()])
    judgments = _listed(pq.read_table(truth / "judgments.parquet"), searcher)
    return alpha_curve(searcher.index, directions, queries["query_id"].to_pylist(), judgments, config.alphas,
                       config.metric).values


def _photographs(config: JobConfig, flow: FlowConfig, searcher: HybridSearcher, also: str | None = None) -> Floats:
    """(A, Q) of new pictures of fashion products; with the words of the attribute `also` beside them."""
    assert flow.shop is not None
    truth = pq.read_table(flow.work_dir / "shop/truth/products.parquet")
    fashion = np.flatnonzero(pc.equal(truth["department"], DEPARTMENT).to_numpy())
    random = np.random.default_rng(flow.shop.seed)
    numbers = np.sort(random.choice(fashion, min(config.photographs, len(fashion)), replace=False))
    names = [f"photo-{number}" for number in numbers]
    judgments = _listed(planted_likeness(truth.take(pa.array(fashion)), np.searchsorted(fashion, numbers), names, also),
                        searcher)
    pictures = photographs(flow.shop, numbers)
    if also is None or searcher.encoder is None:
        directions = searcher.of_pictures(pictures)
    else:
        directions = searcher.of_both(searcher.encoder.encode_queries(words(flow.shop, numbers, also)), pictures)
    return alpha_curve(searcher.index, directions, names, judgments, config.alphas, config.metric).values


def _both(config: JobConfig, flow: FlowConfig, searcher: HybridSearcher) -> Floats:
    return _photographs(config, flow, searcher, UNSEEN)


ASK = {"text queries": _words, "image queries": _photographs, "both queries": _both}


def words(shop: DemoShopConfig, numbers: npt.NDArray[np.int64], facet: str) -> list[str]:
    """What a shopper writes beside the photograph of each product: its kind, and one attribute as shoppers call it."""
    found = []
    for product in products(build_catalogue(shop), numbers):
        at = product.department.facet(facet)
        found.append(f"{product.kind.words.shopper[0]} for "
                     f"{product.department.facets[at].words[product.values[at]].shopper[0]}")
    return found


def photographs(shop: DemoShopConfig, numbers: npt.NDArray[np.int64]) -> list[Pixels]:
    """New pictures of products: the same things, on another day."""
    catalogue, day = build_catalogue(shop), shop.seed + OTHER_DAY
    chance = uniforms(day, "photographs", numbers, 4)
    return [draw(product, shop.image_side, shop.clarity.image_noise, chance[at], day)
            for at, product in enumerate(products(catalogue, numbers))]


def planted_likeness(truth: pa.Table, rows: npt.NDArray[np.int64], names: list[str], also: str | None = None
                     ) -> pa.Table:
    """JUDGMENT rows between the products at `rows` and all of `truth`, from what can be seen of both.

    With `also`, a product that has another value of that attribute loses two grades.
    """
    kind, group = (np.array(truth[name].to_pylist(), object) for name in ("kind", "kind_group"))
    seen = np.array([[value or "" for value in truth[name].to_pylist()] for name in VISIBLE], object)
    ids = truth["product_id"].to_pylist()
    asked = np.array([dict(one).get(also) for one in truth["attributes"].to_pylist()] if also else [], object)
    found: list[dict[str, Any]] = []
    for row, name in zip(rows, names, strict=True):
        there = seen[:, row] != ""
        equal, total = (seen[there] == seen[there, row][:, None]).sum(axis=0), int(there.sum())
        close = equal >= max(1, total - 1)
        gain = np.where((kind == kind[row]) & close, 3, np.where((kind == kind[row]) & (2 * equal >= total), 2,
                                                                 np.where((group == group[row]) & close, 1, 0)))
        if also is not None:
            gain = np.where(asked == asked[row], gain, np.maximum(gain - 2, 0))
        found += [{"query_id": name, "product_id": ids[at], "gain": float(gain[at]), "label": None}
                  for at in np.flatnonzero(gain)]
    return pa.table({"query_id": [one["query_id"] for one in found], "product_id": [one["product_id"] for one in found],
                     "gain": pa.array([one["gain"] for one in found], pa.float32())})


def _listed(judgments: pa.Table, searcher: HybridSearcher) -> pa.Table:
    """Judgments of products that are in the index: near-duplicates and rows that nobody can use are not."""
    known = searcher.index.rows["product_id"].combine_chunks()
    return judgments.filter(pc.is_in(judgments["product_id"], value_set=known))


def _figures(config: JobConfig, kinds: dict[str, Asked]) -> tuple[dict[str, float], dict[str, Any]]:
    resampling = Resampling(samples=config.samples)
    headline: dict[str, float] = {}
    tables: dict[str, Any] = {}
    for name, asked in kinds.items():
        values, alphas = asked.systems(config.seeds[0])
        units = Units.rows(len(values))
        means = mean_intervals(values, units, resampling)
        gains = compare_columns(np.stack([values[:, 2], values[:, 2]], 1), values[:, :2], units, resampling)
        key = name.replace(" ", "_")
        headline |= {f"{key}_{system}": one.mean
                     for system, one in zip(("text", "image", "hybrid"), means, strict=True)}
        # the smaller of the two: better than text alone and than pictures alone
        headline[f"{key}_gain"] = min(one.difference.mean for one in gains)
        headline[f"{key}_gain_ci_low"] = min(one.difference.low for one in gains)
        headline[f"{key}_alpha"] = float(np.mean(alphas))
        tables[name] = {
            "queries": len(values), "alphas chosen on the other half": alphas,
            **{f"{config.metric.name}, {system}": [one.mean, one.low, one.high]
               for system, one in zip(("text alone", "pictures alone", "hybrid"), means, strict=True)},
            **{f"hybrid over {system}": [one.difference.mean, one.difference.low, one.difference.high, one.p_value]
               for system, one in zip(("text alone", "pictures alone"), gains, strict=True)}}
    return headline, tables


def _curve(config: JobConfig, kinds: dict[str, Asked]) -> str:
    """The metric by alpha with its intervals, as an SVG file; the dot is the best alpha over all queries."""
    lines, marked = {}, {}
    for name, asked in kinds.items():
        values = np.concatenate(asked.values, axis=1)
        means = mean_intervals(values.T, Units.rows(values.shape[1]), Resampling(samples=config.samples))
        lines[name] = {alpha: (one.mean, one.low, one.high) for alpha, one in zip(asked.alphas, means, strict=True)}
        marked[name] = asked.alphas[int(np.argmax([one.mean for one in means]))]
    svg = curves(lines, ("alpha: weight of the text; 0 is pictures alone", config.metric.name),
                 "Weight of the text against quality", marked)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ',
                       1).replace("</title>", f"</title><style>{STYLE}</style>", 1) + "\n"


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
