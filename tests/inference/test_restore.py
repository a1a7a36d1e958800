"""Restoring the plain backbone, and the attention head for figures."""

import dataclasses
import hashlib
import json
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from cra_jax import art_module, train_step
from cra_jax.inference import run_options
from cra_jax.inference.restore import (
    classification_variables,
    restore,
)
from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, pretrained
from tests.helpers import tiny_config

NAMES = tuple("abcde")


def _save_run(folder, kind, **changes: Any):
    """Saves an initial state as step 3 of a run; returns its config and state."""
    config = tiny_config.config(folder, **{"model.kind": kind, **changes})
    training = build.build_training(config, len(NAMES), steps_per_epoch=2)
    state = train_step.create_state(
        jax.random.key(0),
        training.network,
        training.optimizer,
        crop_px=32,
        averaged=config.optim.ema_decay > 0,
    )
    # The averages differ from the newest weights.
    average = jax.tree.map(lambda x: x + 1, state.average)
    state = dataclasses.replace(state, average=average)
    meta = {"class_names": NAMES, "epoch": 2, "config": config.to_dict()}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, state, meta, metric=0.5)
    return config, state


@pytest.mark.parametrize(
    ("kind", "head_kind"),
    [("cra", "pooled"), ("cra", "spatial"), ("stn", "pooled"), ("baseline", "pooled")],
)
def test_plain_backbone_and_attention_head_are_restored(tmp_path, kind, head_kind):
    changes = {"art.alpha_p": 0.9, "art.normalize_head": False, "art.head": head_kind}
    config, state = _save_run(tmp_path, kind, **changes)
    restored = restore(run_options.from_config(config), tmp_path)
    stream = state.params["classification_stream"]
    jax.tree.map(assert_array_equal, restored.variables["params"], stream)
    assert set(restored.variables) == {"params", "batch_stats"}
    assert (restored.step, restored.epoch, restored.class_names) == (3, 2, NAMES)

    # The bounds come from the checkpoint, not from the changed config.
    config.art.alpha_p, config.art.normalize_head = 0.5, True
    config.art.head = "pooled"
    options = run_options.from_config(config)
    head = restore(options, tmp_path, attention=True).head
    if kind == "baseline":
        assert head is None
        return
    assert head is not None
    trained = state.params["attention_head"]
    jax.tree.map(assert_array_equal, head.params, trained)
    bounds = head.head.config
    assert (bounds.alpha_p, bounds.normalize_head) == (0.9, False)
    assert bounds.head == head_kind
    images = jnp.ones((4, 32, 32, 3))
    out: Any = restored.backbone.apply(restored.variables, images)
    centres = art_module.cell_centres(restored.backbone, out.features, images)
    assert head(out.pooled, out.features, centres).shape == (4, 2, 3)


def test_missing_checkpoint_is_an_error(tmp_path):
    config, _ = _save_run(tmp_path, "cra")
    config.eval.checkpoint = "7"
    with pytest.raises(ValueError, match=r"no checkpoint '7'.*\[3\]"):
        restore(run_options.from_config(config), tmp_path)


def test_averages_are_restored_if_ema_decay_is_on(tmp_path):
    config, state = _save_run(tmp_path, "cra", **{"optim.ema_decay": 0.9})
    for decay, params, stats in (
        (0.9, state.average["params"], state.average["batch_stats"]),
        (0.0, state.params, state.batch_stats),
    ):
        config.optim.ema_decay = decay
        restored = restore(run_options.from_config(config), tmp_path)
        wanted = classification_variables(params, stats)
        jax.tree.map(assert_array_equal, restored.variables, wanted)
        options = run_options.from_config(config)
        head = restore(options, tmp_path, attention=True).head
        assert head is not None
        assert_array_equal(head.params["bias"], params["attention_head"]["bias"])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_pretrained_weights_of_a_run_are_its_prediction_weights(tmp_path, decay):
    config, state = _save_run(tmp_path, "baseline", **{"optim.ema_decay": decay})
    origin = pretrained.open_pretrained(str(tmp_path), arch=config.model.backbone)
    params, _ = state.to_predict()
    kernel = params["classification_stream"]["fc"]["kernel"]
    assert_array_equal(origin.arrays["fc.weight"], jnp.asarray(kernel).T)


def test_missing_averages_are_an_error(tmp_path):
    config, state = _save_run(tmp_path, "cra")
    config.optim.ema_decay = 0.99
    with pytest.raises(ValueError, match=r"optim.ema_decay asks.*checkpoint 3"):
        restore(run_options.from_config(config), tmp_path)
    # A run without the key ema_decay in its config has no averages.
    old = config.to_dict()
    del old["optim"]["ema_decay"]
    restored = restore(run_options.from_config(run_directory.upgraded(old)), tmp_path)
    wanted = state.params["classification_stream"]
    jax.tree.map(assert_array_equal, restored.variables["params"], wanted)


_NOT_OF_TRAINING = [
    lambda r: r["content"].pop("class_names"),
    lambda r: r["content"].update(class_names=5),
    lambda r: r["content"].update(class_names="abc"),
    lambda r: r["content"].update(class_names=[1, 2, 3]),
    lambda r: r["content"].update(class_names=[]),
    lambda r: r["content"].pop("epoch"),
    lambda r: r["content"].update(epoch="1\x1b[2J"),
    lambda r: r["content"].update(config=[]),
    lambda r: r["content"].pop("config"),
    lambda r: r["content"].update(data=5),
    lambda r: r["content"].update(metric_split=5),
    lambda r: r["content"]["config"].pop("art"),
    lambda r: r["content"]["config"].update(model=3),
    lambda r: r.update(content=[]),
    lambda r: r.pop("content"),
    lambda r: r.update(metric="high"),
    lambda r: r.update(arrays=[]),
    lambda r: r.pop("arrays"),
    lambda r: r["arrays"].update(x=["nonsense", [1], "0"]),
    lambda r: r["arrays"].update(x=["float32", [-1], "0"]),
    lambda r: r["arrays"].update(x=["float32", ["1"], "0"]),
    lambda r: r["arrays"].update(x=["float32", 1, "0"]),
    lambda r: r["arrays"].update(x=["float32", [1]]),
]


def test_meta_that_training_does_not_write_is_an_error(tmp_path):
    config, _ = _save_run(tmp_path, "cra")
    options = run_options.from_config(config)
    path = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    saved = path.read_text()
    for change in _NOT_OF_TRAINING:
        record = json.loads(saved)
        record.pop("checksum")
        change(record)
        text = json.dumps(record, sort_keys=True)
        record["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"checkpoint .*3 .*has"):
            restore(options, tmp_path, attention=True)


def test_checkpoint_that_training_removes_meanwhile_is_not_an_error(
    tmp_path, monkeypatch
):
    config, _ = _save_run(tmp_path, "cra")
    old, new = (tmp_path / "checkpoints" / str(step) for step in (3, 4))
    read = Checkpoints.meta

    def remove_first(checkpoints, step):
        if step == 3:
            shutil.copytree(old, new)
            shutil.rmtree(old / "meta")  # first a part of it, and soon all
            threading.Timer(0.3, lambda: shutil.rmtree(old)).start()
        return read(checkpoints, step)

    monkeypatch.setattr(Checkpoints, "meta", remove_first)
    restored = restore(run_options.from_config(config), tmp_path, attention=True)
    assert restored.step == 4
    assert restored.head is not None
