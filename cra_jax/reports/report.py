"""HTML report of a run: scores, localization, figures, config, provenance."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cra_jax.inference import accuracy
from cra_jax.inference.run_options import RunOptions
from cra_jax.reports import figures, html_page, run_summary, uncertainty
from cra_jax.runtime import files, progress, provenance, run_directory

_PAGE = Path("report", "index.html")
# Titles of the figures, in their order on the page.
_TITLES = {
    "curves": "Training curves",
    "activation": "Predicted classes",
    "attention": "Attention during training",
    "corrected": "Corrected images",
    "confused": "Most confused classes",
}


class KeyNumber(NamedTuple):
    """A number at the top of the page.

    Attributes:
      name: of the number.
      value: the formatted number.
      note: further details.
    """

    name: str
    value: str
    note: str


def run(options: RunOptions, workdir: Path, *, baseline: Path | None = None) -> None:
    """Writes `report/index.html` of a run and prints its path.

    Args:
      options: of the run; used for the figures.
      workdir: the run directory.
      baseline: run directory of a baseline for the figures.

    Raises:
      ValueError: `workdir` is not a run directory, or has no metrics.
    """
    print(f"report: {write(options, workdir, baseline=baseline)}")


def write_after_training(options: RunOptions, workdir: Path) -> None:
    """Writes the report at the end of training; any error is only a warning.

    A report that is newer than the metrics is not written again.

    Args:
      options: of the run.
      workdir: the run directory.
    """
    path, metrics = workdir / _PAGE, workdir / "metrics.jsonl"
    try:
        current = path.is_file() and path.stat().st_mtime > metrics.stat().st_mtime
        progress.print_line(f"report: {path if current else write(options, workdir)}")
    except Exception as error:
        progress.print_line(
            f"warning: the report could not be written ({type(error).__name__}: "
            f"{error}); all metrics are saved in {metrics}: fix the error, then run "
            f"`--mode report --workdir {workdir}`"
        )


def write(options: RunOptions, workdir: Path, *, baseline: Path | None = None) -> Path:
    """Writes `report/index.html`, a self-contained page.

    Args:
      options: of the run.
      workdir: the run directory.
      baseline: run directory of a baseline for the scores and figures; None: the
        directory with the same name and the ending `-baseline`, if there is one.

    Returns:
      Path of the page.

    Raises:
      ValueError: `workdir` is not a run directory, or has no metrics.
    """
    config = run_summary.read_config(workdir)
    lines = run_directory.read_metrics(workdir)
    if not lines:
        raise ValueError(
            f"{workdir} has no metrics (metrics.jsonl is missing or empty): train the "
            "run first, with --mode train"
        )
    baseline = baseline or _baseline_beside(workdir)
    (workdir / _PAGE).parent.mkdir(exist_ok=True)
    values = _template_values(config, lines, workdir)
    values["baseline"] = _baseline_values(baseline, values["scores"])
    values["images"], missing, failed = _figures(options, workdir, baseline)
    values["missing"] = [text for text in missing if text not in values["notes"]]
    values["notes"] += failed
    values["sections"] = [
        (anchor, title)
        for anchor, title, shown in (
            ("results", "Results", values["scores"]),
            ("localization", "Localization", values["localization"]),
            ("figures", "Figures", values["images"]),
            ("classes", "Hardest classes", values["hardest"]),
            ("config", "Config", True),
            ("provenance", "Provenance", True),
        )
        if shown
    ]
    path = workdir / _PAGE
    files.write_atomically(path, html_page.render("report", **values))
    return path


def _template_values(
    config: Mapping[str, Any], lines: list[dict[str, Any]], workdir: Path
) -> dict[str, Any]:
    """Values of all names in `report.html.jinja` except those of the figures."""
    starts = provenance.read(workdir)
    latest = run_summary.latest_scores(lines)
    scores = [_score_row(line, config) for line in latest]
    ends = [row[name] for row in scores for name in ("low", "high")]
    ends += [row["paper"].top1 for row in scores if row["paper"]]
    flat, recipe = run_directory.flatten(config), run_summary.paper_config()
    last = starts[-1] if starts else {}
    ended = last.get("ended")
    values = {
        "title": run_summary.run_title(config),
        "name": workdir.resolve().name,
        "seed": config["seed"],
        "ended": _format_time(ended) if ended else "",
        "commit": provenance.describe_commit(last.get("code", {})),
        "commit_id": last.get("code", {}).get("commit", "")[:7],
        "changed": last.get("code", {}).get("changed", []),
        "notes": _notes(config, lines, starts) + run_summary.notes_on_best(workdir),
        "key_numbers": _key_numbers(config, lines, scores, starts),
        "scores": scores,
        "axis": html_page.axis(ends),
        "step": latest[0]["step"] if latest else None,
        "epoch": latest[0]["epoch"] if latest else None,
        "localization": [_localization_row(x) for x in latest if "pointing" in x],
        "parts": [row for x in latest for row in _part_rows(x)],
        "hardest": _hardest_classes(workdir, latest),
        "starts": [_start_row(start) for start in starts],
        "command": last.get("command", ""),
        "versions": last.get("versions", {}),
        "system": last.get("system", ""),
        "differences": [
            {"key": key, "value": value, "recipe": recipe.get(key, "missing")}
            for key, value in sorted(flat.items())
            if recipe.get(key, object()) != value
        ],
        "config": _config_groups(flat, recipe),
    }
    return values


def _score_row(line: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of results."""
    count = line["count"]
    low, high = uncertainty.wilson_interval(round(line["top1"] * count), count)
    paper = run_summary.paper_result(run_directory.flatten(config), line)
    row = {"top5": None, "mean_per_class": None, "low": low, "high": high}
    return row | {"paper": paper} | dict(line)


