"""Networks in torch and in linen side by side: conversions and comparisons."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tests.helpers.torch_or_skip import torch


def noise(*shape, seed=0, dtype: Any = np.float32):
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def to_torch(images):
    """`[b, h, w, c]` -> a tensor `[b, c, h, w]`."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def to_numpy(tensor):
    """A tensor `[b, c, h, w]` -> `[b, h, w, c]`; of another rank, as it is."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def flat(tree) -> dict[Any, Any]:
    """`flatten_dict` with a type that is easier to use."""
    return flatten_dict(tree)


def assert_trees_close(actual, expected, **tolerance):
    """The same paths, and values within the tolerance."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(
            actual[path], value, err_msg="/".join(path), **tolerance
        )


def assert_stages_equal(torch_model, net, variables, images, train):
    """Compares all activations; returns linen's new statistics and all names."""
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
        # Rounding is relative to what was added up: to the scale of the whole array.
        limit = 1e-4 * max(1, np.abs(value).max())
        np.testing.assert_allclose(seen[name], value, rtol=0, atol=limit, err_msg=name)
    return state["batch_stats"], expected.keys()
