"""Adapters of pictures on the demo shop's fashion department: frozen, the usual recipe, and ours with its gate.

    python benchmarks/attribute_adapter.py --config configs/bench_attribute_adapter/full.yaml

Trained on what the products' words say, as in a real shop; scored on what was planted, on products of groups that no
training saw, with groups as units. Pictures are drawn of the fashion department alone, by the shop's own generator.
A cell is a process and a file of its own below `cells`; a rerun makes only the missing ones.

    frozen/0            the frozen network and chance
    <recipe>/<seed>     a recipe's adapter: hits of every query, what the gate says of it
    faults/<seed>       what is done to our adapter of that seed on purpose, and whether it is noticed
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
from attribute_adapter_table import summary
from cells import is_current, make_missing, merged, read_cell, write_cell

from recsys_ray.artifacts import Artifact, open_artifact, write_table
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.attribute_data import LabelAttributesConfig, label_attributes
from recsys_ray.data.attribute_items import Items, Pairs, read_items, split_places
from recsys_ray.data.attribute_pair_data import GroupSplit, MakeAttributePairsConfig, make_attribute_pairs
from recsys_ray.data.attribute_pairs import PairConfig
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.catalogue import build_catalogue
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.demo_shop.images import SHARD_ROWS, draw, jpeg
from recsys_ray.data.demo_shop.products import products
from recsys_ray.data.demo_shop.streams import uniforms
from recsys_ray.data.demo_shop.vocabulary import DEPARTMENTS
from recsys_ray.data.image_files import ImageTable
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.evaluation.attributes import attribute_figures, chance_level
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.attribute_adapter import KIND as ADAPTER
from recsys_ray.models.attribute_adapter import AttributeAdapter
from recsys_ray.models.image_encoder import ImageEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.schema import ATTRIBUTE_ROW, IMAGE
from recsys_ray.training.attribute_adapter import AdapterData, FinetuneAttributeAdapterConfig
from recsys_ray.training.attribute_adapter_run import train_worker
from recsys_ray.training.attribute_gate import SliceGateConfig, judge_slices, require_alignment

log = logging.getLogger(__name__)

FROZEN, FAULTS, OURS = "frozen/0", "faults", "ours"
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class JobConfig(Config):
    """Which shop, which recipes."""

    shop: DemoShopConfig
    rows: dict[str, dict[str, Any]]             # recipe -> keys of FinetuneAttributeAdapterConfig beside `finetune`
    finetune: dict[str, Any] = Field(default_factory=dict)      # of every recipe
    seeds: tuple[int, ...] = (1, 2, 3)
    weak_classes: tuple[str, ...] = ("cardigan", "blazer")      # as planted
    rare_materials: tuple[str, ...] = ("denim", "leather")
    planted_gate: SliceGateConfig = SliceGateConfig()           # what is declared of the planted truth
    pairs: PairConfig = PairConfig()
    split: GroupSplit = GroupSplit(train=0.5, valid=0.2)
    encoder: ImageEncoderConfig = ImageEncoderConfig(device="cpu", dtype="float32")
    texts: TextEncoderConfig = TextEncoderConfig(device="cpu", max_tokens=48)
    work: Path = Path("runs/bench_attribute_adapter")
    cells: Path = Path("benchmarks/results/attribute_adapter")
    result: Path = Path("benchmarks/results/attribute_adapter.json")
    parallel: int = Field(default=2, ge=1)
    cell: str | None = None                     # this one only (what a worker process gets)


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, *config.cell.split("/"))
        return None
    trained = [f"{row}/{seed}" for seed in config.seeds for row in config.rows]
    faults = [f"{FAULTS}/{seed}" for seed in config.seeds]
    if not all(is_made(config, name) for name in [FROZEN, *trained, *faults]):
        _ready(config)
    for names in ([FROZEN, *trained], faults):      # faults are done to what was trained
        make_missing(__file__, names, lambda name: is_made(config, name), config.work / "logs", config.parallel)
    cells = {name: read_cell(cell_file(config, name)) for name in [FROZEN, *trained, *faults]}
    headline, tables = summary(cells, config.seeds, config.weak_classes, config.rare_materials, config.planted_gate)
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    return write_result(config.result, command=f"python benchmarks/attribute_adapter.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=config.seeds)


def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-')}.json"


def is_made(config: JobConfig, name: str) -> bool:
    """Whether the cell is there and current."""
    return is_current(cell_file(config, name), _identity(config, name))


def _identity(config: JobConfig, name: str) -> dict[str, Any]:
    row = name.split("/")[0]
    return {"shop": config.shop.identity(), "generator": [GENERATOR_VERSION, generator_hash()], "cell": name,
            "pairs": config.pairs.model_dump(mode="json"), "split": config.split.model_dump(),
            "encoder": config.encoder.model_dump(mode="json"),
            "texts": config.texts.model_dump(mode="json"), "common": config.finetune,
            "row": config.rows.get(OURS if row == FAULTS else row)}


# --- what cells share -----------------------------------------------------------------------------
def _ready(config: JobConfig) -> None:
    """The shop, what its words say, its fashion pictures and texts as vectors, the pairs."""
    with connected(RayConfig()):
        make_demo_shop(config.shop.replace(output=config.work / "shop"))
        public = config.work / "shop" / "public"
        prepare(PrepareConfig.model_validate({
            "source": {"format": "amazon_reviews", "products": str(public / "meta_Demo_Shop.jsonl.gz"),
                       "reviews": str(public / "Demo_Shop.jsonl.gz")},
            "output": config.work / "prepared", "num_buckets": 4}))
        attributes = label_attributes(LabelAttributesConfig.model_validate({
            "products": {"prepared": config.work / "prepared"}, "output": config.work / "attributes"}))
        pictures = config.work / "pictures" / fingerprint(config.shop.identity())
        _draw_pictures(config, attributes, pictures)
        embed_images(EmbedImagesConfig(images=ImageTable(path=str(pictures)), encoder=config.encoder,
                                       output=config.work / "vectors", workers=1))
    _make_pairs(config)
    _embed_texts(config, attributes)


def _draw_pictures(config: JobConfig, attributes: Artifact, folder: Path) -> None:
    """The pictures of the fashion department, as the shop's generator draws them, in files that are made once."""
    catalogue = build_catalogue(config.shop)
    numbers = np.flatnonzero(catalogue.department == DEPARTMENTS.index("fashion"))
    known = set(attributes.table("attributes.parquet", ["product_id"])["product_id"].to_pylist())
    numbers = np.array([one for one, name in zip(numbers, catalogue.ids(numbers), strict=True) if name in known])
    side, seed = config.shop.image_side, config.shop.seed
    for shard, start in enumerate(range(0, len(numbers), SHARD_ROWS)):
        name = f"images-{shard:05d}.parquet"
        if (folder / name).is_file():
            continue
        some = numbers[start:start + SHARD_ROWS]
        ids, chance = catalogue.ids(some), uniforms(seed, "images", some, 4)
        drawn = [jpeg(draw(product, side, config.shop.clarity.image_noise, chance[at], seed))
                 for at, product in enumerate(products(catalogue, some))]
        rows = [{"image_id": f"{one}.jpg", "product_id": one, "width": side, "height": side, "data": data}
                for one, data in zip(ids, drawn, strict=True)]
        write_table(folder, name, pa.Table.from_pylist(rows, schema=IMAGE))


