"""CUB-200-2011: the paper's recipe (Sec. 4.1), what a user sets, what goes beyond it.

    python launch.py --config configs/cub.py  # fetches the set, or: --config.data.path=
    python launch.py --config configs/cub.py:resnet101,baseline

Variants, joined by commas: a backbone (`resnet18` ... `resnet152`,
`efficientnet_lite0`); a kind (`baseline`, `stn`); `paper`: without the four guards,
see `as_in_the_paper`; `released`: what the authors' code does where the paper says
something else, see `as_released`; `plus`, see `as_plus`. "(open)" marks what the
paper does not say.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from cra_jax.art_module import ArtConfig
from cra_jax.backbones import families, hub
from cra_jax.model import KINDS
from cra_jax.swap import SwapConfig


def get_config(variant: str = "") -> Any:
    """The paper's recipe on CUB-200-2011.

    Args:
      variant: names of a backbone, a kind and of `CHANGES`, joined by commas.

    Raises:
      ValueError: a name is unknown.
    """
    config: Any = ConfigDict({name: {} for name in _SECTIONS})
    _paper(config)
    _user(config)
    _beyond_the_paper(config)
    for name in filter(None, variant.split(",")):
        if name in families.backbones():
            config.model.backbone = name
        elif name in KINDS:
            config.model.kind = name
        elif name not in CHANGES:
            known = ", ".join((*families.backbones(), *KINDS, *CHANGES))
            raise ValueError(f"unknown variant {name!r}; choose from {known}")
    # ImageNet's weights (Sec. 4.1), where there are some, and their normalisation.
    config.model.pretrained = hub.default_for(config.model.backbone)
    if config.model.pretrained:
        record = hub.known()[config.model.pretrained]
        config.data.mean, config.data.std = record.mean, record.std
    apply_changes(config, variant)
    return config


_SECTIONS = (
    *("data", "model", "art", "restriction", "contrast", "loss", "optim", "train"),
    *("eval", "checkpoint", "bn", "mix", "swap", "hosts"),
)


def _paper(config: Any) -> None:
    """The recipe of Sec. 4.1, each number with its source."""
    data, model, train = config.data, config.model, config.train
    data.source = "cub"
    data.short_side_px = 512  # resize, aspect kept, antialiased bicubic (Sec. 4.1)
    data.crop_px = 448  # random in training, the centre in testing (Sec. 4.1)
    data.flip = True  # random horizontal, in training (open)
    model.kind = "cra"  # cra, baseline, stn (Sec. 3, 4.1; Fig. 4)
    model.backbone = "resnet50"  # of both streams (Sec. 4.1)
    # Size, bounds and start of the attention (Sec. 4.1, Eq. 6), four guards that the
    # paper lacks, and what goes beyond it: each explained in `ArtConfig`.
    config.art = ConfigDict(dataclasses.asdict(ArtConfig()))

    restriction, contrast = config.restriction, config.contrast
    restriction.expectation = (0.0, 0.0, 0.5, 0.0)  # E (Eq. 7, Sec. 4.1)
    restriction.threshold = (0.4, 0.4, 0.4, math.pi)  # T (Eq. 7, Sec. 4.1)
    restriction.first_epochs = 50  # L_res is on so long (Sec. 4.1)
    restriction.period_epochs = 45  # then off and on alternately; 0: always on
    contrast.margin = 0.7  # Eq. 8, Sec. 4.1
    contrast.distance = "euclidean"  # Eq. 8; "squared" as in the released layer
    contrast.normalize = True  # scale N_ar's output to length 1 (open)
    contrast.features = "scores"  # of N_ar in Eq. 8; "pooled": before its last layer
    contrast.pairs = "random"  # disjoint pairs; "all" pairs of a device's batch (open)

    optim = config.optim
    optim.base_lr = 1e-3  # Sec. 4.1
    optim.first_epochs = 50  # at base_lr (Sec. 4.1)
    optim.period_epochs = 45  # then times `factor` each so many (Sec. 4.1)
    optim.factor = 0.1  # Sec. 4.1
    optim.momentum = 0.9  # Sec. 4.1
    optim.weight_decay = 5e-4  # Sec. 4.1
    optim.decay_norm_and_bias = True  # or on kernels alone (open)
    train.batch_size = 64  # images, over all devices (Sec. 4.1)
    train.epochs = 140  # 50 + 45 + 45 (open)


def _user(config: Any) -> None:
    """What depends on a user's data, machine and taste, not on the method."""
    config.seed = 0  # of weights, order, crops, flips and mixing

    data, model = config.data, config.model
    data.path = ""  # of the dataset; empty: none is needed, or CUB is fetched
    data.name = ""  # tfds: of the dataset, such as caltech_birds2011
    data.manual_dir = ""  # tfds, --mode prepare: archives got by hand; see its messages
    data.seed = 0  # of drawn images, and of test splits that the folder does not have
    data.test_share = 0.2  # folder, csv, tfds: without a test split, of each class
    data.val_share = 0.0  # of each class's training images, as a split `val`; 0: none
    data.mean = (0.485, 0.456, 0.406)  # of ImageNet's channels, images in 0..1
    data.std = (0.229, 0.224, 0.225)
    data.prepare = True  # decode once into the image cache; False: at each use
    data.on_device = False  # keep the training images in device memory, decoded
    data.skip_unreadable = False  # leave images out that cannot be decoded, by name
    data.cache_dir = ""  # of the image cache; empty: in or near the dataset
    data.workers = 2  # threads that make batches
    data.prefetch_batches = 4  # batches made ahead
    data.num_species = 8  # synthetic: classes
    data.habitat_share = 0.7  # synthetic: how often the habitat gives the class away
    data.train_size = 4096  # synthetic: images
    data.test_size = 1024  # synthetic: images, in either test split
    model.pretrained = ""  # a name of the hub, a file, a run; empty: none (see above)
    model.dtype = "auto"  # training computes in it: float32, bfloat16, auto
    model.remat = False  # compute blocks again in the backward pass: less memory

    train, checkpoint, evaluation = config.train, config.checkpoint, config.eval
    # Micro-batches a step, one after the other: less memory, the same update where
    # bn.group_size divides one; else BatchNorm sees a micro-batch instead of the batch.
    train.accumulate = 1
    # Steps at one call of the device, up to the next that something is logged or saved
    # after: for small networks, whose steps end before the next call.
    train.steps_per_dispatch = 1
    train.log_every_steps = 20
    train.skip_bad_steps = 0  # leave out so many that are not finite; the next stops
    train.report = True  # write report/index.html at the end
    checkpoint.every_epochs = 1
    checkpoint.every_steps = 0  # also in mid-epoch; 0: at the end of epochs alone
    checkpoint.keep_latest = 2  # the best on `val`, else on `test`, is kept as well
    evaluation.protocol = "both"  # center (Sec. 4.2), full (Sec. 4.3), or both
    evaluation.batch_size = 32  # images; the scores do not depend on it
    evaluation.bucket_px = 64  # full: sizes are rounded up to multiples; 0: exact
    evaluation.every_epochs = 5  # while training, protocol center
    evaluation.snapshots = 8  # test images whose attention is kept each time
    evaluation.checkpoint = "latest"  # --mode eval: latest, best, or a step

    hosts = config.hosts  # that train together; see docs/devices.md
    hosts.coordinator = ""  # HOST:PORT of the first; auto: ask the cluster; empty: one
    hosts.count = 0  # of hosts, with HOST:PORT
    hosts.index = 0  # of this one, from 0, with HOST:PORT


