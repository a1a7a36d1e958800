"""`released`: what the authors' code does where the paper says something else."""

import pytest

from configs import cars, cub, quickstart
from cra_jax import experiment, run_folder, schedule


def _changed(module, variant):
    flat = [
        run_folder.flatten(module.get_config(name).to_dict()) for name in ("", variant)
    ]
    return {key: value for key, value in flat[1].items() if flat[0][key] != value}


@pytest.mark.parametrize("module", [cub, cars])
def test_released_differs_from_the_paper_in_what_the_released_code_does(module):
    assert _changed(module, "released") == {
        "bn.group_size": 4,
        "contrast.distance": "squared",
        "optim.base_lr": 1e-4,
        "optim.first_epochs": 90,
        "optim.period_epochs": 50,
        "art.normalize_head": False,
        "art.inside": False,
        "art.guard": 0.0,
    }
    config = module.get_config("resnet101,released")
    assert config.model.backbone == "resnet101"
    experiment.check(config)
    options = config.optim
    rates = [
        schedule.learning_rate(
            epoch,
            steps_per_epoch=1,
            base=options.base_lr,
            first_epochs=options.first_epochs,
            period_epochs=options.period_epochs,
            factor=options.factor,
        )
        for epoch in range(config.train.epochs)
    ]
    assert rates == pytest.approx([1e-4] * 90 + [1e-5] * 50)


def test_the_quickstart_takes_released_in_its_own_proportions():
    changed = _changed(quickstart, "released")
    assert changed["optim.base_lr"] == pytest.approx(0.005)
    assert (changed["bn.group_size"], changed["contrast.distance"]) == (4, "squared")
    config = quickstart.get_config("released")
    options = config.optim
    assert options.first_epochs + options.period_epochs == config.train.epochs
    experiment.check(config)
