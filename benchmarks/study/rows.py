"""The rows of the study: what each asks, and the settings that ask it.

A row is a config and changes to it; its runs differ in the seed alone. `fingerprint`
says which settings a run's numbers are of, so that lines made under other settings are
never counted in.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.study import cars_subset
from cra_jax.runtime import run_directory

Settings = dict[str, Any]


class Row(NamedTuple):
    """One way to train.

    Attributes:
      name: of the row, and of its run directorys.
      group: of `GROUPS`.
      title: what people call it.
      question: what it asks, in words.
      config: a module of `configs/`.
      variant: of that config.
      changes: settings by their dotted keys.
      seeds: how many runs, with seeds from 0 on.
      references: rows that it is compared with, seed by seed.
    """

    name: str
    group: str
    title: str
    question: str
    config: str
    variant: str
    changes: Settings
    seeds: int
    references: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """As `model.kind` has it."""
        kinds = [x for x in self.variant.split(",") if x in ("baseline", "stn")]
        return kinds[0] if kinds else "cra"


GROUPS = {
    "main": "The main rows",
    "ablations": "CRA-CNN, one part changed",
    "robust": "Guards and learning rates",
    "modern": "Beyond the paper, at the same cost at test time",
    "cub": "Photographs: ten birds of CUB",
    "cars": f"Photographs: {cars_subset.MODELS} models of Stanford Cars",
    "instrument": "How the instrument was chosen",
}
"""Groups in the order in which they run, and their headings."""

# What a run leaves behind beside its numbers; none of it changes them.
KEEPING: Settings = {
    "train.report": False,
    "checkpoint.every_epochs": 3,
    "checkpoint.keep_latest": 1,
    "eval.every_epochs": 1000,  # the last epoch is scored in any case
    "eval.snapshots": 0,
    "data.workers": 1,
}


def _phases(epochs: int, first: int, period: int) -> Settings:
    """A schedule: the rate falls, and L_res switches, after `first` and each period."""
    return {
        "train.epochs": epochs,
        "optim.first_epochs": first,
        "optim.period_epochs": period,
        "restriction.first_epochs": first,
        "restriction.period_epochs": period,
    }


def _drawn(train_size: int, *phases: int, **more: Any) -> Settings:
    """Drawn birds; `more` has `data__habitat_share` for `data.habitat_share`."""
    dotted = {key.replace("__", "."): value for key, value in more.items()}
    sizes = {"data.train_size": train_size, "data.test_size": 1024}
    return {**sizes, **_phases(*phases), **dotted}


# The instrument: see the group of that name in docs/study.md for why.
_HALF = {"train__batch_size": 32, "data__habitat_share": 0.5}
BIRDS = _drawn(512, 40, 24, 8, **_HALF)
"""What makes a quickstart the instrument of the drawn rows."""

_BIRDS_LONG = _drawn(512, 60, 36, 12, **_HALF)


def _instrument(name: str, title: str, changes: Settings, seeds: int = 2) -> Row:
    return Row(
        f"instrument-{name}",
        "instrument",
        title,
        "Is a baseline well trained, not saturated, hurt by the shift, and steady?",
        *("quickstart", "baseline", changes, seeds),
    )


def _main(name: str, title: str, question: str, variant: str, **more: Any) -> Row:
    changes = more.pop("changes", BIRDS)
    return Row(name, "main", title, question, "quickstart", variant, changes, 5, **more)


def _change(name: str, title: str, question: str, **changes: Any) -> Row:
    """A row of CRA-CNN with a few settings changed: `loss__res` is `loss.res`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    group = "robust" if any(k.startswith("art.") for k in dotted) else "ablations"
    more = (*("quickstart", "", {**BIRDS, **dotted}, 3), ("baseline", "cra"))
    return Row(name, group, title, question, *more)


