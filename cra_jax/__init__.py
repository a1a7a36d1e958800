"""CRA-CNN (Liu et al., BMVC 2020) in JAX and Flax.

A ResNet learns to attend: a second ResNet looks at the attended crop and at what was
left out while training, and is thrown away afterwards.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "predict": "cra_jax.inference.predict",
    "resnet": "cra_jax.backbones.resnet",
    "efficientnet": "cra_jax.backbones.efficientnet",
    "weights": "cra_jax.backbones.weights",
}


def __getattr__(name: str) -> Any:
    """`from cra_jax import predict`: imports a module when it is first asked for."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
