"""Predicts classes of a user's images, from Python or with `--mode predict`.

Example:
    ```python
    import cra_jax

    answer = cra_jax.load("runs/cub")("bird.jpg")
    print(answer.classes[0], answer.probabilities[0], answer.attention_box_px)
    ```
"""

import collections
import contextlib
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cra_jax.datasets import listing
from cra_jax.inference import overlay, trained
from cra_jax.inference.predictor import Prediction, Predictor
from cra_jax.inference.run_options import RunOptions
from cra_jax.input.decoding import MAX_ASPECT
from cra_jax.runtime import files
from cra_jax.runtime.progress import Progress, above_bars, print_line


def load(path: str | Path, *, checkpoint: str = "latest") -> Predictor:
    """Loads a predictor from a run directory, one of its checkpoints, or an export.

    Args:
      path: `runs/cub`, `runs/cub/checkpoints/1234` or `runs/cub/export`.
      checkpoint: "latest", "best" or a step, if `path` is a run directory.

    Raises:
      ValueError: the path is none of these, or its files are damaged.
    """
    return Predictor(trained.load_network(path, checkpoint=checkpoint))


def open_predictor(options: RunOptions | None, workdir: Path) -> Predictor:
    """Loads a predictor from a run with its options, or as `load` without options.

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
    output: Path | None = None,
    untrusted: bool = False,
) -> None:
    """Prints a JSON line for each image, and writes the lines to `predictions.jsonl`.

    Unreadable images get a line with an "error" field. The file appears, or replaces
    that of an earlier prediction, when all images are done and at least one was read.

    Args:
      options: options of the run, whose ``eval.checkpoint`` names the checkpoint; None:
        the latest checkpoint, or `workdir` is an export or a checkpoint.
      workdir: as for `load`; files are written into it (for a checkpoint: into its run
        directory).
      images: files, directories (searched recursively), patterns such as "*.jpg", or
        "-" for a list on standard input, one path per line.
      overlays: whether to draw activation, crop and attention of each image into
        `overlays/`, or `<name>-overlays/` beside `output`.
      output: another file for the lines, which must not exist.
      untrusted: whether each image is decoded in a process of its own, with limits on
        time and memory.

    Raises:
      ValueError: there is no such network, there are no images, none of them can be
        read, `output` exists, another process predicts into the same file, or the
        directory cannot be written.
    """
    file = output or trained.output_directory(workdir) / "predictions.jsonl"
    if output and output.exists():
        raise ValueError(
            f"--output {output} exists: name another file, or remove this one"
        )
    paths = find_images(images)
    predictor = open_predictor(options, workdir)
    print_line(f"{predictor.network.about}: {_count_images(len(paths))}")
    drawings = file.with_name(f"{output.stem}-overlays" if output else "overlays")
    unreadable = long = 0
    taken: collections.Counter[str] = collections.Counter()
    try:
        with (
            files.locked(
                file.with_name(f".{file.name}.lock"),
                str(file),
                instead="wait for it, or write to another file with --output",
            ),
            files.written_atomically(file) as lines,
            Progress(len(paths), "predict", unit="images") as progress,
        ):
            if overlays:
                drawings.mkdir(exist_ok=True)
            answers = predictor.each(paths, keep=overlays, untrusted=untrusted)
            for path, answer in zip(paths, answers, strict=True):
                if isinstance(answer, Prediction):
                    line = answer.to_json()
                    long += max(answer.size_px) > MAX_ASPECT * min(answer.size_px)
                    if overlays:
                        drawn = drawings / _overlay_name(path, taken)
                        with files.written_atomically(drawn) as written:
                            draw(answer).save(written, "PNG")
                        line["overlay"] = str(drawn)
                else:
                    line = {"path": path, "error": str(answer)}
                    unreadable += 1
                text = json.dumps(line).replace("\x7f", "\\u007f")
                lines.write(f"{text}\n".encode())
                _print(text)
                progress.advance()
            if unreadable == len(paths):
                raise ValueError(
                    f"none of {_count_images(len(paths))} can be read: name others "
                    f"with --images ({file} was not written)"
                )
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        print_line(f"nothing reads the output: {file} was not written")
        return
    except OSError as error:
        raise ValueError(
            f"cannot write {file} ({error}): {files.advice(error)}, or name another "
            "file with --output"
        ) from error
    print_line(
        f"{len(paths) - unreadable:,} predicted, {unreadable:,} unreadable: {file}"
    )
    if long:
        print_line(
            f"{_count_images(long)} longer than {MAX_ASPECT:g} to 1: their ends are "
            "cropped"
        )


def _count_images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def draw(answer: Prediction) -> Image.Image:
    """Draws the overlay of a prediction with a `View`."""
    view = answer.view
    assert view is not None, "predict with `each(..., keep=True)`"
    return overlay.draw(
        view.image,
        activation=view.activation,
        crop_box_px=view.crop_box_px,
        attention_px=view.attention_px,
        answer=list(zip(answer.classes, answer.probabilities, strict=True)),
    )


def find_images(images: Sequence[str]) -> list[str]:
    """Finds paths of images, in natural order within each directory or pattern.

    Paths of files are returned without checking that the files exist.

    Args:
      images: as for `run`.

    Raises:
      ValueError: nothing is named, or a directory, a pattern or the list has no images.
    """
    found: list[str] = []
    for name in images:
        path = files.local_path(name, "--images")
        if name == "-":
            listed = sys.stdin.buffer.read().splitlines()
            some, what = [os.fsdecode(x) for x in listed if x], "standard input"
        elif path.is_dir():
            skipped = listing.Skipped()
            some, what = map(str, listing.image_files(path, skipped)), "directory"
            for note in skipped.notes():
                print_line(f"{name}: {note}")
        elif not path.exists() and glob.has_magic(name):
            matched = glob.glob(str(path), recursive=True)
            some = [x for x in matched if os.path.isfile(x)]
            some, what = sorted(some, key=listing.natural_key), "pattern"
        else:
            some, what = [str(path)], ""
        before = len(found)
        found += some
        if len(found) == before:
            raise ValueError(f"--images {name}: no images in this {what}")
    if not found:
        raise ValueError(
            "no images are named: give --images files, directories, patterns in "
            "quotes, or - for a list on standard input"
        )
    return found


def _overlay_name(path: str, taken: collections.Counter[str]) -> str:
    """A unique file name for each image; counts `path` in `taken`."""
    stem = os.fsdecode(os.fsencode(Path(path).stem)[:200])
    taken[stem.casefold()] += 1
    count = taken[stem.casefold()]
    return f"{stem}.png" if count == 1 else f"{stem}~{count}.png"


def _print(text: str) -> None:
    """Prints a line to standard output; on a terminal, above the progress bar.

    Raises:
      BrokenPipeError: nothing reads it any more.
    """
    with above_bars() if sys.stdout.isatty() else contextlib.nullcontext():
        print(text, flush=True)
    if getattr(sys.stdout, "is_closed_by_reader", False):
        raise BrokenPipeError