def _modern(name: str, word: str, seeds: int = 3, **changes: Any) -> list[Row]:
    """The same change to the baseline and to CRA-CNN."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return [
        Row(
            f"{kind}-{name}",
            "modern",
            f"{title}, {word}",
            "What does it add, at the same cost at test time?",
            *("quickstart", variant, {**BIRDS, **dotted}, seeds),
            (kind,) if kind == "baseline" else ("cra", f"baseline-{name}"),
        )
        for kind, variant, title in (
            ("baseline", "baseline", "baseline"),
            ("cra", "", "CRA-CNN"),
        )
    ]


def _rate(kind: str, word: str, rate: float) -> Row:
    variant = "" if kind == "cra" else kind
    name = "CRA-CNN" if kind == "cra" else kind
    return Row(
        f"{kind}-rate-{word}",
        "robust",
        f"{name}, learning rate {rate:g}",
        "Does it depend on the rate?",
        *("quickstart", variant, {**BIRDS, "optim.base_lr": rate}, 3),
        (kind,) if kind == "baseline" else (f"baseline-rate-{word}", kind),
    )


# Sides at which the photographs fit a machine without a GPU.
_SMALL = {
    "data.short_side_px": 144,
    "data.crop_px": 128,
    "art.size_px": 64,
    "optim.warmup_epochs": 1,
    "eval.batch_size": 32,
}
_SCRATCH = {
    "model.pretrained": "",
    "model.width": 16,
    "model.stem": "medium",
    "optim.base_lr": 0.05,
    "train.batch_size": 32,
}
_TUNED = {"train.batch_size": 16, "optim.base_lr": 0.005}
_RELEASED_GAMMA = {
    "art.inside": False,
    "art.normalize_head": False,
    "art.guard": 0.0,
}
_KINDS = {
    "baseline": ("baseline", "baseline", ()),
    "baseline-long": ("baseline", "baseline, 1.5 times the epochs", ("baseline",)),
    "cra": ("", "CRA-CNN", ("baseline", "baseline-long")),
    "cra-soft": ("", "CRA-CNN, soft redundancy", ("baseline", "baseline-long")),
    "stn": ("stn", "STN", ("baseline", "baseline-long")),
    "cra-released": (
        "",
        "CRA-CNN, Gamma as released",
        ("baseline", "baseline-long", "cra"),
    ),
}


class _Start(NamedTuple):
    """What photographs are trained from, and for how long (epochs, first, period)."""

    backbone: str
    where: str
    recipe: Settings
    usual: tuple[int, int, int]
    long: tuple[int, int, int]
    kinds: tuple[str, ...]


_MAIN_KINDS = ("baseline", "baseline-long", "cra", "cra-soft", "stn")
_LITE0 = "fine-tuned EfficientNet-Lite0"
_STARTS = {
    "tuned": _Start(
        *("efficientnet_lite0", _LITE0, _TUNED, (10, 6, 2), (15, 9, 3)),
        (*_MAIN_KINDS, "cra-released"),
    ),
    # So many epochs that half as many again should matter little.
    "tuned-40": _Start(
        *("efficientnet_lite0", f"{_LITE0}, 40 epochs", _TUNED),
        *((40, 24, 8), (60, 36, 12), _MAIN_KINDS[:3]),
    ),
    # Without "cra-released": drawn birds have it, from scratch.
    "scratch": _Start(
        *("resnet10", "ResNet, scratch", _SCRATCH, (60, 36, 12), (90, 54, 18)),
        _MAIN_KINDS,
    ),
}


def _photographs(data: str, name: str) -> list[Row]:
    """The main rows on a set of photographs, from scratch or fine-tuned."""
    start = _STARTS[name]
    rows = []
    for kind in start.kinds:
        variant, title, references = _KINDS[kind]
        phases = start.long if kind == "baseline-long" else start.usual
        changes = {**_SMALL, **start.recipe, **_phases(*phases)}
        if data == "cars":
            changes["data.source"] = "csv"
        if kind == "cra-soft":
            changes["art.redundancy"] = "soft"
        if kind == "cra-released":
            changes |= _RELEASED_GAMMA
        rows.append(
            Row(
                f"{data}-{name}-{kind}",
                data,
                f"{title} ({start.where})",
                "Does what is seen on drawings hold for photographs?",
                *(data, ",".join(filter(None, (start.backbone, variant))), changes),
                3 if name == "tuned-40" else 5,
                tuple(f"{data}-{name}-{x}" for x in references),
            )
        )
    return rows


def _changed_photographs(
    kind: str,
    name: str,
    word: str,
    question: str = "What does it add, at the same cost at test time?",
    **changes: Any,
) -> Row:
    """One change to what is fine-tuned on ten birds of CUB."""
    variant, title, _ = _KINDS[kind]
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    usual = f"cub-tuned-{kind}"
    references = (f"cub-tuned-baseline-{name}",) if kind != "baseline" else ()
    return Row(
        f"{usual}-{name}",
        "cub",
        f"{title}, {word} (fine-tuned EfficientNet-Lite0)",
        question,
        *("cub", ",".join(filter(None, ("efficientnet_lite0", variant)))),
        {**_SMALL, **_TUNED, **_phases(*_STARTS["tuned"].usual), **dotted},
        *(3, (*references, usual)),
    )


ROWS = (
    _main("baseline", "baseline", "How far does a plain ResNet come?", "baseline"),
    _main(
        "baseline-long",
        "baseline, 1.5 times the epochs",
        "And with CRA-CNN's compute?",
        "baseline",
        changes=_BIRDS_LONG,
        references=("baseline",),
    ),
    _main(
        "cra",
        "CRA-CNN",
        "Does contrastive reinforcement help?",
        "",
        references=("baseline", "baseline-long"),
    ),
    _main(
        "cra-soft",
        "CRA-CNN, soft redundancy",
        "Does it help where the redundancy's edge has a gradient?",
        "",
        changes={**BIRDS, "art.redundancy": "soft"},
        references=("baseline", "baseline-long", "cra"),
    ),
    _main(
        "stn",
        "STN",
        "Is a spatial transformer without the contrast as good?",
        "stn",
        references=("baseline", "baseline-long"),
    ),
    _change("no-res", "without L_res", "Is the restriction needed?", loss__res=0.0),
    _change("no-cntr", "without L_cntr", "Is the contrast needed?", loss__cntr=0.0),
    _change(
        "no-cls2",
        "without L_cls2",
        "Is the attention's own classification needed?",
        loss__cls2=0.0,
    ),
    _change(
        "no-switching",
        "L_res on throughout",
        "Is it worth turning L_res off and on?",
        restriction__period_epochs=0,
    ),
    _change(
        "raw-features",
        "raw features in L_cntr",
        "Should N_ar's output be scaled to length 1?",
        contrast__normalize=False,
    ),
    _change(
        "squared",
        "squared distance in L_cntr",
        "Euclidean, as the paper has it, or squared, as the released code?",
        contrast__distance="squared",
    ),
    _change(
        "all-pairs",
        "all pairs in L_cntr",
        "Are random pairs enough?",
        contrast__pairs="all",
    ),
    *(
        Row(
            f"{kind}-bn-4",
            "ablations",
            f"{title}, BatchNorm over 4",
            "Does what BatchNorm over 4 images adds need CRA-CNN?",
            *("quickstart", "baseline", {**changes, "bn.group_size": 4}, 3),
            references,
        )
        for kind, title, changes, references in (
            ("baseline", "baseline", BIRDS, ("baseline",)),
            (
                "baseline-long",
                "baseline, 1.5 times the epochs",
                _BIRDS_LONG,
                ("baseline-long", "baseline-bn-4"),
            ),
        )
    ),
    _change(
        "bn-4",
        "BatchNorm over 4",
        "Does BatchNorm over 4 images help, as in the released code?",
        bn__group_size=4,
    )._replace(references=("baseline", "cra", "baseline-bn-4", "baseline-long-bn-4")),
    _change(
        "outside",
        "attention may leave the image",
        "Is it worth keeping the attention in the image?",
        art__inside=False,
    ),
    _change("no-guard", "without the guard", "Is the guard needed?", art__guard=0.0),
    _change(
        "raw-head",
        "raw features to Gamma",
        "Should Gamma be predicted from features of length 1?",
        art__normalize_head=False,
    ),
    _change(
        "no-clip",
        "without the clip of the affine matrix's gradient",
        "Does the clip keep the attention's losses from N_cls?",
        art__gradient_clip=0.0,
    ),
    *(
        _change(
            f"share-{word}",
            f"without the clip; {share:g} of Gamma's gradient goes to N_cls",
            "Can the attention learn, and N_cls keep what it has learnt?",
            art__gradient_clip=0.0,
            art__gradient_share=share,
        )
        for word, share in (("none", 0.0), ("tenth", 0.1))
    ),
    _change(
        "released-gamma",
        "Gamma as released: raw and clipped, no guard, not kept inside",
        "And with the authors' own safeguard alone?",
        **{key.replace(".", "__"): value for key, value in _RELEASED_GAMMA.items()},
    ),
    _change(
        "paper-gamma",
        "Gamma as in the paper: raw, no guard, no clip, not kept inside",
        "What do the additions do together?",
        art__inside=False,
        art__normalize_head=False,
        art__guard=0.0,
        art__gradient_clip=0.0,
    ),
    *(
        _rate(kind, word, rate)
        for word, rate in (("low", 0.0167), ("high", 0.15))
        for kind in ("baseline", "cra")
    ),
    *_modern("smooth", "labels smoothed by 0.1", seeds=5, loss__label_smoothing=0.1),
    Row(
        "baseline-smooth-long",
        "modern",
        "baseline, labels smoothed by 0.1, 1.5 times the epochs",
        "What does smoothing add, with CRA-CNN's compute?",
        *("quickstart", "baseline", {**_BIRDS_LONG, "loss.label_smoothing": 0.1}, 5),
        ("baseline-long", "baseline-smooth", "cra-smooth"),
    ),
    *_modern("cosine", "rate along a cosine", optim__schedule="cosine"),
    *_modern("ema", "weights averaged (0.99)", optim__ema_decay=0.99),
    *_modern("cutmix", "CutMix", mix__kind="cutmix"),
    *_modern("snapmix", "SnapMix", mix__kind="snapmix", mix__alpha=5.0),
    Row(
        "inner",
        "modern",
        "CRA-CNN, attention at two scales",
        "Does N_ar learn more from a closer look as well?",
        *("quickstart", "", {**BIRDS, "art.inner_scale": 0.5}, 3),
        ("baseline", "cra"),
    ),
    *_photographs("cub", "tuned"),
    _changed_photographs(
        "baseline", "smooth", "labels smoothed by 0.1", loss__label_smoothing=0.1
    ),
    _changed_photographs(
        "baseline", "cosine", "rate along a cosine", optim__schedule="cosine"
    ),
    _changed_photographs(
        "baseline", "ema", "weights averaged (0.99)", optim__ema_decay=0.99
    ),
    _changed_photographs(
        "baseline", "snapmix", "SnapMix", mix__kind="snapmix", mix__alpha=5.0
    ),
    *(
        _changed_photographs(
            kind,
            f"rate-{word}",
            f"learning rate {rate:g}",
            "Does it depend on the rate?",
            optim__base_lr=rate,
        )
        for word, rate in (("low", 0.0017), ("high", 0.015))
        for kind in ("baseline", "cra")
    ),
    *_photographs("cub", "tuned-40"),
    *_photographs("cub", "scratch"),
    *_photographs("cars", "tuned"),
    *_photographs("cars", "tuned-40"),
    *_photographs("cars", "scratch"),
    _instrument("quickstart", "2,048 drawings, 18 epochs", _drawn(2048, 18, 12, 3)),
    _instrument("3072", "3,072 drawings, 12 epochs", _drawn(3072, 12, 8, 2), 1),
    _instrument("4096-short", "4,096 drawings, 9 epochs", _drawn(4096, 9, 5, 2)),
    _instrument("4096-shorter", "4,096 drawings, 8 epochs", _drawn(4096, 8, 4, 2), 1),
    _instrument(
        "batch-32",
        "2,048 drawings, 16 epochs, batches of 32",
        _drawn(2048, 16, 8, 4, train__batch_size=32),
        1,
    ),
    _instrument(
        "batch-32-half",
        "the same, habitat at home in 50 %",
        _drawn(2048, 16, 8, 4, **_HALF),
        1,
    ),
    _instrument(
        "ten-half",
        "2,048 drawings, 10 epochs, habitat at home in 50 %",
        _drawn(2048, 10, 6, 2, **_HALF),
    ),
    _instrument(
        "ten-half-long",
        "the same, 15 epochs",
        _drawn(2048, 15, 9, 3, **_HALF),
        1,
    ),
    _instrument(
        "1024",
        "1,024 drawings, 20 epochs, habitat at home in 50 %",
        _drawn(1024, 20, 12, 4, **_HALF),
        1,
    ),
    _instrument(
        "512-60",
        "512 drawings, 40 epochs, habitat at home in 60 %",
        _drawn(512, 40, 24, 8, **{**_HALF, "data__habitat_share": 0.6}),
        1,
    ),
    _instrument(
        "512-60-long",
        "the same, 60 epochs",
        _drawn(512, 60, 36, 12, **{**_HALF, "data__habitat_share": 0.6}),
        1,
    ),
    _instrument(
        "ten-60",
        "2,048 drawings, 10 epochs, habitat at home in 60 %",
        _drawn(2048, 10, 6, 2, train__batch_size=32, data__habitat_share=0.6),
    ),
)
"""All rows, references before what is compared with them."""

BY_NAME = {row.name: row for row in ROWS}

# What cannot change a number: where things lie, how much is done at once, what is kept.
_INDIFFERENT = (
    *("seed", "hosts.", "checkpoint.", "eval.", "data.cache_dir", "data.manual_dir"),
    *("data.on_device", "data.path", "data.prefetch_batches", "data.prepare"),
    *("data.workers", "train.log_every_steps", "train.report"),
    "train.steps_per_dispatch",
)
# What a network without attention never reads.
_OF_ATTENTION = ("art.", "restriction.", "contrast.", "model.ar_passes", "loss.cls2")
_OF_ATTENTION += ("loss.res", "loss.cntr", "optim.attention_lr_scale")
# Settings that are younger than the first lines: the value that means what the code
# did before them. A line made before and a run made after are then of one fingerprint.
_YOUNGER: Settings = {
    "art.gradient_share": 1.0,
    "art.inner_scale": 0.0,
    "loss.label_smoothing": 0.0,
    "optim.freeze_first_epochs": 0,
    "optim.freeze_period_epochs": 0,
    "mix.alpha": 1.0,
    "mix.kind": "",
    "mix.probability": 1.0,
    "optim.ema_decay": 0.0,
    "optim.schedule": "piecewise",
}


def settings_of(row: Row, *, seed: int, path: str = "") -> Settings:
    """The whole config of a run, flat.

    Raises:
      KeyError: a row changes a setting that there is not.
    """
    config = importlib.import_module(f"configs.{row.config}").get_config(row.variant)
    changes = {**KEEPING, **row.changes, "seed": seed, "data.path": path}
    config.update_from_flattened_dict(changes)
    return run_directory.flatten(config.to_dict())


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve letters for all settings that matter to a run's numbers but the seed.

    Args:
      settings: a config, flat; of a run directory or of `settings_of`.
    """
    # Keys that are gone are part of older fingerprints.
    settings = {**run_directory.REMOVED, **settings}
    skipped = _INDIFFERENT
    if settings["model.kind"] == "baseline":
        skipped += _OF_ATTENTION
    matter = {
        key: value
        for key, value in settings.items()
        if not key.startswith(skipped)
        and (key not in _YOUNGER or _YOUNGER[key] != value)
    }
    text = json.dumps(matter, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
