"""CRA-CNN whose streams return their input images as scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cra_jax import model
from cra_jax.art_module import ArtConfig
from tests.helpers.echo_backbone import Echo

SIZE = 8


IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3))


def make_network(kind="cra", **options: Any):
    options = {"inside": False, **options}
    return model.create(kind, Echo, ArtConfig(size_px=SIZE, **options))


def run(network, head=None, train=False):
    images = jnp.asarray(IMAGES, jnp.float32)
    variables = network.init(jax.random.key(0), images)
    params = dict(variables["params"])
    if head is not None:
        params["attention_head"] = head
    variables = {**variables, "params": params}
    out, _ = network.apply(variables, images, train, mutable=["batch_stats"])
    return out


def constant_head(gamma):
    """Returns parameters of a head that gives every image the same Gamma."""
    gamma = jnp.asarray(gamma, jnp.float32)
    return {"kernel": jnp.zeros((3, len(gamma))), "bias": gamma}


def as_images(logits):
    return np.asarray(logits).reshape(2, SIZE, SIZE, 3)


GAMMA = (0.31, -0.52, 0.83, 0.4)
