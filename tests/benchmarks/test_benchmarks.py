"""Tests of the PyTorch code that is compared, and of time measurements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import timing
from configs.cub import get_config
from cra_jax.training import build
from tests.helpers.torch_or_skip import torch
from tests.oracles.torch_resnet import randomize, to_linen

SIDE = 64


@pytest.mark.parametrize("kind", ["baseline", "cra"])
def test_pytorch_code_has_the_same_loss(kind):
    config = get_config(f"resnet10,{kind}")
    config.art.size_px = SIDE // 2
    network = build.build_network(config, 5)
    loss_of = build.build_loss(config, network, steps_per_epoch=1)
    torch.manual_seed(0)
    from benchmarks.torch_baseline import CRACNN  # needs PyTorch

    peer = CRACNN("resnet10", 5, art_px=SIDE // 2, baseline=kind == "baseline")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, SIDE, SIDE, 3)).astype(np.float32)
    labels = np.array([0, 3, 1, 4], np.int32)
    params, stats = {}, {}
    streams = {"classification_stream": peer.classification}
    if kind == "cra":
        streams["regularization_stream"] = peer.regularization
    for seed, (name, module) in enumerate(streams.items()):
        randomize(module, seed)
        tree = to_linen(module.state_dict().items())
        params[name], stats[name] = tree["params"], tree["batch_stats"]
    if kind == "cra":
        with torch.no_grad():
            peer.head.weight.normal_(std=0.3)
        params["attention_head"] = {
            "kernel": peer.head.weight.detach().numpy().T,
            "bias": peer.head.bias.detach().numpy(),
        }
    ours, _ = jax.jit(loss_of)(params, stats, jnp.asarray(images), labels, 0)
    theirs = peer.train()(
        torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels).long()
    )
    assert float(ours) == pytest.approx(theirs.item(), rel=2e-4)


def test_ratios_are_computed_per_round():
    assert timing.ratio([2.0, 40.0, 6.0], [1.0, 20.0, 2.0]) == 2.0
    assert timing.summary([1.0, 2.0, 3.0]) == "2.0 (1.0 to 3.0)"


def test_actions_alternate():
    seen = []
    actions = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = timing.measure_alternately(actions, repeats=3)
    assert seen == list("ab" * 5)
    assert [len(taken) for taken in times.values()] == [3, 3]
