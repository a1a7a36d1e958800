"""Numbers that say that training goes wrong: found, written down, told with the cure.

All of it is judged where numbers are fetched anyway, so no step waits for it: an update
that came from numbers that are not finite is refused on the device (`keep_good`), and
`Watch` finds out afterwards.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cra_jax.runtime import files, progress, run_folder
from cra_jax.training import step_wrappers
from cra_jax.training.step_wrappers import JUDGED_BY

BAD_STEPS = "bad_steps.jsonl"


class Monitor:
    """Looks at a run's numbers as they are fetched.

    A step that went wrong is a line of `bad_steps.jsonl`: its number, its terms, and
    the pictures of its batch. With the seed these say all:
    `cra_jax.training.replay` computes the step again.

    Args:
      workdir: the run folder.
      settings: the run's config, flat, for what a message tells to change.
      first_step: where training goes on from; lines of later steps are taken out.
      images: step, from 1 -> place and name of each image in its batch.
      write: False keeps silent and writes nothing.
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
        self._looked_at = first_step
        self._images = images
        self._write = write
        self._warned: set[str] = set()
        lines = read_bad_steps(workdir)
        kept = [line for line in lines if line["step"] <= first_step]
        self._bad = len(kept)
        if write and len(kept) < len(lines):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            files.write_atomically(workdir / BAD_STEPS, text)

    def _say(self, text: str) -> None:
        if self._write:
            progress.say(text)

    def check_steps(self, step: int, window: Sequence[Mapping[str, float]]) -> None:
        """Finds steps that went wrong among the last ones; each is looked at once.

        Args:
          step: the last one's number.
          window: terms of the last steps.

        Raises:
          ValueError: there were more of them than ``train.skip_bad_steps``.
        """
        for number, terms in enumerate(window, start=step - len(window) + 1):
            if number > self._looked_at and not step_wrappers.is_good(terms):
                self._note(number, terms)
        self._looked_at = step

    def _note(self, step: int, terms: Mapping[str, float]) -> None:
        self._bad += 1
        images = self._images(step)
        line = {
            "step": step,
            # As text: JSON has no such numbers.
            "terms": {k: v if np.isfinite(v) else str(v) for k, v in terms.items()},
            "index": list(images),
            "name": list(images.values()),
        }
        if self._write:
            run_folder.append_lines(self._workdir / BAD_STEPS, [line])
        allowed = self._settings["train.skip_bad_steps"]
        shown = ", ".join(
            f"{name} {value:.4g}"
            for name, value in terms.items()
            if name.startswith("loss") or name in JUDGED_BY
        )
        what = f"step {step} went wrong and its update was not made: {shown}"
        if self._bad <= allowed:
            self._say(
                f"warning: {what} ({self._bad} of train.skip_bad_steps={allowed}; "
                f"its pictures are in {self._workdir / BAD_STEPS})"
            )
            return
        raise ValueError(
            f"{what}\nIts pictures are in {self._workdir / BAD_STEPS}, and `python -m "
            f"cra_jax.training.replay {self._workdir}` computes it again. Perhaps "
            "training has diverged; lower optim.base_lr (now "
            f"{self._settings['optim.base_lr']}) and start again in a new --workdir. "
            "To leave out a few such steps, raise train.skip_bad_steps (now "
            f"{allowed}) and go on with --allow_config_change"
        )

    def warn(self, step: int, numbers: Mapping[str, float], *, begun: bool) -> None:
        """Says what the means over the last steps warn of, each thing once a start.

        Args:
          step: the last one.
          numbers: means of terms.
          begun: whether the first epoch is over; some signs mean nothing before.
        """
        setting = self._settings
        signs = {
            "gamma_saturated": (
                numbers.get("gamma_saturated", 0) > 0.5,
                "the attention sits in a corner in "
                f"{numbers.get('gamma_saturated', 0):.0%} of the pictures, where tanh "
                "is flat and nothing can move it: set art.guard (now "
                f"{setting['art.guard']}) to 0.9, or optim.base_lr (now "
                f"{setting['optim.base_lr']}) lower, and start again",
            ),
            "contrast_dead": (
                numbers.get("contrast_dead", 0) > 0.95,
                f"{numbers.get('contrast_dead', 0):.0%} of the pairs of Eq. (8) are "
                "further apart than the margin asks, and teach nothing: raise "
                f"contrast.margin (now {setting['contrast.margin']})",
            ),
            "contrast_distance": (
                begun
                and setting["contrast.normalize"]
                and numbers.get("contrast_distance", 1) < 0.01,
                "attention and redundancy have the same features (mean distance "
                f"{numbers.get('contrast_distance', 1):.2g}): N_ar cannot tell "
                "them apart; lower optim.base_lr (now "
                f"{setting['optim.base_lr']}) or loss.cntr (now "
                f"{setting['loss.cntr']}), and start again",
            ),
        }
        for name, (shows, text) in signs.items():
            if shows and name not in self._warned:
                self._warned.add(name)
                self._say(f"warning: at step {step} {text}")


def read_bad_steps(workdir: Path) -> list[dict[str, Any]]:
    """The steps of a run that went wrong; usually none."""
    return run_folder.read_lines(workdir / BAD_STEPS)
