"""The training step of one device, as a pure function.

The argument `all_mean` averages over devices; by default there is one device.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from cra_jax import art_module, losses, model, swap
from cra_jax.art_module import ATTENTION_HEAD, CLASSIFICATION_STREAM, Attention
from cra_jax.losses import MixedLabels

Batch = Mapping[str, Any]
Terms = dict[str, Array]

_PREDICTING = (CLASSIFICATION_STREAM, ATTENTION_HEAD)

# At this share of its bound, tanh has a tenth of its maximal slope.
SATURATED = 0.95


@struct.dataclass
class TrainState:
    """All arrays that training changes.

    Attributes:
      step: number of steps taken, a scalar.
      params: parameters of all streams and the attention head.
      batch_stats: BatchNorm's running statistics of all streams.
      opt_state: state of the optax optimizer.
      average: ``{"params", "batch_stats"}`` of the predicting part, averaged over the
        steps so far, see `step_wrappers.average_weights`; empty without averaging.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = struct.field(default_factory=dict)

    def started_from(self, params: Any, batch_stats: Any) -> "TrainState":
        """The same state with other weights, from which the average starts again."""
        average = prediction_variables(params, batch_stats) if self.average else {}
        # Copies, because no two arrays of a donated state may share memory.
        average = jax.tree.map(jnp.array, average)
        return dataclasses.replace(
            self, params=params, batch_stats=batch_stats, average=average
        )

    def to_predict(self) -> tuple[Any, Any]:
        """Parameters and statistics for prediction; averaged ones if there are any."""
        if self.average:
            return self.average["params"], self.average["batch_stats"]
        return self.params, self.batch_stats


def create_state(
    key: Array,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    crop_px: int,
    averaged: bool = False,
) -> TrainState:
    """Creates the initial state.

    The same key gives a stream the same weights for every kind of network.

    Args:
      key: a `jax.random` key.
      network: result of `model.create`.
      optimizer: an optax optimizer.
      crop_px: height and width of an image.
      averaged: whether the step is made by `step_wrappers.average_weights`.
    """
    images = jnp.zeros((2, crop_px, crop_px, 3), jnp.float32)
    variables = jax.jit(network.init)(key, images)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        average=prediction_variables(params, batch_stats) if averaged else {},
    )
    return state.started_from(params, batch_stats)


