"""CRA-CNN (Liu et al., BMVC 2020) in JAX and Flax.

A ResNet learns to attend: a second ResNet looks at the attended crop and at what was
left out while training, and is thrown away afterwards.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cra_jax.inference.predictor import Predictor

__version__ = "0.1.0"

_MODULES = {
    "predict": "cra_jax.inference.predict",
    "resnet": "cra_jax.backbones.resnet",
    "efficientnet": "cra_jax.backbones.efficientnet",
    "weights": "cra_jax.backbones.weights",
}


def load(path: str | Path, *, checkpoint: str = "latest") -> "Predictor":
    """Loads a predictor from a run directory, one of its checkpoints, or an export.

    `load("runs/cub")("bird.jpg").classes[0]` is the best class of an image.

    Args:
      path: `runs/cub`, `runs/cub/checkpoints/1234` or `runs/cub/export`.
      checkpoint: "latest", "best" or a step, if `path` is a run directory.

    Raises:
      ValueError: the path is none of these, or its files are damaged.
    """
    from cra_jax.inference import predict  # here, because importing it takes seconds

    return predict.load(path, checkpoint=checkpoint)


def __getattr__(name: str) -> Any:
    """`from cra_jax import predict`: imports a module at its first use."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
