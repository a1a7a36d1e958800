"""Pictures from a user -> answers: a function for Python, a mode for the terminal.

from cra_jax import predict

answer = predict.load("runs/cub")("bird.jpg")
print(answer.classes[0], answer.probabilities[0], answer.attention_box_px)
"""

import collections
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cra_jax.datasets import listing
from cra_jax.inference import overlay, trained
from cra_jax.inference.predictor import Prediction, Predictor
from cra_jax.inference.run_options import RunOptions
from cra_jax.runtime import files
from cra_jax.runtime.progress import Progress, say


def load(path: str | Path, *, checkpoint: str = "latest") -> Predictor:
    """What predicts, from a run folder, one of its checkpoints, or an export.

    Args:
      path: `runs/cub`, `runs/cub/checkpoints/1234` or `runs/cub/export`.
      checkpoint: "latest", "best" or a step, where `path` is a run folder.

    Raises:
      ValueError: it is none of these, or what it holds is damaged.
    """
    return Predictor(trained.find(path, checkpoint=checkpoint))


def open_predictor(options: RunOptions | None, workdir: Path) -> Predictor:
    """What predicts from a run under its options, or else from anything `load` takes.

    Raises:
      ValueError: as `load`.
    """
    if options is None:
        return load(workdir)
    return Predictor(trained.of_run(options, workdir))


def run(
    options: RunOptions | None,
    workdir: Path,
    images: Sequence[str],
    *,
    overlays: bool = False,
) -> None:
    """Prints a JSON line a picture, and leaves them in `predictions.jsonl` as well.

    A picture that cannot be read has a line with "error", and the rest goes on.

    Args:
      options: the run's, whose ``eval.checkpoint`` says which checkpoint; None: the
        latest, or `workdir` is an export or a checkpoint.
      workdir: as for `load`; what is written goes into it (for a checkpoint: into its
        run folder).
      images: files, folders (with those in them), patterns such as "*.jpg", or "-" for
        a list on standard input, one path a line.
      overlays: whether to draw each picture with what the network looked at into
        `overlays/`.

    Raises:
      ValueError: there is no such network, there are no pictures, none of them can be
        read, or nothing can be written into the folder.
    """
    paths = find_pictures(images)
    predictor = open_predictor(options, workdir)
    say(f"{predictor.network.about}: {_pictures(len(paths))}")
    folder = trained.home(workdir)
    file = folder / "predictions.jsonl"
    unreadable = 0
    taken: collections.Counter[str] = collections.Counter()
    try:
        if overlays:
            (folder / "overlays").mkdir(exist_ok=True)
        with (
            files.written_atomically(file) as lines,
            Progress(len(paths), "predict", unit="pictures") as progress,
        ):
            answers = predictor.each(paths, keep=overlays)
            for path, answer in zip(paths, answers, strict=True):
                if isinstance(answer, Prediction):
                    line = answer.to_json()
                    if overlays:
                        drawn = folder / "overlays" / _overlay_name(path, taken)
                        draw(answer).save(drawn)
                        line["overlay"] = str(drawn)
                else:
                    line = {"path": path, "error": str(answer)}
                    unreadable += 1
                text = json.dumps(line)
                lines.write(f"{text}\n".encode())
                _print(text)
                progress.advance()
    except BrokenPipeError:  # whoever reads us has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder} ({error}): make it a folder that can be "
            "written to, with space"
        ) from error
    say(f"{len(paths) - unreadable:,} predicted, {unreadable:,} unreadable: {file}")
    if unreadable == len(paths):
        raise ValueError(f"none of {_pictures(len(paths))} can be read: see {file}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def draw(answer: Prediction) -> Image.Image:
    """The overlay of a prediction that has a `View`."""
    view = answer.view
    assert view is not None, "ask `each` to keep the pictures"
    return overlay.draw(
        view.picture,
        activation=view.activation,
        crop_box_px=view.crop_box_px,
        attention_px=view.attention_px,
        answer=list(zip(answer.classes, answer.probabilities, strict=True)),
    )


def find_pictures(images: Sequence[str]) -> list[str]:
    """Paths of pictures, in natural order within each folder or pattern.

    A file that is named is taken at its word, whether it is there or not.

    Args:
      images: as for `run`.

    Raises:
      ValueError: nothing is named, or a folder, a pattern or the list holds none.
    """
    found: list[str] = []
    for name in images:
        path = Path(name).expanduser()
        if name == "-":
            listed = sys.stdin.buffer.read().splitlines()
            some, what = [os.fsdecode(x) for x in listed if x], "standard input"
        elif path.is_dir():
            skipped: collections.Counter[str] = collections.Counter()
            some, what = map(str, listing.picture_files(path, skipped)), "folder"
            if skipped:
                kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
                say(f"{name}: {skipped.total()} other files passed over ({kinds})")
        elif not path.exists() and glob.has_magic(name):
            matched = glob.glob(str(path), recursive=True)
            some = [x for x in matched if os.path.isfile(x)]
            some, what = sorted(some, key=listing.natural_key), "pattern"
        else:
            some, what = [str(path)], ""
        before = len(found)
        found += some
        if len(found) == before:
            raise ValueError(f"--images {name}: no pictures in this {what}")
    if not found:
        raise ValueError(
            "no pictures are named: give --images files, folders, patterns in quotes, "
            "or - for a list on standard input"
        )
    return found


def _overlay_name(path: str, taken: collections.Counter[str]) -> str:
    """A file name of its own for each picture, by the order in which they come."""
    stem = os.fsdecode(os.fsencode(Path(path).stem)[:200])
    taken[stem.casefold()] += 1
    count = taken[stem.casefold()]
    return f"{stem}.png" if count == 1 else f"{stem}~{count}.png"


def _print(text: str) -> None:
    """A line on standard output; on a terminal, above the bar."""
    if sys.stdout.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)
