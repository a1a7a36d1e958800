"""HTML report of a run: its contents, that it is self-contained, and errors."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from configs.cub import get_config
from cra_jax.inference import run_options
from cra_jax.reports import html_page, report, run_summary, uncertainty
from cra_jax.runtime import run_directory
from cra_jax.training import train
from tests.helpers import tiny_config
from tests.helpers.fake_runs import make, write_start

_VOID = {"meta", "link", "img", "line", "circle", "path", "br", "wbr"}


class _Page(HTMLParser):
    """Text, table cells and links of a page; fails on unclosed tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.links += [found[x] or "" for x in ("src", "href") if x in found]
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data.strip()


def _read(workdir):
    return _Page((workdir / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config and run directory of a tiny trained run."""
    directory = tmp_path_factory.mktemp("report")
    config = tiny_config.config(
        directory / "cache", **{"train.report": True, "train.epochs": 1}
    )
    train.run(config, directory / "run")
    return config, directory / "run"


def test_training_writes_a_self_contained_page(trained):
    _, workdir = trained
    found = _read(workdir)
    anchors = [x for x in found.links if x.startswith("#")]
    others = [x for x in found.links if not x.startswith("#")]
    assert all(x.startswith("data:") for x in others)
    assert {x[1:] for x in anchors} <= found.ids
    assert "#figures" in anchors
    images = [x for x in others if x.startswith("data:image/png;base64,")]
    assert len(images) >= 3
    for uri in images:
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert min(image.size) > 100
    text = (workdir / "report" / "index.html").read_text()
    assert not re.search(r"url\(|@import|<script|https?://", text)


def test_page_shows_the_numbers_of_the_run(trained):
    config, workdir = trained
    found = _read(workdir)
    lines = run_summary.latest_scores(run_directory.read_metrics(workdir))
    assert [x["split"] for x in lines] == ["test", "test_shifted"]
    for line in lines:
        low, high = uncertainty.wilson_interval(round(line["top1"] * 40), 40)
        interval = f"{html_page.percent(low)} to {html_page.percent(high)}"
        (row,) = [r for r in found.cells if r[:2] == [line["split"], "center"]]
        assert row[2] == html_page.percent(line["top1"])
        assert row[4:] == [
            interval,
            html_page.percent(line["top5"]),
            html_page.percent(line["mean_per_class"]),
            "40",
        ]
        rows = [r for r in found.cells if len(r) == 8 and r[0] == line["split"]]
        (row,) = [r for r in rows if r[1] != "center"]
        assert row[1] == html_page.percent(line["pointing"])
        assert row[3] == html_page.percent(line["activation_in_box"])
        assert row[4] == html_page.percent(line["attention_iou"])
        assert row[5] == html_page.percent(line["head_in_attention"])
    (start,) = json.loads((workdir / "provenance.json").read_text())["starts"]
    assert start["command"] in found.text
    for version in start["versions"].values():
        assert version in found.text
    assert ["data.crop_px", "32", "448"] in found.cells
    assert "data.flip" not in [row[0] for row in found.cells if row]
    assert f"seed {config.seed}" in found.text


def test_a_report_newer_than_the_metrics_is_kept(trained, capsys):
    config, workdir = trained
    path = workdir / "report" / "index.html"
    before = path.stat().st_mtime_ns
    report.write_after_training(run_options.from_config(config), workdir)
    assert path.stat().st_mtime_ns == before
    assert f"report: {path}" in capsys.readouterr().err


def test_page_without_a_checkpoint_shows_the_numbers_but_no_figures(tmp_path, capsys):
    workdir = make(tmp_path / "a<b")
    config = get_config()
    config.data.path = str(tmp_path)
    report.run(run_options.from_config(config), workdir)
    assert str(workdir / "report" / "index.html") in capsys.readouterr().out
    found = _read(workdir)
    assert "The figures could not be drawn" in found.text
    assert "#figures" not in found.links
    (row,) = [r for r in found.cells if r[:2] == ["test", "center"]]
    assert (row[2], row[4]) == ("70.0", "39.7 to 89.2")
    assert "a<b" in found.text  # escaped in the HTML
    # The last three images, of classes 1, 0 and 1, are misclassified.
    (one,) = [r for r in found.cells if r[0] == "class 1" and len(r) == 5]
    assert one[1:3] + one[4:] == ["3 of 5", "60", "class 0(2 images)"]
    errors = [r for r in found.cells if r[0].startswith("test/")]
    assert [r[0] for r in errors] == ["test/009.jpg", "test/008.jpg", "test/007.jpg"]
    assert errors[0][1:] == ["class 1", "class 0", "59.0"]
    # 20 steps of 64 images at 64 images per second.
    assert run_summary.training_time(run_directory.read_metrics(workdir), 64) == (
        20,
        1280,
    )
    assert "20 s" in found.text
    assert "64 images/s" in found.text


def test_page_shows_warnings(tmp_path):
    workdir = make(tmp_path / "run", changes={"train.epochs": 9})
    run_directory.append_metrics(
        workdir,
        {"step": 30, "epoch": 3, "split": "train", "images_per_second": 64.0}
        | {"gamma_saturated": 0.8},
    )
    write_start(workdir, ended=None, outcome=None)
    write_start(workdir, code={"commit": "b" * 40, "changed": ["x"]}, devices="1 x cpu")
    report.write(run_options.from_config(get_config()), workdir)
    found = _read(workdir)
    for text in (
        "Training is not finished: it is at epoch 3 of 9.",
        "The scores are of epoch 2, not of epoch 3.",
        "The attention of 80 % of the training images is saturated at its bound",
        "different code: aaaaaaa, bbbbbbb + 1 changed file.",
        "different devices: 1 x cpu, 8 x test.",
    ):
        assert text in found.text
    shown = [
        row[2:4] for row in found.cells if row and row[0] == "2026-01-01 10:00 UTC"
    ]
    assert shown == [["unknown", "killed or running"], ["2 h 05 min", "finished"]]


def test_page_shows_the_papers_result(tmp_path):
    workdir = make(tmp_path / "run", labels=(0, 1) * 2897, right=5000)
    report.write(run_options.from_config(get_config()), workdir)
    assert "Table 1 reports 86.2 %" in _read(workdir).text


def test_page_shows_the_baseline_that_was_trained_beside_the_run(tmp_path):
    workdir = make(tmp_path / "run")
    options = run_options.from_config(get_config())
    report.write(options, workdir)
    assert "baseline, top-1 (%)" not in _read(workdir).text
    make(tmp_path / "run-baseline", variant="baseline", right=6)
    make(tmp_path / "other", variant="baseline", right=5)
    for baseline, score in ((None, "60.0"), (tmp_path / "other", "50.0")):
        report.write(options, workdir, baseline=baseline)
        (row,) = [r for r in _read(workdir).cells if r[:2] == ["test", "center"]]
        assert (row[2], row[-2], row[-1]) == ("70.0", score, "10")
    assert "The baseline is the run other" in _read(workdir).text
    # A directory without scores is not a baseline.
    (tmp_path / "run-baseline" / "metrics.jsonl").write_text("")
    report.write(options, workdir)
    assert "baseline, top-1 (%)" not in _read(workdir).text


def test_latest_scores_are_of_the_last_checkpoint():
    def line(step, protocol="center", **more):
        return {"step": step, "split": "test", "protocol": protocol, **more}

    lines = [
        line(10, "full", top1=0.9, count=4),
        line(20, top1=0.5, count=4, attention_iou=0.3),
        line(10, top1=0.9, count=4),  # an older checkpoint, evaluated later
        line(20, top1=0.5, count=4),  # from `--mode eval`, without attention scores
        {"step": 20, "split": "train", "top1": 1.0},
    ]
    assert run_summary.latest_scores(lines) == [
        line(20, top1=0.5, count=4, attention_iou=0.3)
    ]
    # Different scores mean other data: the attention scores are not merged.
    for other in (line(20, top1=0.25, count=4), line(20, top1=0.5, count=8)):
        assert run_summary.latest_scores([*lines, other]) == [other]


def test_page_has_a_table_of_parts(tmp_path):
    parts = {"head": (0.9, 7), "left_eye": (0.25, 8), "tail": (0.5, 4)}
    scores: dict[str, float] = {"pointing": 0.5, "box_count": 10}
    for name, (share, count) in parts.items():
        scores |= {f"{name}_in_attention": share, f"{name}_count": count}
    workdir = make(tmp_path / "run", scores=scores)
    report.run(run_options.from_config(get_config()), workdir)
    found = _read(workdir)
    for row in (
        ["head", "90.0", "7"],
        ["left eye", "25.0", "8"],
        ["tail", "50.0", "4"],
    ):
        assert ["test", *row] in found.cells


def test_an_error_after_training_is_only_a_warning(tmp_path, capsys):
    workdir = make(tmp_path / "run")
    (workdir / "report").write_text("a file instead of a directory")
    report.write_after_training(run_options.from_config(get_config()), workdir)
    stderr = capsys.readouterr().err
    assert "warning: the report could not be written (FileExistsError" in stderr
    assert f"--mode report --workdir {workdir}" in stderr


def test_errors_for_missing_runs_and_metrics(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.run(run_options.from_config(get_config()), tmp_path)
    workdir = make(tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has no metrics"):
        report.run(run_options.from_config(get_config()), workdir)