def _beyond_the_paper(config: Any) -> None:
    """What the paper does not have, off here; each with its reason."""
    model, bn, loss, mix, optim = (
        config[name] for name in ("model", "bn", "loss", "mix", "optim")
    )
    model.width = 64  # channels of the first stage: small networks for small images
    model.stem = "imagenet"  # "small", "medium": less stride, for small images
    bn.group_size = 0  # images that share statistics: the released code has 4; 0: all
    bn.sync = False  # share statistics over devices, where a device has few images
    loss.cls2 = 1.0  # weights of the terms of Eq. 9, to see what each term does
    loss.res = 1.0  # times 0 or 1, see restriction
    loss.cntr = 1.0
    loss.label_smoothing = 0.0  # of L_cls1 and L_cls2: helped on drawn birds
    loss.uniform = 0.0  # of N_ar's even scores for the redundancy, see `losses`
    model.shared_weights = False  # N_ar has the weights of N_cls: less memory
    # The attention of an image on the background of another, for N_cls: each key is
    # explained in `SwapConfig`.
    config.swap = ConfigDict(dataclasses.asdict(SwapConfig()))
    mix.kind = ""  # cutmix; snapmix: rivals that a reader will ask for; empty: off
    mix.probability = 1.0  # how often an image is mixed
    mix.alpha = 1.0  # of Beta(alpha, alpha), the share that stays; 5: mostly half
    optim.schedule = "piecewise"  # Sec. 4.1; "cosine": from base_lr to 0 at the end
    optim.warmup_epochs = 0  # linear rise at the start, for training from scratch
    # Prediction takes weights averaged over about 1 / (1 - ema_decay) steps; 0: the
    # newest, as in the paper.
    optim.ema_decay = 0.0
    # After freeze_first_epochs N_cls but its classifier is frozen and trained
    # alternately, for freeze_period_epochs each, as released; 0: never frozen.
    optim.freeze_first_epochs = 0
    optim.freeze_period_epochs = 0


