"""Steps whose numbers are not finite: refused, written down, computed again."""

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


def a_config(cache_dir, **changes):
    return tiny_config.config(
        cache_dir,
        **{"model.kind": "baseline", "train.epochs": 1, "checkpoint.every_steps": 3},
        **changes,
    )


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of one step infinite, as a division by zero somewhere would."""
    make_loss = build.build_loss

    def build_loss(*arguments, **keywords):
        loss_function = make_loss(*arguments, **keywords)

        def poisoned(params, batch_stats, images, labels, step):
            loss, (stats, terms) = loss_function(
                params, batch_stats, images, labels, step
            )
            factor = 1 / jax.numpy.where(step == BAD - 1, 0.0, 1.0)
            return loss * factor, (stats, terms | {"loss": loss * factor})

        return poisoned

    monkeypatch.setattr(build, "build_loss", build_loss)


def test_a_bad_step_stops_the_run_and_is_computed_again_in_one_command(
    cache_dir, tmp_path, poisoned, capsys, note
):
    config = a_config(cache_dir)
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
    said = capsys.readouterr().out
    assert "from checkpoint 3 to step 5" in said
    assert "  loss: inf\n" in said
    assert said.endswith("the same numbers\n")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # The same command comes to the same step, and the file has it once.
    with pytest.raises(ValueError, match="step 5 failed"):
        train.run(config, tmp_path)
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [BAD]
    note(
        "the loss of a step is not finite",
        "stops with step, terms and images; one command computes the same numbers",
    )


def test_a_few_may_be_left_out(cache_dir, tmp_path, poisoned, capsys, note):
    config = a_config(cache_dir, **{"train.skip_bad_steps": 1})
    train.run(config, tmp_path)
    assert (
        "(1 of train.skip_bad_steps=1; its images are listed in"
        in capsys.readouterr().err
    )
    lines = run_directory.read_metrics(tmp_path)
    assert all(math.isfinite(x["loss"]) for x in lines)
    assert [x["step"] for x in lines if x["split"] == "train"] == [4, 6]
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [BAD]
    note("the same, with train.skip_bad_steps=1", "its update is left out; goes on")


def test_a_refused_update_changes_nothing_but_the_count(cache_dir):
    config = a_config(cache_dir)
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


SIGNS = {
    "gamma_saturated": (0.6, 0.4, "set art.guard (now 0.95) to 0.9"),
    "contrast_inactive": (1.0, 0.9, "raise contrast.margin (now 0.7)"),
    "contrast_distance": (0.001, 0.2, "lower optim.base_lr (now 0.05) or loss.cntr"),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_warned_of_once_with_the_cure(tmp_path, capsys, name, note):
    bad, good, cure = SIGNS[name]
    settings = run_directory.flatten(tiny_config.config(tmp_path).to_dict())
    watched = monitor.Monitor(tmp_path, settings, first_step=0, images=lambda step: {})
    watched.warn(10, {name: good}, begun=True)
    assert not capsys.readouterr().err
    watched.warn(20, {name: bad}, begun=True)
    watched.warn(30, {name: bad}, begun=True)
    said = capsys.readouterr().err
    assert said.count("warning: at step 20") == 1
    assert "step 30" not in said
    assert cure in said
    note("attention in a corner, dead pairs, features alike", "a warning with the cure")


def test_numbers_of_steps_that_a_crash_lost_are_taken_out(tmp_path):
    for step in (3, 9):
        line = {"step": step, "terms": {}, "index": [], "name": []}
        run_directory.append_lines(tmp_path / monitor.BAD_STEPS, [line])
    monitor.Monitor(tmp_path, {}, first_step=5, images=lambda step: {})
    assert [x["step"] for x in monitor.read_bad_steps(tmp_path)] == [3]


def test_replay_says_what_is_missing(tmp_path, capsys):
    assert replay.main([str(tmp_path)]) == 1
    assert "no such step" in capsys.readouterr().err
    assert replay.main([]) == 2


def test_a_line_that_a_crash_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    run_directory.append_lines(path, [{"step": 3}])
    assert run_directory.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3}
