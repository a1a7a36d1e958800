"""The networks: CRA-CNN, its baseline, and the STN of Fig. 4 (Sec. 3).

For every kind, `params["classification_stream"]` is exactly the tree of the plain
backbone. Evaluation builds, restores and runs this backbone only. The regularization
stream and the attention head exist in training only.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array

from cra_jax import art_module
from cra_jax.art_module import ArtConfig, Attention, AttentionHead

KINDS: Mapping[str, str] = {"cra": "CRA-CNN", "baseline": "baseline", "stn": "STN"}
"""Kinds of networks, with their printed names."""


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
    """

    logits: Array
    attention: Attention | None = None
    attention_logits: Array | None = None
    redundancy_logits: Array | None = None
    inner_logits: Array | None = None


class CRACNN(nn.Module):
    """Both streams and the ART module between them; see `create`.

    Attributes:
      kind: one of `KINDS`.
      classification_stream: N_cls, a backbone.
      regularization_stream: N_ar, the same architecture; None for the baseline.
      art: options of the ART module.
    """

    kind: str
    classification_stream: nn.Module
    regularization_stream: nn.Module | None
    art: ArtConfig

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Outputs:
        """Runs all parts of the network on normalised images ``[b, H, W, 3]``."""
        classified = self.classification_stream(images, train)
        if self.regularization_stream is None:
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
        logits = self.regularization_stream(jnp.concatenate(views), train).logits
        return Outputs(classified.logits, attention, *jnp.split(logits, len(views)))


def create(kind: str, make_backbone: Callable[[], nn.Module], art: ArtConfig) -> CRACNN:
    """Creates the network for training.

    Args:
      kind: one of `KINDS`.
      make_backbone: creates a backbone; called once for each stream.
      art: options of the ART module.

    Raises:
      ValueError: the kind is unknown or does not support an option.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown model.kind {kind!r}; choose from {', '.join(KINDS)}")
    if art.inner_scale and kind != "cra":
        raise ValueError(
            f"art.inner_scale={art.inner_scale} needs the attention of CRA-CNN, and "
            f"model.kind={kind!r} has none: set it to 0"
        )
    if art.head == "spatial" and kind != "cra":
        has = "learns six parameters" if kind == "stn" else "has no attention"
        raise ValueError(
            "art.head='spatial' predicts the centre of CRA-CNN's attention, and "
            f"model.kind={kind!r} {has}: set art.head='pooled'"
        )
    return CRACNN(
        kind=kind,
        classification_stream=make_backbone(),
        regularization_stream=None if kind == "baseline" else make_backbone(),
        art=art,
    )
