"""The run directory: config, metrics, results, and a lock while the run is active."""

import csv
import fnmatch
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from cra_jax.runtime import files, provenance

METRICS = "metrics.jsonl"
SNAPSHOTS = "attention.jsonl"
IMAGES = "images.json"
FOREIGN = "foreign"
"""Field of a scored line whose data or settings are not those of the run."""
_RENAMED_FIELDS = {"contrast_dead": "contrast_inactive", "held": "stream_frozen"}


class Result(NamedTuple):
    """The prediction of a checkpoint for one image.

    Attributes:
      index: of the image in its split.
      name: of its record.
      label: number of its class.
      predicted: number of the class with the highest score.
      confidence: softmax of that score, in 0..1.
      step: of the checkpoint.
      class_name: of `label`; empty in files of older versions.
      predicted_class: name of the class `predicted`; empty in those files.
      digest: of the image's content; empty in files of older versions.
      settings: digest of what the network and its input depend on, see
        `RunOptions.settings`; empty in files of older versions.
    """

    index: int
    name: str
    label: int
    predicted: int
    confidence: float
    step: int
    class_name: str = ""
    predicted_class: str = ""
    digest: str = ""
    settings: str = ""


def check_path(directory: Path) -> None:
    """Checks that orbax can read what it writes below a directory.

    It takes parts of the path for a pattern, and its libraries need UTF-8.

    Raises:
      ValueError: it cannot; says what to rename.
    """
    for part in directory.absolute().parts:
        try:
            part.encode()
            problem = "a backslash" if "\\" in part else ""
            # A pattern such as [1] matches other names only.
            if not fnmatch.fnmatchcase(part, part):
                problem = "a pattern in brackets"
            if part == "gs:":
                problem = "the prefix of Google Cloud Storage"
        except UnicodeEncodeError:
            problem = "bytes that are not UTF-8"
        if problem:
            raise ValueError(
                f"{str(directory)!r} has {problem} in the name {part!r}, so that"
                " checkpoints there could not be read; rename it, or choose another"
                " --workdir"
            )


_MARKS = {"config.json", "lock", "provenance.json", "data.png"}
_WRITTEN = frozenset(_MARKS) | {
    *(METRICS, SNAPSHOTS, "bad_steps.jsonl", "predictions.jsonl", "overlays"),
    *("checkpoints", "damaged_checkpoints", "tensorboard", "results", "report"),
    *("figures", "export"),
}


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run directory, or has nothing but run directories."""
    names, children = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                names.add(entry.name)
                if entry.name in _WRITTEN:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    config = os.path.join(folder, "config.json")
                    checkpoints = os.path.join(folder, "checkpoints")
                    return os.path.isfile(config) and os.path.isdir(checkpoints)
                children.append(entry.path)
    except OSError:
        return False
    if {"config.json", "checkpoints"} <= names or (_MARKS & names and not children):
        return True
    return len(children) == len(names) > 0 and all(map(is_run, children))


def written_names(folder: str | Path) -> frozenset[str]:
    """Names of what a run writes, if the folder is a run directory; else empty.

    A run directory may also hold the user's images.
    """
    marks = (os.path.join(folder, name) for name in ("config.json", METRICS))
    return _WRITTEN if all(map(os.path.isfile, marks)) else frozenset()


class ListedImage(NamedTuple):
    """An image of a dataset, for comparisons.

    Attributes:
      name: of its record.
      label: number of its class.
      digest: of its content, see `Record.digest`.
    """

    name: str
    label: int
    digest: str


class TrainedData(NamedTuple):
    """The data of a run, as `images.json` has it.

    Attributes:
      splits: the images of each split, in order.
      earlier: digests of images that were trained on and are no longer in "train".
    """

    splits: dict[str, tuple[ListedImage, ...]]
    earlier: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainedData":
        """Reads the result of `to_json`.

        Raises:
          TypeError, ValueError, KeyError, AttributeError: it is of another form.
        """
        splits = {
            str(split): tuple(ListedImage(str(n), int(k), str(d)) for n, k, d in images)
            for split, images in value["splits"].items()
        }
        return cls(splits, tuple(map(str, value["earlier"])))

    def to_json(self) -> dict[str, Any]:
        """As a value that JSON can hold."""
        return self._asdict()

    def trained(self) -> set[str]:
        """Digests of all images that were trained on."""
        now = self.splits.get("train", ())
        return {image.digest for image in now} | set(self.earlier)


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks the run directory; the lock ends with the process, however that ends.

    Raises:
      ValueError: another process holds it (the message names it), or a disk or a
        directory failed, here or while it was locked.
    """
    check_path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with files.locked(
            workdir / "lock",
            f"run directory {workdir}",
            instead="wait for it, end it, or choose another directory with --workdir",
        ):
            yield
    except (OSError, ValueError) as error:
        # tensorstore reports system errors while saving as a ValueError.
        if not isinstance(error, OSError) and "os_error_code" not in str(error):
            raise
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise ValueError(
            f"{reason}: {files.advice(error)}, and run the same command again, which "
            f"resumes from {workdir}"
        ) from error


