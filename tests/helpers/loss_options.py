"""The paper's numbers of Eq. (7), (8) and (9)."""

import math

from cra_jax.train_step import LossOptions

LOSS = LossOptions(
    cls2_weight=1.0,
    res_weight=1.0,
    cntr_weight=1.0,
    uniform_weight=0.0,
    swap_weight=0.0,
    expectation=(0.0, 0.0, 0.5, 0.0),
    threshold=(0.4, 0.4, 0.4, math.pi),
    margin=0.7,
    distance="euclidean",
    features="scores",
    normalize_features=True,
    pairs="random",
    label_smoothing=0.0,
)
