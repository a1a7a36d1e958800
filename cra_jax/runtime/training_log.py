"""Logs the metrics of a run to files, TensorBoard and the terminal."""

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cra_jax.runtime import files, progress, run_directory
from cra_jax.runtime.run_directory import METRICS, SNAPSHOTS

Numbers = Mapping[str, float]


class Log:
    """Logs metrics to `metrics.jsonl` and `attention.jsonl`, TensorBoard, the terminal.

    If standard error is a terminal, it shows a progress bar with an ETA; otherwise one
    line each time that metrics are logged.

    Args:
      workdir: the run directory.
      first_step: the step that training resumes from; lines of later steps, from an
        interrupted run, are removed.
      total_steps: of the whole run.
      is_evaluated: whether the evaluation after `first_step` is complete; if not, its
        lines are removed.
      mute: whether nothing is written or printed; only one of several hosts logs.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        total_steps: int,
        is_evaluated: bool = True,
        mute: bool = False,
    ):
        self._workdir = workdir
        self._total_steps = total_steps
        self._mute = mute
        if mute:
            return
        last_tested = first_step if is_evaluated else first_step - 1
        for path in (workdir / METRICS, workdir / SNAPSHOTS):
            kept = [
                x
                for x in run_directory.read_lines(path)
                if first_step
                and x["step"]
                <= (first_step if x.get("split") == "train" else last_tested)
            ]
            if path.exists():
                files.write_atomically(path, run_directory.json_lines(kept))
        self._board = _Board(workdir / "tensorboard", first_step)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=progress.bar_file(),
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._mute:
            return
        self._bar.close()
        self._board.close()

    def advance(self) -> None:
        """Counts one dispatched step."""
        if not self._mute:
            self._bar.update()

    def print_line(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if not self._mute:
            progress.print_line(text)

    def train(self, *, step: int, epoch: int, numbers: Numbers) -> None:
        """Records the means over the last steps."""
        if self._mute:
            return
        self._record(step, epoch, "train", numbers)
        shown = {
            "loss": f"{numbers['loss']:.3f}",
            "top1": f"{numbers['top1']:.3f}",
            "images/s": f"{numbers['images_per_second']:.0f}",
        }
        if self._bar.disable:
            eta = _duration(numbers["eta_seconds"])
            parts = " ".join(f"{name} {value}" for name, value in shown.items())
            self.print_line(
                f"step {step}/{self._total_steps} epoch {epoch} {parts} ETA {eta}"
            )
        else:
            self._bar.set_postfix({"epoch": epoch, **shown}, refresh=False)

    def test(self, *, step: int, epoch: int, split: str, numbers: Numbers) -> None:
        """Records the scores of a split."""
        self._record(step, epoch, split, numbers)
        if not self._mute:
            self._board.flush()
        self.print_line(f"epoch {epoch}  {split}: {describe_scores(numbers)}")

    def attention(
        self,
        *,
        step: int,
        epoch: int,
        split: str,
        names: Mapping[int, str],
        matrices: Mapping[int, Any],
    ) -> None:
        """Records the attention of images: index -> name, index -> matrix."""
        lines = [
            {
                "step": step,
                "epoch": epoch,
                "split": split,
                "index": index,
                "name": name,
                "matrix": [
                    [round(float(x), 6) for x in row] for row in matrices[index]
                ],
            }
            for index, name in names.items()
        ]
        if not self._mute:
            run_directory.append_lines(self._workdir / SNAPSHOTS, lines)

    def _record(self, step: int, epoch: int, split: str, numbers: Numbers) -> None:
        if self._mute:
            return
        line = {"step": step, "epoch": epoch, "split": split, **numbers}
        run_directory.append_metrics(self._workdir, line)
        self._board.add(step, split, numbers)


class _Board:
    """Event files of TensorBoard.

    tensorboardX's `SummaryWriter` writes them in a thread. If that thread fails, as on
    a full disk, its queue fills up and blocks training forever. Here the caller gets
    the error.
    """

    def __init__(self, folder: Path, first_step: int):
        # Imported late: it loads PyTorch if that is installed, which takes seconds.
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        start_s, host = int(time.time()), socket.gethostname()
        name = f"events.out.tfevents.{start_s}.{host}.{os.getpid()}"
        self._events: Any = event_pb2  # its names are made at runtime
        self._summary = summary
        self._records = RecordWriter(str(folder / name))
        self._write(0, file_version="brain.Event:2")
        # TensorBoard then hides later steps of an interrupted run.
        start = self._events.SessionLog.START
        self._write(first_step + 1, session_log={"status": start})

    def add(self, step: int, split: str, numbers: Mapping[str, Any]) -> None:
        for name, value in numbers.items():
            if not isinstance(value, str):
                scalar = self._summary.scalar(f"{split}/{name}", value)
                self._write(step, summary=scalar)

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._events.Event(step=step, wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())


def describe_scores(numbers: Mapping[str, Any]) -> str:
    """The scores of a split in one line: "top-1 84.2 %, ... of 5794 images"."""
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_per_class": "per class",
        "pointing": "strongest activation in the box",
        "activation_in_box": "share of activation in it",
        "attention_iou": "attention IoU",
        "head_in_attention": "head in the attention",
    }
    parts = [
        f"{text} {100 * numbers[name]:.1f} %"
        for name, text in names.items()
        if name in numbers
    ]
    text = f"{', '.join(parts)} of {numbers['count']} images"
    if tied := numbers.get("tied_count"):
        text += f" (warning: of {tied} images, several classes have the highest score)"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
