"""Comparison of runs, as Markdown tables and as an HTML page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cra_jax.reports import compare_statistics, html_page, paper_results
from cra_jax.reports.compare_statistics import (
    METRICS,
    Comparison,
    Difference,
    Group,
    Pair,
    Row,
)
from cra_jax.reports.uncertainty import Interval, Spread
from cra_jax.runtime import files


def run(_: Any, workdir: Path, *, runs: Sequence[Path]) -> None:
    """Prints the comparison as Markdown; writes `compare.md` and `compare.html`.

    Args:
      _: a config, which is not used, because each run has its own.
      workdir: directory of the two files; created if it does not exist.
      runs: run directories.

    Raises:
      ValueError: there are no runs, or a run has no scores.
    """
    comparison = compare_statistics.compare(runs)
    text = format_markdown(comparison)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / "compare.md", text)
    html = html_page.render("compare", **_template_values(comparison))
    files.write_atomically(workdir / "compare.html", html)
    print(text)
    print(f"written: {workdir / 'compare.md'}, {workdir / 'compare.html'}")


def format_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, with tables whose columns line up in a terminal."""
    parts = [
        "# Comparison of runs",
        _groups(comparison.groups),
        *_scores(comparison),
        *_differences(comparison.differences),
        *_pairs(comparison.pairs),
        *_config_differences(comparison),
        *_notes(comparison.notes),
    ]
    return "\n\n".join(parts) + "\n"


def _groups(groups: Iterable[Group]) -> str:
    return "\n".join(
        f"- **{group.letter}**: {group.label} ("
        + ", ".join(f"`{run.workdir.name}` seed {run.seed}" for run in group.runs)
        + ")"
        for group in groups
    )


def _scores(comparison: Comparison) -> Iterator[str]:
    """For each split and protocol, a table of top-1 and one of the other metrics."""
    for evaluation, rows in comparison.tables.items():
        yield f"## {_evaluation_name(evaluation)}: top-1 accuracy (%)"
        yield html_page.markdown_table(
            ("group", "seeds", "mean ± SD", "95 % interval", "each seed", "paper"),
            [
                (
                    row.group.letter,
                    str(row.spread.count),
                    _mean_text(row.spread),
                    _interval_text(row.interval)
                    + (" (1)" if row.spread.count == 1 else ""),
                    ", ".join(html_page.percent(x) for x in row.by_seed.values()),
                    _paper_text(row.paper),
                )
                for row in rows
            ],
        )
        others = comparison.others[evaluation]
        if others:
            yield html_page.markdown_table(
                ("group", *(f"{METRICS[metric]} (%)" for metric in others)),
                [(row.group.letter, *_metric_texts(others, row)) for row in rows],
            )
    tables = comparison.tables.values()
    if any(row.spread.count == 1 for rows in tables for row in rows):
        yield (
            "(1) One seed: Wilson's interval over test images. The other intervals are "
            "Student's t intervals over seeds."
        )


def _differences(differences: Sequence[Difference]) -> Iterator[str]:
    if not differences:
        return
    yield "## Mean differences over seeds: top-1 accuracy (percentage points)"
    yield html_page.markdown_table(
        ("split, protocol", "groups", "seeds", "difference ± SD", "95 % interval"),
        [
            (
                _evaluation_name(x.evaluation),
                _difference_name(x.letters),
                str(x.spread.count),
                _mean_text(x.spread, sign=True),
                _interval_text(x.spread.interval, sign=True),
            )
            for x in differences
        ],
    )


def _pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    yield "## Paired tests on the same images: exact McNemar tests of two runs"
    yield html_page.markdown_table(
        (
            *("split, protocol", "first", "second"),
            *("only first correct", "only second correct"),
            *("difference (points)", "p", "p (Holm)"),
        ),
        [
            (
                _evaluation_name(x.evaluation),
                f"{x.letters[0]} `{x.first.workdir.name}`",
                f"{x.letters[1]} `{x.second.workdir.name}`",
                str(x.counts.only_first),
                str(x.counts.only_second),
                html_page.percent(x.counts.difference, sign=True),
                html_page.p_value(x.counts.p),
                html_page.p_value(x.adjusted_p),
            )
            for x in pairs
        ],
    )
    yield (
        "A small p shows that the two trained networks differ. It does not show that "
        "the two methods differ; that needs several seeds."
    )


