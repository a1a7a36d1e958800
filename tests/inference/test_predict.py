"""Prediction: scores, positions in the image, inputs, errors and overlays."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from cra_jax import art_module
from cra_jax.inference import evaluate, export, overlay, predict, run_options, trained
from cra_jax.inference.predictor import Prediction, Predictor
from cra_jax.inference.restore import restore
from cra_jax.input import decoding
from cra_jax.training import build
from tests.helpers import tiny_run

SIZES = [(36, 36), (90, 60), (60, 90), (33, 200), (500, 40), (61, 47), (640, 480)]
ROOT = Path(__file__).resolve().parents[2]
_ROTATED = 0x0112, 6  # the EXIF orientation of a rotated camera


def _image(width, height, seed=0):
    """Makes a smooth image, so that all JPEG decoders give nearly the same pixels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return tiny_run.save(folder), folder


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Makes a dataset of class directories with test images of many sizes."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for name in tiny_run.CLASSES:
            (root / split / name.replace("/", "_")[:4]).mkdir(parents=True)
    folders = sorted((root / "test").iterdir())
    for i, size in enumerate(SIZES):
        exif = Image.Exif()
        if i % 2:
            exif[_ROTATED[0]] = _ROTATED[1]
        file = folders[i % len(folders)] / f"{i}.jpg"
        _image(*size, seed=i).save(file, exif=exif)
    for folder in (root / "train").iterdir():
        _image(40, 40).save(folder / "0.png")
    return root


def test_predicted_scores_equal_the_scores_of_evaluation(run, predictor, data):
    config = run[0].copy_and_resolve_references()
    config.update_from_flattened_dict(
        {"data.source": "folder", "data.path": str(data), "eval.batch_size": 8}
    )
    options = run_options.from_config(config)
    dataset = build.load_dataset(config)
    split = build.open_split(config, dataset, "test")
    restored = restore(options, run[1])
    evaluator = evaluate.Evaluator(restored.backbone, options)
    expected = evaluator.center(restored.variables, split).logits
    files = [Path(data) / record.name for record in split.records]
    files = [f if f.exists() else data / "test" / f for f in files]
    found = predictor([str(file) for file in files])
    assert len(found) == len(SIZES)
    assert_array_equal([answer.scores for answer in found], expected)
    for answer, scores in zip(found, expected, strict=True):
        assert list(answer.labels) == np.argsort(-scores)[:5].tolist()
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        assert_allclose(answer.probabilities, np.sort(shares)[::-1][:5], rtol=1e-12)
        names = [tiny_run.CLASSES[label] for label in answer.labels]
        assert list(answer.classes) == names
    assert len({answer.classes for answer in found}) > 1  # predictions differ


def test_path_bytes_and_pixels_of_one_image_give_the_same_prediction(predictor, data):
    files = sorted(data.rglob("test/**/*.jpg"))
    together = predictor(files)
    for file, expected in zip(files, together, strict=True):
        inputs = [str(file), file.read_bytes(), decoding.decode(str(file))]
        for image in inputs:
            found = predictor(image)
            assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
            assert found.size_px == expected.size_px
    assert predictor(inputs[1]).path == ""
    assert together[0].path == str(files[0])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("size", [(72, 144), (144, 72), (45, 36), (36 * 20, 36)])