def _make_pairs(config: JobConfig) -> None:
    """Pairs of products by what their words say, with negatives mined among the frozen vectors."""
    make_attribute_pairs(MakeAttributePairsConfig.model_validate({
        "attributes": config.work / "attributes", "vectors": {"images": config.work / "vectors"},
        "pairs": config.pairs, "split": config.split, "output": config.work / "pairs"}))


def _embed_texts(config: JobConfig, attributes: Artifact) -> None:
    names = attributes.table("attributes.parquet", ["product_id"])["product_id"]
    prepared = open_artifact(config.work / "prepared", "prepared")
    table = pa.concat_tables(prepared.tables("product_text/", ["product_id", "text"]))
    table = table.filter(pc.is_in(table["product_id"], value_set=names.combine_chunks()))
    encoder = build_text_encoder(config.texts)
    vectors = encoder.encode_documents(table["text"].to_pylist())
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    write_table(config.work, "texts.parquet", pa.table({"product_id": table["product_id"], "vector": column}))


def _items(config: JobConfig) -> tuple[Items, dict[str, Ints], dict[str, Any]]:
    """(the pictures, the places of each split, the identity of the picture tower)."""
    vectors = open_artifact(config.work / "vectors", "image_vectors")
    items = read_items(vectors, open_artifact(config.work / "attributes", "attributes"), None)
    told = pq.read_table(config.work / "texts.parquet")
    place = pc.index_in(items.rows["product_id"].combine_chunks(), value_set=told["product_id"].combine_chunks())
    texts = told["vector"].combine_chunks().flatten().to_numpy().reshape(len(told), -1)[place.to_numpy()]
    items = Items.of(items.vectors, items.rows, np.array(texts, dtype=np.float32))
    split = split_places(items, config.split)
    truth = planted_rows(config, items.rows["product_id"].to_pylist())
    planted = np.array(truth["group_key"].to_pylist(), dtype=object)
    known = set(planted[split["train"]]) | set(planted[split["valid"]])    # a repeated listing whose words hide it
    split["test"] = np.array([one for one in split["test"].tolist() if planted[one] not in known], dtype=np.int64)
    return items, split, vectors.manifest.facts["encoder"]


def planted_rows(config: JobConfig, product_ids: list[str]) -> pa.Table:
    """What was planted of some products, as ATTRIBUTE_ROW rows; a listing that repeats another is of its group."""
    truth = pq.read_table(config.work / "shop" / "truth" / "products.parquet")
    found = {row["product_id"]: row for row in truth.select(
        ["product_id", "kind", "material", "pattern", "neckline", "sleeve", "duplicate_group"]).to_pylist()}
    return pa.Table.from_pylist([{
        "product_id": one, "category2": found[one]["kind"], "group_key": found[one]["duplicate_group"], "evidence": [],
        **{name: found[one][name] for name in ("material", "pattern", "neckline", "sleeve")}} for one in product_ids],
        schema=ATTRIBUTE_ROW)


