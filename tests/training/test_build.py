"""Configs of saved runs, and the options read from them."""

import json

import pytest

from cra_jax.inference import run_options
from cra_jax.training import build
from tests.helpers import tiny_config


def _save_config(folder, **changes):
    config = tiny_config.config(folder).to_dict()
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_unknown_keys_of_a_saved_config_are_reported_and_ignored(tmp_path, capsys):
    _save_config(tmp_path, optim__attention_lr_scale=0.1, art__colour="red")
    defaults = tiny_config.config(tmp_path)
    config = build.config_of_run(tmp_path, defaults, {"eval.checkpoint": "best"})
    errors = capsys.readouterr().err
    assert "art.colour='red', optim.attention_lr_scale=0.1" in errors
    assert "art.softness" not in errors
    assert config.eval.checkpoint == "best"
    assert run_options.from_config(config).art.alpha_s == 0.5


def test_config_of_run_has_saved_values_and_overrides(tmp_path, capsys):
    _save_config(tmp_path, art__alpha_p=0.9, art__softness=0.05, data__workers=3)
    config = build.config_of_run(
        tmp_path, tiny_config.config(tmp_path), {"data.workers": 1}
    )
    options = run_options.from_config(config)
    assert (options.art.alpha_p, options.data.workers) == (0.9, 1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epochs": 0}, "train.epochs=0 must be 1 or more"),
        ({"checkpoint.every_steps": -1}, "checkpoint.every_steps=-1 must be 0 or more"),
        ({"train.batch_size": 0}, "train.batch_size=0 must be 1 or more"),
    ],
)
def test_too_low_value_is_an_error_that_names_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build.loop_options(tiny_config.config(tmp_path, **changes))