def test_crop_and_attention_are_in_pixels_of_the_upright_image(
    run, size, rotated, tmp_path
):
    """The attention is half the crop, to the right of and above its centre."""
    network = trained.of_run(run_options.from_config(run[0]), run[1])
    head = network.head
    assert head is not None
    x, y, scale = 0.25, -0.5, 0.4
    bias = [
        np.arctanh(x),
        np.arctanh(y),
        np.arctanh(scale / head.head.config.alpha_s),
        0.0,
    ]
    config = dataclasses.replace(head.head.config, inside=False)  # only Eq. 6
    params = {"kernel": 0 * head.params["kernel"], "bias": np.array(bias, np.float32)}
    head = art_module.trained_head({"attention_head": params}, config, "cra")
    fixed = Predictor(dataclasses.replace(network, head=head))
    exif = Image.Exif()
    exif[_ROTATED[0]] = _ROTATED[1] if rotated else 1
    stored = size[::-1] if rotated else size
    _image(*stored).save(tmp_path / "a.png", exif=exif)
    answer = fixed(tmp_path / "a.png")
    assert answer.size_px == size
    # The image's short side is 36 px after resizing; the crop has 32 px of these.
    scale_up = min(size) / 36
    shift = [(side / scale_up - 32) / 2 for side in size]
    if size[0] == 45:
        shift[0] = 6  # the odd pixel is on the right
    left, top = shift[0] * scale_up, shift[1] * scale_up
    box = [left, top, left + 32 * scale_up, top + 32 * scale_up]
    assert_allclose(answer.crop_box_px, box, atol=1e-9)
    # -1 and 1 are the centres of the first and last pixel of the crop.
    centre = [left + (16 + 15.5 * x) * scale_up, top + (16 + 15.5 * y) * scale_up]
    half = 15.5 * scale * scale_up
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    assert_allclose(answer.attention_px, np.add(centre, corners), atol=1e-4)
    expected = [centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half]
    assert answer.attention_box_px is not None
    assert_allclose(answer.attention_box_px, expected, atol=1e-4)


def test_banner_of_aircraft_is_cropped_by_run_and_export(
    run, predictor, tmp_path, capsys
):
    changes: Any = {"data.source": "aircraft"}
    config = tiny_run.save(tmp_path, **changes)
    export.run(run_options.from_config(config), tmp_path)
    image = np.asarray(_image(60, 70))
    expected = predictor(image[:-20])
    banner = predict.load(tmp_path)
    found = banner(image)
    assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert found.crop_box_px == expected.crop_box_px
    assert found.size_px == (60, 70)
    with pytest.raises(ValueError, match="20 rows, of which the lowest 20 are"):
        banner(image[:20])
    assert trained.load_network(tmp_path / "export").cut_bottom_px == 20


def test_attention_box_is_clipped_to_the_image(predictor):
    answer = predictor(np.zeros((36, 36, 3), np.uint8))
    far = np.array([[-9.0, 5.0], [20.0, -3.0], [50.0, 20.0], [18.0, 40.0]])
    clipped = dataclasses.replace(answer, attention_px=far)
    assert clipped.attention_box_px == (0, 0, 36, 36)


def test_run_checkpoint_and_export_give_the_same_prediction(
    run, predictor, data, capsys
):
    config, folder = run
    file = next(data.rglob("test/**/*.jpg"))
    expected = predictor(file)
    at_7 = predict.load(folder / "checkpoints" / "7")
    assert_array_equal(at_7(file).scores, expected.scores)
    others = [
        predict.load(folder, checkpoint="best"),
        predict.load(str(folder / "checkpoints" / "6")),
    ]
    first, second = (other(file).scores for other in others)
    assert_array_equal(first, second)
    assert not np.allclose(first, expected.scores)
    export.run(run_options.from_config(config), folder)
    exported = predict.load(folder / "export")
    found = exported(file)
    assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert found.classes == expected.classes
    assert found.crop_box_px == expected.crop_box_px
    assert found.attention_px is None
    assert "attention" not in found.to_json()


def test_baseline_has_no_attention_and_stn_has_one(tmp_path, data):
    file = next(data.rglob("test/**/*.jpg"))
    tiny_run.save(tmp_path / "baseline", "baseline")
    assert predict.load(tmp_path / "baseline")(file).attention_px is None
    tiny_run.save(tmp_path / "stn", "stn")
    assert predict.load(tmp_path / "stn")(file).attention_px.shape == (4, 2)


def test_each_reads_only_a_few_batches_ahead(predictor):
    class Counted(list):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.read += 1
            return super().__getitem__(index)

    many = Counted([np.zeros((36, 36, 3), np.uint8)] * 500)
    answers = predictor.each(many, workers=2)
    next(answers)
    assert Counted.read <= 4 * 16 + 2
    answers.close()


