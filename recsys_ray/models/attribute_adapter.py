"""Residual heads on towers, so that pictures of like attributes lie together; untrained they change nothing.

With a picture's vector v of unit length by the tower and a head f (linear, or an MLP), the adapted vector is

    z = (v + f(v - m)) / |v + f(v - m)|,        f = 0 at the start

where m is the middle of the train pictures, kept beside the weights: what all pictures have in common is most of a
vector and tells nothing. So training begins at the frozen model, and weight decay pulls back to it. Texts of a tower
that shares the pictures' space get such a head too; those of another encoder are projected into the space
(`Projection.start`), which has to be judged against chance, because there is no frozen model to compare with. Attribute
heads are prototypes u_v of each value v, with logits s * z . u_v / |u_v|. A product's picture and text together are one
vector

    [sqrt(w) z_picture, sqrt(1 - w) z_text]

whose inner product with another's is w times the pictures' similarity and 1 - w times the texts', with w learned. The
temperature of the contrastive loss is kept as given: it is no parameter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys_ray.artifacts import sha256_of
from recsys_ray.config import Config
from recsys_ray.data.images import Pixels
from recsys_ray.models.image_encoder import TRAINED, ImageEncoder, ImageEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import EncoderError, find_model
from recsys_ray.models.text_encoder import TextEncoderConfig

KIND = TRAINED                  # of the artefact, and the name of its directory
WEIGHTS, CARD = "adapter.safetensors", "adapter.json"
FUSION_START = 0.7              # of the picture, as the source weighs it
LOGIT_SCALE = 16.0              # of the prototypes' cosines, before it is learned
ROWS = 8192                     # adapted at once

Floats = npt.NDArray[np.float32]


class HeadConfig(Config):
    """How a head is made."""

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = Field(default=512, ge=1)              # of an MLP
    # random: a plain projection in the place of the residual, which throws the frozen space away
    start: Literal["identity", "random"] = "identity"


class AdapterCard(Config):
    """All that is needed beside the weights, and which towers they belong to."""

    image: dict[str, Any]                       # identity of the picture tower
    base: dict[str, Any] | None = None          # of the one that was trained to it; None: it is frozen
    text: dict[str, Any] | None = None          # of the text tower; None: pictures alone
    head: HeadConfig = HeadConfig()
    attributes: dict[str, tuple[str, ...]]      # attribute -> its values, in the order of the outputs
    temperature: float = Field(default=0.07, gt=0)

    @property
    def dimension(self) -> int:
        """Of the space."""
        return int(self.image["dimension"])

    @property
    def shares_space(self) -> bool:
        """Whether the text tower is the picture tower's own."""
        return self.text is not None and self.text == self.image

    def on(self, trained: Mapping[str, Any]) -> Self:
        """The card of the same heads on `trained`, the identity of what this card's picture tower has become."""
        return self.replace(image=dict(trained), text=dict(trained) if self.shares_space else self.text,
                            base=self.image)


class Head(nn.Module):
    """Vectors (N, D) of unit length -> adapted ones, (N, D) of unit length."""

    def __init__(self, dimension: int, config: HeadConfig) -> None:
        super().__init__()
        self.residual = config.start == "identity"
        self.middle: Tensor
        self.register_buffer("middle", torch.zeros(dimension))
        last = nn.Linear(config.hidden if config.kind == "mlp" else dimension, dimension)
        self.change: nn.Module = last
        if config.kind == "mlp":
            self.change = nn.Sequential(nn.Linear(dimension, config.hidden), nn.GELU(), last)
        if self.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, vectors_ND: Tensor) -> Tensor:
        """The adapted vectors."""
        changed: Tensor = self.change(vectors_ND - self.middle)
        return F.normalize(vectors_ND + changed if self.residual else changed, dim=-1)