def _baseline_beside(workdir: Path) -> Path | None:
    """The run `NAME-baseline` beside the run `NAME`; None if it has no scores."""
    path = workdir.with_name(f"{workdir.resolve().name}-baseline")
    if not (path / "config.json").is_file():
        return None
    return path if run_summary.latest_scores(run_directory.read_metrics(path)) else None


def _baseline_values(
    baseline: Path | None, scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Scores of the baseline by split and protocol, its name and its epochs."""
    if baseline is None:
        return {}
    config = run_directory.read_config(baseline)
    lines = run_summary.latest_scores(run_directory.read_metrics(baseline))
    found = {(line["split"], line["protocol"]): line for line in lines}
    keys = [(row["split"], row["protocol"]) for row in scores]
    return {
        "name": baseline.name,
        "title": run_summary.run_title(config),
        "epochs": config["train"]["epochs"],
        "top1": {key: found[key]["top1"] for key in keys if key in found},
    }


def _localization_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of localization; older runs have fewer metrics."""
    names = ("activation_in_box", "attention_iou", "head_in_attention", "box_share")
    row: dict[str, Any] = dict.fromkeys(names) | {"box_count": line["count"]}
    row |= line
    count = row["box_count"]
    low, high = uncertainty.wilson_interval(round(row["pointing"] * count), count)
    return row | {"low": low, "high": high}


def _part_rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of parts for one split; none if only the head is known."""
    suffix = "_in_attention"
    names = [name.removesuffix(suffix) for name in line if name.endswith(suffix)]
    if len(names) < 2:
        return []
    return [
        {
            "split": line["split"],
            "part": name.replace("_", " "),
            "share": line[f"{name}{suffix}"],
            "count": line[f"{name}_count"],
        }
        for name in names
    ]


def _key_numbers(
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
) -> list[KeyNumber]:
    numbers = [
        KeyNumber(
            f"top-1 accuracy, {row['split']}, {row['protocol']}",
            f"{html_page.percent(row['top1'])} %",
            f"95 % interval: {html_page.percent(row['low'])} to "
            f"{html_page.percent(row['high'])} %",
        )
        for row in scores[:2]
    ]
    seconds, images = run_summary.training_time(lines, config["train"]["batch_size"])
    if seconds:
        durations = [_duration_seconds(start) for start in starts]
        if durations and None not in durations:
            total = sum(x for x in durations if x is not None)
            note = f"{html_page.duration(total)} including evaluation"
        else:
            note = "without evaluation"
        numbers += [
            KeyNumber("training time", html_page.duration(seconds), note),
            KeyNumber(
                "throughput",
                f"{images / seconds:,.0f} images/s".replace(
                    ",", "\N{NARROW NO-BREAK SPACE}"
                ),
                starts[-1]["devices"] if starts else "devices unknown",
            ),
        ]
    return numbers


def _notes(
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Warnings about the run, shown above its results."""
    notes = []
    epochs, last = config["train"]["epochs"], max(line["epoch"] for line in lines)
    evaluated = max((x["epoch"] for x in lines if x.get("protocol")), default=0)
    if last < epochs:
        notes.append(f"Training is not finished: it is at epoch {last} of {epochs}.")
    if evaluated < last:
        notes.append(f"The scores are of epoch {evaluated}, not of epoch {last}.")
    latest = run_summary.latest_scores(lines)
    training = [line for line in lines if line["split"] == "train"]
    if training and training[-1].get("gamma_saturated", 0) > 0.5:
        share = html_page.percent(training[-1]["gamma_saturated"], 0)
        notes.append(
            f"The attention of {share} % of the training images is saturated at its "
            "bound: do not interpret its position."
        )
    notes += starts[-1].get("notes", []) if starts else []
    tied = max((line.get("tied_count", 0) for line in latest), default=0)
    if tied:
        notes.append(
            f"Of {tied} images, several classes have the highest score: the network may"
            " not have learned anything."
        )
    warnings = [x for start in starts for x in start.get("warnings", ())]
    warnings += [
        accuracy.describe_chance(line)
        for line in latest
        if (line["split"], line["protocol"]) == ("test", "center")
    ]
    notes += [f"{x[0].upper()}{x[1:]}." for x in dict.fromkeys(warnings) if x]
    codes = {provenance.describe_commit(start["code"]) for start in starts}
    if len(codes) > 1:
        notes.append(f"Parts of the run used different code: {_list(codes)}.")
    elif starts and starts[-1]["code"].get("changed"):
        notes.append(
            "The code had uncommitted changes: the section Provenance lists the files."
        )
    devices = {start["devices"] for start in starts}
    if len(devices) > 1:
        notes.append(f"Parts of the run used different devices: {_list(devices)}.")
    return notes


def _hardest_classes(
    workdir: Path, scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    classes = run_summary.hardest_classes(workdir, scores)
    if classes:
        ends = [row[end] for row in classes["rows"] for end in ("low", "high")]
        classes["axis"] = html_page.axis(ends)
    return classes


def _config_groups(
    flat: Mapping[str, Any], recipe: Mapping[str, Any]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Config keys by section; `differs` marks those that depart from the recipe."""
    groups = collections.defaultdict(list)
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        differs = recipe.get(key, object()) != value
        groups[group or "top level"].append(
            {"key": name, "value": value, "differs": differs}
        )
    return list(groups.items())


def _start_row(start: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of starts."""
    seconds = _duration_seconds(start)
    return {
        "started": _format_time(start["started"]),
        "first_step": start["first_step"],
        "duration": "unknown" if seconds is None else html_page.duration(seconds),
        "outcome": start["outcome"] or "killed or running",
        "code": provenance.describe_commit(start["code"]),
        "devices": start["devices"],
    }


def _duration_seconds(start: Mapping[str, Any]) -> float | None:
    """Duration of training since a start; None if its end is unknown."""
    if not start["ended"]:
        return None
    started, ended = (datetime.fromisoformat(start[x]) for x in ("started", "ended"))
    return (ended - started).total_seconds()


def _format_time(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def _list(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts))


def _figures(
    options: RunOptions, workdir: Path, baseline: Path | None
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Figures of the page, reasons for missing figures, and errors."""
    try:
        drawn, missing = figures.draw_all(options, workdir, baseline=baseline)
    except Exception as error:
        # Figures need the checkpoint and the images; the other sections do not.
        text = f"The figures could not be drawn ({type(error).__name__}): {error}"
        return [], [], [text]
    order = list(_TITLES)
    drawn.sort(key=lambda figure: order.index(_base_name(figure)))
    return [_figure_values(figure) for figure in drawn], missing, []


def _figure_values(figure: figures.Drawn) -> dict[str, Any]:
    # With the size of the image, the browser reserves its space before it loads.
    with Image.open(figure.png) as image:
        width, height = image.size
    of_the_baseline = figure.name.endswith("-baseline")
    return {
        "name": figure.name,
        "title": _TITLES[_base_name(figure)]
        + (", baseline" if of_the_baseline else ""),
        "caption": figure.caption,
        "uri": html_page.data_uri(figure.png),
        "width": width,
        "height": height,
    }


def _base_name(figure: figures.Drawn) -> str:
    return figure.name.removesuffix("-baseline")