def test_unreadable_image_is_an_error_in_a_call_and_a_result_in_each(
    predictor, tmp_path
):
    good = tmp_path / "good.png"
    _image(40, 40).save(good)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(decoding.ImageError, match=r"bad\.jpg"):
        predictor([good, bad])
    types = [type(a) for a in predictor.each([bad, good, b"junk", good])]
    error = decoding.ImageError
    assert types == [error, Prediction, error, Prediction]
    assert predictor([]) == []


def test_non_finite_scores_are_an_error(run):
    network = trained.of_run(run_options.from_config(run[0]), run[1])
    params = {**network.variables["params"]}
    params["fc"] = {k: v * np.nan for k, v in params["fc"].items()}
    variables = {**network.variables, "params": params}
    broken = Predictor(dataclasses.replace(network, variables=variables))
    with pytest.raises(ValueError, match="not finite"):
        broken(np.zeros((36, 36, 3), np.uint8))


# --- damaged and untrusted files ----------------------------------------------------


def test_directory_without_a_network_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither a run .* nor an export"):
        predict.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        predict.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_px": 10**9, "resize_short_side_px": 10**9},
        {"crop_px": 0},
        {"crop_px": "32"},
        {"crop_px": 37},
        {"cut_bottom_px": -1},
        {"cut_bottom_px": "20"},
        {"class_names": []},
        {"class_names": 6},
        {"mean": [0.5]},
        {"std": None},
        {"architecture": "resnet9"},
        {"architecture": ["resnet10"]},
        {"stem": "large"},
        {"crop_px": 32.5},
        {"crop_px": True},
        {"resize_short_side_px": 36.5},
        {"class_names": "abcdef"},
        {"class_names": list(range(6))},
        {"std": [0, 0, 0]},
        {"std": [0.2, -0.2, 0.2]},
        {"mean": [float("nan")] * 3},
        {"mean": ["0.5"] * 3},
        {"mean": [10**400] * 3},
        {"width": 10**7},
        {"width": 8.0},
        {"stem": []},
        {"checkpoint_step": "\x1b[2J"},
        {"sha256": []},
        {"sha256": {"model.safetensors": "0"}},
        "[" * 100_000,
        {"width": 10},
        {"class_names": ["auk", "boobook"]},
        "not json",
        "[]",
        None,
    ],
)
def test_export_with_a_wrong_config_is_an_error(run, tmp_path, change, capsys):
    config, folder = run
    if not (folder / "export").is_dir():
        export.run(run_options.from_config(config), folder)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / "export" / name).read_bytes())
    about = tmp_path / "config.json"
    if isinstance(change, dict):
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
    elif change is None:
        about.unlink()
    else:
        about.write_text(change)
    with pytest.raises(ValueError, match=r"config\.json|classifier") as caught:
        predict.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- --mode predict -----------------------------------------------------------------


