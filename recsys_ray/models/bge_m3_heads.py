"""BGE-M3's two heads over token states: `sparse_linear.pt` and `colbert_linear.pt` beside the body's files.

Each file is the state of one linear layer, {weight, bias}. The sparse head gives a token the weight
relu(w . h + b); the multi-vector head gives it the unit-length vector of W h + b (Chen et al., "BGE
M3-Embedding", arXiv 2402.03216, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from recsys_ray.models.sentence_layout import MULTI_HEAD, SPARSE_HEAD, EncoderError, head_file

FIRST_WEIGHT = 0.2      # about what BGE-M3 gives a word that matters
RIDGE = 1e-2            # of the mean square of a state's coordinate


class BgeM3Heads(nn.Module):
    """The heads that are there; both compute in their own type, float32, whatever the body's."""

    def __init__(self, sparse: nn.Linear | None, multi: nn.Linear | None) -> None:
        super().__init__()
        self.sparse_linear, self.colbert_linear = sparse, multi

    @classmethod
    def new(cls, dimension: int, multi_dimension: int | None = None) -> Self:
        """Heads for a body of `dimension` that has none, as a first training starts from.

        Token vectors are the body's own states, or an orthogonal projection of them to `multi_dimension`;
        all tokens weigh the same until `fit_sparse`.
        """
        sparse, multi = nn.Linear(dimension, 1), nn.Linear(dimension, multi_dimension or dimension)
        nn.init.zeros_(sparse.weight)
        nn.init.constant_(sparse.bias, FIRST_WEIGHT)    # above 0: the gradient of a ReLU at rest is 0 for ever
        if multi.in_features == multi.out_features:
            nn.init.eye_(multi.weight)
        else:
            nn.init.orthogonal_(multi.weight)
        nn.init.zeros_(multi.bias)
        return cls(sparse, multi)

    @torch.no_grad()
    def fit_sparse(self, hidden_TD: Tensor, weights_T: Tensor) -> None:
        """Set the sparse head to the ridge regression of `weights_T`, the wanted weights of T tokens, on their states.

        Where the states say little about the weights it comes near to their mean.
        """
        assert self.sparse_linear is not None
        hidden_TD, weights_T = hidden_TD.double(), weights_T.double()
        middle_D, mean = hidden_TD.mean(dim=0), weights_T.mean()
        centred_TD = hidden_TD - middle_D
        square_DD = centred_TD.T @ centred_TD
        square_DD.diagonal().add_(RIDGE * square_DD.diagonal().mean() + torch.finfo(torch.float64).tiny)
        found_D = torch.linalg.solve(square_DD, centred_TD.T @ (weights_T - mean))
        self.sparse_linear.weight.copy_(found_D[None, :])
        self.sparse_linear.bias.copy_(mean - middle_D @ found_D)

    @classmethod
    def load(cls, root: Path, dimension: int, *, sparse: bool = True, multi: bool = True) -> Self:
        """The heads that are asked for; raises `EncoderError` naming the file that is missing or does not fit."""
        return cls(_read_linear(root / SPARSE_HEAD, dimension, 1) if sparse else None,
                   _read_linear(root / MULTI_HEAD, dimension, None) if multi else None)

    @staticmethod
    def there(root: Path) -> bool:
        """Whether a model's directory has any head's file."""
        return (root / SPARSE_HEAD).is_file() or (root / MULTI_HEAD).is_file()

    def save(self, root: Path) -> None:
        """Write each head's file into a model's directory."""
        for head, name in ((self.sparse_linear, SPARSE_HEAD), (self.colbert_linear, MULTI_HEAD)):
            if head is not None:
                state = {key: tensor.detach().float().cpu().contiguous() for key, tensor in head.state_dict().items()}
                torch.save(state, root / name)

    def token_weights(self, hidden_TD: Tensor) -> Tensor:
        """The lexical weight of every token, float32 (T,), at least 0."""
        if self.sparse_linear is None:
            raise EncoderError("this model was loaded without its sparse head; load it with sparse=True")
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weights: Tensor = self.sparse_linear(hidden_TD.to(self.sparse_linear.weight.dtype)).squeeze(-1)
        return F.relu(weights)

    def token_vectors(self, hidden_TD: Tensor) -> Tensor:
        """The unit-length vector of every token, float32 (T, M)."""
        if self.colbert_linear is None:
            raise EncoderError("this model was loaded without its multi-vector head; load it with multi_vector=True")
        with torch.autocast(hidden_TD.device.type, enabled=False):
            return F.normalize(self.colbert_linear(hidden_TD.to(self.colbert_linear.weight.dtype)), dim=-1)


def multi_dimension(root: Path, dimension: int) -> int:
    """The size of the token vectors that a model's multi-vector head gives."""
    return _read_linear(root / MULTI_HEAD, dimension, None).out_features


def _read_linear(path: Path, inputs: int, outputs: int | None) -> nn.Linear:
    head_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or foreign file makes torch raise a dozen kinds
        raise EncoderError(f"{path}: cannot be read as a head's weights ({type(error).__name__}); "
                           "fetch the model again") from None
    if not isinstance(state, dict) or set(state) != {"weight", "bias"}:
        raise EncoderError(f"{path}: holds {_named(state)}, not exactly weight and bias")
    weight, bias = state["weight"], state["bias"]
    wanted = (outputs if outputs is not None else weight.shape[0], inputs)
    if tuple(weight.shape) != wanted or tuple(bias.shape) != wanted[:1]:
        raise EncoderError(f"{path}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} where {wanted} and "
                           f"{wanted[:1]} belong; the head is of another body")
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise EncoderError(f"{path}: holds NaN or infinity; fetch the model again")
    linear = nn.Linear(inputs, wanted[0])
    linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return linear


def _named(state: object) -> str:
    return ", ".join(map(str, state)) if isinstance(state, Iterable) else type(state).__name__
