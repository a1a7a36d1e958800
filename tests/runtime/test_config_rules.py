"""Every config key has a rule, which refuses values that no training can mean."""

import math

import pytest

from configs.cub import get_config
from cra_jax.runtime import config_rules
from cra_jax.runtime.run_directory import flatten
from cra_jax.training import check_config
from tests.helpers import tiny_config

DEFAULTS = flatten(get_config().to_dict())


def test_every_key_has_a_rule_that_allows_its_default():
    assert set(config_rules.RULES) == set(DEFAULTS)
    config_rules.check_values(DEFAULTS)


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if v != ""])
def test_values_of_another_kind_are_refused(key):
    default = DEFAULTS[key]
    others: list = [None, {}, [default], math.nan, math.inf, -math.inf]
    if isinstance(default, tuple):
        others += [(), default[:1], (*default, 0.5), (math.nan, *default[1:]), 0.5]
    else:
        others.append((default,))
    others += [True, 1j] if not isinstance(default, bool) else [0, 1, "True"]
    if not isinstance(default, str):
        others.append(str(default))
    for value in others:
        with pytest.raises(ValueError, match=f"{key}=.* must be "):
            config_rules.check_values({key: value})


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.epochs", 0, "1 or more"),
        ("train.epochs", 2.5, "a whole number, in [1, 100000]"),
        ("train.epochs", True, "a whole number, in [1, 100000]"),
        ("checkpoint.every_steps", -1, "0 or more"),
        ("data.crop_px", 0, "1 or more"),
        ("data.crop_px", 5000, "4096 or less"),
        ("data.mean", (0.5,), "3 numbers, in [0, 1]"),
        ("data.mean", (123.7, 116.3, 103.5), "3 numbers, in [0, 1]"),
        ("data.std", (0.0, 0.2, 0.2), "3 numbers, in (0, 1]"),
        ("data.test_share", 1.5, "in (0, 1]"),
        ("optim.base_lr", 0.0, "above 0"),
        ("optim.base_lr", -1.0, "above 0"),
        ("optim.momentum", 1.0, "in [0, 1)"),
        ("optim.weight_decay", -1e-9, "0 or more"),
        ("optim.factor", 1.5, "in (0, 1]"),
        ("restriction.threshold", (0.4, 0.4, -0.4, 3.0), "4 numbers, 0 or more"),
        ("restriction.expectation", (0.4,), "4 numbers, finite"),
        ("seed", -1, "0 or more"),
        ("seed", 2**40, "4294967295 or less"),
        ("train.report", 1, "True or False"),
        ("data.path", 3, "text"),
    ],
)
def test_values_out_of_range_are_refused_with_key_value_and_range(key, value, rule):
    with pytest.raises(ValueError, match="must be") as caught:
        config_rules.check_values({key: value, "data.flip": True})
    assert str(caught.value) == f"{key}={value!r} must be {rule}"


def test_all_wrong_and_missing_keys_are_listed():
    with pytest.raises(ValueError, match="must be") as caught:
        config_rules.check_values(
            {"seed": -1, "train.epochs": 0, "other": -1},
            needed=["seed", "a", "b", "c", "d"],
        )
    assert str(caught.value) == (
        "seed=-1 must be 0 or more; train.epochs=0 must be 1 or more; "
        "these keys are missing: a, b, c and 1 more"
    )


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_check_config_refuses_what_the_rules_refuse(tmp_path, key):
    config = tiny_config.config(tmp_path)
    section, _, name = key.rpartition(".")
    part = config[section] if section else config
    with config.ignore_type():
        part[name] = object()
    with pytest.raises(ValueError, match=f"{key}=.* must be "):
        check_config.check(config)