@pytest.fixture
def image_dir(tmp_path):
    """Makes two images, one in a subdirectory, an unreadable image and a text file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    _image(50, 40, seed=1).save(folder / "b2.png")
    _image(40, 50, seed=2).save(folder / "more" / "b2.jpg")
    (folder / "b10.jpg").write_text("<html>404</html>")
    (folder / "notes.txt").write_text("no image")
    return folder


def _lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_directory_is_predicted_and_unreadable_images_are_reported(
    run, predictor, image_dir, capsys
):
    folder = run[1]
    predict.run(
        run_options.from_config(run[0]), folder, [str(image_dir)], overlays=True
    )
    printed = capsys.readouterr()
    lines = _lines(printed.out)
    assert (folder / "predictions.jsonl").read_text() == printed.out
    names = [os.path.relpath(line["path"], image_dir) for line in lines]
    assert names == ["b2.png", "b10.jpg", "more/b2.jpg"]
    assert "not an image" in lines[1]["error"]
    assert set(lines[1]) == {"path", "error"}
    assert "2 predicted, 1 unreadable" in printed.err
    assert "1 files skipped: 1 .txt" in printed.err
    assert "longer than 8 to 1" not in printed.err
    for line in lines[::2]:
        answer = predictor(line["path"])
        assert [top["class"] for top in line["top"]] == list(answer.classes)
        found = [top["probability"] for top in line["top"]]
        assert_allclose(found, answer.probabilities, rtol=1e-4)
        box = line["attention"]["box_px"]
        assert_allclose(box, answer.attention_box_px, atol=0.02)
        assert (line["width_px"], line["height_px"]) == answer.size_px
    drawn = [Path(line["overlay"]) for line in lines[::2]]
    assert [file.name for file in drawn] == ["b2.png", "b2~2.png"]
    assert all(file.parent == folder / "overlays" for file in drawn)
    for file in drawn:
        with Image.open(file) as image:
            assert min(image.size) >= 320


def test_images_are_found_by_path_directory_pattern_and_list(
    image_dir, monkeypatch, capsys
):
    b2, b10 = str(image_dir / "b2.png"), str(image_dir / "b10.jpg")
    inner = str(image_dir / "more" / "b2.jpg")
    assert predict.find_images([b10, "nowhere.jpg"]) == [b10, "nowhere.jpg"]
    assert predict.find_images([str(image_dir)]) == [b2, b10, inner]
    assert predict.find_images([f"{image_dir}/b*"]) == [b2, b10]
    assert predict.find_images([f"{image_dir}/**/*.jpg"]) == [b10, inner]
    listed = io.TextIOWrapper(io.BytesIO(f"{b2}\n\n{inner}\n".encode() + b"\xff.jpg\n"))
    monkeypatch.setattr(sys, "stdin", listed)
    found = predict.find_images(["-", b10])
    assert found == [b2, inner, os.fsdecode(b"\xff.jpg"), b10]
    # A path that exists is no pattern.
    bracketed = image_dir / "[1].png"
    bracketed.write_bytes(b"")
    assert predict.find_images([str(bracketed)]) == [str(bracketed)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images are named"),
        (["{image_dir}/empty"], "no images in this directory"),
        (["{image_dir}/*.gif"], "no images in this pattern"),
        (["-"], "no images in this standard input"),
        (["{image_dir}/b10.jpg", "nowhere.jpg"], "none of 2 images can be read"),
    ],
)
def test_missing_or_unreadable_images_are_errors(
    run, image_dir, images, message, monkeypatch, capsys
):
    (image_dir / "empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(ValueError, match=message):
        predict.run(
            run_options.from_config(run[0]),
            run[1],
            [name.format(image_dir=image_dir) for name in images],
        )


def test_command_line_reads_a_list_and_ends_if_its_output_is_closed(
    run, image_dir, tmp_path
):
    """The list comes from standard input; the reader closes the pipe early."""
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=predict"]
    command += [f"--workdir={run[1]}", "--config.eval.checkpoint=6", "--images=-"]
    more = [str(image_dir / "more" / "b2.jpg")]
    process = subprocess.Popen(
        [*command, *more * 300],  # more output than a pipe's buffer
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(os.fsencode(image_dir / "b2.png") + b"\n")
        process.stdin.close()
        line = json.loads(process.stdout.readline())
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert line["path"] == str(image_dir / "b2.png")
    expected = predict.load(run[1], checkpoint="6")(line["path"])
    assert line["top"][0]["class"] == expected.classes[0]
    assert "checkpoint 6 (epoch 1) of" in errors
    assert ": 301 images" in errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert process.returncode == 0


def test_failed_prediction_keeps_the_earlier_predictions(run, image_dir, capsys):
    options, file = run_options.from_config(run[0]), run[1] / "predictions.jsonl"
    predict.run(options, run[1], [str(image_dir)])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="none of 1 image can be read"):
        predict.run(options, run[1], [str(image_dir / "misspelt.png")])
    assert file.read_bytes() == before


def test_output_is_another_file_that_must_not_exist(run, image_dir, tmp_path, capsys):
    options, kept = run_options.from_config(run[0]), run[1] / "predictions.jsonl"
    kept.write_text("of another prediction")
    file = tmp_path / "new.jsonl"
    images = [str(image_dir / "b2.png")]
    predict.run(options, run[1], images, output=file, overlays=True)
    (line,) = _lines(file.read_text())
    assert line["overlay"] == str(tmp_path / "new-overlays" / "b2.png")
    assert kept.read_text() == "of another prediction"
    with pytest.raises(ValueError, match=r"new\.jsonl exists: name another file"):
        predict.run(options, run[1], images, output=file)


def test_second_prediction_into_the_same_file_is_refused(
    run, image_dir, tmp_path, capsys, monkeypatch
):
    options, images = run_options.from_config(run[0]), [str(image_dir / "b2.png")]
    file, refused = tmp_path / "a.jsonl", []
    printed = predict._print

    def predict_again(text):
        with pytest.raises(ValueError, match="in use by another process") as caught:
            predict.run(options, run[1], images, output=file)
        refused.append(caught.value)
        printed(text)

    monkeypatch.setattr(predict, "_print", predict_again)
    predict.run(options, run[1], images * 3, output=file)
    assert len(refused) == 3
    assert len(_lines(file.read_text())) == 3


def test_file_name_that_is_no_unicode_is_reported(run, image_dir, capsys):
    name = os.path.join(os.fsencode(image_dir), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write((image_dir / "b2.png").read_bytes())
    predict.run(None, run[1] / "checkpoints" / "6", [os.fsdecode(name)], overlays=True)
    (line,) = _lines(capsys.readouterr().out)
    assert os.fsencode(line["path"]) == name
    assert Path(line["overlay"]).is_file()
    assert not list((run[1] / "checkpoints").rglob("*predictions*"))
    assert len(_lines((run[1] / "predictions.jsonl").read_text())) == 1


def test_unwritable_run_directory_is_an_error(run, image_dir):
    blocked = run[1] / ".predictions.jsonl.partial"
    blocked.mkdir()
    try:
        with pytest.raises(ValueError, match=r"cannot write .*predictions\.jsonl"):
            predict.run(run_options.from_config(run[0]), run[1], [str(image_dir)])
    finally:
        blocked.rmdir()


# --- overlays -----------------------------------------------------------------------


def test_negative_activation_is_transparent():
    activation = np.array([[-3.0, 0.0], [1.0, 2.0]])
    colours = overlay.color_activation(activation)
    assert colours.shape == (2, 2, 4)
    assert_array_equal(colours[0, :, 3], 0)
    assert 0 < colours[1, 0, 3] < colours[1, 1, 3] < 255
    grey = colours[..., :3] @ [0.299, 0.587, 0.114]
    assert grey[1, 1] > grey[1, 0]
    assert_array_equal(overlay.color_activation(-np.ones((3, 3)))[..., 3], 0)


def test_overlay_changes_only_activation_and_attention():
    grey = np.full((400, 600, 3), 128, np.uint8)
    activation = np.zeros((200, 200))
    activation[50:100, 50:100] = 1
    corners = np.array([[300, 150], [380, 150], [380, 230], [300, 230]])
    drawn = np.asarray(
        overlay.draw(
            grey,
            activation=activation,
            crop_box_px=(200, 100, 400, 300),
            attention_px=corners,
            answer=[("auk" * 99, 0.9), ("two\nlines", 0.1)],
        )
    ).astype(int)
    assert drawn.shape[:2] > (400, 600)
    change = np.abs(drawn[:400] - 128).max(-1)
    assert_array_equal(change[:99], 0)  # above the crop
    assert_array_equal(change[:, 401:], 0)
    assert_array_equal(change[160:298, 202:248], 0)  # in the crop, without activation
    assert change[155:195, 255:290].min() > 30  # the activation
    assert (drawn[150, 310:370] == 255).all()  # the edge of the attention
    assert_array_equal(change[190:220, 320:360], 0)  # inside the attention