def keep_config(
    workdir: Path, config: Mapping[str, Any], *, allow_change: bool = False
) -> None:
    """Writes `config.json`; if there is one, compares with it first.

    Raises:
      ValueError: as `check_config`.
    """
    if not allow_change:
        check_config(workdir, config)
    text = json.dumps(config, indent=2, sort_keys=True)
    files.write_atomically(workdir / "config.json", text + "\n")


def check_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Compares a config with `config.json`, if there is one.

    Raises:
      ValueError: the configs differ; the message lists the keys that do.
    """
    if not (workdir / "config.json").is_file():
        return
    changes = config_changes(read_config(workdir), config)
    if changes:
        raise ValueError(
            f"run directory {workdir} was made with another config:\n  "
            + "\n  ".join(changes)
            + "\ngive the new run its own --workdir, or resume with the new values "
            "with --allow_config_change"
        )


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the keys whose values differ, one line each."""
    old, new = (
        flatten(upgraded(_with_tuples(json.loads(json.dumps(x)))))
        for x in (before, now)
    )
    return [
        f"{key}: {old.get(key, 'absent')!r} in the run directory, "
        f"{new.get(key, 'absent')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def check_is_unused(workdir: Path, *, had_checkpoints: bool) -> None:
    """Checks that a training from the start overwrites no results.

    A run that was killed before its first checkpoint has metrics, but an (empty)
    directory of checkpoints beside them, and starts again.

    Raises:
      ValueError: a run has trained here, and its checkpoints were removed.
    """
    finished = any(x.get("outcome") == "finished" for x in provenance.read(workdir))
    if finished or (not had_checkpoints and (workdir / METRICS).is_file()):
        raise ValueError(
            f"run directory {workdir} has the results of a training, but its "
            "checkpoints were removed: restore checkpoints/, choose another --workdir, "
            "or remove the directory to train again"
        )


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
      ValueError: the directory holds no run, or its config is damaged.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore a copy (checkpoints also hold "
            "the config)"
        ) from error
    except FileNotFoundError:
        raise ValueError(
            f"{workdir} holds no run (it has no config.json): set --workdir to the "
            "run directory of a trained run"
        ) from None
    return upgraded(_with_tuples(config))


# Values that match the behaviour before these keys existed: older runs lack them.
_BEFORE_THE_KEY = {
    "art.gradient_share": 1.0,
    "art.head": "pooled",
    "art.inner_scale": 0.0,
    "art.inside": False,
    "art.normalize_head": False,
    "art.rotate": True,
    "contrast.features": "scores",
    "data.name": "",
    "data.skip_unreadable": False,
    "data.val_share": 0.0,
    "loss.uniform": 0.0,
    "model.shared_weights": False,
    "optim.ema_decay": 0.0,
    "swap.boxes": "attention",
    "swap.edge": 0.0,
    "swap.every": 2,
    "swap.place": "neighbour",
    "swap.weight": 0.0,
}
# Removed keys, and the value with which they had no effect.
REMOVED = {
    "art.softness": 0.05,
    "model.ar_passes": 1,
    "optim.attention_lr_scale": 1.0,
}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a config of an older run to the current keys, with the same meaning."""
    new = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    if "art" in new:
        new.setdefault("swap", {})
    for key, value in _BEFORE_THE_KEY.items():
        section, _, name = key.partition(".")
        if isinstance(new.get(section), dict):
            new[section].setdefault(name, value)
    for key, value in REMOVED.items():
        section, _, name = key.partition(".")
        if isinstance(new.get(section), dict) and new[section].get(name) == value:
            del new[section][name]
    return new


def _with_tuples(value: Any) -> Any:
    """Replaces lists by tuples: JSON has no tuples, and configs have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}, "c": {}}` as `{"a.b": 1}`."""
    return flatten_dict(tree, sep=".")


def write_data(workdir: Path, data: TrainedData) -> None:
    """Writes `images.json` atomically: name, label and digest of each image."""
    files.write_atomically(workdir / IMAGES, json.dumps(data.to_json()) + "\n")


def read_data(workdir: Path) -> TrainedData | None:
    """Reads what `write_data` wrote; None for a run of an older version.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / IMAGES
    if not path.is_file():
        return None
    try:
        return TrainedData.from_json(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): restore a copy, or move it away, after "
            "which changes of the data are found, but not named"
        ) from error


def append_metrics(workdir: Path, line: Mapping[str, Any]) -> None:
    """Appends a line to `metrics.jsonl`: step, epoch, split and metrics."""
    append_lines(workdir / METRICS, [line])


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The run's own lines of `metrics.jsonl`.

    Omits foreign evaluations (`FOREIGN`), and lines that a crash left unfinished.
    Fields that older versions named differently have their present names.
    """
    lines = read_lines(workdir / METRICS)
    return [
        {_RENAMED_FIELDS.get(k, k): v for k, v in line.items()}
        for line in lines
        if FOREIGN not in line
    ]


def read_snapshots(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `attention.jsonl`: the attention of a few test images.

    Each has ``step``, ``epoch``, ``split``, ``index``, ``name`` and ``matrix``, the
    2 x 3 affine matrix. Empty for a network without attention.
    """
    return read_lines(workdir / SNAPSHOTS)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines of JSON; ends a line that a crash left unfinished first."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json_lines(lines).encode())


def json_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """JSON objects, one per line."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON that have a step; skips others, which a crash can leave."""
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
    workdir: Path,
    split: str,
    protocol: str,
    results: Iterable[Result],
    *,
    foreign: str = "",
) -> Path:
    """Writes `results/<split>-<protocol>.csv` atomically, one row per image.

    Args:
      workdir: the run directory.
      split: name of the split.
      protocol: name of the protocol.
      results: one per image.
      foreign: for a foreign evaluation, a name of its data and settings; the file is
        then in `results/foreign-<name>/`.

    Returns:
      The file.
    """
    path = _results_path(workdir, split, protocol)
    if foreign:
        path = path.parent / f"foreign-{foreign}" / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    for result in results:
        writer.writerow(result._replace(confidence=f"{result.confidence:.6f}"))  # pyright: ignore[reportArgumentType]
    files.write_atomically(path, text.getvalue())
    return path


def read_results(workdir: Path, split: str, protocol: str) -> list[Result]:
    """Reads what `write_results` wrote, in the order of the split.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    path = _results_path(workdir, split, protocol)
    if not path.is_file():
        raise ValueError(
            f"there are no results per image at {path}: write them with `--mode eval "
            f"--workdir {workdir} --config.eval.protocol={protocol}`"
        )
    types = Result.__annotations__
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                Result(
                    **{
                        name: types[name](row[name])
                        for name in Result._fields
                        if name in row or name not in Result._field_defaults
                    }
                )
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): remove it, and write it again with "
            f"`--mode eval --workdir {workdir} --config.eval.protocol={protocol}`"
        ) from error
