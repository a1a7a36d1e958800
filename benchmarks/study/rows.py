"""The rows of the study: the training configurations and the question each answers.

A row is a config with changed settings. The runs of a row differ only in the seed.
`fingerprint` identifies the settings of a run, so that results of other settings are
never counted.
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
    """One training configuration.

    Attributes:
      name: key of the row in `results.jsonl` and in the names of its run directories.
      group: a key of `GROUPS`.
      title: name of the row on the page.
      question: the question that the row answers.
      config: a module of `configs/`.
      variant: variant of that config.
      changes: changed settings by their dotted keys.
      seeds: number of runs; their seeds start at 0.
      references: names of the rows that it is compared with, seed by seed.
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
        """Value of `model.kind`."""
        kinds = [x for x in self.variant.split(",") if x in ("baseline", "stn")]
        return kinds[0] if kinds else "cra"


GROUPS = {
    "gain": "Drawn birds: 64 images of a species, every row with the same compute",
    "budget": "Drawn birds: other numbers of passes and of images",
    "main": "Drawn birds: main comparison",
    "ablations": "Drawn birds: one part of CRA-CNN changed",
    "robust": "Drawn birds: guards of Gamma and learning rates",
    "modern": "Drawn birds: additions to both networks",
    "cub": "Photographs: ten species of CUB",
    "cars": f"Photographs: {cars_subset.MODELS} models of Stanford Cars",
    "instrument": "Choice of the drawn-bird task",
}
"""Headings of the groups, in the order in which the groups run."""

# Outputs of a run besides its scores. They do not change the scores.
KEEPING: Settings = {
    "train.report": False,
    "checkpoint.every_epochs": 3,
    "checkpoint.keep_latest": 1,
    "eval.every_epochs": 1000,  # the last epoch is always evaluated
    "eval.snapshots": 0,
    "data.workers": 1,
}


def _phases(epochs: int, first: int, period: int) -> Settings:
    """Settings of the schedule.

    The learning rate falls and L_res switches after `first` epochs, and then after each
    period.
    """
    return {
        "train.epochs": epochs,
        "optim.first_epochs": first,
        "optim.period_epochs": period,
        "restriction.first_epochs": first,
        "restriction.period_epochs": period,
    }


def _drawn(train_size: int, *phases: int, **more: Any) -> Settings:
    """Settings of drawn birds; `data__habitat_share` sets `data.habitat_share`."""
    dotted = {key.replace("__", "."): value for key, value in more.items()}
    sizes = {"data.train_size": train_size, "data.test_size": 1024}
    return {**sizes, "train.batch_size": 64, **_phases(*phases), **dotted}


# The drawn-bird task. docs/study.md, "Choice of the drawn-bird task", gives the reason.
_HALF = {"train__batch_size": 32, "data__habitat_share": 0.5}
BIRDS = _drawn(512, 40, 24, 8, **_HALF)
"""Changes to the quickstart config that make the drawn-bird task of the study."""

_BIRDS_LONG = _drawn(512, 60, 36, 12, **_HALF)


def _instrument(name: str, title: str, changes: Settings, seeds: int = 2) -> Row:
    return Row(
        f"instrument-{name}",
        "instrument",
        title,
        "Which criteria does the baseline meet?",
        *("quickstart", "baseline", changes, seeds),
    )


def _main(name: str, title: str, question: str, variant: str, **more: Any) -> Row:
    changes = more.pop("changes", BIRDS)
    return Row(name, "main", title, question, "quickstart", variant, changes, 5, **more)


def _change(name: str, title: str, question: str, **changes: Any) -> Row:
    """A row of CRA-CNN with changed settings; `loss__res` sets `loss.res`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    group = "robust" if any(k.startswith("art.") for k in dotted) else "ablations"
    more = (*("quickstart", "cra", {**BIRDS, **dotted}, 3), ("baseline", "cra"))
    return Row(name, group, title, question, *more)


def _modern(name: str, word: str, seeds: int = 3, **changes: Any) -> list[Row]:
    """Two rows: the baseline and CRA-CNN with the same changed settings."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return [
        Row(
            f"{kind}-{name}",
            "modern",
            f"{title}, {word}",
            "Does the addition raise accuracy?",
            *("quickstart", variant, {**BIRDS, **dotted}, seeds),
            (kind,) if kind == "baseline" else ("cra", f"baseline-{name}"),
        )
        for kind, variant, title in (
            ("baseline", "baseline", "baseline"),
            ("cra", "cra", "CRA-CNN"),
        )
    ]


