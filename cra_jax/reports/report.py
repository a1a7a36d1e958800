"""A run as a page: what came out, where it looks, what it was made with."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cra_jax.inference.run_options import RunOptions
from cra_jax.reports import figures, html_page, run_summary, uncertainty
from cra_jax.runtime import files, progress, provenance, run_directory

_PAGE = Path("report", "index.html")
# Of the figures, in the order of the page.
_TITLES = {
    "curves": "Training",
    "activation": "Class activation maps",
    "attention": "Attention and redundancy",
    "corrected": "Wrong by the baseline, right here",
    "confused": "The most confused classes",
}


class Fact(NamedTuple):
    """A figure at the top of the page: what it is, its value, and a word on it."""

    what: str
    value: str
    about: str


def run(options: RunOptions, workdir: Path, *, baseline: Path | None = None) -> None:
    """Writes `report/index.html` of a run directory, and prints where it is.

    Args:
      options: the run's own; figures are drawn with it.
      workdir: the run directory.
      baseline: folder of a run that its figures compare it with.

    Raises:
      ValueError: the folder holds no run, or a run without numbers.
    """
    print(f"report: {write(options, workdir, baseline=baseline)}")


def write_after_training(options: RunOptions, workdir: Path) -> None:
    """Writes the report at the end of training; whatever fails, the run goes on.

    The numbers are in the run directory by then: a page is not worth losing a run over.

    Args:
      options: the run's own.
      workdir: the run directory.
    """
    path, numbers = workdir / _PAGE, workdir / "metrics.jsonl"
    try:
        known = path.is_file() and path.stat().st_mtime > numbers.stat().st_mtime
        progress.print_line(f"report: {path if known else write(options, workdir)}")
    except Exception as error:
        progress.print_line(
            f"warning: the report could not be written ({type(error).__name__}: "
            f"{error}); the numbers are safe in {workdir / 'metrics.jsonl'}, and "
            f"`--mode report --workdir {workdir}` tries again"
        )


def write(options: RunOptions, workdir: Path, *, baseline: Path | None = None) -> Path:
    """Writes `report/index.html`, which needs nothing but itself.

    Args:
      options: the run's own.
      workdir: the run directory.
      baseline: folder of a run that its figures compare it with.

    Returns:
      The page.

    Raises:
      ValueError: the folder holds no run, or a run without numbers.
    """
    settings = run_directory.read_config(workdir)
    lines = run_directory.read_metrics(workdir)
    if not lines:
        raise ValueError(
            f"{workdir} has no numbers yet (metrics.jsonl is missing or empty): train "
            "first, with --mode train"
        )
    (workdir / _PAGE).parent.mkdir(exist_ok=True)
    values = _values(settings, lines, workdir)
    values["images"], values["missing"], failed = _figures(options, workdir, baseline)
    values["notes"] += failed
    values["sections"] = [
        (anchor, text)
        for anchor, text, shown in (
            ("results", "Results", values["scores"]),
            ("attention", "Where it looks", values["attention"]),
            ("figures", "Figures", values["images"]),
            ("classes", "Hardest classes", values["classes"]),
            ("config", "Config", True),
            ("provenance", "Provenance", True),
        )
        if shown
    ]
    path = workdir / _PAGE
    files.write_atomically(path, html_page.render("report", **values))
    return path


def _values(
    settings: Mapping[str, Any], lines: list[dict[str, Any]], workdir: Path
) -> dict[str, Any]:
    """All that the template names, but for the figures."""
    starts = provenance.read(workdir)
    scored = run_summary.newest(lines)
    scores = [_with_interval(line, settings) for line in scored]
    ends = [row[name] for row in scores for name in ("low", "high")]
    ends += [row["paper"].top1 for row in scores if row["paper"]]
    flat, base = run_directory.flatten(settings), run_summary.recipe()
    last = starts[-1] if starts else {}
    ended = last.get("ended")
    values = {
        "title": run_summary.title(settings),
        "name": workdir.resolve().name,
        "seed": settings["seed"],
        "finished": f"ended {_moment(ended)}" if ended else "",
        "commit": provenance.describe_commit(last.get("code", {})),
        "commit_only": last.get("code", {}).get("commit", "")[:7],
        "changed": last.get("code", {}).get("changed", []),
        "notes": _notes(settings, lines, starts),
        "facts": _facts(settings, lines, scores, starts),
        "scores": scores,
        "axis": html_page.axis(ends),
        "step": scored[0]["step"] if scored else None,
        "epoch": scored[0]["epoch"] if scored else None,
        "attention": [_attention(line) for line in scored if "pointing" in line],
        "classes": _classes(workdir, scored),
        "starts": [_start(start) for start in starts],
        "command": last.get("command", ""),
        "versions": last.get("versions", {}),
        "system": last.get("system", ""),
        "differences": None
        if base is None
        else [
            {"key": key, "value": value, "recipe": base.get(key, "no such setting")}
            for key, value in sorted(flat.items())
            if base.get(key, object()) != value
        ],
        "config": _config(flat, base),
    }
    return values


def _with_interval(
    line: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the table of results."""
    count = line["count"]
    low, high = uncertainty.wilson(round(line["top1"] * count), count)
    known = run_summary.published(run_directory.flatten(settings), line)
    row = {"top5": None, "mean_per_class": None, "low": low, "high": high}
    return row | {"paper": known} | dict(line)