class Projection(nn.Module):
    """Vectors (N, T) of another encoder -> vectors (N, D) of unit length in the pictures' space."""

    def __init__(self, source: int, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(source, dimension)

    def forward(self, vectors_NT: Tensor) -> Tensor:
        """The projected vectors."""
        return F.normalize(self.linear(vectors_NT), dim=-1)

    @torch.no_grad()
    def start(self, texts_NT: Tensor, pictures_ND: Tensor, ridge: float = 0.1) -> None:
        """Begin at the least-squares map from texts to pictures of the same products, with a ridge."""
        middle_T, middle_D = texts_NT.mean(dim=0), pictures_ND.mean(dim=0)
        centred_NT, wanted_ND = (texts_NT - middle_T).double(), (pictures_ND - middle_D).double()
        gram_TT = centred_NT.T @ centred_NT / len(texts_NT)
        gram_TT += ridge * gram_TT.diagonal().mean() * torch.eye(len(gram_TT), dtype=torch.float64)
        solved_TD = torch.linalg.solve(gram_TT, centred_NT.T @ wanted_ND / len(texts_NT)).float()
        self.linear.weight.copy_(solved_TD.T)
        self.linear.bias.copy_(middle_D - middle_T @ solved_TD)


class AttributeAdapter(nn.Module):
    """The heads of one card; vectors go in as the frozen towers give them."""

    def __init__(self, card: AdapterCard) -> None:
        super().__init__()
        self.card = card
        self.image = Head(card.dimension, card.head)
        self.text: Head | Projection | None = None
        if card.text is not None:
            self.text = (Head(card.dimension, card.head) if card.shares_space
                         else Projection(int(card.text["dimension"]), card.dimension))
            self.fusion = nn.Parameter(torch.logit(torch.tensor(FUSION_START)))
        self.prototypes = nn.ParameterDict({
            name: nn.Parameter(torch.randn(len(values), card.dimension)) for name, values in card.attributes.items()})
        self.scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    @torch.no_grad()
    def start(self, vectors_ND: Tensor, codes_NA: Tensor, texts_NT: Tensor | None = None) -> None:
        """Begin at what train pictures say: their middle, and each value's prototype at its pictures' seen from there.

        `codes_NA` are values by their number in the card's order, -1 where unknown; `texts_NT` are the vectors of the
        products' texts, zeros where there is none: their middle, or the projection that is nearest to the pictures.
        """
        middle_D = vectors_ND.mean(dim=0)
        self.image.middle.copy_(middle_D)
        if texts_NT is not None:
            there_N = (texts_NT != 0).any(dim=1)
            if isinstance(self.text, Projection):
                self.text.start(texts_NT[there_N], vectors_ND[there_N])
            elif self.text is not None:
                self.text.middle.copy_(texts_NT[there_N].mean(dim=0))
        for column, name in enumerate(self.card.attributes):
            prototypes_VD = self.prototypes[name]
            for value in range(len(prototypes_VD)):
                own = codes_NA[:, column] == value
                if own.any():
                    prototypes_VD[value] = F.normalize(vectors_ND[own].mean(dim=0) - middle_D, dim=0)

    def logits(self, adapted_ND: Tensor) -> dict[str, Tensor]:
        """For each attribute, in the card's order, the logits of its values, (N, V), of adapted pictures."""
        return {name: self.scale * adapted_ND @ F.normalize(self.prototypes[name], dim=-1).T
                for name in self.card.attributes}       # a ParameterDict has them sorted by name

    def image_weight(self) -> Tensor:
        """w: how much of a product's similarity is its picture's."""
        return torch.sigmoid(self.fusion)

    def fuse(self, image_ND: Tensor, text_ND: Tensor) -> Tensor:
        """Adapted pictures and texts of the same products as one vector each, (N, 2 D), of unit length."""
        weight = self.image_weight()
        return torch.cat([weight.sqrt() * image_ND, (1 - weight).sqrt() * text_ND], dim=-1)

    @torch.inference_mode()
    def adapt(self, vectors: Floats, side: Literal["image", "text"] = "image") -> Floats:
        """Adapted vectors of frozen ones, float32 (N, D)."""
        head = self.image if side == "image" else self.text
        if head is None:
            raise EncoderError("this adapter was trained without texts; train one with `embeddings`")
        device = self.scale.device
        parts = [head(torch.from_numpy(np.ascontiguousarray(vectors[start:start + ROWS])).to(device)).cpu().numpy()
                 for start in range(0, len(vectors), ROWS)]
        return np.concatenate(parts) if parts else np.zeros((0, self.card.dimension), dtype=np.float32)

    def save(self, root: Path, readme: str = "") -> None:
        """Write the weights, the card, and `readme` as README.md."""
        root.mkdir(parents=True, exist_ok=True)
        save_file({name: one.detach().cpu().contiguous() for name, one in self.state_dict().items()}, root / WEIGHTS)
        (root / CARD).write_text(self.card.model_dump_json(indent=2), encoding="utf-8")
        if readme:
            (root / "README.md").write_text(readme, encoding="utf-8")

    @classmethod
    def load(cls, model: str) -> Self:
        """The adapter of a folder or an artefact; raises `EncoderError` unless card and weights fit together."""
        root = find_model(model, KIND)
        try:
            found = cls(AdapterCard.model_validate(json.loads((root / CARD).read_bytes())))
            found.load_state_dict(load_file(root / WEIGHTS))
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise EncoderError(f"{root}: is no attribute adapter ({str(error).splitlines()[0][:300]}); train one with "
                               "jobs/finetune_attribute_adapter.py") from None
        return found.eval()


def adapter_identity(model: str) -> dict[str, Any]:
    """What decides whether two adapted vectors may be compared."""
    root = find_model(model, KIND)
    card = AdapterCard.model_validate(json.loads((root / CARD).read_bytes()))
    trained = {} if card.base is None else {"trained_from": card.base["weights_sha256"]}
    return {**card.image, **trained, "adapter_sha256": sha256_of(root / WEIGHTS)}


# --- towers ---------------------------------------------------------------------------------------
class ImageTowerConfig(Config):
    """A network for pictures, and the adapter on it; one that was trained with its network brings that along."""

    encoder: ImageEncoderConfig = ImageEncoderConfig()
    adapter: str | None = None                  # folder or artefact of finetune_attribute_adapter; None: frozen
    text: TextEncoderConfig | None = None       # of an adapter whose texts come from another encoder


class ImageTower:
    """Pictures, and texts where there is a tower for them, as vectors of unit length in one space."""

    def __init__(self, encoder: ImageEncoder, adapter: AttributeAdapter | None, identity: Mapping[str, Any],
                 text: TextEncoderConfig | None) -> None:
        self.encoder, self.adapter = encoder, adapter
        self.identity, self.dimension, self.framing = dict(identity), encoder.dimension, encoder.framing
        self._text = None if text is None else build_text_encoder(text)
        if adapter is None or adapter.card.text is None or adapter.card.shares_space:
            return
        if self._text is not None and self._text.identity != adapter.card.text:
            raise EncoderError("text: the adapter was trained with another text encoder; give the one of its card")

    def encode(self, pictures: Sequence[Pixels]) -> Floats:
        """Vectors of N pictures, float32 (N, D)."""
        return self.adapt(self.encoder.encode_images(pictures))

    def encode_framed(self, framed: Sequence[Pixels]) -> Floats:
        """The same of pictures that `framing.frame` made ready."""
        return self.adapt(self.encoder.encode_framed(framed))

    def adapt(self, vectors: Floats) -> Floats:
        """Vectors of this tower from those of its network alone (the `image_vectors` artefact), (N, D)."""
        return vectors if self.adapter is None else self.adapter.adapt(vectors)

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Vectors of N texts in the pictures' space, (N, D); raises `EncoderError` where no tower reads texts."""
        if self.adapter is None or self.adapter.card.text is None:
            return self.encoder.encode_texts(texts)
        if self.adapter.card.shares_space:
            return self.adapter.adapt(self.encoder.encode_texts(texts), "text")
        if self._text is None:
            raise EncoderError("text: this adapter's texts come from an encoder of their own; say which")
        return self.adapter.adapt(self._text.encode_queries(texts), "text")


def load_image_tower(config: ImageTowerConfig) -> ImageTower:
    """The tower of `config`: its identity is the network's, with the adapter's hash where there is one.

    Errors: `EncoderError` for a network or an adapter that cannot be loaded, or that do not belong together.
    """
    if config.adapter is None:
        encoder = ImageEncoder(config.encoder)
        return ImageTower(encoder, None, encoder.identity, None)
    adapter = AttributeAdapter.load(config.adapter)
    own = {} if adapter.card.base is None else {"model": adapter.card.image["model"], "pretrained": config.adapter}
    encoder = ImageEncoder(config.encoder.replace(**own))
    if adapter.card.image != encoder.identity:
        raise EncoderError(f"adapter: {config.adapter} was trained on {adapter.card.image['model']} of other weights "
                           f"than this {config.encoder.model}; embed with the network that its card names")
    return ImageTower(encoder, adapter, adapter_identity(config.adapter), config.text)
