"""An encoder between two others: base + share x (trained - base), weight by weight.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from recsys_ray.models.sentence_layout import find_model

WEIGHTS = "model.safetensors"


def averaged_encoder(base: str, trained: Path, share: float, target: Path) -> Path:
    """`target` as a sentence-transformers folder with the weights in between; the folder of `trained` for share 1.

    Errors: `ValueError` when the two have different weights or one is not in a single safetensors file.
    """
    if share == 1:
        return trained
    from safetensors.torch import load_file, save_file

    names = [path.relative_to(trained) for path in trained.rglob(WEIGHTS)]
    if len(names) != 1 or not (find_model(base) / names[0]).is_file():
        raise ValueError(f"{trained}, {base}: each must have its weights in one {WEIGHTS}, at the same place")
    one, other = load_file(find_model(base) / names[0]), load_file(trained / names[0])
    if missing := [name for name in other if name not in one or one[name].shape != other[name].shape]:
        raise ValueError(f"{trained}: {missing[0]} is none of the weights of {base}")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(trained, target)
    save_file({name: (one[name].float() + share * (other[name].float() - one[name].float())).contiguous()
               for name in other}, target / names[0], metadata={"format": "pt"})
    return target
