"""Wrong options are errors before any work."""

import re

import pytest

from cra_jax.training import build, check_config
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim.schedule": "cosin"},
            "unknown optim.schedule 'cosin'; choose from piecewise, cosine",
        ),
        (
            {"optim.schedule": "cosine", "optim.warmup_epochs": 2},
            "optim.warmup_epochs=2 leaves no epoch of train.epochs=2",
        ),
        (
            {"optim.warmup_epochs": 1000},
            "optim.warmup_epochs=1000 leaves no epoch of train.epochs=2",
        ),
        (
            {"optim.base_lrr": 0.1},
            r"optim.base_lrr=0.1: there is no such config key; did you mean "
            r"optim.base_lr\?",
        ),
        ({"eval.checkpoint": "newest"}, "eval.checkpoint='newest' must be 'latest'"),
        ({"optim.freeze_first_epochs": -1}, "optim.freeze_first_epochs=-1 must be 0"),
        ({"optim.freeze_period_epochs": -3}, "optim.freeze_period_epochs=-3 must be 0"),
        ({"optim.freeze_first_epochs": 3}, "both above 0, or both to 0"),
        ({"optim.freeze_period_epochs": 3}, "both above 0, or both to 0"),
        (
            {
                "optim.freeze_first_epochs": 1,
                "optim.freeze_period_epochs": 1,
                "model.kind": "baseline",
            },
            "only stream of model.kind='baseline'",
        ),
        ({"optim.ema_decay": 1.0}, r"optim.ema_decay=1.0 must be in \[0, 1\)"),
        (
            {"loss.label_smoothing": 1.0},
            r"loss.label_smoothing=1.0 must be in \[0, 1\)",
        ),
    ],
)
def test_wrong_options_are_errors(tmp_path, changes, message):
    check_config.check(tiny_config.config(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_config.check(tiny_config.config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("piecewise", [0.4, 0.04, 0.004]), ("cosine", [0.4, 0.3, 0.1])],
)
def test_optim_schedule_selects_the_learning_rate(tmp_path, schedule, rates):
    config = tiny_config.config(
        tmp_path,
        **{
            "optim.schedule": schedule,
            "optim.base_lr": 0.4,
            "optim.first_epochs": 1,
            "optim.period_epochs": 1,
            "train.epochs": 3,
        },
    )
    rate = build.build_learning_rate(config, 10)
    assert [float(rate(10 * epoch)) for epoch in range(3)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "messages"),
    [
        ({"train.epochs": 18}, 10, []),
        ({"train.epochs": 18}, 2, ["only 36 steps (18 epochs of 2)"]),
        ({"train.epochs": 13}, 10, []),
        (
            {"train.epochs": 12},
            10,
            ["never falls in train.epochs=12: optim.first_epochs=12, .* to 8 for"],
        ),
        ({"train.epochs": 12, "optim.schedule": "cosine"}, 10, []),
        ({"train.epochs": 18, "optim.period_epochs": 0}, 10, ["period_epochs above 0"]),
        ({"train.epochs": 18, "optim.factor": 1.0}, 10, ["optim.factor below 1"]),
        ({"train.epochs": 2}, 3, ["only 6 steps", "never falls"]),
    ],
)
def test_warnings_name_a_training_that_is_of_little_use(
    tmp_path, changes, steps_per_epoch, messages
):
    phases = {"optim.first_epochs": 12, "optim.period_epochs": 3}
    config = tiny_config.config(tmp_path, **{**phases, **changes})
    found = check_config.warnings(config, steps_per_epoch=steps_per_epoch)
    assert len(found) == len(messages)
    for warning, message in zip(found, messages, strict=True):
        assert re.search(message.replace("(", r"\(").replace(")", r"\)"), warning)