# Passes over the training images for every row of the group "gain".
_PASSES = 160
_SPATIAL: Settings = {"art.head": "spatial", "art.rotate": False}
_SWAP: Settings = {**_SPATIAL, "swap.weight": 1.0}
_BEST: Settings = {
    **_SWAP,
    "art.redundancy": "filled",
    "loss.uniform": 1.0,
    "loss.cntr": 0.0,
    "model.shared_weights": True,
}


def _gain(
    name: str,
    title: str,
    variant: str,
    passes: float,
    changes: Settings | None = None,
    *,
    references: tuple[str, ...] = ("gain-baseline",),
) -> Row:
    """A row of the group "gain"; `passes` counts those of an epoch, see quickstart."""
    epochs = round(_PASSES / passes)
    phases = (epochs, round(0.7 * epochs), round(0.2 * epochs))
    return Row(
        f"gain-{name}",
        "gain",
        title,
        "Which training is the most accurate for its compute?",
        *("quickstart", variant),
        {**_drawn(512, *phases, train__batch_size=32), **(changes or {})},
        5,
        references,
    )


_GAIN = (
    _gain("baseline", "baseline", "baseline", 1, references=()),
    _gain("cra", "CRA-CNN", "cra", 1.5),
    _gain("spatial", "spatial head", "cra", 1.5, _SPATIAL),
    _gain(
        "no-gradient",
        "spatial head, none of Gamma's gradient to N_cls",
        *("cra", 1.5, {**_SPATIAL, "art.gradient_share": 0.0}),
    ),
    _gain(
        "contrast",
        "spatial head, filled redundancy",
        *("cra", 1.5, {**_SPATIAL, "art.redundancy": "filled"}),
    ),
    _gain(
        "shared",
        "spatial head, shared weights",
        *("cra", 1.5, {**_SPATIAL, "model.shared_weights": True}),
    ),
    _gain(
        "uniform",
        "spatial head, shared weights, L_uniform on a filled redundancy",
        *("cra", 1.5, {**_BEST, "swap.weight": 0.0}),
    ),
    _gain("swap", "spatial head, swap", "cra", 2, _SWAP),
    _gain("best", "all extensions", "cra", 2, _BEST),
    _gain(
        "random",
        "all extensions, swap of random boxes",
        *("cra", 2, {**_BEST, "swap.boxes": "random"}),
    ),
    _gain("cutmix", "baseline, CutMix", "baseline", 1, {"mix.kind": "cutmix"}),
    _gain(
        "snapmix",
        "baseline, SnapMix",
        *("baseline", 4 / 3, {"mix.kind": "snapmix", "mix.alpha": 5.0}),
    ),
    _gain("baseline-plus", "baseline, smoothing and averages", "baseline,plus", 1),
    _gain(
        "plus",
        "all extensions, smoothing and averages (`plus`)",
        *("plus", 2),
        references=("gain-baseline-plus", "gain-baseline"),
    ),
)


BUDGETS = ((80, 64), (160, 64), (320, 64), (640, 16), (40, 256))
"""Passes over the training images, and images of a species; see the page's figure."""


def budget_row(kind: str, passes: int, images: int) -> str:
    """Name of the row of "baseline-plus" or "plus" with a budget of `BUDGETS`."""
    name = f"gain-{kind}"
    return name if (passes, images) == (160, 64) else f"{name}-{passes}-{images}"


def _budget(passes: int, images: int) -> list[Row]:
    """Both rows with another number of passes or of images of a species."""
    rows = []
    for kind, variant, each, title in (
        ("baseline-plus", "baseline,plus", 1, "baseline, smoothing and averages"),
        ("plus", "plus", 2, "`plus`"),
    ):
        epochs = passes // each
        phases = (epochs, round(0.7 * epochs), round(0.2 * epochs))
        reference = budget_row("baseline-plus", passes, images)
        rows.append(
            Row(
                budget_row(kind, passes, images),
                "budget",
                f"{title}, {images} images of a species, {passes} passes",
                "Does the gain depend on the compute, or on the number of images?",
                *("quickstart", variant),
                _drawn(8 * images, *phases, train__batch_size=32),
                *(3, () if kind == "baseline-plus" else (reference,)),
            )
        )
    return rows


