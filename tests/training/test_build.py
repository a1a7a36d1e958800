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
    _save_config(
        tmp_path,
        art__alpha_p=0.9,
        art__softness=0.05,
        data__workers=3,
        data__cache_dir="",
    )
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


def test_config_of_a_run_has_no_effect_on_this_machine(tmp_path, capsys):
    """A run may come from a stranger; what is given as a flag counts."""
    hosts = {"coordinator": "example.org:1", "count": 2, "index": 1}
    config = tiny_config.config(tmp_path / "cache").to_dict() | {"hosts": hosts}
    config["data"]["manual_dir"] = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = build.config_of_run(tmp_path, tiny_config.config(tmp_path / "other"), {})
    assert found.hosts.to_dict() == {"coordinator": "", "count": 0, "index": 0}
    assert (found.data.cache_dir, found.data.manual_dir) == ("", "")
    assert "is not used" in capsys.readouterr().err
    assert run_options.options_of_run(tmp_path).data.cache_dir == ""
    assert run_options.options_of_run(tmp_path).hosts == {}
    given = {"data.cache_dir": "here", "hosts.coordinator": "auto"}
    found = build.config_of_run(tmp_path, tiny_config.config(tmp_path), given)
    assert (found.data.cache_dir, found.hosts.coordinator) == ("here", "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('c["younger"] = {"setting": 1}', None),
        ('c["data"]["younger"] = 1', None),
        ('c["data"]["crop_px"] = "32"', "data.crop_px='32' must be a whole number"),
        ('c["data"] = 3', "these keys are missing: data.source"),
        ('c["data"] = [1, 2]', "these keys are missing: data.source"),
        ('del c["data"]', "these keys are missing: data.source"),
        ('c["data"]["crop_px"] = {"a": 1}', "these keys are missing: data.crop_px"),
        ('c["model"]["width"] = "8"', "model.width='8' must be a whole number"),
        ('c["model"]["width"] = None', "model.width=None must be a whole number"),
        ('c["data"]["mean"] = "abc"', "data.mean='abc' must be 3 numbers"),
        ('c["optim"]["ema_decay"] = [0.9]', "optim.ema_decay=.* must be a number"),
        ('c["model"]["backbone"] = "../x"', "unknown backbone"),
    ],
)
def test_config_of_another_version_is_an_error_in_one_line(tmp_path, change, message):
    config = tiny_config.config(tmp_path).to_dict()
    exec(change, {"c": config})
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read():
        defaults = tiny_config.config(tmp_path)
        return run_options.from_config(build.config_of_run(tmp_path, defaults, {}))

    for options in (read, lambda: run_options.options_of_run(tmp_path)):
        if message:
            with pytest.raises(ValueError, match=message) as caught:
                options().create_backbone(3)
            assert "\n" not in str(caught.value)
        else:
            assert options().data.crop_px == 32
