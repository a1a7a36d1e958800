"""Full-size networks and ten steps of training, compared with torch.

Slow: `make test-slow`. `test_resnet.py` tests small networks.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from cra_jax.backbones import resnet
from cra_jax.training.optimizer import make_optimizer
from tests.helpers.torch_or_skip import torch
from tests.helpers.torch_parity import noise, to_numpy, to_torch
from tests.oracles.torch_resnet import LAYERS, TorchResNet, randomize, to_linen

pytestmark = pytest.mark.slow

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIDES_PX = (224, 225, 448)


def differences(actual, expected):
    """Returns each array's largest difference, relative to max(1, largest value)."""
    assert expected.keys() <= actual.keys()
    found = {}
    for name, value in expected.items():
        value = np.asarray(value)
        assert actual[name].shape == value.shape, name
        scale = max(1, np.abs(value).max())
        found[name] = float(np.abs(actual[name] - value).max() / scale)
    return found


@pytest.mark.parametrize("side_px", SIDES_PX)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_stage_of_a_full_size_network_equals_torch(arch, side_px):
    torch_model = randomize(TorchResNet(arch, 1000), seed=0).eval()
    images = noise(1, side_px, side_px, 3)
    with torch.no_grad():
        expected = torch_model.stages(to_torch(images))
    expected = {name: to_numpy(value) for name, value in expected.items()}
    assert sum(name.startswith("layer") for name in expected) == sum(LAYERS[arch][1])

    @jax.jit
    def stages(variables, images) -> Any:
        return resnet.create(arch, 1000).apply(
            variables,
            images,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: len(module.path) == 1,
        )

    variables = to_linen(torch_model.state_dict().items())
    outputs, state = stages(variables, images)
    seen = {n: m["__call__"][0] for n, m in state["intermediates"].items() if n != "fc"}
    seen |= {name: getattr(outputs, name) for name in ("features", "pooled", "logits")}
    found = differences(seen, expected)
    worst = max(found, key=lambda name: found[name])
    print(f"{arch} at {side_px}: largest difference {found[worst]:.1e}, in {worst}")
    assert found[worst] < 1e-4


def test_weights_and_statistics_equal_torch_after_ten_steps():
    """SGD with momentum and weight decay; the running variance is unbiased."""
    rate, steps = 0.01, 10
    torch_model = randomize(TorchResNet("resnet10", 5, 8), seed=1).train()
    sgd = torch.optim.SGD(
        torch_model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4
    )
    model = resnet.create("resnet10", 5, width=8)
    variables = to_linen(torch_model.state_dict().items())
    start: Any = flatten_dict(variables)
    optimizer = make_optimizer(lambda step: rate)

    @jax.jit
    def step(variables, optimizer_state, images, labels):
        def loss(params):
            outputs, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                outputs.logits, labels
            )
            return losses.mean(), updates

        params = variables["params"]
        grads, updates = jax.grad(loss, has_aux=True)(params)
        moves, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return {"params": optax.apply_updates(params, moves), **updates}, (
            optimizer_state
        )

    optimizer_state = optimizer.init(variables["params"])
    for i in range(steps):
        images = noise(4, 65, 64, 3, seed=i)
        labels = np.arange(i, i + 4) % 5
        variables, optimizer_state = step(variables, optimizer_state, images, labels)
        sgd.zero_grad()
        logits = torch_model(to_torch(images))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        sgd.step()

    actual: Any = flatten_dict(variables)
    expected: Any = flatten_dict(to_linen(torch_model.state_dict().items()))
    found = differences(actual, expected)
    moved = differences(start, expected)
    for leaf in ("mean", "var", "kernel", "scale", "bias"):
        keys = [key for key in expected if key[-1] == leaf]
        worst = max(found[key] for key in keys)
        least = min(moved[key] for key in keys)
        print(f"{leaf}: difference at most {worst:.1e}; moved at least {least:.1e}")
        assert worst < 1e-4
        assert least > 10 * worst  # one step less would fail

    # With biased variances, the last stage (24 values a channel) would differ.
    count = 4 * 3 * 2
    path = ("batch_stats", "layer4_0", "bn2", "var")
    kept = 0.9**steps * start[path]
    biased = kept + (expected[path] - kept) * (count - 1) / count
    gap = np.abs(biased - expected[path]).max() / np.abs(expected[path]).max()
    print(f"biased variance would differ by {gap:.1e} in {'.'.join(path)}")
    assert gap > 1e-2
