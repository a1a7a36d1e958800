"""Tests of bit-identical training with the same seed, on a GPU with one flag."""

import importlib.util
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cra_jax.training import build
from tests.faults.harness import Run, assert_same_run, options
from tests.helpers import tiny_config

FLAG = "--xla_gpu_deterministic_ops=true"


def test_xla_knows_the_flag():
    """XLA ends a process with an unknown flag."""
    known, unknown = (
        subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
            capture_output=True,
            text=True,
        )
        for flag in (FLAG, "--xla_gpu_no_such_flag=true")
    )
    assert known.returncode == 0, known.stderr
    assert unknown.returncode != 0


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_no_step_has_a_select_and_scatter(tmp_path, backbone):
    """With the flag, XLA does not compile a select-and-scatter.

    The default gradient of max-pooling has one; the backbones use another gradient.
    """
    changes = {"model.backbone": backbone, "model.width": 64}
    config = tiny_config.config(tmp_path, **changes, **{"model.stem": "imagenet"})
    network = build.build_network(config, 3)
    loss = build.build_loss(config, network, steps_per_epoch=6)
    images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    variables = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images)
    text = (
        jax.jit(jax.grad(loss, has_aux=True))
        .lower(variables["params"], variables["batch_stats"], images, labels, 0)
        .as_text()
    )
    assert "stablehlo.convolution" in text
    assert "stablehlo.select_and_scatter" not in text


def test_the_default_max_pooling_has_a_select_and_scatter():
    def pooled(x):
        return nn.max_pool(x, (3, 3), (2, 2)).sum()

    text = jax.jit(jax.grad(pooled)).lower(jnp.ones((1, 8, 8, 1))).as_text()
    assert "stablehlo.select_and_scatter" in text


def test_two_runs_on_a_gpu_are_bit_identical(tmp_path):
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not (shutil.which("nvidia-smi") and any(map(importlib.util.find_spec, plugins))):
        pytest.skip("SKIPPED, NOT PASSED: no NVIDIA GPU, or jax without CUDA")
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        given = [f"--workdir={folder}/run", *options(tmp_path / "home")]
        run = Run(tmp_path, *given, JAX_PLATFORMS="cuda", XLA_FLAGS=FLAG)
        assert run.end() == 0, run.text
        assert "on 1 x " in run.text
    assert_same_run(*(folder / "run" for folder in folders))
