"""The rule of each config key: its type, and the range of its value.

Names, such as that of a backbone, are checked where they are looked up, the ranges of
``art`` and ``swap`` in `ArtConfig` and `SwapConfig`, and combinations in
`training/check_config.py`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_LARGEST_PX = 4096
_SEEDS = 2**32 - 1
_EPOCHS = 10**5


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
      kind: its type; for a tuple, that of its items. An integer also is a float.
      low: lowest value.
      high: highest value.
      without: the ends of the range that are not in it: "", "low", "high" or "both".
      length: number of items; 0: the value is no tuple.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    without: str = ""
    length: int = 0

    def allows(self, value: Any) -> bool:
        """Whether the value has the type and lies in the range."""
        if not self.has_type(value):
            return False
        items = value if self.length else (value,)
        return self.kind in (bool, str) or all(map(self._in_range, items))

    def has_type(self, value: Any) -> bool:
        """Whether the value, or each of its items, has the type."""
        if not self.length:
            return self._is_kind(value)
        is_tuple = isinstance(value, tuple | list) and len(value) == self.length
        return is_tuple and all(map(self._is_kind, value))

    def _is_kind(self, value: Any) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        return isinstance(value, (int, float) if self.kind is float else self.kind)

    def _in_range(self, value: float) -> bool:
        above = (
            self.low < value if self.without in ("low", "both") else (self.low <= value)
        )
        below = (
            value < self.high
            if self.without in ("high", "both")
            else (value <= self.high)
        )
        return math.isfinite(value) and above and below

    def describe(self, value: Any) -> str:
        """What a value that is not allowed must be."""
        bounds = self._describe_range()
        if self.has_type(value) and not self.length:
            if self.kind is not int:
                return bounds
            low = value < self.low
            return f"{self.low} or more" if low else f"{self.high:.0f} or less"
        kinds = {bool: "True or False", str: "text", int: "a whole number"}
        kind = kinds.get(self.kind, "a number")
        if self.length:
            kind = f"{self.length} numbers"
        return f"{kind}, {bounds}" if bounds and self.kind in (int, float) else kind

    def _describe_range(self) -> str:
        low, high = self.low, self.high
        if math.isfinite(low) and math.isfinite(high):
            left = "(" if self.without in ("low", "both") else "["
            right = ")" if self.without in ("high", "both") else "]"
            return f"in {left}{low:.10g}, {high:.10g}{right}"
        if math.isfinite(low):
            return f"above {low:.10g}" if self.without else f"{low:.10g} or more"
        return "finite"


def _count(low: int, high: float = math.inf) -> Rule:
    return Rule(int, low, high)


_SWITCH, _TEXT = Rule(bool), Rule(str)
_SHARE = Rule(float, 0, 1)
_BELOW_ONE = Rule(float, 0, 1, without="high")
_WEIGHT = Rule(float, 0)
_ABOVE_ZERO = Rule(float, 0, without="low")

RULES: Mapping[str, Rule] = {
    "art.alpha_p": Rule(float),
    "art.alpha_s": Rule(float),
    "art.gradient_clip": Rule(float),
    "art.gradient_share": Rule(float),
    "art.guard": Rule(float),
    "art.head": _TEXT,
    "art.init": Rule(float, length=4),
    "art.inner_scale": Rule(float),
    "art.inside": _SWITCH,
    "art.normalize_head": _SWITCH,
    "art.redundancy": _TEXT,
    "art.size_px": _count(1, _LARGEST_PX),
    "art.rotate": _SWITCH,
    "bn.group_size": _count(0),
    "bn.sync": _SWITCH,
    "checkpoint.every_epochs": _count(1, _EPOCHS),
    "checkpoint.every_steps": _count(0),
    "checkpoint.keep_latest": _count(1),
    "contrast.distance": _TEXT,
    "contrast.features": _TEXT,
    "contrast.margin": _WEIGHT,
    "contrast.normalize": _SWITCH,
    "contrast.pairs": _TEXT,
    "data.cache_dir": _TEXT,
    "data.crop_px": _count(1, _LARGEST_PX),
    "data.flip": _SWITCH,
    "data.habitat_share": _SHARE,
    "data.manual_dir": _TEXT,
    "data.mean": Rule(float, 0, 1, length=3),
    "data.name": _TEXT,
    "data.num_species": _count(2, 8),
    "data.on_device": _SWITCH,
    "data.path": _TEXT,
    "data.prefetch_batches": _count(1, 10_000),
    "data.prepare": _SWITCH,
    "data.seed": _count(0, _SEEDS),
    "data.short_side_px": _count(1, _LARGEST_PX),
    "data.skip_unreadable": _SWITCH,
    "data.source": _TEXT,
    "data.std": Rule(float, 0, 1, without="low", length=3),
    "data.test_share": Rule(float, 0, 1, without="low"),
    "data.val_share": Rule(float, 0, 1, without="high"),
    "data.test_size": _count(1, 10**7),
    "data.train_size": _count(1, 10**7),
    "data.workers": _count(1, 1024),
    "eval.batch_size": _count(1, 2**16),
    "eval.bucket_px": _count(0, _LARGEST_PX),
    "eval.checkpoint": _TEXT,
    "eval.every_epochs": _count(1, _EPOCHS),
    "eval.protocol": _TEXT,
    "eval.snapshots": _count(0),
    "hosts.coordinator": _TEXT,
    "hosts.count": _count(0),
    "hosts.index": _count(0),
    "loss.cls2": _WEIGHT,
    "loss.cntr": _WEIGHT,
    "loss.label_smoothing": _BELOW_ONE,
    "loss.res": _WEIGHT,
    "loss.uniform": _WEIGHT,
    "mix.alpha": _ABOVE_ZERO,
    "mix.kind": _TEXT,
    "mix.probability": _SHARE,
    "model.backbone": _TEXT,
    "model.dtype": _TEXT,
    "model.kind": _TEXT,
    "model.pretrained": _TEXT,
    "model.remat": _SWITCH,
    "model.shared_weights": _SWITCH,
    "model.stem": _TEXT,
    "model.width": _count(1, 4096),
    "optim.base_lr": _ABOVE_ZERO,
    "optim.decay_norm_and_bias": _SWITCH,
    "optim.ema_decay": _BELOW_ONE,
    "optim.factor": Rule(float, 0, 1, without="low"),
    "optim.first_epochs": _count(0, _EPOCHS),
    "optim.freeze_first_epochs": _count(0, _EPOCHS),
    "optim.freeze_period_epochs": _count(0, _EPOCHS),
    "optim.momentum": _BELOW_ONE,
    "optim.period_epochs": _count(0, _EPOCHS),
    "optim.schedule": _TEXT,
    "optim.warmup_epochs": _count(0, _EPOCHS),
    "optim.weight_decay": _WEIGHT,
    "restriction.expectation": Rule(float, length=4),
    "restriction.first_epochs": _count(0, _EPOCHS),
    "restriction.period_epochs": _count(0, _EPOCHS),
    "restriction.threshold": Rule(float, 0, length=4),
    "seed": _count(0, _SEEDS),
    "swap.boxes": _TEXT,
    "swap.edge": Rule(float),
    "swap.every": Rule(int),
    "swap.place": _TEXT,
    "swap.weight": Rule(float),
    "train.accumulate": _count(1),
    "train.batch_size": _count(1),
    "train.epochs": _count(1, _EPOCHS),
    "train.log_every_steps": _count(1),
    "train.report": _SWITCH,
    "train.skip_bad_steps": _count(0),
    "train.steps_per_dispatch": _count(1, 10**5),
}
"""Every key of `configs/`."""


def check_values(flat: Mapping[str, Any], *, needed: Iterable[str] = ()) -> None:
    """Checks the values of a config.

    Args:
      flat: a flattened config. Keys without a rule are ignored.
      needed: keys that must be there.

    Raises:
      ValueError: a value has another type or is out of range, or a key is missing;
        lists all of these, each with its value and its range.
    """
    wrong = [
        f"{key}={value!r} must be {RULES[key].describe(value)}"
        for key, value in flat.items()
        if key in RULES and not RULES[key].allows(value)
    ]
    missing = [key for key in needed if key not in flat]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        wrong.append(f"these keys are missing: {', '.join(missing[:3])}{more}")
    if wrong:
        raise ValueError("; ".join(wrong))
