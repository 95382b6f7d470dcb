"""Frozen networks for pictures: the packaged one, ResNet50 and OpenCLIP, each by its real loading code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ray.models.image_encoder import (
    HALF,
    LITE0,
    Framing,
    ImageEncoder,
    ImageEncoderConfig,
    read_weights,
    state_sha256,
)
from recsys_ray.models.sentence_layout import EncoderError

TINY = "tiny-test-clip"


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (random.integers(40, 90), random.integers(40, 90), 3), dtype=np.uint8)
            for _ in range(count)]


@pytest.fixture(scope="module")
def clip_file(tiny_clip: Callable[[str], Path]) -> Path:
    """The checkpoint as a trainer on several devices saves it."""
    file = tiny_clip(TINY)
    weights = torch.load(file, weights_only=True)
    torch.save({"state_dict": {f"module.{name}": one for name, one in weights.items()}}, file)
    return file


def test_the_packaged_network_tells_pictures_apart() -> None:
    encoder = ImageEncoder(ImageEncoderConfig(device="cpu", dtype="float32", batch_size=2))
    red, blue = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    darker = red // 2
    found = encoder.encode_images([red, blue, darker])
    assert found.shape == (3, encoder.dimension) == (3, 1280)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found[0] @ found[2] > found[0] @ found[1]
    with pytest.raises(EncoderError, match="knows pictures alone"):
        encoder.encode_texts(["red"])


def test_the_packaged_weights_classify(real_data: object) -> None:
    """With the classifier on, the same weights name what is on a picture: trousers, shirts and shoes of ImageNet."""
    import timm

    from recsys_ray.models.image_encoder import LITE0_FILE, LITE0_PACKAGE

    spec = __import__("importlib.util").util.find_spec(LITE0_PACKAGE)
    weights = read_weights(Path(spec.submodule_search_locations[0]) / LITE0_FILE)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(real_data("clothing") / "images.parquet", columns=["label", "jpeg"],  # type: ignore[operator]
                          filters=[("label", "in", ["Shoes", "Dress"])]).slice(0, 300)
    shoes = {"running shoe": 770, "loafer": 630, "clog": 502, "sandal": 774, "cowboy boot": 514, "sock": 806}
    framing = Framing(224, 0.875, HALF, HALF)
    rows = [row for row in table.to_pylist() if row["label"] == "Shoes"][:12]
    batch = framing.batch([framing.frame(np.asarray(Image.open(io.BytesIO(row["jpeg"])).convert("RGB")))
                           for row in rows])
    with torch.inference_mode():
        first = network(batch).topk(5).indices
    assert sum(any(int(one) in shoes.values() for one in row) for row in first) >= 8


def test_a_picture_is_framed_from_its_middle() -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[:, 50:150] = 255
    framed = Framing(64, 1.0, HALF, HALF).frame(picture)
    assert framed.shape == (64, 64, 3)
    assert framed.min() > 200       # the dark sides are cut off
    batch = Framing(64, 1.0, HALF, HALF).batch([framed])
    assert batch.shape == (1, 3, 64, 64)
    assert float(batch.mean()) == pytest.approx(1.0, abs=0.05)


def test_open_clip_puts_texts_beside_pictures(clip_file: Path) -> None:
    import open_clip

    encoder = ImageEncoder(ImageEncoderConfig(model=TINY, pretrained=str(clip_file), device="cpu", dtype="float32"))
    some = pictures(3)
    found = encoder.encode_images(some)
    assert found.shape == (3, 16)
    texts = encoder.encode_texts(["a red dress", "shoes"])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    theirs = open_clip.create_model(TINY, pretrained=str(clip_file)).eval()
    with torch.no_grad():
        batch = encoder.framing.batch([encoder.framing.frame(one) for one in some])
        wanted = theirs.encode_image(batch, normalize=True)
        words = theirs.encode_text(open_clip.get_tokenizer(TINY)(["a red dress", "shoes"]), normalize=True)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(texts, words.numpy(), atol=1e-5)
    assert encoder.identity["texts"]


def test_resnet50_from_a_file(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet.pth")
    encoder = ImageEncoder(ImageEncoderConfig(model="resnet50", pretrained=str(tmp_path / "resnet.pth"), device="cpu"))
    assert encoder.encode_images(pictures(1)).shape == (1, 2048)
    assert encoder.encode_images([]).shape == (0, 2048)


@pytest.mark.parametrize(("settings", "message"), [
    ({"model": "no-such-model", "pretrained": "x"}, "is none of"),
    ({"model": "resnet50"}, "needs weights"),
    ({"model": "resnet50", "pretrained": "NONE"}, "IMAGENET1K_V2"),
    ({"model": LITE0, "pretrained": "{tiny}"}, "other shapes"),
    ({"model": "resnet50", "pretrained": "{tiny}"}, "belongs to another network"),
    ({"model": LITE0, "pretrained": "{torn}"}, "cannot be read as weights"),
])
def test_what_cannot_be_loaded_is_named(clip_file: Path, tmp_path: Path, settings: dict[str, str], message: str
                                        ) -> None:
    (tmp_path / "torn.pt").write_bytes(clip_file.read_bytes()[:5000])
    places = {"{tiny}": str(clip_file), "{torn}": str(tmp_path / "torn.pt")}
    given = {name: places.get(value, value) for name, value in settings.items()}
    with pytest.raises(EncoderError, match=message):
        ImageEncoder(ImageEncoderConfig.model_validate({**given, "device": "cpu"}))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    torch.save({"state_dict": Planted()}, tmp_path / "planted.pt")
    with pytest.raises(EncoderError, match="cannot be read as weights"):
        read_weights(tmp_path / "planted.pt")


def test_the_identity_is_that_of_the_weights(clip_file: Path) -> None:
    network = torch.nn.Linear(3, 2)
    before = state_sha256(network)
    with torch.no_grad():
        network.bias[0] += 1
    assert state_sha256(network) != before
