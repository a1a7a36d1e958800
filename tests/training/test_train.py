"""Complete tiny runs: training, resuming, evaluation, export and errors."""

import dataclasses
import errno
import json
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cra_jax.datasets import sources
from cra_jax.inference import evaluate, export, run_options
from cra_jax.inference.restore import restore
from cra_jax.input.batches import center_batches
from cra_jax.reports import report
from cra_jax.runtime import provenance, run_directory, signals, training_log
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.training import build, preview, train
from tests.helpers import tiny_config
from tests.helpers.dataset_folders import save_image
from tests.helpers.torch_or_skip import safetensors_torch, torch
from tests.oracles.torch_resnet import TorchResNet


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache_dir, tmp_path_factory) -> Any:
    """Trains 3 epochs without interruption; returns config, directory and scores."""
    config = tiny_config.config(cache_dir, **{"train.epochs": 3})
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return config, workdir, train.run(config, workdir)


def _arrays(workdir):
    """Returns step, metadata and arrays of the newest checkpoint."""
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        shapes = checkpoints.shapes(step)
        restored = checkpoints.restore(step, shapes)
        return step, checkpoints.meta(step), restored


def test_run_lowers_the_loss_and_writes_metrics(finished):
    config, workdir, scores = finished
    lines = run_directory.read_metrics(workdir)
    training = [x for x in lines if x["split"] == "train"]
    assert [x["step"] for x in training] == [4, 6, 8, 12, 16, 18]
    assert [x["epoch"] for x in training] == [1, 1, 2, 2, 3, 3]
    assert training[-1]["loss_cls1"] < training[0]["loss_cls1"]
    assert training[-1]["loss"] < training[0]["loss"]
    for name in (
        *("loss", "loss_cls1", "loss_cls2", "loss_res", "loss_cntr"),
        *("top1", "attention_top1", "learning_rate", "restriction_weight"),
        *("gamma1_mean", "gamma4_std", "gamma_saturated", "gamma_guarded"),
        *("gradient_norm", "images_per_second", "eta_seconds"),
    ):
        assert all(np.isfinite(x[name]) for x in training), name
    for split in ("test", "test_shifted"):
        tested = [x for x in lines if x["split"] == split]
        assert [x["step"] for x in tested] == [6, 12, 18]
        assert all(x["count"] == config.data.test_size for x in tested)
        for name in (
            *("pointing", "activation_in_box", "attention_iou", "box_share"),
            "head_in_attention",
        ):
            assert all(0 < x[name] < 1 for x in tested), name
        for name in ("box_count", "head_count"):
            assert all(x[name] == config.data.test_size for x in tested)
        assert scores[split] == tested[-1]
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        json.dumps(build.config_without_hosts(config))
    )


def test_latest_and_best_checkpoints_are_kept_with_class_names(finished):
    _, workdir, _ = finished
    tested = [x for x in run_directory.read_metrics(workdir) if x["split"] == "test"]
    best = max(tested, key=lambda x: (x["top1"], x["step"]))["step"]
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.choose("latest") == 18
        assert checkpoints.choose("best") == best
        assert set(checkpoints.steps()) == {12, 18, best}
        assert len(checkpoints.meta(18)["class_names"]) == 8


def test_finished_run_without_steps_to_train_is_not_recorded_again(finished):
    config, workdir, scores = finished
    before = (workdir / "provenance.json").read_bytes()
    assert train.run(config, workdir) == scores
    assert (workdir / "provenance.json").read_bytes() == before


def test_run_whose_checkpoints_were_removed_is_not_overwritten(finished, tmp_path):
    config, workdir, _ = finished
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    before.pop(copy / "lock")
    for _ in range(2):  # also if the directory is there and empty
        with pytest.raises(ValueError, match="its checkpoints were removed: restore"):
            train.run(config, copy)
        assert before == {path: path.read_bytes() for path in before}
        (copy / "checkpoints").mkdir(exist_ok=True)


def test_scores_are_printed_before_they_are_written(finished, tmp_path, capsys):
    config, workdir, scores = finished
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "results")
    (copy / "results").write_text("in the way, as a read-only directory would be")
    config = _changed(config, **{"eval.protocol": "center"})
    with pytest.raises(ValueError, match="of test, center; test_shifted, center are"):
        evaluate.run(run_options.from_config(config), copy)
    printed = capsys.readouterr().out
    for split in ("test", "test_shifted"):
        top1 = f"{100 * scores[split]['top1']:.1f} %"
        assert f"\n{split}, center: top-1 {top1}, " in printed