def _rate(kind: str, word: str, rate: float) -> Row:
    name = "CRA-CNN" if kind == "cra" else kind
    return Row(
        f"{kind}-rate-{word}",
        "robust",
        f"{name}, learning rate {rate:g}",
        "Does the result depend on the learning rate?",
        *("quickstart", kind, {**BIRDS, "optim.base_lr": rate}, 3),
        (kind,) if kind == "baseline" else (f"baseline-rate-{word}", kind),
    )


# Image sizes that are feasible without a GPU.
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
    "baseline-long": ("baseline", "baseline, same compute", ("baseline",)),
    "cra": ("", "CRA-CNN", ("baseline", "baseline-long")),
    "cra-soft": ("", "CRA-CNN, soft redundancy", ("baseline", "baseline-long")),
    "stn": ("stn", "STN", ("baseline", "baseline-long")),
    "cra-released": (
        "",
        "CRA-CNN, Gamma as in the released code",
        ("baseline", "baseline-long", "cra"),
    ),
}


class _Start(NamedTuple):
    """Initial weights and schedule of the rows on photographs.

    Attributes:
      backbone: variant of the config.
      title: name of the start on the page.
      recipe: changed settings.
      usual: arguments of `_phases`.
      long: the same for the baseline with the compute of CRA-CNN.
      kinds: keys of `_KINDS`.
    """

    backbone: str
    title: str
    recipe: Settings
    usual: tuple[int, int, int]
    long: tuple[int, int, int]
    kinds: tuple[str, ...]


_MAIN_KINDS = ("baseline", "baseline-long", "cra", "cra-soft", "stn")
_STARTS = {
    "tuned": _Start(
        *("efficientnet_lite0", "fine-tuned", _TUNED, (10, 6, 2), (15, 9, 3)),
        (*_MAIN_KINDS, "cra-released"),
    ),
    # A longer schedule, because 10 epochs do not reach the highest accuracy.
    "tuned-40": _Start(
        *("efficientnet_lite0", "fine-tuned for 40 epochs", _TUNED),
        *((40, 24, 8), (60, 36, 12), _MAIN_KINDS[:3]),
    ),
    # Without "cra-released", which the drawn birds cover from scratch.
    "scratch": _Start(
        *("resnet10", "from scratch", _SCRATCH, (60, 36, 12), (90, 54, 18)),
        _MAIN_KINDS,
    ),
}


def _photographs(data: str, name: str) -> list[Row]:
    """The main rows on a dataset of photographs, from one start of `_STARTS`."""
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
                f"{title} ({start.title})",
                "Do the results on drawn birds hold on photographs?",
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
    question: str = "Does the addition raise accuracy?",
    **changes: Any,
) -> Row:
    """A row with changed settings, fine-tuned on ten species of CUB."""
    variant, title, _ = _KINDS[kind]
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    usual = f"cub-tuned-{kind}"
    references = (f"cub-tuned-baseline-{name}",) if kind != "baseline" else ()
    return Row(
        f"{usual}-{name}",
        "cub",
        f"{title}, {word} (fine-tuned)",
        question,
        *("cub", ",".join(filter(None, ("efficientnet_lite0", variant)))),
        {**_SMALL, **_TUNED, **_phases(*_STARTS["tuned"].usual), **dotted},
        *(3, (*references, usual)),
    )