def _attention(line: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of attention; runs of before had fewer numbers."""
    names = ("activation_in_box", "attention_iou", "box_share")
    row: dict[str, Any] = dict.fromkeys(names) | {"box_count": line["count"]}
    row |= line
    count = row["box_count"]
    low, high = uncertainty.wilson(round(row["pointing"] * count), count)
    return row | {"low": low, "high": high}


def _facts(
    settings: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
) -> list[Fact]:
    facts = [
        Fact(
            f"top-1 on {row['split']}, {row['protocol']}",
            f"{html_page.percent(row['top1'])} %",
            f"{html_page.percent(row['low'])} to {html_page.percent(row['high'])} %",
        )
        for row in scores[:2]
    ]
    seconds, images = run_summary.time_trained(lines, settings["train"]["batch_size"])
    if seconds:
        took = [_seconds(start) for start in starts]
        wall = sum(x for x in took if x is not None)
        known = bool(took) and None not in took
        about = (
            f"{html_page.duration(wall)} with evaluation" if known else "of steps alone"
        )
        facts += [
            Fact("training", html_page.duration(seconds), about),
            Fact(
                "throughput",
                f"{images / seconds:,.0f} images/s".replace(
                    ",", "\N{NARROW NO-BREAK SPACE}"
                ),
                starts[-1]["devices"] if starts else "devices unknown",
            ),
        ]
    return facts


def _notes(
    settings: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What a reader should know before believing the numbers."""
    notes = []
    epochs, last = settings["train"]["epochs"], max(line["epoch"] for line in lines)
    scored = max((x["epoch"] for x in lines if x.get("protocol")), default=0)
    if last < epochs:
        notes.append(f"Not finished: epoch {last} of {epochs}.")
    if scored < last:
        notes.append(f"The last scores are of epoch {scored}; training is at {last}.")
    training = [line for line in lines if line["split"] == "train"]
    if training and training[-1].get("gamma_saturated", 0) > 0.5:
        share = html_page.percent(training[-1]["gamma_saturated"], 0)
        notes.append(
            f"In {share} % of the images the attention sits in a corner, where tanh "
            "is flat: what it attends to means little."
        )
    codes = {provenance.describe_commit(start["code"]) for start in starts}
    if len(codes) > 1:
        notes.append(f"Its parts were trained with different code: {_list(codes)}.")
    elif starts and starts[-1]["code"].get("changed"):
        notes.append(
            "The code had changes that no commit holds: the files are named under "
            "Provenance."
        )
    devices = {start["devices"] for start in starts}
    if len(devices) > 1:
        notes.append(f"Its parts were trained on different devices: {_list(devices)}.")
    return notes


def _classes(
    workdir: Path, scored: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    found = run_summary.classes(workdir, scored)
    if found:
        ends = [row[end] for row in found["rows"] for end in ("low", "high")]
        found["axis"] = html_page.axis(ends)
    return found


def _config(
    flat: Mapping[str, Any], base: Mapping[str, Any] | None
) -> list[tuple[str, list[dict[str, Any]]]]:
    groups = collections.defaultdict(list)
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        differs = base is not None and base.get(key, object()) != value
        groups[group or "all"].append({"key": name, "value": value, "differs": differs})
    return list(groups.items())


def _start(start: Mapping[str, Any]) -> dict[str, Any]:
    seconds = _seconds(start)
    return {
        "started": _moment(start["started"]),
        "first_step": start["first_step"],
        "took": "unknown" if seconds is None else html_page.duration(seconds),
        "outcome": start["outcome"] or "killed, or still running",
        "code": provenance.describe_commit(start["code"]),
        "devices": start["devices"],
    }


def _seconds(start: Mapping[str, Any]) -> float | None:
    """How long a start lasted; None where its end was not written."""
    if not start["ended"]:
        return None
    begun, ended = (datetime.fromisoformat(start[x]) for x in ("started", "ended"))
    return (ended - begun).total_seconds()


def _moment(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def _list(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts))


def _figures(
    options: RunOptions, workdir: Path, baseline: Path | None
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The run's figures for the page, why others are not there, and what failed."""
    try:
        drawn, missing = figures.draw_all(options, workdir, baseline=baseline)
    except Exception as error:
        # Figures need the checkpoint and the images; the numbers need neither.
        text = f"The figures could not be drawn ({type(error).__name__}): {error}"
        return [], [], [text]
    order = list(_TITLES)
    drawn.sort(key=lambda figure: order.index(_base(figure)))
    return [_figure(figure) for figure in drawn], missing, []


def _figure(figure: figures.Drawn) -> dict[str, Any]:
    """With its size, so that the page does not jump while it loads."""
    with Image.open(figure.png) as image:
        width, height = image.size
    of_the_baseline = figure.name.endswith("-baseline")
    return {
        "name": figure.name,
        "title": _TITLES[_base(figure)] + (", baseline" if of_the_baseline else ""),
        "caption": figure.caption,
        "uri": html_page.data_uri(figure.png),
        "width": width,
        "height": height,
    }


def _base(figure: figures.Drawn) -> str:
    return figure.name.removesuffix("-baseline")
