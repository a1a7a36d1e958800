"""Comparison of runs: groups, means over seeds, paired tests, Markdown and HTML."""

import re
from typing import Any

import pytest
from scipy import stats

from cra_jax.reports import compare, compare_statistics
from cra_jax.runtime import run_directory
from tests.helpers.fake_runs import make, write_start

CENTER = ("test", "center")


def test_runs_that_differ_only_in_the_seed_form_a_group(tmp_path):
    runs = [
        make(tmp_path / "a", right=6, seed=0),
        make(tmp_path / "b", variant="baseline", right=5, seed=0),
        make(tmp_path / "c", right=9, seed=1, changes={"data.workers": 7}),
        make(tmp_path / "d", right=9, seed=2, changes={"eval.batch_size": 7}),
    ]
    comparison = compare_statistics.compare(runs)
    assert [[r.workdir.name for r in g.runs] for g in comparison.groups] == [
        ["a", "c", "d"],
        ["b"],
    ]
    assert [g.label for g in comparison.groups] == [
        "CRA-CNN, resnet50, CUB-200-2011",
        "baseline, resnet50, CUB-200-2011",
    ]
    assert comparison.config_differences == {"model.kind": ["cra", "baseline"]}
    three, one = comparison.tables[CENTER]
    assert three.by_seed == {0: 0.6, 1: 0.9, 2: 0.9}
    assert three.spread.mean == pytest.approx(0.8)
    expected = stats.t.interval(0.95, 2, loc=0.8, scale=stats.sem([0.6, 0.9, 0.9]))
    assert three.interval.low == pytest.approx(expected[0])
    assert three.interval.high == 1  # clipped from 1.23
    assert one.spread.sd is None
    wilson = stats.binomtest(5, 10).proportion_ci(0.95, method="wilson")
    assert one.interval == pytest.approx((wilson.low, wilson.high))
    assert comparison.notes == []


def test_runs_with_the_same_seed_and_images_are_paired(tmp_path):
    runs = [
        make(tmp_path / "a", right=3, seed=0),
        make(tmp_path / "b", right=3, seed=1),
        make(tmp_path / "c", variant="baseline", right=10, seed=0),
        make(tmp_path / "d", variant="baseline", right=9, seed=1),
    ]
    comparison = compare_statistics.compare(runs)
    names = [(x.first.workdir.name, x.second.workdir.name) for x in comparison.pairs]
    assert names == [("a", "c"), ("b", "d")]
    first, second = comparison.pairs
    assert first.counts[:4] == (3, 0, 7, 0)
    assert first.counts.p == pytest.approx(2 / 2**7)
    assert second.counts.p == pytest.approx(2 / 2**6)
    assert first.adjusted_p == pytest.approx(2 * first.counts.p)
    (difference,) = comparison.differences
    assert difference.letters == ("A", "B")
    assert difference.spread.mean == pytest.approx(0.65)
    assert difference.spread.count == 2


def test_two_groups_of_one_run_each_are_paired_with_any_seeds(tmp_path):
    runs = [make(tmp_path / "a", seed=3), make(tmp_path / "b", variant="baseline")]
    assert len(compare_statistics.compare(runs).pairs) == 1


def test_runs_with_different_images_are_not_paired(tmp_path):
    runs = [
        make(tmp_path / "a"),
        make(tmp_path / "b", variant="baseline", labels=(1, 0) * 5),
    ]
    comparison = compare_statistics.compare(runs)
    assert comparison.pairs == []
    assert "because their images or labels differ" in comparison.notes[0]


def test_images_are_paired_by_their_content(tmp_path):
    """Neither their names nor their order matter; copies are paired one by one."""
    runs = [
        make(tmp_path / "a", right=10),
        make(tmp_path / "b", right=3, variant="baseline", folder="moved"),
        make(
            tmp_path / "c",
            variant="stn",
            digests=[f"other {i}" for i in range(10)],
        ),
    ]
    comparison = compare_statistics.compare(runs)
    (pair,) = comparison.pairs
    assert pair.letters == ("A", "B")
    assert pair.counts[:4] == (3, 7, 0, 0)
    assert [note for note in comparison.notes if "because their images" in note]
    copies = [
        make(tmp_path / name, variant=variant, right=right, digests=["same"] * 10,
             labels=(0,) * 10)
        for name, variant, right in (("d", "", 4), ("e", "baseline", 6))
    ]  # fmt: skip
    (pair,) = compare_statistics.compare(copies).pairs
    assert pair.counts[:4] == (4, 0, 2, 4)


def test_results_of_older_versions_are_paired_by_name_with_a_note(tmp_path):
    runs = [
        make(tmp_path / "a", digests=[""] * 10),
        make(tmp_path / "b", variant="baseline"),
    ]
    comparison = compare_statistics.compare(runs)
    assert len(comparison.pairs) == 1
    assert "matched by their names alone" in comparison.notes[0]


