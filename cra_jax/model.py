"""The networks: CRA-CNN, its baseline, and the STN of Fig. 4 (Sec. 3).

For every kind, `params["classification_stream"]` is exactly the tree of the plain
backbone. Evaluation builds, restores and runs this backbone only. The regularization
stream and the attention head exist in training only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array

from cra_jax import art_module
from cra_jax import swap as swap_module
from cra_jax.art_module import ArtConfig, Attention, AttentionHead
from cra_jax.swap import SwapConfig

KINDS: Mapping[str, str] = {"cra": "CRA-CNN", "baseline": "baseline", "stn": "STN"}
"""Kinds of networks, with their printed names."""

_NO_SWAP = SwapConfig()


@struct.dataclass
class Outputs:
    """Outputs of a training batch; None if the kind lacks them.

    Attributes:
      logits: ``[b, k]``, scores of the classification stream.
      attention: position of the attention.
      attention_logits: ``[b, k]``, scores of the regularization stream for the
        attention.
      redundancy_logits: ``[b, k]``, its scores for the redundancy.
      inner_logits: ``[b, k]``, its scores for the inner attention.
      attention_pooled: ``[b, c]``, its pooled features for the attention.
      redundancy_pooled: ``[b, c]``, those for the redundancy.
      swap_logits: ``[p, k]``, scores of the classification stream for swapped images,
        see `swap.swap`.
    """

    logits: Array
    attention: Attention | None = None
    attention_logits: Array | None = None
    redundancy_logits: Array | None = None
    inner_logits: Array | None = None
    attention_pooled: Array | None = None
    redundancy_pooled: Array | None = None
    swap_logits: Array | None = None


class CRACNN(nn.Module):
    """Both streams and the ART module between them; see `create`.

    Attributes:
      kind: one of `KINDS`.
      classification_stream: N_cls, a backbone.
      regularization_stream: N_ar, the same architecture; None for the baseline and for
        weights shared with N_cls.
      art: options of the ART module.
      swap: options of the swap.
    """

    kind: str
    classification_stream: nn.Module
    regularization_stream: nn.Module | None
    art: ArtConfig
    swap: SwapConfig = _NO_SWAP

    @nn.compact
    def __call__(
        self, images: Array, train: bool = False, boxes: Array | None = None
    ) -> Outputs:
        """Runs all parts of the network on normalised images ``[b, H, W, 3]``.

        `boxes`, attention parameters ``[b, 4]``, take the place of the attention in the
        swap.
        """
        classified = self.classification_stream(images, train)
        if self.kind == "baseline":
            return Outputs(classified.logits)
        head = AttentionHead(self.art, self.kind, name=art_module.ATTENTION_HEAD)
        centres = art_module.cell_centres(
            self.classification_stream, classified.features, images
        )
        attention = head(classified.pooled, classified.features, centres)
        seen = art_module.views(images, attention, self.art)
        # One batch, so that BatchNorm sees attention and redundancy together.
        views = [
            x for x in (seen.attention, seen.redundancy, seen.inner) if x is not None
        ]
        out = self._regularize(jnp.concatenate(views), train)
        pooled = jnp.split(out.pooled, len(views))
        regions = attention.gamma_res if boxes is None else boxes
        swapped = None
        if self.swap.weight and train and regions is not None:
            swapped = self._classify_swapped(images, regions)
        return Outputs(
            classified.logits,
            attention,
            *jnp.split(out.logits, len(views)),
            attention_pooled=pooled[0],
            redundancy_pooled=None if seen.redundancy is None else pooled[1],
            swap_logits=swapped,
        )

    def _regularize(self, views: Array, train: bool) -> Any:
        """Outputs of N_ar; with shared weights, of N_cls with statistics of its own."""
        if self.regularization_stream is not None:
            return self.regularization_stream(views, train)
        own = self.variable(
            "batch_stats",
            art_module.REGULARIZATION_STREAM,
            lambda: self.classification_stream.variables["batch_stats"],
        )
        out, own.value = self._classify(views, train, own.value)
        return out

    def _classify_swapped(self, images: Array, gamma: Array) -> Array:
        """Scores ``[p, k]`` of N_cls for swapped images."""
        target, source = swap_module.neighbours(len(images), self.swap.every)
        swapped = swap_module.swap(
            images[target], gamma[target], images[source], gamma[source], self.swap
        )
        stats = self.classification_stream.variables["batch_stats"]
        return self._classify(swapped, True, stats)[0].logits

    def _classify(self, images: Array, train: bool, stats: Any) -> tuple[Any, Any]:
        """Runs N_cls with other BatchNorm statistics: outputs, and updated statistics.

        BatchNorm normalises these images by themselves, and their statistics do not
        enter those of N_cls, which evaluates whole images.
        """
        stream = self.classification_stream
        variables = {"params": stream.variables["params"], "batch_stats": stats}
        out, updated = stream.apply(variables, images, train, mutable=["batch_stats"])
        return out, updated["batch_stats"]


def create(
    kind: str,
    make_backbone: Callable[[], nn.Module],
    art: ArtConfig,
    *,
    swap: SwapConfig = _NO_SWAP,
    shared: bool = False,
) -> CRACNN:
    """Creates the network for training.

    Args:
      kind: one of `KINDS`.
      make_backbone: creates a backbone; called once for each stream.
      art: options of the ART module.
      swap: options of the swap.
      shared: whether N_ar has the weights of N_cls, with BatchNorm statistics of its
        own.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown model.kind {kind!r}; choose from {', '.join(KINDS)}")
    return CRACNN(
        kind=kind,
        classification_stream=make_backbone(),
        regularization_stream=(
            None if shared or kind == "baseline" else make_backbone()
        ),
        art=art,
        swap=swap,
    )
