"""Detects failing training from its numbers, records it and suggests a fix.

The device skips an update from numbers that are not finite (`skip_non_finite`).
`Monitor` detects it later, when numbers are fetched anyway, so that no step waits
for it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cra_jax.runtime import files, progress, run_directory
from cra_jax.training import step_wrappers
from cra_jax.training.step_wrappers import MUST_BE_FINITE

BAD_STEPS = "bad_steps.jsonl"


class Monitor:
    """Checks the numbers of a run when they are fetched.

    `bad_steps.jsonl` has a line for each failed step: its number, its terms and the
    images of its batch. `cra_jax.training.replay` computes the step again.

    Args:
      workdir: the run directory.
      settings: the run's flat config, for the messages.
      first_step: the step that training resumes from; lines of later steps are removed.
      images: step, from 1 -> index and name of each image in its batch.
      write: whether to print and write anything.
    """

    def __init__(
        self,
        workdir: Path,
        settings: Mapping[str, Any],
        *,
        first_step: int,
        images: Callable[[int], dict[int, str]],
        write: bool = True,
    ):
        self._workdir = workdir
        self._settings = settings
        self._last_checked = first_step
        self._images = images
        self._write = write
        self._warned: set[str] = set()
        lines = read_bad_steps(workdir)
        kept = [line for line in lines if line["step"] <= first_step]
        self._bad = len(kept)
        if write and len(kept) < len(lines):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            files.write_atomically(workdir / BAD_STEPS, text)

    def _print_line(self, text: str) -> None:
        if self._write:
            progress.print_line(text)

    def check_steps(self, step: int, window: Sequence[Mapping[str, float]]) -> None:
        """Finds failed steps among the last ones; checks each step once.

        Args:
          step: number of the last step.
          window: terms of the last steps.

        Raises:
          ValueError: more than ``train.skip_bad_steps`` steps have failed.
        """
        for number, terms in enumerate(window, start=step - len(window) + 1):
            if number > self._last_checked and not step_wrappers.is_finite_step(terms):
                self._record(number, terms)
        self._last_checked = step

    def _record(self, step: int, terms: Mapping[str, float]) -> None:
        self._bad += 1
        images = self._images(step)
        line = {
            "step": step,
            # As text, because JSON has no inf and NaN.
            "terms": {k: v if np.isfinite(v) else str(v) for k, v in terms.items()},
            "index": list(images),
            "name": list(images.values()),
        }
        if self._write:
            run_directory.append_lines(self._workdir / BAD_STEPS, [line])
        allowed = self._settings["train.skip_bad_steps"]
        shown = ", ".join(
            f"{name} {value:.4g}"
            for name, value in terms.items()
            if name.startswith("loss") or name in MUST_BE_FINITE
        )
        what = f"step {step} failed and its update was skipped: {shown}"
        if self._bad <= allowed:
            self._print_line(
                f"warning: {what} ({self._bad} of train.skip_bad_steps={allowed}; "
                f"its images are listed in {self._workdir / BAD_STEPS})"
            )
            return
        raise ValueError(
            f"{what}\nIts images are listed in {self._workdir / BAD_STEPS}, and "
            f"`python -m cra_jax.training.replay {self._workdir}` computes it again. "
            "Perhaps training has diverged; lower optim.base_lr (now "
            f"{self._settings['optim.base_lr']}) and start again in a new --workdir. "
            "To skip a few such steps, raise train.skip_bad_steps (now "
            f"{allowed}) and resume with --allow_config_change"
        )

    def warn(self, step: int, numbers: Mapping[str, float], *, begun: bool) -> None:
        """Prints warnings about the means of the last steps, each once per start.

        Args:
          step: number of the last step.
          numbers: means of terms.
          begun: whether the first epoch is over; some warnings need that.
        """
        setting = self._settings
        signs = {
            "gamma_saturated": (
                numbers.get("gamma_saturated", 0) > 0.5,
                "the attention is saturated at its bound in "
                f"{numbers.get('gamma_saturated', 0):.0%} of the images, where tanh "
                "has almost no gradient: set art.guard (now "
                f"{setting['art.guard']}) to 0.9, or lower optim.base_lr (now "
                f"{setting['optim.base_lr']}), and start again",
            ),
            "contrast_inactive": (
                numbers.get("contrast_inactive", 0) > 0.95,
                f"{numbers.get('contrast_inactive', 0):.0%} of the pairs of Eq. (8) "
                "exceed the margin and have no gradient: "
                + (
                    "set art.redundancy=filled (now "
                    f"{setting['art.redundancy']}), because N_ar recognizes the "
                    "redundancy by its hole, and start again"
                    if setting["art.redundancy"] != "filled"
                    else "set loss.uniform=1.0 and loss.cntr=0.0, a loss of the "
                    "redundancy that keeps its gradient, and start again"
                ),
            ),
            "contrast_distance": (
                begun
                and setting["contrast.normalize"]
                and numbers.get("contrast_distance", 1) < 0.01,
                "attention and redundancy have the same features (mean distance "
                f"{numbers.get('contrast_distance', 1):.2g}): lower optim.base_lr (now "
                f"{setting['optim.base_lr']}) or loss.cntr (now "
                f"{setting['loss.cntr']}), and start again",
            ),
        }
        for name, (shows, text) in signs.items():
            if shows and name not in self._warned:
                self._warned.add(name)
                self._print_line(f"warning: at step {step} {text}")


def read_bad_steps(workdir: Path) -> list[dict[str, Any]]:
    """The failed steps of a run; usually none."""
    return run_directory.read_lines(workdir / BAD_STEPS)
