"""What a run leaves behind: its config, its numbers, and a lock while it runs."""

import csv
import errno
import fcntl
import io
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

Numbers = Mapping[str, float]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
METRICS = "metrics.jsonl"
SNAPSHOTS = "attention.jsonl"


class Result(NamedTuple):
    """What a checkpoint says of one picture.

    Attributes:
      index: of the picture in its split.
      name: of its record.
      label: its class, a number.
      predicted: the class with the highest score.
      confidence: softmax of that score, in 0..1.
      step: of the checkpoint.
    """

    index: int
    name: str
    label: int
    predicted: int
    confidence: float
    step: int


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the run folder for this process; the lock dies with it, however it ends.

    Raises:
      ValueError: another process holds it (the message says which), or a disk or a
        folder failed, here or while it was held.
    """
    try:
        with _locked(workdir):
            yield
    except (OSError, ValueError) as error:
        # What tensorstore meets while it saves is a ValueError that quotes the system.
        if not isinstance(error, OSError) and "os_error_code" not in str(error):
            raise
        full = any(os.strerror(code) in str(error) for code in _FULL)
        raise ValueError(
            f"{error}: {'free some space' if full else 'put that right'}, and the same "
            f"command goes on from what is saved in {workdir}"
        ) from error


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"run folder {workdir} is in use by another process ({holder}): wait "
                "for it, end it, or choose another folder with --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def keep_config(
    workdir: Path, config: Mapping[str, Any], *, allow_change: bool = False
) -> None:
    """Writes `config.json`, or compares with the one that is there.

    Raises:
      ValueError: the folder's run had another config; the message lists what differs.
    """
    path = workdir / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True)
    if path.is_file() and not allow_change:
        now = flatten(_with_tuples(json.loads(text)))
        before = flatten(read_config(workdir))
        changes = [
            f"{key}: {before.get(key, 'absent')!r} in the run folder, "
            f"{now.get(key, 'absent')!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise ValueError(
                f"run folder {workdir} was made with another config:\n  "
                + "\n  ".join(changes)
                + "\ngive the new run its own --workdir, or go on with the new values "
                "by --allow_config_change"
            )
    write_atomically(path, text + "\n")


def read_config(workdir: Path) -> dict[str, Any]:
    """The config that a run was made with.

    Raises:
      ValueError: the folder holds no run, or its config is damaged.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put back a copy; checkpoints hold the "
            "config, too"
        ) from error
    except FileNotFoundError:
        raise ValueError(
            f"{workdir} holds no run (there is no config.json in it): name the folder "
            "of a run that was trained, with --workdir"
        ) from None
    return _with_tuples(config)


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_metrics(workdir: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to `metrics.jsonl`: step, epoch and split, then numbers."""
    append_lines(workdir / METRICS, [line])


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; one that a crash left unfinished is passed over."""
    return read_lines(workdir / METRICS)


def read_snapshots(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `attention.jsonl`: where a few test pictures were attended.

    Each has ``step``, ``epoch``, ``split``, ``index``, ``name`` and ``matrix``, the
    2 x 3 affine matrix. None for a kind without attention.
    """
    return read_lines(workdir / SNAPSHOTS)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines of JSON; one that a crash left unfinished is ended first."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_json_lines(lines).encode())


def _json_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON that have a step; others, as a crash leaves, are passed over."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _results_path(workdir: Path, split: str, protocol: str) -> Path:
    return workdir / "results" / f"{split}-{protocol}.csv"


def write_results(
    workdir: Path, split: str, protocol: str, results: Iterable[Result]
) -> None:
    """Writes `results/<split>-<protocol>.csv`, a row a picture, as a whole."""
    path = _results_path(workdir, split, protocol)
    path.parent.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    for result in results:
        writer.writerow(result._replace(confidence=f"{result.confidence:.6f}"))  # pyright: ignore[reportArgumentType]
    write_atomically(path, text.getvalue())


def read_results(workdir: Path, split: str, protocol: str) -> list[Result]:
    """What `write_results` wrote, in the split's order.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    path = _results_path(workdir, split, protocol)
    if not path.is_file():
        raise ValueError(
            f"there are no results of each picture at {path}: `--mode eval --workdir "
            f"{workdir} --config.eval.protocol={protocol}` writes them"
        )
    kinds = Result.__annotations__
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                Result(**{name: kinds[name](row[name]) for name in Result._fields})
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): remove it, and `--mode eval --workdir "
            f"{workdir} --config.eval.protocol={protocol}` writes it again"
        ) from error


class Log:
    """The numbers of a run: `metrics.jsonl` and its like, TensorBoard, the terminal.

    Where standard error is a terminal, there is a progress bar with an ETA; elsewhere
    a line each time that numbers are logged.

    Args:
      workdir: the run folder.
      first_step: where training goes on from: later lines, which a stopped run has
        left, are taken out.
      total_steps: of the whole run.
      mute: whether nothing is written or said: of several hosts one does.
    """

    def __init__(
        self, workdir: Path, *, first_step: int, total_steps: int, mute: bool = False
    ):
        self._workdir = workdir
        self._total_steps = total_steps
        self._mute = mute
        if mute:
            return
        for path in (workdir / METRICS, workdir / SNAPSHOTS):
            kept = [
                x for x in read_lines(path) if first_step and x["step"] <= first_step
            ]
            if path.exists():
                write_atomically(path, _json_lines(kept))
        # Here alone: it loads PyTorch, where there is one, which takes seconds.
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1
        )
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
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
        """One step was dispatched."""
        if not self._mute:
            self._bar.update()

    def say(self, text: str) -> None:
        """A line for people, above the bar where there is one."""
        if not self._mute:
            self._bar.write(text, file=sys.stderr)

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
            self.say(f"step {step}/{self._total_steps} epoch {epoch} {parts} ETA {eta}")
        else:
            self._bar.set_postfix({"epoch": epoch, **shown}, refresh=False)

    def test(self, *, step: int, epoch: int, split: str, numbers: Numbers) -> None:
        """Records the scores of a split."""
        self._record(step, epoch, split, numbers)
        self.say(f"epoch {epoch}  {split}: {describe_scores(numbers)}")

    def attention(
        self,
        *,
        step: int,
        epoch: int,
        split: str,
        names: Mapping[int, str],
        matrices: Mapping[int, Any],
    ) -> None:
        """Records where pictures are attended: index -> name, index -> matrix."""
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
            append_lines(self._workdir / SNAPSHOTS, lines)

    def _record(self, step: int, epoch: int, split: str, numbers: Numbers) -> None:
        if self._mute:
            return
        line = {"step": step, "epoch": epoch, "split": split, **numbers}
        append_metrics(self._workdir, line)
        for name, value in numbers.items():
            if not isinstance(value, str):
                self._board.add_scalar(f"{split}/{name}", value, step)


def describe_scores(numbers: Mapping[str, Any]) -> str:
    """Scores of a split as a line: "top-1 84.2 %, ... of 5794 images"."""
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "mean_per_class": "per class",
        "pointing": "strongest activation in the box",
        "activation_in_box": "share of activation in it",
        "attention_iou": "attention IoU",
    }
    parts = [
        f"{text} {100 * numbers[name]:.1f} %"
        for name, text in names.items()
        if name in numbers
    ]
    return f"{', '.join(parts)} of {numbers['count']} images"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
