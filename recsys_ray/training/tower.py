"""The picture tower itself as something that is trained: all of its weights, or low-rank matrices beside them.

Every picture of a step goes through the network once on one of the workers. The loss is computed on the vectors alone,
and its gradient with respect to them is sent through the network in chunks (GradCache; Gao et al., arXiv 2101.06983),
so a step needs the memory of one chunk and has the gradient of the whole batch. The network runs as it does when it is
used: without dropout, and batch norms keep the averages they were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recsys_ray.config import Config, ConfigError
from recsys_ray.data.image_files import ImageTable
from recsys_ray.models.image_encoder import TOWER, ImageEncoder, ImageEncoderConfig, state_sha256
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.training.distributed import rank, sum_over_workers, world_size
from recsys_ray.training.tower_pictures import Pictures

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class TowerLora(Config):
    """Low-rank matrices beside frozen ones (Hu et al., arXiv 2106.09685): W + alpha / rank * B A, B = 0 at first."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    # endings of the names of the matrices W; these are all in the blocks of OpenCLIP's own transformers
    weights: tuple[str, ...] = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class TowerConfig(Config):
    """How the network is trained, and where its pictures are."""

    train: Literal["full", "lora"] = "full"
    lora: TowerLora = TowerLora()
    learning_rate: float = Field(default=1e-5, gt=0)    # of the network; the heads' is optim.learning_rate
    at_once: int = Field(default=32, ge=1)      # pictures that go through the network together: a matter of memory
    images: ImageTable | None = None            # None: what `vectors` was made of
    encoder: ImageEncoderConfig | None = None   # None: what `vectors` was made with

    def completed(self, made: Mapping[str, Any], gpus: bool) -> Self:
        """The same with what is not given from `made`, the configuration that the vectors were made by.

        Errors: `ConfigError` where that does not say it either.
        """
        if lacking := [name for name in ("images", "encoder") if getattr(self, name) is None and name not in made]:
            raise ConfigError(f"tower.{lacking[0]}: `vectors` does not say what it was made of; give it here")
        images = self.images or ImageTable.model_validate(made["images"])
        encoder = self.encoder or ImageEncoderConfig.model_validate(made["encoder"])
        return self.replace(images=images, encoder=encoder.resolved().replace(
            dtype="float32", device="cuda" if gpus else "cpu", batch_size=self.at_once))