def prediction_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    """Selects the arrays for prediction and its figures: N_cls and attention head.

    Returns:
      ``{"params", "batch_stats"}``, trees of the same arrays, without copies.
    """
    return {
        name: {stream: tree[stream] for stream in _PREDICTING if stream in tree}
        for name, tree in (("params", params), ("batch_stats", batch_stats))
    }


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of Eq. (7), (8) and (9).

    Attributes:
      cls2_weight: weight of L_cls2 in Eq. (9). All three weights are 1 in the paper.
      res_weight: weight of L_res.
      cntr_weight: weight of L_cntr; 0: L_cntr is not computed.
      uniform_weight: weight of L_uniform.
      swap_weight: weight of L_swap.
      expectation: E of Eq. (7).
      threshold: T of Eq. (7).
      margin: margin of Eq. (8).
      distance: distance of Eq. (8), one of `losses.DISTANCES`.
      features: features of N_ar in Eq. (8), one of `losses.FEATURES`.
      normalize_features: whether they are scaled to length 1.
      pairs: which images Eq. (8) contrasts, one of `losses.PAIRS`.
      label_smoothing: smoothing of both cross-entropies, see `losses.cross_entropy`.

    Raises:
      ValueError: an option is unknown or out of range.
    """

    cls2_weight: float
    res_weight: float
    cntr_weight: float
    uniform_weight: float
    swap_weight: float
    expectation: tuple[float, ...]
    threshold: tuple[float, ...]
    margin: float
    distance: str
    features: str
    normalize_features: bool
    pairs: str
    label_smoothing: float

    def __post_init__(self) -> None:
        if self.pairs not in losses.PAIRS:
            raise ValueError(
                f"unknown contrast.pairs {self.pairs!r}; choose from "
                f"{', '.join(losses.PAIRS)}"
            )
        if self.distance not in losses.DISTANCES:
            raise ValueError(
                f"unknown contrast.distance {self.distance!r}; choose from "
                f"{', '.join(losses.DISTANCES)}"
            )
        if self.features not in losses.FEATURES:
            raise ValueError(
                f"unknown contrast.features {self.features!r}; choose from "
                f"{', '.join(losses.FEATURES)}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing} must be in [0, 1): 0.1 "
                "is usual, 0 leaves the labels as they are"
            )


def make_loss(
    network: nn.Module,
    options: LossOptions,
    *,
    restriction_weight: Callable[[Array], Array],
) -> Callable[..., tuple[Array, tuple[Any, Terms]]]:
    """Eq. (9) as a function of ``(params, batch_stats, images, labels, step)``.

    A sixth argument, boxes ``[b, 4]``, takes the place of the attention in the swap.

    The labels are int ``[b]`` or `losses.MixedLabels`. The accuracy of mixed labels
    counts the label with the larger weight as correct.

    Args:
      network: result of `model.create`.
      options: weights, margins and thresholds.
      restriction_weight: step -> 0 or 1, from `schedule`.

    Returns:
      A function that returns the loss and ``(batch_stats, terms)``. Terms are means
      over the batch (over pairs for L_cntr). Terms that the kind lacks are missing.
    """

    def loss_function(params, batch_stats, images, labels, step, boxes=None):
        out, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            True,
            boxes,
            mutable=["batch_stats"],
        )
        assert isinstance(out, model.Outputs)
        terms = classification_terms(out, labels, options)
        if out.attention is not None and out.attention.gamma_res is not None:
            terms |= restriction_terms(out.attention.gamma_res, options)
            terms |= {"restriction_weight": restriction_weight(step)}
            terms |= _describe_gamma(out.attention, network)
        if out.redundancy_logits is not None and options.cntr_weight:
            terms |= contrastive_terms(out, options)
        if out.redundancy_logits is not None and options.uniform_weight:
            even = losses.uniform_loss(out.redundancy_logits)
            terms["loss_uniform"] = even.mean()
        if out.swap_logits is not None:
            terms |= swap_terms(out.swap_logits, labels, options, network.swap)
        terms["loss"] = total_loss(terms, options)
        return terms["loss"], (updated["batch_stats"], terms)

    return loss_function


def total_loss(terms: Terms, options: LossOptions) -> Array:
    """The loss of Eq. (9); a term that the kind lacks counts as 0."""
    w, term = options, collections.defaultdict(float, terms)
    return jnp.asarray(
        term["loss_cls1"]
        + w.cls2_weight * term["loss_cls2"]
        + w.res_weight * term["restriction_weight"] * term["loss_res"]
        + w.cntr_weight * term["loss_cntr"]
        + w.uniform_weight * term["loss_uniform"]
        + w.swap_weight * term["loss_swap"]
    )


def classification_terms(
    out: model.Outputs, labels: Array | MixedLabels, options: LossOptions
) -> Terms:
    """L_cls1, L_cls2 and the accuracies of both streams."""
    is_mixed = isinstance(labels, MixedLabels)
    right = labels.heavier() if is_mixed else labels

    def loss(logits: Array) -> Array:
        entropy = losses.mixed_cross_entropy if is_mixed else losses.cross_entropy
        return entropy(logits, labels, smoothing=options.label_smoothing).mean()  # pyright: ignore[reportArgumentType]

    def accuracy(logits: Array) -> Array:
        return (logits.argmax(-1) == right).mean()

    terms = {"loss_cls1": loss(out.logits), "top1": accuracy(out.logits)}
    if is_mixed:
        terms["mixed"] = labels.other_weight.mean()
    if out.attention_logits is not None:
        terms["loss_cls2"] = loss(out.attention_logits)
        terms["attention_top1"] = accuracy(out.attention_logits)
    if out.inner_logits is not None:
        # The mean gives L_cls2 the same weight with and without an inner attention.
        terms["loss_cls2"] = (terms["loss_cls2"] + loss(out.inner_logits)) / 2
        terms["inner_top1"] = accuracy(out.inner_logits)
    return terms


def restriction_terms(gamma_res: Array, options: LossOptions) -> Terms:
    """L_res, Eq. (7)."""
    each = losses.restriction_loss(
        gamma_res, expectation=options.expectation, threshold=options.threshold
    )
    return {"loss_res": each.mean()}


def contrastive_terms(out: model.Outputs, options: LossOptions) -> Terms:
    """L_cntr of Eq. (8), the share of pairs with loss 0, and the mean distance."""
    attention, redundancy = out.attention_logits, out.redundancy_logits
    if options.features == "pooled":
        attention, redundancy = out.attention_pooled, out.redundancy_pooled
    assert attention is not None
    assert redundancy is not None
    if options.normalize_features:
        attention = losses.l2_normalize(attention)
        redundancy = losses.l2_normalize(redundancy)
    is_random = options.pairs == "random"
    draw_pairs = losses.neighbour_pairs if is_random else losses.all_pairs
    m, n = draw_pairs(len(attention))
    each = losses.contrastive_loss(
        attention[m],
        attention[n],
        redundancy[m],
        redundancy[n],
        margin=options.margin,
        distance=options.distance,
    )
    distance = jnp.linalg.norm(jax.lax.stop_gradient(attention - redundancy), axis=-1)
    return {
        "loss_cntr": each.mean(),
        "contrast_inactive": (each == 0).mean(),
        "contrast_distance": distance.mean(),
    }


def swap_terms(
    logits: Array, labels: Array, options: LossOptions, config: swap.SwapConfig
) -> Terms:
    """L_swap, the cross-entropy of swapped images, and their accuracy."""
    _, source = swap.neighbours(len(labels), config.every)
    each = losses.cross_entropy(
        logits, labels[source], smoothing=options.label_smoothing
    )
    right = logits.argmax(-1) == labels[source]
    return {"loss_swap": each.mean(), "swap_top1": right.mean()}


def make_train_step(
    loss_function: Callable[..., tuple[Array, tuple[Any, Terms]]],
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: Callable[[Array], Array],
    normalize: Callable[[Array], Array],
    all_mean: Callable[[Any], Any] = lambda tree: tree,
    accumulate: int = 1,
    mix: Callable[[TrainState, Array, Batch], tuple[Array, MixedLabels]] | None = None,
    draw_boxes: Callable[[Array, Array], Array] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Terms]]:
    """Creates the function that makes one update.

    Args:
      loss_function: result of `make_loss`.
      optimizer: an optax optimizer.
      learning_rate: the schedule of the optimizer, for logging.
      normalize: uint8 images -> input of the network.
      all_mean: averages a tree over devices.
      accumulate: number of micro-batches. They are consecutive slices of the batch,
        computed one after the other in the same memory, and all start from the same
        BatchNorm statistics, like the shares of different devices. The update equals
        that of the whole batch unless images of different micro-batches interact. They
        do in BatchNorm, unless its groups divide a micro-batch, and in Eq. (8) over all
        pairs.
      mix: function of `mixing` on normalised images; None: images are not mixed.
      draw_boxes: ``(step, index) -> [b, 4]``, boxes for the swap; None: the attention.

    Returns:
      ``(state, batch) -> (state, terms)``. A batch has ``image`` uint8
      ``[b, h, w, 3]``, ``flip`` bool ``[b]`` and ``label`` int ``[b]``; with `mix` or
      `draw_boxes` also ``index`` int ``[b]``, the positions of the images in the split.
    """

    def differentiate(state: TrainState, batch: Batch) -> tuple[Any, tuple[Any, Terms]]:
        images = batch["image"]
        images = jnp.where(
            batch["flip"][:, None, None, None], images[:, :, ::-1], images
        )
        images, labels = normalize(images), batch["label"]
        if mix:
            images, labels = mix(state, images, batch)
        boxes = (draw_boxes(state.step, batch["index"]),) if draw_boxes else ()
        return jax.grad(loss_function, has_aux=True)(
            state.params, state.batch_stats, images, labels, state.step, *boxes
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        found = _mean_over_parts(partial(differentiate, state), batch, accumulate)
        # Each device computes its share of the batch; all keep the mean.
        gradient, (batch_stats, terms) = all_mean(found)
        terms["gradient_norm"] = optax.tree.norm(gradient)
        terms["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, terms

    return train_step


def _mean_over_parts(function: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """Mean of a function's tree over `count` equal slices of a batch's rows."""
    if count == 1:
        return function(batch)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), dict(batch))
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


def _describe_gamma(attention: Attention, network: Any) -> Terms:
    """Mean and standard deviation of Gamma_res; shares saturated and guarded."""
    gamma_res = attention.gamma_res
    assert gamma_res is not None
    mean, spread = gamma_res.mean(0), gamma_res.std(0)
    terms = {f"gamma{i + 1}_mean": mean[i] for i in range(4)}
    terms |= {f"gamma{i + 1}_std": spread[i] for i in range(4)}
    # Without the scale: Eq. (7) expects it at its bound, half the image.
    saturated = art_module.is_beyond(attention.gamma, SATURATED)[:, :2].any(-1)
    terms["gamma_saturated"] = saturated.mean()
    if network.art.guard:
        guarded = art_module.is_beyond(attention.gamma, network.art.guard)
        terms["gamma_guarded"] = guarded.any(-1).mean()
    return terms