def _config_differences(comparison: Comparison) -> Iterator[str]:
    if not comparison.config_differences:
        return
    yield "## Config differences between the groups"
    yield html_page.markdown_table(
        ("config key", *(group.letter for group in comparison.groups)),
        [
            (f"`{key}`", *(f"`{html_page.format_value(value)}`" for value in values))
            for key, values in comparison.config_differences.items()
        ],
    )


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield "## Notes"
        yield "\n".join(f"- {note}" for note in notes)


def _evaluation_name(evaluation: compare_statistics.Evaluation) -> str:
    return ", ".join(evaluation)


def _paper_text(row: paper_results.Row | None) -> str:
    return (
        f"{html_page.percent(row.top1)} ({row.table})"
        if row
        else html_page.percent(None)
    )


def _metric_texts(others: Mapping[str, Mapping[str, Spread]], row: Row) -> list[str]:
    """A group's mean of each metric; a dash for a metric that the group lacks."""
    spreads = [by_letter.get(row.group.letter) for by_letter in others.values()]
    return [_mean_text(x) if x else html_page.percent(None) for x in spreads]


def _difference_name(letters: tuple[str, str]) -> str:
    """The second group minus the first: "B − A"."""
    return f"{letters[1]} {html_page.MINUS} {letters[0]}"


def _template_values(comparison: Comparison) -> dict[str, Any]:
    """Values of all names in `compare.html.jinja`."""
    evaluations = []
    for evaluation, rows in comparison.tables.items():
        plotted = [
            value for row in rows for value in (*row.interval, *row.by_seed.values())
        ]
        plotted += [row.paper.top1 for row in rows if row.paper]
        others = comparison.others[evaluation]
        evaluations.append(
            {
                "split": evaluation[0],
                "protocol": evaluation[1],
                "axis": html_page.axis(plotted),
                "rows": [_row_values(row) for row in rows],
                "metrics": [METRICS[metric] for metric in others],
                "others": [(row.group, _metric_texts(others, row)) for row in rows],
            }
        )
    groups = comparison.groups
    return {
        "title": " and ".join(dict.fromkeys(group.label for group in groups)),
        "groups": groups,
        "evaluations": evaluations,
        "differences": [
            {
                "evaluation": _evaluation_name(x.evaluation),
                "groups": _difference_name(x.letters),
                "count": x.spread.count,
                "mean": _mean_text(x.spread, sign=True),
                "interval": _interval_text(x.spread.interval, sign=True),
            }
            for x in comparison.differences
        ],
        "pairs": comparison.pairs,
        "config_differences": comparison.config_differences,
        "notes": comparison.notes,
    }


def _row_values(row: Row) -> dict[str, Any]:
    """Values of a row of the dot plot and of the table below it."""
    return {
        "group": row.group,
        "value": row.spread.mean,
        "mean": _mean_text(row.spread),
        "low": row.interval.low,
        "high": row.interval.high,
        "interval": _interval_text(row.interval),
        "count": row.spread.count,
        "by_seed": row.by_seed,
        "dots": list(row.by_seed.values()) if row.spread.count > 1 else [],
        "paper": row.paper,
    }


def _mean_text(spread: Spread, *, sign: bool = False) -> str:
    """Mean and standard deviation in percent: "75.2 ± 0.3"."""
    text = html_page.percent(spread.mean, sign=sign)
    return text if spread.sd is None else f"{text} ± {html_page.percent(spread.sd)}"


def _interval_text(interval: Interval | None, *, sign: bool = False) -> str:
    """An interval in percent: "74.9 to 75.5"; None gives a dash."""
    if interval is None:
        return html_page.percent(None)
    return " to ".join(html_page.percent(end, sign=sign) for end in interval)