# --- one cell -------------------------------------------------------------------------------------
def _make_cell(config: JobConfig, row: str, seed: str) -> None:
    import torch

    torch.set_num_threads(1)
    items, split, identity = _items(config)
    test, name = items.take(split["test"]), f"{row}/{seed}"
    rows = planted_rows(config, test.rows["product_id"].to_pylist())
    if name == FROZEN:
        document = _hits(test.vectors, rows) | {
            "chance": {one: float(np.nanmean(each)) for one, each in chance_level(rows, rows).items()},
            "groups": rows["group_key"].to_pylist(),
            "planted": {column: rows[column].to_pylist() for column in ("category2", "material")}}
    elif row == FAULTS:
        document = _faults(config, items.take(split["valid"]), int(seed))
    else:
        adapter, training = _train(config, row, int(seed), items, split, identity)
        gate = judge_slices(items.take(split["valid"]), adapter.adapt(items.vectors[split["valid"]]),
                            _settings(config, row, int(seed)).gate, int(seed))
        document = _hits(adapter.adapt(test.vectors), rows) | {"training": training, "gate": gate.board,
                                                               "refused": bool(gate.names("worse"))}
        if adapter.card.text is not None and test.texts is not None:
            figures = attribute_figures(adapter.adapt(test.texts, "text"), rows, adapter.adapt(test.vectors), rows)
            document["text"] = {one: float(np.nanmean(values)) for one, values in figures.items()}
    write_cell(cell_file(config, name), _identity(config, name), {"cell": name, **document})


def _hits(vectors: Floats, rows: pa.Table) -> dict[str, Any]:
    found = attribute_figures(vectors, rows, vectors, rows)
    return {"hits": {name: [None if np.isnan(one) else round(float(one), 4) for one in each]
                     for name, each in found.items()}}


def _settings(config: JobConfig, row: str, seed: int) -> FinetuneAttributeAdapterConfig:
    return FinetuneAttributeAdapterConfig.model_validate(merged(merged(config.finetune, config.rows[row]), {
        "vectors": config.work / "vectors", "seed": seed,    # a folder of its own: no run goes on with another's state
        "output": config.work / "adapters" / fingerprint(_identity(config, f"{row}/{seed}"))}))


def _train(config: JobConfig, row: str, seed: int, items: Items, split: dict[str, Ints], identity: dict[str, Any]
           ) -> tuple[AttributeAdapter, dict[str, Any]]:
    settings = _settings(config, row, seed)
    table = pa.concat_tables(open_artifact(config.work / "pairs", "attribute_pairs").tables("pairs/train"))
    pairs = Pairs.of(table, items, seed).within(split["train"], len(items))
    text = build_text_encoder(config.texts).identity if settings.loss.text or settings.loss.fused else None
    if text is None:
        items = Items.of(items.vectors, items.rows)
    directory = settings.output.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    train_worker(settings, AdapterData(items, split["train"], split["valid"], pairs, identity, text), directory,
                 f"{row}/{seed}")
    values = read_cell(directory / "result.json")
    return AttributeAdapter.load(str(directory / ADAPTER)), {
        name: values[name] for name in ("step", "best_step", "best_value", "base_value", "cpu_seconds", "pairs")}


def _faults(config: JobConfig, valid: Items, seed: int) -> dict[str, Any]:
    """What is done to our adapter's vectors or to the rows beside them, and whether it is noticed."""
    settings, random = _settings(config, OURS, seed), np.random.default_rng(seed)
    adapted = AttributeAdapter.load(str(settings.output / ADAPTER)).adapt(valid.vectors)
    two = adapted @ random.normal(size=(adapted.shape[1], 2)).astype(np.float32)
    caught = {"collapse to two dimensions": bool(judge_slices(
        valid, two / np.linalg.norm(two, axis=1, keepdims=True), settings.gate, seed).names("worse"))}
    nothing_to_lose = []
    for row in judge_slices(valid, adapted, settings.gate, seed).board["rows"]:
        name = row["slice"]
        if row["frozen"]["mean"] - row["chance"]["mean"] <= 2 * settings.gate.margin:
            nothing_to_lose.append(name)    # it stands at chance: its collapse costs less than the gate can tell
            continue
        attribute, _, value = name.partition("=")
        said = valid.rows[attribute]
        own = np.flatnonzero((pc.equal(said, value).fill_null(False) if value else pc.is_valid(said)).to_numpy())
        broken = adapted.copy()
        broken[own] = adapted[random.integers(0, len(adapted), len(own))]
        caught[f"collapse of {name}"] = name in judge_slices(valid, broken, settings.gate, seed).names("worse")
    shuffled = Items.of(valid.vectors, valid.rows.take(pa.array(random.permutation(len(valid)))))
    try:
        require_alignment(shuffled, seed)
        noticed = False
    except ValueError:
        noticed = True
    return {"caught": caught, "nothing_to_lose": nothing_to_lose, "shuffled_metadata_caught": noticed}


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
