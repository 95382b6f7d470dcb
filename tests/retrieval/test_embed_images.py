"""Pictures of a table as vectors: values, quarantine, resuming, on Ray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def test_a_table_becomes_vectors_and_reasons(tmp_path: Path, local_ray: object) -> None:
    for part in range(2):
        rows = [{"image_id": f"{part}-{number}", "sender": f"s{part}", "label": "Hat", "jpeg": jpeg(10 * part + number)}
                for number in range(3)]
        rows.append({"image_id": f"{part}-bad", "sender": "s", "label": "Hat", "jpeg": b"no picture at all"})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"images-{part}.parquet")
    config = EmbedImagesConfig.model_validate({
        "images": {"path": str(tmp_path / "images-*.parquet"), "columns": {"data": "jpeg", "group_id": "sender"}},
        "output": str(tmp_path / "vectors"), "workers": 2, "encoder": {"device": "cpu", "dtype": "float32"}})
    artifact = embed_images(config)
    artifact.verify()
    rows = pa.concat_tables(artifact.tables("vectors/")).to_pylist()
    assert sorted(row["image_id"] for row in rows) == [f"{part}-{number}" for part in range(2) for number in range(3)]
    assert {(row["group_id"], row["width"], row["height"]) for row in rows} == {("s0", 60, 48), ("s1", 60, 48)}
    reasons = artifact.table("quarantine.parquet")["reason"].to_pylist()
    assert len(reasons) == 2
    assert all(reason.startswith("does not decode") for reason in reasons)
    encoder = ImageEncoder(ImageEncoderConfig(device="cpu", dtype="float32"))
    picture = np.asarray(Image.open(io.BytesIO(jpeg(1))))
    found = next(row["vector"] for row in rows if row["image_id"] == "0-1")
    np.testing.assert_allclose(found, encoder.encode_images([picture])[0], atol=1e-5)
    assert artifact.manifest.facts["encoder"] == encoder.identity
    assert embed_images(config).manifest.version == artifact.manifest.version


def test_a_table_without_a_readable_picture_is_refused(tmp_path: Path, local_ray: object) -> None:
    pq.write_table(pa.table({"image_id": ["a"], "location": ["nowhere.jpg"]}), tmp_path / "images.parquet")
    config = EmbedImagesConfig.model_validate({
        "images": {"path": str(tmp_path / "images.parquet"), "root": str(tmp_path)}, "workers": 1,
        "output": str(tmp_path / "vectors"), "encoder": {"device": "cpu"}})
    with pytest.raises(ValueError, match="no picture could be read; the first reason: cannot be read"):
        embed_images(config)