def test_val_chooses_the_best_checkpoint_and_test_reports(
    cache_dir, tmp_path, capsys, monkeypatch
):
    """Class b has no test image, and half of the test images are training images."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    for split, classes in (("train", "abc"), ("val", "abc"), ("test", "ac")):
        files = [f"{split}/{c}/{i}.png" for c in classes for i in range(8)]
        for seed, file in enumerate(files):
            save_image(data / file, seed + 100 * len(split), size=(40, 40))
    for i in range(4):
        for c in "ac":
            shutil.copy(data / f"train/{c}/{i}.png", data / f"test/{c}/{i}.png")
    changes = {"data.source": "folder", "data.path": str(data), "train.epochs": 3}
    changes |= {"model.kind": "baseline", "eval.protocol": "center"}
    config = tiny_config.config(tmp_path / "cache", **changes)
    # On val, the second epoch is the best; on test, the last.
    given = {("val", 2): 0.9, ("test", 3): 1.0}
    scores_of = evaluate.Evaluator.scores
    calls = []

    def scores(self, found, split, protocol):
        name = split.records[0].name.partition("/")[0]
        calls.append(name)
        top1 = given.get((name, calls.count(name)), 0.5)
        return scores_of(self, found, split, protocol) | {"top1": top1}

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "scores", scores)
        found = train.run(config, workdir)
    assert set(found) == {"test", "val"}
    printed = capsys.readouterr()
    duplicates = (
        "warning: 8 of 16 images of 'test' are duplicates of training images"
        " (test/a/0.png = train/a/0.png, test/a/1.png = train/a/1.png,"
        " test/a/2.png = train/a/2.png, ...), which makes its scores too high"
    )
    absent = "'test' has no images of 1 of the 3 classes, which its scores leave out: b"
    assert duplicates in printed.out
    assert duplicates in printed.err
    assert absent in printed.err
    assert "checkpoint `best`: step 2 (epoch 2), chosen on 'val'" in printed.out
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.best_step() == 2
        assert checkpoints.meta(2)["metric_split"] == "val"
    options = run_options.from_config(config)
    evaluate.run(options.at_checkpoint("best"), workdir)
    printed = capsys.readouterr().out
    assert f"checkpoint 2 (epoch 2, the best on 'val') of {workdir}" in printed
    assert "note: the score of 'val' is too high, since it chose the checkp" in printed
    assert duplicates in printed
    assert f"note: {absent}" in printed
    rows = run_directory.read_results(workdir, "test", "center")
    assert {(row.label, row.class_name) for row in rows} == {(0, "a"), (2, "c")}
    page = report.write(options, workdir).read_text()
    assert "epoch 2, chosen by top-1 on val; the test images chose nothing." in page
    assert "which its scores leave out: b" in page
    assert "8 of 16 images of" in page

    # Other images, without training images, some of which the run was trained on.
    fresh = tmp_path / "fresh"
    shutil.copytree(data / "train" / "c", fresh / "test" / "c")
    save_image(fresh / "test" / "a" / "new.png", 999, size=(40, 40))
    other = tiny_config.config(
        tmp_path / "cache", **changes | {"data.path": str(fresh)}
    )
    evaluate.run(run_options.from_config(other), workdir)
    printed = capsys.readouterr().out
    assert "warning: 8 of 9 images of 'test' are duplicates of training im" in printed
    assert "leave out: b" in printed
    assert " of 9 images" in printed


def test_best_is_chosen_on_a_held_out_share(cache_dir, tmp_path, capsys):
    changes = {"data.val_share": 0.25, "model.kind": "baseline", "train.epochs": 1}
    scores = train.run(tiny_config.config(cache_dir, **changes), tmp_path)
    assert {name: line["count"] for name, line in scores.items()} == {
        **{"test": 40, "test_shifted": 40, "val": 24}
    }
    assert "(epoch 1), chosen on 'val'" in capsys.readouterr().out


class _Killed(BaseException):
    pass


def _stop_at(monkeypatch, step):
    advance = training_log.Log.advance
    calls = []

    def advance_or_stop(log):
        advance(log)
        calls.append(log)
        if len(calls) == step:
            raise _Killed

    monkeypatch.setattr(training_log.Log, "advance", advance_or_stop)


def test_resumed_run_is_bitwise_equal_to_an_uninterrupted_run(
    finished, cache_dir, tmp_path, monkeypatch
):
    """The run is stopped twice, within an epoch and within a window of the log."""
    config = tiny_config.config(
        cache_dir, **{"train.epochs": 3, "checkpoint.every_steps": 3}
    )
    for stop in (5, 11):  # the second start counts from step 3
        with monkeypatch.context() as patch:
            _stop_at(patch, stop)
            with pytest.raises(_Killed):
                train.run(config, tmp_path)
    train.run(config, tmp_path)
    step, meta, arrays = _arrays(tmp_path)
    expected_step, expected_meta, expected = _arrays(finished[1])
    assert step == expected_step == 18
    assert meta["window"] == expected_meta["window"]
    assert jax.tree.structure(arrays) == jax.tree.structure(expected)
    jax.tree.map(assert_array_equal, arrays, expected)
    assert len(jax.tree.leaves(arrays)) > 50
    _assert_same_record(tmp_path, finished[1])


def test_epoch_is_saved_before_its_evaluation(
    finished, cache_dir, tmp_path, monkeypatch
):
    """The first evaluation fails, the others are ended by SIGTERM; all are repeated."""
    config = tiny_config.config(cache_dir, **{"train.epochs": 3})
    scores, calls = evaluate.Evaluator.scores, []

    def fail(evaluator, found, split, protocol):
        calls.append(split)
        if len(calls) == 1:
            return scores(evaluator, found, split, protocol)
        raise OSError(errno.EIO, "of a disk")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "scores", fail)
        with pytest.raises(ValueError, match="of a disk"):
            train.run(config, tmp_path)
    assert _arrays(tmp_path)[0] == 6

    lines = run_directory.read_metrics(tmp_path)
    assert [x["split"] for x in lines if x["step"] == 6] == ["train", "test"]
    record = training_log.Log.test
    for step in (12, 18):

        def terminate(log, *, step, stop_at=step, **scores):
            record(log, step=step, **scores)
            if step == stop_at and scores["split"] == "test":
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(training_log.Log, "test", terminate)
            with pytest.raises(signals.Stopped) as stopped:
                train.run(config, tmp_path)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert _arrays(tmp_path)[0] == step
    assert train.run(config, tmp_path).keys() == finished[2].keys()
    starts = provenance.read(tmp_path)
    assert [x["first_step"] for x in starts] == [0, 6, 12, 18]
    assert starts[-1]["outcome"] == "finished"
    _assert_same_record(tmp_path, finished[1])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert all(map(checkpoints.has_metric, checkpoints.steps()))


def _assert_same_record(one, other):
    """Checks that metrics, snapshots and results are equal, without times."""
    timed = {"images_per_second", "eta_seconds"}
    found, expected = (
        [
            {k: v for k, v in line.items() if k not in timed}
            for line in run_directory.read_metrics(folder)
        ]
        for folder in (one, other)
    )
    assert found == expected
    assert run_directory.read_snapshots(one) == run_directory.read_snapshots(other)
    assert run_directory.read_results(one, "test", "center") == (
        run_directory.read_results(other, "test", "center")
    )


def test_several_steps_per_dispatch_give_the_same_training(
    finished, cache_dir, tmp_path, monkeypatch
):
    """The run is stopped and resumed."""
    changes = {"train.steps_per_dispatch": 3, "train.log_every_steps": 6}
    changes |= {"train.epochs": 3, "checkpoint.every_steps": 3}
    config = tiny_config.config(cache_dir, **changes)
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(_Killed):
            train.run(config, tmp_path)
    calls = []

    def dispatches(*args: Any, **options: Any) -> list[range]:
        calls.extend(found := schedule_dispatches(*args, **options))
        return found

    schedule_dispatches = train.dispatches
    monkeypatch.setattr(train, "dispatches", dispatches)
    train.run(config, tmp_path)
    assert [(call.start, call.stop) for call in calls] == [
        (step, step + 3) for step in range(3, 18, 3)
    ]
    # Another program rounds differently and errors grow: compare the first epoch.
    (first, *_), (wanted, *_) = (
        [x["loss"] for x in run_directory.read_metrics(folder) if x["split"] == "test"]
        for folder in (tmp_path, finished[1])
    )
    assert first == pytest.approx(wanted, rel=1e-3)


def test_run_saves_attention_snapshots_and_results_of_each_image(finished):
    config, workdir, scores = finished
    lines = run_directory.read_snapshots(workdir)
    assert sorted({(x["step"], x["epoch"]) for x in lines}) == [
        *((0, 0), (6, 1), (12, 2), (18, 3))
    ]
    split = build.open_split(config, build.load_dataset(config), "test")
    for step in (0, 6, 12, 18):
        at_step = [x for x in lines if x["step"] == step]
        indices = [x["index"] for x in at_step]
        assert [split.labels[i] for i in indices] == list(range(8))
        assert all(split.labels.tolist().index(k) == i for k, i in enumerate(indices))
        assert [x["name"] for x in at_step] == [split.records[i].name for i in indices]
    # The attention starts at art.init and changes.
    np.testing.assert_allclose(
        lines[0]["matrix"], [[0.45, 0, 0], [0, 0.45, 0]], atol=0.01
    )
    assert np.abs(np.subtract(lines[-1]["matrix"], lines[7]["matrix"])).max() > 1e-4
    # The last snapshots equal the attention of the restored head.
    options = run_options.from_config(config)
    restored = restore(options, workdir, attention=True)
    assert restored.head is not None
    evaluator = evaluate.Evaluator(restored.backbone, options)
    found = evaluator.center(restored.variables, split, head=restored.head)
    last = [x for x in lines if x["step"] == 18]
    for line in last:
        assert found.matrices is not None
        expected = found.matrices[line["index"]]
        np.testing.assert_allclose(line["matrix"], expected, atol=2e-6)
    measured = evaluator.scores(found, split, "center")
    assert measured["attention_iou"] == pytest.approx(scores["test"]["attention_iou"])
    for name in scores:
        rows = run_directory.read_results(workdir, name, "center")
        assert [x.index for x in rows] == list(range(config.data.test_size))
        right = np.mean([x.label == x.predicted for x in rows])
        assert right == scores[name]["top1"]
        assert {x.step for x in rows} == {18}


def test_eval_equals_the_scores_of_training_and_adds_the_full_protocol(
    finished, capsys
):
    config, workdir, scores = finished
    lines = len(run_directory.read_metrics(workdir))
    evaluate.run(run_options.from_config(config), workdir)
    added = run_directory.read_metrics(workdir)[lines:]
    # The scores of the center protocol are in the file already, from training.
    found = [(x["split"], x["protocol"]) for x in added]
    assert found == [("test", "full"), ("test_shifted", "full")]
    assert all(x["count"] == config.data.test_size for x in added)
    printed = capsys.readouterr().out
    for split in ("test", "test_shifted"):
        rows = run_directory.read_results(workdir, split, "full")
        right = sum(x.label == x.predicted for x in rows)
        (line,) = [x for x in added if x["split"] == split]
        assert right / len(rows) == line["top1"]
        top1 = f"{split}, center: top-1 {100 * scores[split]['top1']:.1f} %"
        assert f"{top1}," in printed
        assert f"{split}, full: top-1 " in printed


def test_finished_run_does_nothing_even_after_eval(finished):
    config, workdir, scores = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train.run(config, workdir) == scores
    assert (workdir / "metrics.jsonl").read_text() == before


def _files(workdir):
    return {
        path: path.read_bytes()
        for path in (workdir / "results").rglob("*.csv")
        if "foreign" not in str(path)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"data.seed": 1},
        {"data.test_size": 24},
        {"data.mean": (0.9, 0.1, 0.9)},
        {"data.crop_px": 28},
        {"data.short_side_px": 33},
    ],
)
def test_eval_with_other_data_or_settings_is_foreign(finished, capsys, changes):
    config, workdir, scores = finished
    before, results_before = run_directory.read_metrics(workdir), _files(workdir)
    changed = _changed(config, **changes, **{"eval.protocol": "center"})
    evaluate.run(run_options.from_config(changed), workdir)
    printed = capsys.readouterr().out
    ((key, value),) = changes.items()
    assert f"foreign evaluation, not the run's own: {key}={value!r}" in printed
    assert "test, center: foreign, top-1" in printed
    # Neither lines nor results of the run have changed, and the run says the same.
    assert run_directory.read_metrics(workdir) == before
    assert _files(workdir) == results_before
    assert train.run(config, workdir) == scores
    lines = run_directory.read_lines(workdir / "metrics.jsonl")
    foreign = [x for x in lines if x.get("foreign", "").startswith(f"{key}={value!r}")]
    assert {x["split"] for x in foreign} == {"test", "test_shifted"}
    own = next(x for x in before if x["split"] == "test" and x["step"] == 18)
    of_data = key in ("data.seed", "data.test_size")
    assert all((x["data"] == own["data"]) != of_data for x in foreign[:1])
    assert all((x["settings"] == own["settings"]) == of_data for x in foreign)


def test_eval_of_data_that_has_changed_is_an_error_or_foreign(
    finished, capsys, monkeypatch
):
    config, workdir, _ = finished
    options = run_options.from_config(_changed(config, **{"eval.protocol": "center"}))

    def load(options, **more):
        """The dataset; a test image has other content, another was trained on."""
        found = load_dataset(options, **more)
        test = list(found.splits["test"])
        test[3] = dataclasses.replace(test[3], stamp="other")
        trained = found.splits["train"][5]
        test[4] = dataclasses.replace(
            test[4], content=f"{trained.name} {trained.stamp}".encode
        )
        return dataclasses.replace(found, splits={**found.splits, "test": tuple(test)})

    load_dataset = sources.load_dataset
    monkeypatch.setattr(sources, "load_dataset", load)
    before = run_directory.read_metrics(workdir)
    message = r"test data .* test: test/000003 has other content \(and 1 more"
    with pytest.raises(ValueError, match=message):
        evaluate.run(options, workdir)
    evaluate.run(options, workdir, allow_data_change=True)
    printed = capsys.readouterr().out
    assert (
        "test: foreign evaluation, not the run's own: the data has changed" in printed
    )
    assert "1 of its 40 images were trained on" in printed
    assert "test_shifted: foreign" not in printed  # it has not changed
    assert run_directory.read_metrics(workdir) == before
    # The training command finds the change as well, and the run stays as it was.
    with pytest.raises(ValueError, match="has changed since step 18"):
        train.run(config, workdir)
    kept = (workdir / "images.json").read_bytes()
    with pytest.raises(ValueError, match="1 images of the split 'test' were trained"):
        train.run(config, workdir, allow_data_change=True)
    assert (workdir / "images.json").read_bytes() == kept


@pytest.mark.parametrize("checkpoint", ["best", 12])
def test_eval_uses_another_checkpoint(finished, capsys, checkpoint):
    config, workdir, _ = finished
    changed = config.copy_and_resolve_references()
    changed.eval.checkpoint = str(checkpoint)
    changed.eval.protocol = "center"
    before = (workdir / "metrics.jsonl").read_text()
    evaluate.run(run_options.from_config(changed), workdir)
    (workdir / "metrics.jsonl").write_text(before)
    if checkpoint == 12:
        tested = [
            x for x in run_directory.read_metrics(workdir) if x["split"] == "test"
        ]
        top1 = next(x["top1"] for x in tested if x["step"] == 12)
        assert f"test, center: top-1 {100 * top1:.1f} %" in capsys.readouterr().out


def test_export_of_a_run_gives_its_accuracy_in_an_independent_network(finished):
    """The independent PyTorch ResNet loads the export with strict=True."""
    config, workdir, scores = finished
    export.run(run_options.from_config(config), workdir)
    about = json.loads((workdir / "export" / "config.json").read_text())
    arrays = safetensors_torch.load_file(workdir / "export" / "model.safetensors")
    width, stem = config.model.width, config.model.stem
    network = TorchResNet(about["architecture"], 8, width=width, stem=stem).eval()
    network.load_state_dict(arrays, strict=True)
    dataset = build.load_dataset(config)
    assert about["class_names"] == list(dataset.class_names)
    split = build.open_split(config, dataset, "test")
    batches = center_batches(
        split.images, split.labels, batch_size=40, crop_px=about["crop_px"]
    )
    images = batches[0]["image"] / np.float32(255)
    images = (images - np.array(about["mean"])) / np.array(about["std"])
    with torch.no_grad():
        logits = network(torch.tensor(images.transpose(0, 3, 1, 2)).float()).numpy()
    top1 = (logits.argmax(1) == split.labels).mean()
    assert top1 == scores["test"]["top1"]


def test_run_starts_from_an_export_and_resumes_without_it(
    finished, cache_dir, tmp_path, capsys
):
    config, workdir, _ = finished
    export.run(run_options.from_config(config), workdir)
    file = tmp_path / "weights.safetensors"
    file.write_bytes((workdir / "export" / "model.safetensors").read_bytes())
    changes = {"model.pretrained": str(file), "optim.base_lr": 1e-9, "train.epochs": 1}
    started = tiny_config.config(cache_dir, **changes)
    train.run(started, tmp_path / "run")
    assert "weights.safetensors" in capsys.readouterr().err
    _, _, arrays = _arrays(tmp_path / "run")
    _, _, source = _arrays(workdir)
    for stream in ("classification_stream", "regularization_stream"):
        conv1 = arrays["params"][stream]["conv1"]["kernel"]
        expected = source["params"]["classification_stream"]["conv1"]["kernel"]
        np.testing.assert_allclose(conv1, expected, atol=1e-6)
        fc = arrays["params"][stream]["fc"]["kernel"]
        trained = source["params"]["classification_stream"]["fc"]["kernel"]
        assert np.abs(fc - trained).max() > 1e-3
    file.unlink()
    train.run(started, tmp_path / "run")
    capsys.readouterr()
    # A start from the run itself includes the classifier, as the classes are equal.
    again = _changed(started, **{"model.pretrained": str(workdir)})
    preview.run(again, tmp_path, what="weights")
    printed = capsys.readouterr().out
    assert "classification_stream.fc" in printed
    assert "attention_head" in printed
    with pytest.raises(ValueError, match=r"weights.safetensors"):
        train.run(started, tmp_path / "another")


def _changed(config, **changes):
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 16}, "of another model"),
        ({"model.backbone": "resnet18"}, "of another model"),
        ({"data.num_species": 5}, "the data has 5 classes, the checkpoint 8"),
        ({"eval.checkpoint": "7"}, "no checkpoint '7'"),
        ({"eval.protocol": "corner"}, "unknown eval.protocol 'corner'"),
    ],
)
def test_eval_with_another_network_or_wrong_options_is_an_error(
    finished, changes, message
):
    config, workdir, _ = finished
    changed = _changed(config, **changes)
    with pytest.raises(ValueError, match=message):
        evaluate.run(run_options.from_config(changed), workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 20}, r"train.batch_size=20 cannot be shared"),
        ({"train.batch_size": 8}, "at least 2 images on each"),
        ({"train.batch_size": 112}, "96 training images do not fill one batch"),
        ({"train.epochs": 0}, "train.epochs=0 must be 1 or more"),
        ({"data.crop_px": 40}, "data.crop_px=40 does not fit"),
        ({"data.source": "imagenet"}, "'imagenet'"),
        ({"data.source": "cub", "data.path": "nowhere"}, "there is no such folder"),
        ({"model.backbone": "vgg16"}, "unknown backbone 'vgg16'"),
        ({"model.kind": "cnn"}, "unknown model.kind 'cnn'"),
        ({"contrast.pairs": "some"}, "unknown contrast.pairs 'some'"),
        ({"contrast.distance": "cosine"}, "unknown contrast.distance 'cosine'"),
        ({"bn.sync": True, "bn.group_size": 2}, "give only one"),
    ],
)
def test_wrong_options_are_errors_before_training(
    cache_dir, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        train.run(tiny_config.config(cache_dir, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_config_in_the_same_run_directory_is_an_error(finished):
    config, workdir, _ = finished
    with pytest.raises(
        ValueError, match=r"optim.base_lr: 0.05 in the run directory, 0.1"
    ):
        train.run(_changed(config, **{"optim.base_lr": 0.1}), workdir)


def test_run_directory_without_checkpoint_accepts_another_config(cache_dir, tmp_path):
    run_directory.keep_config(tmp_path, {"seed": 5})
    changes = {"model.kind": "baseline", "train.epochs": 1}
    train.run(tiny_config.config(cache_dir, **changes), tmp_path)
    assert run_directory.read_config(tmp_path)["seed"] == 0


def test_resuming_from_a_checkpoint_of_another_model_is_an_error(finished):
    config, workdir, _ = finished
    changed = _changed(config, **{"model.width": 16})
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match="of another model"):
        train.run(changed, workdir, allow_change=True)
    assert (workdir / "config.json").read_text() == before


def test_diverged_run_is_an_error(cache_dir, tmp_path):
    changes = {"optim.base_lr": 1e6, "model.kind": "baseline", "train.epochs": 4}
    with pytest.raises(ValueError, match=r"training has diverged; lower optim.base_lr"):
        train.run(tiny_config.config(cache_dir, **changes), tmp_path)


def test_attention_stuck_in_a_corner_gives_a_warning(cache_dir, tmp_path, capsys):
    changes = {"art.init": (0.99, 0.99, 0.45, 0.0), "art.inside": False}
    changes |= {"train.epochs": 1}
    train.run(tiny_config.config(cache_dir, **changes), tmp_path)
    assert (
        "warning: at step 4 the attention is saturated at its bound"
        in capsys.readouterr().err
    )
