"""Tests of steps with non-finite values, and of warnings about the training."""

import json
import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cra_jax.input.batches import TrainBatches
from cra_jax.runtime import run_directory
from cra_jax.training import build, monitor, replay, step_wrappers, train
from tests.helpers import tiny_config

BAD = 5


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make_config(cache_dir, **changes):
    return tiny_config.config(
        cache_dir,
        **{"model.kind": "baseline", "train.epochs": 1, "checkpoint.every_steps": 3},
        **changes,
    )


@pytest.fixture
def infinite_loss(monkeypatch):
    """Makes the loss of one step infinite by a division by zero."""
    make_loss = build.build_loss

    def build_loss(*arguments, **keywords):
        loss_function = make_loss(*arguments, **keywords)

        def scaled_loss(params, batch_stats, images, labels, step):
            loss, (stats, terms) = loss_function(
                params, batch_stats, images, labels, step
            )
            factor = 1 / jax.numpy.where(step == BAD - 1, 0.0, 1.0)
            return loss * factor, (stats, terms | {"loss": loss * factor})

        return scaled_loss

    monkeypatch.setattr(build, "build_loss", build_loss)


def test_a_bad_step_stops_the_run_and_is_reproduced_by_replay(
    cache_dir, tmp_path, infinite_loss, capsys, note
):
    config = make_config(cache_dir)
    with pytest.raises(ValueError, match=r"step 5 failed .* loss inf") as caught:
        train.run(config, tmp_path)
    assert "lower optim.base_lr (now 0.05)" in str(caught.value)
    assert f"`python -m cra_jax.training.replay {tmp_path}`" in str(caught.value)
    (line,) = monitor.read_bad_steps(tmp_path)
    assert line["step"] == BAD
    assert line["terms"]["loss"] == "inf"
    assert math.isfinite(line["terms"]["loss_cls1"])
    dataset = build.load_dataset(config)
    split = build.open_split(config, dataset, "train")
    batches = TrainBatches(
        split.images, split.labels, batch_size=16, crop_px=32, seed=0
    )
    expected = batches.batch(BAD - 1)["index"].tolist()
    assert line["index"] == expected
    assert line["name"] == [split.records[i].name for i in expected]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert replay.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "from checkpoint 3 to step 5" in out
    assert "  loss: inf\n" in out
    assert out.endswith("the same numbers\n")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # The same command fails at the same step, and the file has it once.
    with pytest.raises(ValueError, match="step 5 failed"):
        train.run(config, tmp_path)
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [BAD]
    note(
        "the loss of a step is not finite",
        "stops and reports step, loss terms and images; a command reproduces the step",
    )


def test_bad_steps_may_be_skipped(cache_dir, tmp_path, infinite_loss, capsys, note):
    config = make_config(cache_dir, **{"train.skip_bad_steps": 1})
    train.run(config, tmp_path)
    assert (
        "(1 of train.skip_bad_steps=1; its images are listed in"
        in capsys.readouterr().err
    )
    lines = run_directory.read_metrics(tmp_path)
    assert all(math.isfinite(x["loss"]) for x in lines)
    assert [x["step"] for x in lines if x["split"] == "train"] == [4, 6]
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [BAD]
    note(
        "the loss of a step is not finite, with `train.skip_bad_steps=1`",
        "the update is skipped; training continues",
    )


def test_a_skipped_update_changes_only_the_step_counter(cache_dir):
    config = make_config(cache_dir)
    training = build.build_training(config, 8, steps_per_epoch=6)
    from cra_jax import train_step

    def start():
        return train_step.create_state(
            jax.random.key(0), training.network, training.optimizer, crop_px=32
        )

    def step_with(norm):
        def step(state, batch):
            after = jax.tree.map(lambda x: x + 1, state)
            return after, {"loss": jax.numpy.float32(1), "gradient_norm": norm}

        return jax.jit(step_wrappers.skip_non_finite(step))

    before = start()
    for norm, same in ((np.float32("nan"), True), (np.float32(3), False)):
        after, terms = step_with(norm)(start(), {})
        assert int(after.step) == 1
        assert (
            step_wrappers.is_finite_step({k: float(v) for k, v in terms.items()})
            != same
        )
        for name in ("params", "batch_stats", "opt_state"):
            one, other = (
                jax.tree.leaves(getattr(state, name)) for state in (before, after)
            )
            if same:
                list(map(assert_array_equal, one, other))
            else:
                assert all((a + 1 == b).all() for a, b in zip(one, other, strict=True))


PROBLEMS = {
    "gamma_saturated": (0.6, 0.4, "set art.guard (now 0.95) to 0.9"),
    "contrast_inactive": (1.0, 0.9, "set art.redundancy=filled (now hard)"),
    "contrast_distance": (0.001, 0.2, "lower optim.base_lr (now 0.05) or loss.cntr"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_warning_is_printed_once_and_names_the_option(tmp_path, capsys, name, note):
    bad, good, advice = PROBLEMS[name]
    settings = run_directory.flatten(tiny_config.config(tmp_path).to_dict())
    watched = monitor.Monitor(tmp_path, settings, first_step=0, images=lambda step: {})
    watched.warn(10, {name: good}, begun=True)
    assert not capsys.readouterr().err
    watched.warn(20, {name: bad}, begun=True)
    watched.warn(30, {name: bad}, begun=True)
    err = capsys.readouterr().err
    assert err.count("warning: at step 20") == 1
    assert "step 30" not in err
    assert advice in err
    note(
        "saturated Gamma, inactive pairs in L_cntr, or collapsed features",
        "a warning that names the option to change",
    )


def test_an_inactive_contrast_of_a_filled_redundancy_has_other_advice(tmp_path, capsys):
    config = tiny_config.config(tmp_path, **{"art.redundancy": "filled"})
    settings = run_directory.flatten(config.to_dict())
    watched = monitor.Monitor(tmp_path, settings, first_step=0, images=lambda step: {})
    watched.warn(10, {"contrast_inactive": 0.99}, begun=True)
    assert "set loss.uniform=1.0 and loss.cntr=0.0" in capsys.readouterr().err


def test_bad_steps_after_the_resumed_step_are_removed(tmp_path):
    for step in (3, 9):
        line = {"step": step, "terms": {}, "index": [], "name": []}
        run_directory.append_lines(tmp_path / monitor.BAD_STEPS, [line])
    monitor.Monitor(tmp_path, {}, first_step=5, images=lambda step: {})
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [3]


def test_replay_without_a_bad_step_is_an_error(tmp_path, capsys):
    assert replay.main([str(tmp_path)]) == 1
    assert "no such step" in capsys.readouterr().err
    assert replay.main([]) == 2


def test_an_incomplete_line_does_not_affect_other_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    run_directory.append_lines(path, [{"step": 3}])
    assert run_directory.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3}
