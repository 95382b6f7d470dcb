"""One side of the speed of pictures in a process of its own: `python benchmarks/images_sides.py TASK.json`.

Writes measured.json (wall_s, cpu_s) and, end to end, vectors.npy in the order of the image ids.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from embed_sides import TreeCpu


def ray(task: dict[str, Any]) -> dict[str, Any]:
    """`embed_images`, or its pieces, decoded and framed alone, by the same runner; timed once Ray is up."""
    from recsys_ray.data.image_files import ImageTable
    from recsys_ray.models.image_encoder import ImageEncoderConfig
    from recsys_ray.piecework import run_pieces
    from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images, image_pieces
    from recsys_ray.runtime import RayConfig, connected

    images, directory = ImageTable(path=task["images"]), Path(task["directory"])
    with connected(RayConfig(progress=False)):
        watch, start = TreeCpu(), time.perf_counter()
        if task["decode_only"]:
            work = image_pieces(images)
            run_pieces(_Decoder, (work, images.model_dump(mode="json")), len(work), directory, "decoded", gpu=False,
                       workers=task["workers"])
        else:
            made = embed_images(EmbedImagesConfig(
                images=images, output=directory / "vectors", workers=task["workers"],
                encoder=ImageEncoderConfig.model_validate(task["encoder"])))
        measured = {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds()}
    if not task["decode_only"]:
        table = pa.concat_tables(made.tables("vectors/", ["image_id", "vector"])).sort_by("image_id")
        vectors = table["vector"].combine_chunks().flatten().to_numpy()
        np.save(directory / "vectors.npy", vectors.reshape(len(table), -1))
    return measured


class _Decoder:
    """What `embed_images` does before its network."""

    def __init__(self, job: tuple[Any, dict[str, Any]]) -> None:
        from recsys_ray.data.image_files import ImageTable

        self.work, self.images = job[0], ImageTable.model_validate(job[1])

    def make(self, number: int) -> pa.Table:
        """How many pictures of a piece were framed."""
        from recsys_ray.data.image_files import with_bytes
        from recsys_ray.data.images import decoded_images
        from recsys_ray.data.sources.blocks import read_piece

        framed = 0
        for block in read_piece(*self.work[number]):
            framed += len(decoded_images(with_bytes(block, self.images), framing().frame, self.images.limits)[1])
        return pa.table({"framed": [framed]})


def framing() -> Any:
    """That of EfficientNet-Lite0, without loading it."""
    from recsys_ray.models.image_encoder import HALF, Framing

    return Framing(224, 0.875, HALF, HALF)


def loader(task: dict[str, Any]) -> dict[str, Any]:
    """A DataLoader whose workers decode and frame with Pillow; the main process runs the network on each batch."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig

    config = ImageEncoderConfig.model_validate(task["encoder"])
    watch, start = TreeCpu(), time.perf_counter()
    frame = framing().frame

    class Pictures(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.data = pq.read_table(task["images"], columns=["data"])["data"].combine_chunks()

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, place: int) -> torch.Tensor:
            with Image.open(io.BytesIO(self.data[place].as_buffer())) as image:
                return torch.from_numpy(frame(image.convert("RGB")).copy())

    batches = DataLoader(Pictures(), batch_size=config.batch_size, num_workers=task["workers"])
    if task["decode_only"]:
        count = sum(len(batch) for batch in batches)
        return {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds(), "pictures": count}
    torch.set_num_threads(task["workers"])      # its default, whatever the shell says
    encoder = ImageEncoder(config)
    vectors = np.concatenate([encoder.encode_framed(list(batch.numpy())) for batch in batches])
    np.save(Path(task["directory"]) / "vectors.npy", vectors)
    return {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds()}


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"ray": ray, "loader": loader}


if __name__ == "__main__":
    the_task = json.loads(Path(sys.argv[1]).read_bytes())
    result = SIDES[the_task["side"]](the_task)
    (Path(the_task["directory"]) / "measured.json").write_text(json.dumps(result))