class TrainedTower:
    """A network with its pictures, while it is trained."""

    def __init__(self, config: TowerConfig, encoder: ImageEncoder, pictures: Pictures) -> None:
        """Errors: `EncoderError` where low-rank matrices fit nowhere."""
        self.config, self.encoder, self.pictures = config, encoder, pictures
        if config.train == "lora":
            add_low_rank(self.network, config.lora)
        else:
            self.network.requires_grad_(True)

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        return self.encoder.network

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those that are trained, in the network's order."""
        return [one for one in self.network.parameters() if one.requires_grad]

    def vectors(self, places: Ints) -> Floats:
        """Vectors of unit length of pictures as the network is now, (N, D)."""
        self.network.eval()
        return self.encoder.encode_framed(self.pictures.framed(places))

    def states(self, places: Ints) -> Tensor:
        """The same with gradients to the network's weights."""
        self.network.eval()     # the loop turns training on before each step
        batch = self.encoder.framing.batch(self.pictures.framed(places))
        return F.normalize(self.network(batch.to(self.encoder.device)), dim=-1)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the network as `ImageEncoderConfig.pretrained` reads it; returns its identity. Training ends here."""
        merge_low_rank(self.network)
        weights = {name: one.detach().cpu().contiguous() for name, one in self.encoder.checkpoint().items()}
        save_file(weights, folder / TOWER)
        return {**self.encoder.identity, "weights_sha256": state_sha256(self.network)}


class TowerPass:
    """The vectors of a step's pictures, (U, D): a worker computes its share of them and knows all."""

    def __init__(self, tower: TrainedTower, places: Ints) -> None:
        """`places` are sorted, none twice, and the same on every worker."""
        self.tower, self.places = tower, places
        own, most = np.arange(rank(), len(places), world_size()), tower.config.at_once
        self.chunks = [own[start:start + most] for start in range(0, len(own), most)]
        vectors_UD = torch.zeros(len(places), tower.encoder.dimension, device=tower.encoder.device)
        self._last: Tensor | None = None
        for chunk in self.chunks:
            with torch.set_grad_enabled(chunk is self.chunks[-1]):     # its graph is kept: no second pass
                self._last = tower.states(places[chunk])
            vectors_UD[chunk] = self._last.detach()
        self.vectors_UD = sum_over_workers(vectors_UD).requires_grad_()

    def take(self, places: Ints) -> Tensor:
        """The vectors of some of the pictures, (N, D), with gradients to `vectors_UD`."""
        found: Tensor = self.vectors_UD[np.searchsorted(self.places, places)]
        return found

    def gradients(self, of_vectors_UD: Tensor) -> list[Tensor]:
        """What this worker's pictures add to the gradient of each trained weight.

        `of_vectors_UD` is the gradient of this worker's loss; of the vectors the sum over all workers is meant.
        """
        wanted_UD, weights = sum_over_workers(of_vectors_UD), self.tower.weights
        summed = [torch.zeros_like(one) for one in weights]
        for chunk in self.chunks:
            states = self._last if chunk is self.chunks[-1] else self.tower.states(self.places[chunk])
            assert states is not None
            found = torch.autograd.grad(states, weights, wanted_UD[chunk], allow_unused=True)
            for total, one in zip(summed, found, strict=True):
                if one is not None:
                    total += one
        self._last = None
        return summed


# --- low rank -------------------------------------------------------------------------------------
class _LowRank(nn.Module):
    """A frozen matrix (M, N) -> the same with a product of rank R added.

    A parametrisation and no layer of its own: attention takes its matrices without calling the layers that hold them.
    The frozen matrix is never written to, so that a run that goes on finds the very bits it stopped with.
    """

    def __init__(self, weight_MN: Tensor, config: TowerLora) -> None:
        super().__init__()
        rows, columns = weight_MN.shape
        self.down = nn.Parameter(weight_MN.new_empty(config.rank, columns))
        self.up = nn.Parameter(weight_MN.new_zeros(rows, config.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = config.alpha / config.rank

    def forward(self, weight_MN: Tensor) -> Tensor:
        """The sum."""
        return weight_MN + self.scale * (self.up @ self.down)


def add_low_rank(network: nn.Module, config: TowerLora) -> None:
    """Freeze a network and put trained low-rank matrices beside those that `config.weights` names.

    Errors: `EncoderError` where it has none of these, or where one is no matrix (a convolution).
    """
    network.requires_grad_(False)
    chosen = [(name, one) for name, one in network.named_parameters() if name.endswith(config.weights)]
    if not chosen:
        raise EncoderError(f"tower.lora.weights: the network has none of {', '.join(config.weights)}; it has, for "
                           f"example, {', '.join(_matrices(network)[-3:]) or 'no matrix at all'}. Convolutions are "
                           "trained with train=full")
    if other := [name for name, one in chosen if one.ndim != 2]:
        raise EncoderError(f"tower.lora.weights: {other[0]} is no matrix; convolutions are trained with train=full")
    for name, one in chosen:
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        parametrize.register_parametrization(module, own, _LowRank(one.detach(), config))
    for name, one in network.named_parameters():
        one.requires_grad_(name.endswith((".0.up", ".0.down")))


def merge_low_rank(network: nn.Module) -> None:
    """Write the sums in the place of the frozen matrices: the network is then as it was made, with other weights."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            names: Sequence[str] = list(module.parametrizations)    # type: ignore[arg-type]
            for name in names:
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _matrices(network: nn.Module) -> list[str]:
    return [name for name, one in network.named_parameters() if one.ndim == 2]
