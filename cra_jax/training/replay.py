"""Computes a failed step again: `python -m cra_jax.training.replay RUN [STEP]`."""

import math
import sys
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from cra_jax.runtime import progress, run_directory
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, monitor, train


def replay(workdir: Path, step: int | None = None) -> bool:
    """Trains from the checkpoint before a failed step up to it, and compares its terms.

    Order, crops and flips are functions of the seed and the step, so the batch is the
    same. On a CPU the numbers agree to the bit. Prints them, and changes no file.

    Args:
      workdir: the run directory.
      step: one of `monitor.read_bad_steps`; None: the last of them.

    Returns:
      Whether all numbers are the same as in the run.

    Raises:
      ValueError: this step, or any step, has not failed.
    """
    bad = {line["step"]: line for line in monitor.read_bad_steps(workdir)}
    if not bad or (step is not None and step not in bad):
        raise ValueError(
            f"no such step in {workdir / monitor.BAD_STEPS}: the failed steps are "
            f"{sorted(bad)}"
        )
    wanted = max(bad) if step is None else step
    config = ConfigDict(run_directory.read_config(workdir))
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        first = max((s for s in checkpoints.steps() if s < wanted), default=0)
        print(
            f"from {f'checkpoint {first}' if first else 'the start'} to step {wanted}"
        )
        dataset = build.load_dataset(config)
        run = train.Run(config, workdir, dataset, checkpoints, first, repeats=True)
        terms = run.terms_of(wanted)
    same = True
    for name, before in bad[wanted]["terms"].items():
        now, then = terms[name], float(before)
        equal = now == then or (math.isnan(now) and math.isnan(then))
        same &= equal
        print(f"  {name}: {now}" + ("" if equal else f", but {then} in the run"))
    for index, name in zip(bad[wanted]["index"], bad[wanted]["name"], strict=True):
        print(f"  image {index}: {name}")
    print("the same numbers" if same else "other numbers")
    return same


def main(arguments: list[str]) -> int:
    """Runs `replay` with arguments RUN and optionally STEP; returns the exit status."""
    logging.set_verbosity(logging.ERROR)
    known = len(arguments) in (1, 2) and all(x.isdecimal() for x in arguments[1:])
    if not known:
        print("usage: python -m cra_jax.training.replay RUN [STEP]", file=sys.stderr)
        return 2
    try:
        step = int(arguments[1]) if arguments[1:] else None
        return 0 if replay(Path(arguments[0]), step) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    with progress.protected_output():
        sys.exit(main(sys.argv[1:]))
