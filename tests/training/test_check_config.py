"""Wrong options are errors before any work."""

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