def apply_changes(config: Any, variant: str) -> None:
    """Makes those of a variant's changes that are more than a backbone or a kind."""
    for name in variant.split(","):
        if name in CHANGES:
            CHANGES[name](config)


def as_in_the_paper(config: Any) -> None:
    """Turns off the four guards that the paper does not have.

    Without them training fails: on photographs 49 % for 88 % (docs/study.md).
    """
    config.art.gradient_clip = 0.0
    config.art.normalize_head = False
    config.art.inside = False
    config.art.guard = 0.0


def as_released(config: Any) -> None:
    """Changes a recipe into what the authors' released code does.

    That code starts both streams from a backbone that was fine-tuned on the same set.
    No variant can know where yours is; train one, then name its run directory:

        python launch.py --config configs/cub.py:baseline
        python launch.py --config configs/cub.py:released \
            --config.model.pretrained=runs/cub-baseline

    Three things of it are not built. It flips its 4 images by one coin; here each
    has its own. It takes the mean over the affine matrix's four entries for the
    gradient to scale and angle, a quarter of ours, which is the sum. And its L_res
    looks at the entries of that matrix, ours, as Eq. (7), at Gamma.
    """
    config.bn.group_size = 4  # it sums gradients over 16 batches of 4: BatchNorm sees 4
    config.contrast.distance = "squared"
    # 60 epochs more than the paper's 140: the rate falls once, after 50, and again for
    # these, in which L_res is off. Until then it is on.
    options, restriction, epochs = config.optim, config.restriction, config.train.epochs
    turn_epochs = options.period_epochs
    options.period_epochs = 2 * turn_epochs
    config.train.epochs = round(epochs * 200 / 140)
    restriction.first_epochs = epochs
    restriction.period_epochs = config.train.epochs - epochs
    # What goes off and on alternately is the training of N_cls; the baseline has no
    # other stream that could train in the meantime.
    if config.model.kind != "baseline":
        options.freeze_first_epochs = options.first_epochs
        options.freeze_period_epochs = turn_epochs
    # Its one guard is the clip of the affine matrix's gradient, which is our default.
    config.art.normalize_head = False
    config.art.inside = False
    config.art.guard = 0.0


def as_plus(config: Any) -> None:
    """Adds to a recipe what is younger than the paper and helped in the study.

    Nothing of it costs anything at test time; docs/study.md has the numbers. Label
    smoothing and averaged weights serve every kind of network, the rest CRA-CNN. Not in
    it, since they cost accuracy: CutMix and SnapMix (``mix.kind``), and a cosine
    (``optim.schedule``).
    """
    config.loss.label_smoothing = 0.1
    # An average over 1,000 steps, or 100 of the few that training from scratch takes.
    config.optim.ema_decay = 0.999 if config.model.pretrained else 0.99
    if config.model.kind != "cra":
        return
    config.art.head = "spatial"  # the pooled one stays where it begins
    config.art.rotate = False
    config.art.redundancy = "filled"  # a black hole would give the redundancy away
    config.loss.uniform = 1.0  # instead of L_cntr, which soon has no gradient
    config.loss.cntr = 0.0
    config.model.shared_weights = True  # the losses of N_ar train N_cls itself
    config.swap.weight = 1.0


CHANGES = {"paper": as_in_the_paper, "released": as_released, "plus": as_plus}
