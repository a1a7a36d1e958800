"""Mean of logged numbers over the steps since the last mean."""

from collections.abc import Callable, Mapping

import jax
import numpy as np


class Mean:
    """Mean of named numbers over the steps since the last `take`.

    Added numbers may still be computed on the device. They are fetched when the mean is
    taken, so that adding never waits.
    """

    def __init__(self) -> None:
        self._pending: list[Mapping[str, object]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, values: Mapping[str, object]) -> None:
        """Adds one step's numbers."""
        self._pending.append(values)

    def fetch(self) -> list[dict[str, float]]:
        """Returns all numbers since the last `take` as floats, for a checkpoint."""
        self._pending = [
            {name: float(value) for name, value in step.items()}
            for step in jax.device_get(self._pending)  # all copies at once
        ]
        return list(self._pending)  # pyright: ignore[reportReturnType]

    def take(
        self, keep: Callable[[Mapping[str, float]], bool] = lambda step: True
    ) -> dict[str, float]:
        """Returns the mean of each number over the added steps, and removes them.

        Args:
          keep: whether a step counts; without any such step the result is empty.
        """
        steps = [step for step in self.fetch() if keep(step)]
        self._pending = []
        return {
            name: float(np.mean([step[name] for step in steps], dtype=np.float64))
            for name in (steps[0] if steps else ())
        }
