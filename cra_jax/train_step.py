"""One step of training, for one device: pure, and testable alone.

The step is told how to average over devices (`all_mean`); by itself it knows none.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from cra_jax import losses, model
from cra_jax.input import normalize
from cra_jax.losses import MixedLabels

Batch = Mapping[str, Any]
Terms = dict[str, Array]

_PREDICTING = ("classification_stream", "attention_head")

# Beyond this share of its bound, tanh has lost nine tenths of its slope.
SATURATED = 0.95


@struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: steps taken, a scalar.
      params: of all streams and the head.
      batch_stats: BatchNorm's running statistics of all streams.
      opt_state: optax's.
      average: ``{"params", "batch_stats"}`` of what prediction reads, averaged over the
        steps so far, see `step_wrappers.average_weights`; empty where none is taken.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = struct.field(default_factory=dict)

    def started_from(self, params: Any, batch_stats: Any) -> "TrainState":
        """The same with other weights, from which an average begins anew."""
        average = predicting_part(params, batch_stats) if self.average else {}
        # Copies: no two arrays of a state that is donated may share memory.
        average = jax.tree.map(jnp.array, average)
        return dataclasses.replace(
            self, params=params, batch_stats=batch_stats, average=average
        )

    def to_predict(self) -> tuple[Any, Any]:
        """Parameters and statistics to predict with: averages, where they are taken."""
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
    """A fresh state; the same key gives a stream the same weights in any kind.

    Args:
      key: of `jax.random`.
      network: of `model.create`.
      optimizer: of `optim`.
      crop_px: height and width of a picture.
      averaged: whether the step is one of `step_wrappers.average_weights`.
    """
    images = jnp.zeros((2, crop_px, crop_px, 3), jnp.float32)
    variables = jax.jit(network.init)(key, images)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        average=predicting_part(params, batch_stats) if averaged else {},
    )
    return state.started_from(params, batch_stats)


def predicting_part(params: Any, batch_stats: Any) -> dict[str, Any]:
    """What of a state prediction and its pictures read: N_cls and the attention head.

    Returns:
      ``{"params", "batch_stats"}``, trees of those arrays themselves.
    """
    return {
        name: {stream: tree[stream] for stream in _PREDICTING if stream in tree}
        for name, tree in (("params", params), ("batch_stats", batch_stats))
    }


def make_loss(
    network: nn.Module,
    *,
    restriction_weight: Callable[[Array], Array],
    expectation: Sequence[float] = (0.0, 0.0, 0.5, 0.0),
    threshold: Sequence[float],
    margin: float = 0.7,
    normalize_features: bool = True,
    distance: str = "euclidean",
    pairs: str = "random",
    weights: Mapping[str, float],
    label_smoothing: float = 0.0,
) -> Callable[..., tuple[Array, tuple[Any, Terms]]]:
    """Eq. (9) as a function of ``(params, batch_stats, images, labels, step)``.

    The labels are int ``[b]`` or `losses.MixedLabels`, of which the heavier counts as
    the right one for the share of right answers.

    Args:
      network: of `model.create`.
      restriction_weight: step -> weight of L_res, from `schedule`.
      expectation: E of Eq. (7).
      threshold: T of Eq. (7).
      margin: of Eq. (8).
      normalize_features: whether N_ar's outputs are scaled to length 1 for Eq. (8).
      distance: of Eq. (8), one of `losses.DISTANCES`.
      pairs: which pictures Eq. (8) contrasts, one of `losses.PAIRS`.
      weights: of the terms ``cls2``, ``res``, ``cntr`` of Eq. (9); the paper's are 1.
      label_smoothing: of both cross-entropies, see `losses.cross_entropy`.

    Returns:
      A function that returns the loss and ``(batch_stats, terms)``, all means over the
      batch (over pairs for L_cntr).
    """
    if pairs not in losses.PAIRS:
        raise ValueError(f"contrast.pairs {pairs!r} is unknown; one of {losses.PAIRS}")
    if distance not in losses.DISTANCES:
        raise ValueError(
            f"contrast.distance {distance!r} is unknown; one of {losses.DISTANCES}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"loss.label_smoothing={label_smoothing} must be in [0, 1): 0.1 is usual, "
            "0 leaves the labels as they are"
        )
    draw_pairs = losses.neighbour_pairs if pairs == "random" else losses.all_pairs

    def classification_loss(logits: Array, labels: Array | MixedLabels) -> Array:
        if isinstance(labels, MixedLabels):
            each = losses.mixed_cross_entropy(logits, labels, smoothing=label_smoothing)
        else:
            each = losses.cross_entropy(logits, labels, smoothing=label_smoothing)
        return each.mean()

    def loss_function(params, batch_stats, images, labels, step):
        is_mixed = isinstance(labels, MixedLabels)
        right = labels.heavier() if is_mixed else labels
        out, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            True,
            mutable=["batch_stats"],
        )
        assert isinstance(out, model.Outputs)
        correct = out.logits.argmax(-1) == right
        terms: Terms = {
            "loss_cls1": classification_loss(out.logits, labels),
            "top1": correct.mean(),
        }
        if is_mixed:
            terms["mixed"] = labels.other_weight.mean()
        loss = terms["loss_cls1"]
        if out.attention_logits is not None:
            attended = classification_loss(out.attention_logits, labels)
            correct = out.attention_logits.argmax(-1) == right
            if out.inner_logits is not None:
                # Their mean: L_cls2 weighs what it weighs without an inner attention.
                attended += classification_loss(out.inner_logits, labels)
                attended /= 2
                terms["inner_top1"] = (out.inner_logits.argmax(-1) == right).mean()
            terms |= {"loss_cls2": attended, "attention_top1": correct.mean()}
            loss += weights["cls2"] * attended
        if out.gamma is not None and out.gamma_res is not None:
            outside = losses.restriction_loss(
                out.gamma_res, expectation=expectation, threshold=threshold
            ).mean()
            on = restriction_weight(step)
            terms |= {"loss_res": outside, "restriction_weight": on}
            loss += weights["res"] * on * outside
            terms |= _describe_gamma(out.gamma, out.gamma_res, network)
        if out.redundancy_logits is not None and weights["cntr"]:
            m, n = draw_pairs(len(images))
            attention, redundancy = out.attention_logits, out.redundancy_logits
            assert attention is not None
            if normalize_features:
                attention = losses.l2_normalize(attention)
                redundancy = losses.l2_normalize(redundancy)
            contrast = losses.contrastive_loss(
                attention[m],
                attention[n],
                redundancy[m],
                redundancy[n],
                margin=margin,
                distance=distance,
            )
            terms["loss_cntr"] = contrast.mean()
            loss += weights["cntr"] * terms["loss_cntr"]
            # Pairs that teach nothing, and how far apart the features are.
            terms["contrast_dead"] = (contrast == 0).mean()
            apart = jax.lax.stop_gradient(attention - redundancy)
            terms["contrast_distance"] = jnp.linalg.norm(apart, axis=-1).mean()
        terms["loss"] = loss
        return loss, (updated["batch_stats"], terms)

    return loss_function


def make_train_step(
    loss_function: Callable[..., tuple[Array, tuple[Any, Terms]]],
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: Callable[[Array], Array],
    mean: Sequence[float],
    std: Sequence[float],
    all_mean: Callable[[Any], Any] = lambda tree: tree,
    accumulate: int = 1,
    mix: Callable[[TrainState, Array, Batch], tuple[Array, MixedLabels]] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Terms]]:
    """One update.

    Args:
      loss_function: of `make_loss`.
      optimizer: of `optim`.
      learning_rate: the optimiser's own schedule, to log it.
      mean: of the channels, for `normalize`.
      std: of the channels.
      all_mean: averages a tree over devices.
      accumulate: micro-batches, runs of neighbours in the batch, that are worked
        through one after the other, each in the memory of the last. All start from the
        same BatchNorm statistics, so that a micro-batch is what a device is: the update
        is the whole batch's wherever pictures of different micro-batches do not meet.
        They do in BatchNorm, unless its groups divide a micro-batch, and in Eq. (8)
        over all pairs.
      mix: of `mixing`, for normalised pictures; None: each is left as it is.

    Returns:
      ``(state, batch) -> (state, terms)``. A batch has ``image`` uint8
      ``[b, h, w, 3]``, ``flip`` bool ``[b]`` and ``label`` int ``[b]``; to mix, also
      ``index`` int ``[b]``, the picture's place in the split.
    """

    def differentiate(state: TrainState, batch: Batch) -> tuple[Any, tuple[Any, Terms]]:
        images = batch["image"]
        images = jnp.where(
            batch["flip"][:, None, None, None], images[:, :, ::-1], images
        )
        images, labels = normalize.normalize(images, mean=mean, std=std), batch["label"]
        if mix:
            images, labels = mix(state, images, batch)
        return jax.grad(loss_function, has_aux=True)(
            state.params, state.batch_stats, images, labels, state.step
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        found = _mean_over_parts(partial(differentiate, state), batch, accumulate)
        # Each device has seen its own share: what all keep is the mean.
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
    """The mean of a function's tree over so many equal runs of a batch's rows."""
    if count == 1:
        return function(batch)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), dict(batch))
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


def _describe_gamma(gamma: Array, gamma_res: Array, network: nn.Module) -> Terms:
    """Mean and spread of Gamma_res, and how often it is stuck or held."""
    mean, spread = gamma_res.mean(0), gamma_res.std(0)
    terms = {f"gamma{i + 1}_mean": mean[i] for i in range(4)}
    terms |= {f"gamma{i + 1}_std": spread[i] for i in range(4)}
    # Not the scale: at its bound the attention is half the picture, as Eq. 7 expects.
    stuck = model.beyond(gamma, SATURATED)[:, :2].any(-1)
    terms["gamma_saturated"] = stuck.mean()
    if network.guard:  # pyright: ignore[reportAttributeAccessIssue]
        held = model.beyond(gamma, network.guard)  # pyright: ignore[reportAttributeAccessIssue]
        terms["gamma_guarded"] = held.any(-1).mean()
    return terms
