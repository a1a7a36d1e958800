"""The mean of logged numbers over the steps since it was last taken."""

from collections.abc import Callable, Mapping

import jax
import numpy as np


class Mean:
    """The mean of named numbers over the steps since it was last taken.

    What is added may still be on its way from the device: it is fetched when the mean
    is taken, so that adding never waits.
    """

    def __init__(self) -> None:
        self._pending: list[Mapping[str, object]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, values: Mapping[str, object]) -> None:
        """Adds one step's numbers."""
        self._pending.append(values)

    def fetch(self) -> list[dict[str, float]]:
        """What was added since the last `take`, as floats: JSON for a checkpoint."""
        self._pending = [
            {name: float(value) for name, value in step.items()}
            for step in jax.device_get(self._pending)  # all copies at once
        ]
        return list(self._pending)  # pyright: ignore[reportReturnType]

    def take(
        self, keep: Callable[[Mapping[str, float]], bool] = lambda step: True
    ) -> dict[str, float]:
        """The mean of each number over what was added, which is then forgotten.

        Args:
          keep: which steps count; empty is the mean of none.
        """
        steps = [step for step in self.fetch() if keep(step)]
        self._pending = []
        return {
            name: float(np.mean([step[name] for step in steps], dtype=np.float64))
            for name in (steps[0] if steps else ())
        }
