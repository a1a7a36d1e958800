"""Conversions and comparisons between torch and linen."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tests.helpers.torch_or_skip import torch


def noise(*shape, seed=0, dtype: Any = np.float32):
    """Draws standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def to_torch(images):
    """Returns `[b, h, w, c]` as a tensor `[b, c, h, w]`."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def to_numpy(tensor):
    """Returns a tensor `[b, c, h, w]` as `[b, h, w, c]`; other ranks unchanged."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def flat(tree) -> dict[Any, Any]:
    """Calls `flatten_dict`; its type is easier to use."""
    return flatten_dict(tree)


def assert_trees_close(actual, expected, **tolerance):
    """Checks that the paths are the same and the values within the tolerance."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(
            actual[path], value, err_msg="/".join(path), **tolerance
        )


def assert_stages_equal(torch_model, net, variables, images, train):
    """Compares all activations; returns linen's new statistics and the names."""
    with torch.no_grad():
        expected = torch_model.train(train).stages(to_torch(images))
    apply = partial(
        net.apply,
        train=train,
        mutable=["intermediates", "batch_stats"],
        capture_intermediates=True,
    )
    outputs, state = jax.jit(apply)(variables, images)
    seen = {
        name: module["__call__"][0]
        for name, module in state["intermediates"].items()
        if name != "__call__" and "__call__" in module
    }
    seen |= {name: getattr(outputs, name) for name in ("features", "pooled", "logits")}
    assert expected.keys() <= seen.keys()
    for name, value in expected.items():
        value = to_numpy(value)
        # The rounding of a sum is relative to the scale of the whole array.
        limit = 1e-4 * max(1, np.abs(value).max())
        np.testing.assert_allclose(seen[name], value, rtol=0, atol=limit, err_msg=name)
    return state["batch_stats"], expected.keys()
