"""bfloat16 in the convolutions; float32 in state, losses and geometry."""

from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from cra_jax import train_step
from cra_jax.inference import run_options
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices, run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, check_config, train
from tests.helpers import tiny_config

BACKBONES = ("resnet10", "efficientnet_lite0")


def _one_device(config):
    """Returns the training step of a config for one device, and its state's maker."""
    network = build.build_network(config, 5)
    optimizer = build.build_training(config, 5, steps_per_epoch=10).optimizer
    step = train_step.make_train_step(
        build.build_loss(config, network, steps_per_epoch=10),
        optimizer,
        learning_rate=lambda step: jnp.float32(0.01),
        normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
    )
    make = partial(
        train_step.create_state, network=network, optimizer=optimizer, crop_px=32
    )
    return step, make


def _config(tmp_path, dtype, backbone="resnet10"):
    changes = {"model.dtype": dtype, "model.backbone": backbone}
    if backbone != "resnet10":
        changes |= {"model.width": 64, "model.stem": "imagenet"}
    return tiny_config.config(tmp_path, **changes)


def _batch(n=8):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
        "flip": rng.random(n) < 0.5,
        "label": rng.integers(0, 5, n).astype(np.int32),
    }


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_convolutions_are_bfloat16(tmp_path, backbone):
    step, make = _one_device(_config(tmp_path, "bfloat16", backbone))
    traced = jax.make_jaxpr(step)(jax.eval_shape(make, jax.random.key(0)), _batch())
    for kept in (*traced.in_avals, *traced.out_avals):
        assert kept.dtype != jnp.bfloat16
    seen = set()
    for equation in _equations(traced.jaxpr):
        name = equation.primitive.name
        types = {str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)}
        seen |= {(name, dtype) for dtype in types}
    assert ("conv_general_dilated", "bfloat16") in seen
    assert ("conv_general_dilated", "float32") not in seen
    # The sampler's coordinates and pixels, the angle, tanh and all losses.
    for name in ("gather", "cos", "tanh", "floor", "exp", "log", "sqrt", "rsqrt"):
        assert (name, "float32") in seen, name
        assert (name, "bfloat16") not in seen, name


def test_bfloat16_step_equals_float32_step_to_rounding(tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        step, make = _one_device(_config(tmp_path, dtype))
        found[dtype] = jax.jit(step)(make(jax.random.key(0)), _batch())
    wide, narrow = found["float32"][1], found["bfloat16"][1]
    for name in ("loss", "loss_cls1", "loss_cls2", "loss_cntr"):
        assert narrow[name] != wide[name], name
        assert_allclose(narrow[name], wide[name], rtol=0.02, err_msg=name)
    assert_allclose(narrow["gradient_norm"], wide["gradient_norm"], rtol=0.1)
    # So do the running statistics.
    for a, b in zip(
        *(jax.tree.leaves(state.batch_stats) for state, _ in found.values()),
        strict=True,
    ):
        assert_allclose(b, a, rtol=0.02, atol=0.01)


def test_run_resumes_in_another_precision(tmp_path):
    """Prediction is float32 in both cases, and so are the saved weights."""
    cache = tmp_path / "cache"
    changes = {"data.test_size": 16, "model.kind": "baseline"}
    first = tiny_config.config(cache, **changes, **{"model.dtype": "bfloat16"})
    first.train.epochs = 1
    train.run(first, tmp_path / "run")
    second = tiny_config.config(cache, **changes, **{"model.dtype": "float32"})
    train.run(second, tmp_path / "run", allow_change=True)
    lines = run_directory.read_metrics(tmp_path / "run")
    assert [x["step"] for x in lines if x["split"] == "test"] == [6, 12]
    with Checkpoints(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        for step in checkpoints.steps():
            dtypes = {x.dtype for x in jax.tree.leaves(checkpoints.shapes(step))}
            assert dtypes == {np.dtype(np.float32), np.dtype(np.int32)}
    backbone = run_options.from_config(first).create_backbone(8)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    traced = jax.make_jaxpr(backbone.init)(jax.random.key(0), images)
    assert "bf16" not in str(traced)
    assert "bf16" in str(
        jax.make_jaxpr(build.build_backbone(first, 8).init)(jax.random.key(0), images)
    )


def test_compute_dtype_auto_is_bfloat16_on_accelerators_only(tmp_path, monkeypatch):
    assert devices.compute_dtype("auto") == jnp.float32
    assert devices.compute_dtype("bfloat16") == jnp.bfloat16
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        assert devices.compute_dtype("auto") == jnp.bfloat16
        assert devices.compute_dtype("float32") == jnp.float32
    with pytest.raises(ValueError, match=r"unknown model.dtype 'half'; choose from"):
        check_config.check(_config(tmp_path, "half"))
