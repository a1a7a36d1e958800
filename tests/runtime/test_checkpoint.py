"""Checkpoints: save, restore, keep the latest and the best, and errors."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cra_jax.runtime import run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.train_step import TrainState


def _state(value: float) -> TrainState:
    params = {
        "classification_stream": {"conv1": {"kernel": jnp.full((2, 3), value)}},
        "regularization_stream": {"conv1": {"kernel": jnp.full((4,), -value)}},
    }
    chain = optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9))
    return TrainState(
        step=jnp.int32(value),
        params=params,
        batch_stats={"classification_stream": {"bn1": {"mean": jnp.ones(3)}}},
        opt_state=chain.init(params),
    )


def test_restored_state_has_the_same_structure_and_values(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, _state(3), {"epoch": 1, "window": [{"loss": 0.5}]})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(3, jax.eval_shape(lambda: _state(0)))
        assert checkpoints.meta(3) == {"epoch": 1, "window": [{"loss": 0.5}]}
    assert jax.tree.structure(restored) == jax.tree.structure(_state(3))
    jax.tree.map(np.testing.assert_array_equal, restored, _state(3))


def test_save_copies_the_state_before_it_returns(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.zeros(1 << 18)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
    assert not restored["x"].any()


def test_latest_and_best_are_kept(tmp_path):
    accuracy = {2: 0.9, 4: 0.3, 6: 0.4, 8: 0.2}
    with Checkpoints(tmp_path / "c", keep_latest=2) as checkpoints:
        for step in range(1, 9):
            metric = accuracy.get(step)
            checkpoints.save(step, _state(step), {}, metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 7, 8]
        assert checkpoints.choose("latest") == 8
        assert checkpoints.choose("best") == 2
        assert checkpoints.choose("7") == 7
        with pytest.raises(ValueError, match=r"no checkpoint '3'.*\[2, 7, 8\]"):
            checkpoints.choose("3")


def test_best_step_is_none_without_metrics(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        assert checkpoints.best_step() is None


def test_saved_step_is_replaced_by_the_same_step(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, _state(1), {"epoch": 1})
        checkpoints.save(1, _state(5), {"epoch": 2})
        checkpoints.wait()
        restored = checkpoints.restore(1, jax.eval_shape(lambda: _state(0)))
        assert (int(restored.step), checkpoints.meta(1)) == (5, {"epoch": 2})


def test_part_of_a_state_can_be_restored(tmp_path):
    target = {
        "params": {
            "classification_stream": {
                "conv1": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
            }
        }
    }
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, _state(1), {})
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        restored = checkpoints.restore(1, target)
    assert jax.tree.structure(restored) == jax.tree.structure(target)


def test_checkpoint_of_another_model_is_an_error_that_names_the_arrays(tmp_path):
    target = {
        "params": {
            "classification_stream": {
                "conv1": {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32)},
                "fc": {"bias": jax.ShapeDtypeStruct((5,), jnp.float32)},
            }
        }
    }
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        with pytest.raises(ValueError, match="of another model") as caught:
            checkpoints.restore(1, target)
    message = str(caught.value)
    assert "conv1.kernel: checkpoint (2, 3), model (2, 4)" in message
    assert "fc.bias: checkpoint has none, model (5,)" in message


def test_missing_checkpoints_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no checkpoints at"):
        Checkpoints(tmp_path / "nowhere", writable=False)


def test_metric_can_be_added_after_the_step_is_saved(tmp_path):
    with Checkpoints(tmp_path / "c", keep_latest=1) as checkpoints:
        for step, metric in ((1, 0.5), (2, 0.9), (3, 0.1)):
            checkpoints.save(step, _state(step), {})
            assert not checkpoints.has_metric(step)
            checkpoints.add_metric(step, metric)
            assert checkpoints.has_metric(step)
        assert checkpoints.steps() == [2, 3]
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert checkpoints.best_step() == 2
    (tmp_path / "c" / "2" / "metric.json").write_text('{"metric": 0.9}')
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert not checkpoints.has_metric(2)


def test_error_that_passes_is_tried_again(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, _state(1), {})
        checkpoints.wait()
        read, failures = Checkpoints._read_arrays, [OSError(errno.EIO, "of a mount")]

        def fail_once(self, *arguments):
            if failures:
                raise failures.pop()
            return read(self, *arguments)

        monkeypatch.setattr(Checkpoints, "_read_arrays", fail_once)
        checkpoints.verify(1)
        failures += [OSError(errno.EMFILE, "too many")] * 2
        with pytest.raises(OSError, match="too many"):
            checkpoints.verify(1)


ODD_NAMES = {
    "a[1]": "a pattern in brackets",
    "a[!b]": "a pattern in brackets",
    "a\\b": "a backslash",
    "a\udcff": "bytes that are not UTF-8",
    "gs:": "the prefix of Google Cloud Storage",
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_path_that_orbax_cannot_read_is_an_error(tmp_path, name):
    folder = tmp_path / name / "run"
    message = f"has {ODD_NAMES[name]} in the name .*; rename it, or choose another"
    for writable in (True, False):
        with pytest.raises(ValueError, match=message):
            Checkpoints(folder, writable=writable)
    with (
        pytest.raises(ValueError, match=message),
        run_directory.locked(folder),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_other_odd_paths_are_read(tmp_path):
    folder = tmp_path / "a] *?{b} [#%20" / "é:鳥\n'\"$;|&"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"x": np.arange(3)}, {})
    with Checkpoints(folder, writable=False) as checkpoints:
        found = checkpoints.restore(1, checkpoints.shapes(1))
    assert found["x"].tolist() == [0, 1, 2]
