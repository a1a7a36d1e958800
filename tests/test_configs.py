"""The config keys that the variants `released`, `plus` and `paper` change."""

import dataclasses

import pytest

from configs import cars, cub, quickstart
from cra_jax import schedule
from cra_jax.art_module import ArtConfig
from cra_jax.runtime import run_directory
from cra_jax.training import check_config, step_wrappers


def _changed_keys(module, variant, reference="cra"):
    flat = [
        run_directory.flatten(module.get_config(name).to_dict())
        for name in (reference, variant)
    ]
    return {key: value for key, value in flat[1].items() if flat[0][key] != value}


@pytest.mark.parametrize("module", [cub, cars])
def test_released_changes_only_the_options_of_the_released_code(module):
    changed = {
        "bn.group_size": 4,
        "contrast.distance": "squared",
        "optim.period_epochs": 90,
        "train.epochs": 200,
        "restriction.first_epochs": 140,
        "restriction.period_epochs": 60,
        "optim.freeze_first_epochs": 50,
        "optim.freeze_period_epochs": 45,
        "art.normalize_head": False,
        "art.inside": False,
        "art.guard": 0.0,
    }
    assert _changed_keys(module, "released") == changed
    config = module.get_config("released,resnet101")
    assert config.model.backbone == "resnet101"
    check_config.check(config)

    options, restriction = config.optim, config.restriction
    rates, restricted, frozen = [], [], []
    for epoch in range(config.train.epochs):
        lengths = options.first_epochs, options.period_epochs
        rates.append(_at(schedule.learning_rate, epoch, *lengths, base=options.base_lr))
        lengths = restriction.first_epochs, restriction.period_epochs
        restricted.append(_at(schedule.restriction_weight, epoch, *lengths))
        lengths = options.freeze_first_epochs, options.freeze_period_epochs
        frozen.append(_at(step_wrappers.is_frozen, epoch, *lengths))
    assert rates == pytest.approx([1e-3] * 50 + [1e-4] * 90 + [1e-5] * 60)
    assert restricted == [1] * 140 + [0] * 60
    assert frozen == [0] * 50 + [1] * 45 + [0] * 45 + [1] * 45 + [0] * 15


def _at(function, epoch, first_epochs, period_epochs, **options):
    lengths = {"first_epochs": first_epochs, "period_epochs": period_epochs}
    return float(function(epoch, steps_per_epoch=1, **lengths, **options))


@pytest.mark.parametrize("variant", ["released,baseline", "baseline,released"])
def test_released_baseline_freezes_nothing(variant):
    for module in (cub, quickstart):
        config = module.get_config(variant)
        assert config.contrast.distance == "squared"
        assert config.optim.freeze_period_epochs == 0


def test_released_quickstart_scales_the_schedules_to_its_own_length():
    config = quickstart.get_config("released")
    assert (config.bn.group_size, config.contrast.distance) == (4, "squared")
    options, restriction = config.optim, config.restriction
    assert config.train.epochs == 153  # 107 by 200 / 140
    assert (options.first_epochs, options.period_epochs) == (75, 42)
    assert (restriction.first_epochs, restriction.period_epochs) == (107, 46)
    assert (options.freeze_first_epochs, options.freeze_period_epochs) == (75, 21)
    check_config.check(config)


PLUS = {
    "optim.ema_decay": 0.999,
    "loss.label_smoothing": 0.1,
    "loss.uniform": 1.0,
    "loss.cntr": 0.0,
    "art.head": "spatial",
    "art.rotate": False,
    "art.redundancy": "filled",
    "model.shared_weights": True,
    "swap.weight": 1.0,
}


@pytest.mark.parametrize("module", [cub, cars])
def test_plus_adds_the_extensions(module):
    assert _changed_keys(module, "plus") == PLUS
    check_config.check(module.get_config("plus"))


@pytest.mark.parametrize("module", [cub, cars])
@pytest.mark.parametrize("kind", ["baseline", "stn"])
def test_plus_of_another_kind_is_smoothing_and_averages(module, kind):
    assert _changed_keys(module, f"{kind},plus", kind) == {
        "optim.ema_decay": 0.999,
        "loss.label_smoothing": 0.1,
    }
    check_config.check(module.get_config(f"plus,{kind}"))


@pytest.mark.parametrize("variant", ["", "resnet18", "plus"])
def test_quickstart_is_plus_without_a_kind_or_a_change(variant):
    config = quickstart.get_config(variant)
    flat = run_directory.flatten(config.to_dict())
    # An average over fewer steps, because training from scratch takes few.
    assert {key: flat[key] for key in PLUS} == {**PLUS, "optim.ema_decay": 0.99}
    assert config.model.backbone == ("resnet18" if "18" in variant else "resnet10")
    check_config.check(config)


def test_every_kind_of_the_quickstart_takes_the_same_passes():
    epochs = {
        variant: quickstart.get_config(variant).train.epochs
        for variant in ("baseline", "stn", "cra", "plus")
    }
    assert epochs == {"baseline": 160, "stn": 128, "cra": 107, "plus": 80}
    assert quickstart.get_config("cra").swap.weight == 0


def test_unknown_variant_is_an_error_that_lists_the_known_ones():
    for module in (cub, cars, quickstart):
        with pytest.raises(ValueError, match=r"'relaesd'.*baseline.*released, plus"):
            module.get_config("baseline,relaesd")


@pytest.mark.parametrize("module", [cub, cars, quickstart])
def test_paper_variant_turns_off_the_guards(module):
    assert _changed_keys(module, "paper") == {
        "art.gradient_clip": 0.0,
        "art.normalize_head": False,
        "art.inside": False,
        "art.guard": 0.0,
    }
    check_config.check(module.get_config("paper,resnet18"))


def test_art_defaults_of_config_and_dataclass_are_equal():
    art = cub.get_config().art.to_dict()
    assert art == dataclasses.asdict(ArtConfig())