ROWS = (
    *_GAIN,
    *(row for x in BUDGETS if x != (160, 64) for row in _budget(*x)),
    _main("baseline", "baseline", "How accurate is a plain ResNet?", "baseline"),
    _main(
        "baseline-long",
        "baseline, same compute",
        "How accurate is a plain ResNet with the compute of CRA-CNN?",
        "baseline",
        changes=_BIRDS_LONG,
        references=("baseline",),
    ),
    _main(
        "cra",
        "CRA-CNN",
        "Does contrastive reinforcement raise accuracy?",
        "cra",
        references=("baseline", "baseline-long"),
    ),
    _main(
        "cra-soft",
        "CRA-CNN, soft redundancy",
        "Does a redundancy with differentiable edges raise accuracy?",
        "cra",
        changes={**BIRDS, "art.redundancy": "soft"},
        references=("baseline", "baseline-long", "cra"),
    ),
    _main(
        "stn",
        "STN",
        "Is a spatial transformer as accurate?",
        "stn",
        references=("baseline", "baseline-long"),
    ),
    _change("no-res", "without L_res", "Does L_res raise accuracy?", loss__res=0.0),
    _change("no-cntr", "without L_cntr", "Does L_cntr raise accuracy?", loss__cntr=0.0),
    _change(
        "no-cls2",
        "without L_cls2",
        "Does L_cls2 raise accuracy?",
        loss__cls2=0.0,
    ),
    _change(
        "no-switching",
        "L_res in all epochs",
        "Does switching L_res off and on raise accuracy?",
        restriction__period_epochs=0,
    ),
    _change(
        "raw-features",
        "features not normalized in L_cntr",
        "Does L2 normalization of N_ar's output raise accuracy?",
        contrast__normalize=False,
    ),
    _change(
        "squared",
        "squared distance in L_cntr",
        "Does the squared distance of the released code raise accuracy?",
        contrast__distance="squared",
    ),
    _change(
        "all-pairs",
        "all pairs in L_cntr",
        "Are all pairs better than random pairs?",
        contrast__pairs="all",
    ),
    *(
        Row(
            f"{kind}-bn-4",
            "ablations",
            f"{title}, BatchNorm groups of 4",
            "Do BatchNorm groups of 4 raise the accuracy of the baseline?",
            *("quickstart", "baseline", {**changes, "bn.group_size": 4}, 3),
            references,
        )
        for kind, title, changes, references in (
            ("baseline", "baseline", BIRDS, ("baseline",)),
            (
                "baseline-long",
                "baseline, same compute",
                _BIRDS_LONG,
                ("baseline-long", "baseline-bn-4"),
            ),
        )
    ),
    _change(
        "bn-4",
        "BatchNorm groups of 4",
        "Do BatchNorm groups of 4, as in the released code, raise accuracy?",
        bn__group_size=4,
    )._replace(references=("baseline", "cra", "baseline-bn-4", "baseline-long-bn-4")),
    _change(
        "outside",
        "attention not kept inside the image",
        "Does keeping the attention inside the image raise accuracy?",
        art__inside=False,
    ),
    _change(
        "no-guard",
        "without the guard",
        "Does the guard raise accuracy?",
        art__guard=0.0,
    ),
    _change(
        "raw-head",
        "features not normalized before Gamma",
        "Does L2 normalization of the head's input raise accuracy?",
        art__normalize_head=False,
    ),
    _change(
        "no-clip",
        "without gradient clipping",
        "Does clipping the gradient of the affine matrix raise accuracy?",
        art__gradient_clip=0.0,
    ),
    *(
        _change(
            f"share-{word}",
            f"without gradient clipping, {share:g} of Gamma's gradient to N_cls",
            "Does a smaller gradient from Gamma to N_cls raise accuracy?",
            art__gradient_clip=0.0,
            art__gradient_share=share,
        )
        for word, share in (("none", 0.0), ("tenth", 0.1))
    ),
    _change(
        "released-gamma",
        "Gamma as in the released code",
        "How accurate is CRA-CNN with gradient clipping as the only guard?",
        **{key.replace(".", "__"): value for key, value in _RELEASED_GAMMA.items()},
    ),
    _change(
        "paper-gamma",
        "Gamma as in the paper",
        "How accurate is CRA-CNN without the four guards?",
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
    *_modern("smooth", "label smoothing 0.1", seeds=5, loss__label_smoothing=0.1),
    Row(
        "baseline-smooth-long",
        "modern",
        "baseline, label smoothing 0.1, same compute",
        "Does label smoothing raise accuracy with the compute of CRA-CNN?",
        *("quickstart", "baseline", {**_BIRDS_LONG, "loss.label_smoothing": 0.1}, 5),
        ("baseline-long", "baseline-smooth", "cra-smooth"),
    ),
    *_modern("cosine", "cosine learning rate", optim__schedule="cosine"),
    *_modern("ema", "weight averaging (EMA 0.99)", optim__ema_decay=0.99),
    *_modern("cutmix", "CutMix", mix__kind="cutmix"),
    *_modern("snapmix", "SnapMix", mix__kind="snapmix", mix__alpha=5.0),
    Row(
        "inner",
        "modern",
        "CRA-CNN, attention at two scales",
        "Does a second, smaller attention raise accuracy?",
        *("quickstart", "cra", {**BIRDS, "art.inner_scale": 0.5}, 3),
        ("baseline", "cra"),
    ),
    *_photographs("cub", "tuned"),
    _changed_photographs(
        "baseline", "smooth", "label smoothing 0.1", loss__label_smoothing=0.1
    ),
    _changed_photographs(
        "baseline", "cosine", "cosine learning rate", optim__schedule="cosine"
    ),
    _changed_photographs(
        "baseline", "ema", "weight averaging (EMA 0.99)", optim__ema_decay=0.99
    ),
    _changed_photographs(
        "baseline", "snapmix", "SnapMix", mix__kind="snapmix", mix__alpha=5.0
    ),
    *(
        _changed_photographs(
            kind,
            f"rate-{word}",
            f"learning rate {rate:g}",
            "Does the result depend on the learning rate?",
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
        "2,048 drawings, 16 epochs, batch size 32",
        _drawn(2048, 16, 8, 4, train__batch_size=32),
        1,
    ),
    _instrument(
        "batch-32-half",
        "2,048 drawings, 16 epochs, batch size 32, habitat share 0.5",
        _drawn(2048, 16, 8, 4, **_HALF),
        1,
    ),
    _instrument(
        "ten-half",
        "2,048 drawings, 10 epochs, habitat share 0.5",
        _drawn(2048, 10, 6, 2, **_HALF),
    ),
    _instrument(
        "ten-half-long",
        "2,048 drawings, 15 epochs, habitat share 0.5",
        _drawn(2048, 15, 9, 3, **_HALF),
        1,
    ),
    _instrument(
        "1024",
        "1,024 drawings, 20 epochs, habitat share 0.5",
        _drawn(1024, 20, 12, 4, **_HALF),
        1,
    ),
    _instrument(
        "512-60",
        "512 drawings, 40 epochs, habitat share 0.6",
        _drawn(512, 40, 24, 8, **{**_HALF, "data__habitat_share": 0.6}),
        1,
    ),
    _instrument(
        "512-60-long",
        "512 drawings, 60 epochs, habitat share 0.6",
        _drawn(512, 60, 36, 12, **{**_HALF, "data__habitat_share": 0.6}),
        1,
    ),
    _instrument(
        "ten-60",
        "2,048 drawings, 10 epochs, habitat share 0.6",
        _drawn(2048, 10, 6, 2, train__batch_size=32, data__habitat_share=0.6),
    ),
)
"""All rows; each row stands after its references."""

BY_NAME = {row.name: row for row in ROWS}

# Settings that do not change a score: paths, parallelism and outputs.
_IRRELEVANT = (
    *("seed", "hosts.", "checkpoint.", "eval.", "data.cache_dir", "data.manual_dir"),
    *("data.on_device", "data.path", "data.prefetch_batches", "data.prepare"),
    *("data.workers", "train.log_every_steps", "train.report"),
    "train.steps_per_dispatch",
)
# Settings that only a network with attention reads.
_OF_ATTENTION = ("art.", "restriction.", "contrast.", "model.ar_passes", "loss.cls2")
_OF_ATTENTION += ("loss.res", "loss.cntr", "loss.uniform", "optim.attention_lr_scale")
_OF_ATTENTION += ("model.shared_weights", "swap.")
# Settings that were added after the first results, with the value that reproduces the
# earlier behaviour. A result from before such a setting keeps its fingerprint.
_ADDED_LATER: Settings = {
    "art.gradient_share": 1.0,
    "data.val_share": 0.0,
    "art.head": "pooled",
    "art.inner_scale": 0.0,
    "art.rotate": True,
    "contrast.features": "scores",
    "loss.uniform": 0.0,
    "model.shared_weights": False,
    "swap.boxes": "attention",
    "swap.edge": 0.0,
    "swap.every": 2,
    "swap.place": "neighbour",
    "swap.weight": 0.0,
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
    """The whole config of a run, as a flat mapping.

    Raises:
      KeyError: a row changes an unknown setting.
    """
    config = importlib.import_module(f"configs.{row.config}").get_config(row.variant)
    changes = {**KEEPING, **row.changes, "seed": seed, "data.path": path}
    config.update_from_flattened_dict(changes)
    return run_directory.flatten(config.to_dict())


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash of all settings that change the scores of a run, except the seed.

    Args:
      settings: a flat config, from a run directory or from `settings_of`.

    Returns:
      Twelve hexadecimal digits.
    """
    # Older fingerprints contain keys that were removed since.
    settings = {**run_directory.REMOVED, **settings}
    skipped = _IRRELEVANT
    if settings["model.kind"] == "baseline":
        skipped += _OF_ATTENTION
    relevant = {
        key: value
        for key, value in settings.items()
        if not key.startswith(skipped)
        and (key not in _ADDED_LATER or _ADDED_LATER[key] != value)
    }
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
