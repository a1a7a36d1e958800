"""Runs side by side, as a table for the terminal and as a page."""

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
      _: a config; the runs bring their own.
      workdir: the folder for the two files, made where it is missing.
      runs: run directorys.

    Raises:
      ValueError: there are no runs, or one of them has no scores.
    """
    found = compare_statistics.compare(runs)
    text = markdown(found)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(workdir / "compare.md", text)
    html = html_page.render("compare", **_for_the_page(found))
    files.write_atomically(workdir / "compare.html", html)
    print(text)
    print(f"written: {workdir / 'compare.md'}, {workdir / 'compare.html'}")


def markdown(found: Comparison) -> str:
    """The comparison as tables that a terminal and a README can show."""
    parts = [
        "# Runs compared",
        _groups(found.groups),
        *_scores(found),
        *_differences(found.differences),
        *_pairs(found.pairs),
        *_settings(found),
        *_notes(found.notes),
    ]
    return "\n\n".join(parts) + "\n"


def _groups(groups: Iterable[Group]) -> str:
    return "\n".join(
        f"- **{group.letter}**: {group.label} ("
        + ", ".join(f"`{run.workdir.name}` seed {run.seed}" for run in group.runs)
        + ")"
        for group in groups
    )


def _scores(found: Comparison) -> Iterator[str]:
    """For each test, a table of top-1 and one of the other metrics."""
    for test, rows in found.tables.items():
        yield f"## {', '.join(test)}: top-1, %"
        yield html_page.markdown_table(
            ("group", "seeds", "mean ± sd", "95 % interval", "each seed", "the paper"),
            [
                (
                    row.group.letter,
                    str(row.spread.count),
                    _mean(row.spread),
                    _range(row.interval) + (" (1)" if row.spread.count == 1 else ""),
                    ", ".join(html_page.percent(x) for x in row.by_seed.values()),
                    _published(row.paper),
                )
                for row in rows
            ],
        )
        others = found.others[test]
        if others:
            yield html_page.markdown_table(
                ("group", *(f"{METRICS[metric]}, %" for metric in others)),
                [(row.group.letter, *_cells(others, row)) for row in rows],
            )
    if any(row.spread.count == 1 for rows in found.tables.values() for row in rows):
        yield (
            "(1) One seed: Wilson's interval, over test images. The others are "
            "Student's t, over seeds."
        )


def _differences(differences: Sequence[Difference]) -> Iterator[str]:
    if not differences:
        return
    yield "## Differences over seeds: top-1, points"
    yield html_page.markdown_table(
        ("test", "groups", "seeds", "difference ± sd", "95 % interval"),
        [
            (
                ", ".join(x.test),
                _minus(x.letters),
                str(x.spread.count),
                _mean(x.spread, sign=True),
                _range(x.spread.interval, sign=True),
            )
            for x in differences
        ],
    )


def _pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    yield "## The same images: exact McNemar tests of two networks"
    yield html_page.markdown_table(
        (
            *("test", "first", "second", "only first right", "only second right"),
            *("difference", "p", "p, Holm"),
        ),
        [
            (
                ", ".join(x.test),
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
        "A small p says that these two networks differ, not that the methods do: "
        "that is what several seeds are for."
    )


def _settings(found: Comparison) -> Iterator[str]:
    if not found.settings:
        return
    yield "## What differs between the groups"
    yield html_page.markdown_table(
        ("setting", *(group.letter for group in found.groups)),
        [
            (f"`{key}`", *(f"`{html_page.plain(value)}`" for value in values))
            for key, values in found.settings.items()
        ],
    )


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield "## Notes"
        yield "\n".join(f"- {note}" for note in notes)


def _published(row: paper_results.Row | None) -> str:
    return (
        f"{html_page.percent(row.top1)} ({row.table})"
        if row
        else html_page.percent(None)
    )


def _cells(others: Mapping[str, Mapping[str, Spread]], row: Row) -> list[str]:
    """A group's mean of each metric; a dash where it has none."""
    spreads = [by_letter.get(row.group.letter) for by_letter in others.values()]
    return [_mean(x) if x else html_page.percent(None) for x in spreads]


def _minus(letters: tuple[str, str]) -> str:
    """The second minus the first."""
    return f"{letters[1]} {html_page.MINUS} {letters[0]}"


def _for_the_page(found: Comparison) -> dict[str, Any]:
    """All that the template names."""
    tests = []
    for test, rows in found.tables.items():
        ends = [
            value for row in rows for value in (*row.interval, *row.by_seed.values())
        ]
        ends += [row.paper.top1 for row in rows if row.paper]
        others = found.others[test]
        tests.append(
            {
                "split": test[0],
                "protocol": test[1],
                "axis": html_page.axis(ends),
                "rows": [_shown(row) for row in rows],
                "metrics": [METRICS[metric] for metric in others],
                "others": [(row.group, _cells(others, row)) for row in rows],
            }
        )
    return {
        "title": " and ".join(dict.fromkeys(group.label for group in found.groups)),
        "groups": found.groups,
        "tests": tests,
        "differences": [
            {
                "test": x.test,
                "groups": _minus(x.letters),
                "count": x.spread.count,
                "mean": _mean(x.spread, sign=True),
                "range": _range(x.spread.interval, sign=True),
            }
            for x in found.differences
        ],
        "pairs": found.pairs,
        "settings": found.settings,
        "notes": found.notes,
    }


def _shown(row: Row) -> dict[str, Any]:
    """A line of the dot plot and of its table."""
    return {
        "group": row.group,
        "value": row.spread.mean,
        "mean": _mean(row.spread),
        "low": row.interval.low,
        "high": row.interval.high,
        "range": _range(row.interval),
        "count": row.spread.count,
        "by_seed": row.by_seed,
        "dots": list(row.by_seed.values()) if row.spread.count > 1 else [],
        "paper": row.paper,
    }


def _mean(spread: Spread, *, sign: bool = False) -> str:
    """Mean and standard deviation in percent: "75.2 ± 0.3"."""
    text = html_page.percent(spread.mean, sign=sign)
    return text if spread.sd is None else f"{text} ± {html_page.percent(spread.sd)}"


def _range(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return html_page.percent(None)
    return " to ".join(html_page.percent(end, sign=sign) for end in interval)
