"""The optimizer compared with torch's SGD."""

import jax
import jax.numpy as jnp
import numpy as np

from cra_jax.training import optimizer
from tests.helpers.torch_or_skip import torch

RATE = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001]


def _rate(step):
    return jnp.asarray(RATE)[step]


def _params(rng):
    return {
        "classification_stream": {
            "conv1": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
            "bn1": {"scale": jnp.asarray(rng.normal(size=4), jnp.float32)},
        },
        "attention_head": {
            "kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
        },
    }


def _leaves(tree):
    return {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def test_ten_steps_equal_torch_sgd():
    rng = np.random.default_rng(0)
    params = _params(rng)
    chain = optimizer.make_optimizer(_rate)
    state = chain.init(params)
    torch_params = {k: torch.tensor(np.array(v)) for k, v in _leaves(params).items()}
    weights = list(torch_params.values())
    sgd = torch.optim.SGD(weights, lr=1.0, momentum=0.9, weight_decay=5e-4)
    for rate in RATE:
        gradient = _params(rng)
        updates, state = chain.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, value in _leaves(gradient).items():
            torch_params[name].grad = torch.tensor(np.array(value))
        for group in sgd.param_groups:
            group["lr"] = rate
        sgd.step()
    for name, value in _leaves(params).items():
        np.testing.assert_allclose(value, torch_params[name], rtol=2e-6, atol=2e-7)


def test_decay_norm_and_bias_false_decays_only_kernels():
    params = _params(np.random.default_rng(0))
    chain = optimizer.make_optimizer(_rate, decay_norm_and_bias=False)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = chain.update(zero, chain.init(params), params)
    changed = {name: bool(jnp.any(x != 0)) for name, x in _leaves(updates).items()}
    assert changed == {
        "classification_stream.conv1.kernel": True,
        "classification_stream.bn1.scale": False,
        "attention_head.kernel": True,
        "attention_head.bias": False,
    }