def test_foreign_evaluations_are_not_compared(tmp_path):
    runs = [make(tmp_path / "a", right=7)]
    before = compare_statistics.compare(runs)
    foreign = run_directory.read_metrics(runs[0])[-1] | {"top1": 0.1}
    run_directory.append_metrics(
        runs[0], foreign | {run_directory.FOREIGN: "data.path='other'"}
    )
    assert compare_statistics.compare(runs) == before
    assert before.tables["test", "center"][0].spread.mean == 0.7


def test_seeds_that_were_scored_on_different_data_are_not_averaged(tmp_path):
    runs = [
        make(tmp_path / name, seed=seed, scores={"data": data})
        for seed, (name, data) in enumerate([("a", "1"), ("b", "1"), ("c", "2")])
    ]
    comparison = compare_statistics.compare(runs)
    assert [len(group.runs) for group in comparison.groups] == [2, 1]
    assert comparison.config_differences == {"data.digest of test": ["1", "2"]}
    assert comparison.differences == []


@pytest.mark.parametrize("results", ["missing", "of another checkpoint"])
def test_a_note_says_that_per_image_results_are_missing(tmp_path, results):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", variant="baseline")]
    path = runs[1] / "results" / "test-center.csv"
    if results == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text().replace(",20,", ",10,"))
    comparison = compare_statistics.compare(runs)
    assert comparison.pairs == []
    assert len(comparison.notes) == 1
    assert "Run b has no paired test for test, center, because" in comparison.notes[0]


def test_a_run_with_the_config_and_seed_of_another_is_left_out(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", right=8)]
    comparison = compare_statistics.compare([*runs, runs[0]])
    assert [r.workdir.name for r in comparison.groups[0].runs] == ["a"]
    assert comparison.notes == [
        "Run b is left out, because it has the same config and seed as run a."
    ]


def test_labels_of_groups_with_the_same_title_include_the_config_differences(tmp_path):
    runs = [
        make(tmp_path / "a"),
        make(tmp_path / "b", changes={"contrast.margin": 0.5}),
    ]
    comparison = compare_statistics.compare(runs)
    assert [g.label.rpartition(", ")[2] for g in comparison.groups] == [
        "contrast.margin=0.7",
        "contrast.margin=0.5",
    ]


def test_only_runs_on_the_whole_split_are_shown_with_the_papers_result(tmp_path):
    whole: Any = {"labels": (0, 1) * 2897, "right": 5000}
    runs = [
        make(tmp_path / "a", **whole),
        make(tmp_path / "b", variant="baseline", **whole),
        make(tmp_path / "c", variant="stn", **whole),
        make(tmp_path / "part"),
    ]
    comparison = compare_statistics.compare(runs[:3])
    rows = comparison.tables[CENTER]
    assert [row.paper and row.paper.top1 for row in rows] == [0.862, 0.842, None]
    assert comparison.notes == [
        f"Group {letter} is shown with the paper's result, but its config differs from "
        "the paper's recipe: train.epochs=2 (paper: 140)."
        for letter in "AB"
    ]
    (part,) = compare_statistics.compare(runs[3:]).tables[CENTER]
    assert part.paper is None


def test_notes_warn_about_unfinished_runs_and_different_code(tmp_path):
    runs = [
        make(tmp_path / "a", seed=0, changes={"train.epochs": 9}),
        make(tmp_path / "b", seed=1, changes={"train.epochs": 9}),
    ]
    write_start(runs[0])
    write_start(runs[1], code={"commit": "b" * 40, "changed": []})
    notes = compare_statistics.compare(runs).notes
    assert notes == [
        "Run a was evaluated at epoch 2 of 9.",
        "Run b was evaluated at epoch 2 of 9.",
        "The runs of group A were trained with different code: aaaaaaa, bbbbbbb.",
    ]


def test_errors_for_missing_runs_and_scores(tmp_path):
    with pytest.raises(ValueError, match="there are no runs to compare"):
        compare_statistics.compare([])
    with pytest.raises(ValueError, match="holds no run"):
        compare_statistics.compare([tmp_path])
    workdir = make(tmp_path / "a")
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has no scores"):
        compare_statistics.compare([workdir])


def test_run_writes_markdown_and_html(tmp_path, capsys):
    scores = {"pointing": 0.5, "box_count": 10, "head_in_attention": 0.25}
    runs = [
        make(tmp_path / "a", right=6, seed=0, scores=scores),
        make(tmp_path / "b", right=9, seed=1, scores=scores),
        make(tmp_path / "c<d", variant="baseline", right=8, seed=0),
    ]
    compare.run(None, tmp_path / "out", runs=runs)
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text in capsys.readouterr().out
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert "| A | 2 | 75.0 ± 21.2 | 0.0 to 100.0 | 60.0, 90.0 | – |" in lines
    assert "| B | 1 | 80.0 | 49.0 to 94.3 (1) | 80.0 | – |" in lines
    assert "| A | 100.0 ± 0.0 | 75.0 ± 21.2 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in lines
    assert "| B | 100.0 | 80.0 | – | – |" in lines
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "75.0 ± 21.2" in html
    assert "c&lt;d" in html
    assert "c<d" not in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
