"""Property tests of the file readers and the geometry."""

import contextlib
import csv
import math
import re
import string
import tempfile
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import save_file

from cra_jax import geometry, losses
from cra_jax.backbones import torch_files, torch_names
from cra_jax.datasets import csv_file, listing, matlab_files, sources
from cra_jax.runtime import run_directory
from tests.helpers import dataset_folders
from tests.helpers.torch_or_skip import torch

few = settings(max_examples=25, deadline=None)
many = settings(max_examples=200, deadline=None)

words = st.text(string.ascii_letters + string.digits + " _-.äß鳥", min_size=1).map(
    str.strip
)
names = words.filter(lambda text: text.strip(". "))


@contextlib.contextmanager
def new_directory():
    """Makes a new directory for each example; `tmp_path` is made once for a test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path).resolve()


# --- dataset lists ------------------------------------------------------------------


@few
@given(
    st.lists(
        names.filter(lambda text: text.casefold() not in csv_file.MISSING),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_csv_is_read_as_it_was_written(labels, separator, line_end, with_bom):
    assume(len({*map(str.casefold, labels)}) == len({*labels}))
    with new_directory() as root:
        rows = [[f"a,b {i}.jpg", label, "train"] for i, label in enumerate(labels)]
        for file, *_ in rows:
            (root / file).touch()
        encoding = "utf-8-sig" if with_bom else "utf-8"
        with open(root / "list.csv", "w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter=separator, lineterminator=line_end)
            writer.writerows([["path", "label", "split"], *rows])
        found = csv_file.csv_list(root / "list.csv")
    numeric = all(re.fullmatch(r"\d+(\.0*)?", label) for label in labels)
    wanted = [str(int(float(x))) if numeric else x for x in labels]
    entries = found.splits["train"]
    assert [entry.file for entry in entries] == [root / row[0] for row in rows]
    assert [found.class_names[entry.label] for entry in entries] == wanted
    assert set(found.class_names) == set(wanted)


@many
@given(st.text(), st.sampled_from(["", "path,label\n", "label;split;path\n"]))
def test_any_text_is_a_csv_of_files_in_its_folder_or_an_error(text, header):
    with new_directory() as root:
        (root / "list.csv").write_text(header + text, encoding="utf-8", newline="")
        try:
            found = csv_file.csv_list(root / "list.csv")
        except ValueError as error:
            named, found = str(root / "list.csv") in str(error), None
        else:
            named = True
        assert named
        for entries in found.splits.values() if found else ():
            assert all(x.file.resolve().is_relative_to(root) for x in entries)


outside = st.sampled_from(["../{}", "a/../../{}", "/{}", "..\\{}", "C:\\{}", "C:/{}"])


@few
@given(outside, names)
def test_csv_path_outside_its_folder_is_an_error(pattern, name):
    with new_directory() as root:
        text = f'path,label\n"{pattern.format(name)}",auk\n'
        (root / "list.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"is outside the CSV's folder"):
            csv_file.csv_list(root / "list.csv")


@pytest.mark.parametrize("name", ["../../x.jpg", "../../../x.jpg", "{}/x.jpg"])
def test_cub_path_outside_its_folder_is_an_error(name, tmp_path):
    files = list(dataset_folders.CUB_FILES)
    files[1] = name.format(tmp_path)
    lines = "".join(f"{i} {file}\n" for i, file in enumerate(files, 1))
    root = dataset_folders.cub_tree(tmp_path / "cub", images=lines)
    for place in (tmp_path, root):  # the file exists: only the check can refuse it
        dataset_folders.save_image(place / "x.jpg")
    with pytest.raises(ValueError, match=r"its lists contain .*x.jpg, which is outsi"):
        sources.load("cub", root)


@few
@given(st.lists(names.filter(lambda x: "\\" not in x), min_size=2, unique=True))
def test_class_names_of_cub_are_unchanged(class_names):
    lines = "".join(f"{i} {name}\n" for i, name in enumerate(class_names, 1))
    labels = f"1 1\n2 1\n3 {len(class_names)}\n4 2\n"
    with new_directory() as root:
        dataset_folders.cub_tree(root, classes=lines, image_class_labels=labels)
        if len(class_names) > 2:  # classes without images are another error
            with pytest.raises(ValueError, match="training image"):
                sources.load("cub", root)
        else:
            assert sources.load("cub", root).class_names == tuple(class_names)


@many
@given(st.lists(words))
def test_natural_order_tells_all_texts_apart_and_sorts_numbers(texts):
    normal = {unicodedata.normalize("NFC", text) for text in texts}
    assert len({str(listing.natural_key(text)) for text in texts}) == len(normal)
    assert sorted(["b10", "b2"], key=listing.natural_key) == ["b2", "b10"]


# --- run directory ------------------------------------------------------------------

leaves = st.one_of(st.none(), st.integers(), st.floats(-1, 1))
keys = st.text(string.ascii_lowercase, min_size=1, max_size=5)
branches = st.dictionaries(keys, leaves, min_size=1, max_size=3)
trees = st.dictionaries(keys, leaves | branches, max_size=4)


@many
@given(trees)
def test_flattened_config_has_all_values(tree):
    flat = run_directory.flatten(tree)
    again: dict = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        here = again
        for key in above:
            here = here.setdefault(key, {})
        here[last] = value
    assert again == tree


# Fields of older runs are read under their new names, and foreign lines are left out.
_MEANT = {*run_directory._RENAMED_FIELDS, run_directory.FOREIGN}
plain_keys = keys.filter(lambda key: key not in _MEANT)


@many
@given(st.lists(st.dictionaries(plain_keys, leaves), max_size=5), st.binary())
def test_lines_are_read_despite_partial_lines_before_and_after(lines, partial):
    steps = [{**line, "step": i} for i, line in enumerate(lines)]
    assume(not partial.strip().startswith(b"{"))
    with new_directory() as root:
        path = root / "metrics.jsonl"
        path.write_bytes(partial)
        run_directory.append_lines(path, steps)
        with open(path, "ab") as file:
            file.write(b'{"step": 99, "lo')
        assert run_directory.read_metrics(root) == steps


# --- weights -----------------------------------------------------------------------

dtypes = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
tensors = st.dictionaries(
    st.text(string.ascii_letters + "._0123456789", min_size=1, max_size=20),
    st.sampled_from(dtypes).flatmap(
        lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, max_side=4))
    ),
    min_size=1,
    max_size=5,
)


@few
@given(tensors, st.sampled_from(["safetensors", "zip", "legacy"]), st.booleans())
def test_weights_file_is_read_as_it_was_written(saved, file_format, transposed):
    with new_directory() as root:
        path = root / "weights"
        if file_format == "safetensors":
            save_file(saved, path)
        else:
            found = {k: torch.from_numpy(v.copy()) for k, v in saved.items()}
            if transposed:  # a view with other strides
                found = {
                    k: v.permute(tuple(range(v.ndim))[::-1]) for k, v in found.items()
                }
                saved = {k: v.T for k, v in saved.items()}
            torch.save(found, path, _use_new_zipfile_serialization=file_format == "zip")
        read = torch_files.read(path)
    assert read.keys() == saved.keys()
    for name, array in saved.items():
        assert read[name].dtype == array.dtype
        assert_array_equal(read[name], array)


@many
@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
def test_random_bytes_are_an_error_as_weights(content, start):
    with new_directory() as root:
        (root / "w.pth").write_bytes(start + content)
        with pytest.raises(ValueError, match=r"w\.pth"):
            torch_files.read(root / "w.pth")


@many
@given(arrays("float32", array_shapes(min_dims=1, max_dims=4, max_side=3)))
def test_to_linen_inverts_to_torch(array):
    assert_array_equal(torch_names.to_linen(torch_names.to_torch(array)), array)


module = st.from_regex(r"[a-z]+(_[0-9]{1,2})?", fullmatch=True)
paths = st.lists(module, min_size=1, max_size=3)
leaf = st.sampled_from(["kernel", "bias", "mean", "var"])


@many
@given(st.tuples(paths, leaf), st.tuples(paths, leaf))
def test_torch_names_of_two_variables_differ(one, other):
    assume(one != other)
    keys = [("params", *path, last) for path, last in (one, other)]
    assert torch_names.torch_name(keys[0]) != torch_names.torch_name(keys[1])


# --- MATLAB files ---------------------------------------------------------------------

numbers = st.one_of(st.integers(-1000, 10**6), st.floats(-1e6, 1e6))
rows = st.lists(st.tuples(names, numbers), min_size=1, max_size=5)


@few
@given(rows, st.booleans())
def test_mat_file_is_read_as_it_was_written(written, compressed):
    array = np.empty((1, len(written)), [("fname", object), ("class", object)])
    cells = np.empty((len(written), 1), object)
    for i, row in enumerate(written):
        array[0, i], cells[i, 0] = row, row[0]
    labels = np.array([[n] for _, n in written])
    with new_directory() as root:
        path = root / "x.mat"
        variables = {"annotations": array, "names": cells, "labels": labels}
        scipy.io.savemat(path, variables, do_compression=compressed)
        found = matlab_files.read(path)
    assert found.keys() == variables.keys()
    assert [(x["fname"], x["class"].item()) for x in found["annotations"]] == written
    assert found["names"] == [name for name, _ in written]
    assert found["labels"].tolist() == [n for _, n in written]


def test_mat_file_that_decompresses_to_too_much_is_an_error(tmp_path):
    path = tmp_path / "bomb.mat"
    zeros = np.zeros((40_000_000, 1))
    scipy.io.savemat(path, {"labels": zeros}, do_compression=True)
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="decompresses to more than 256 MB"):
        matlab_files.read(path)


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"x": np.eye(2)}, {"format": "4"}, "no .mat file of version 5 to 7.2"),
        ({"x": scipy.sparse.eye(3)}, {}, "class 5 is not supported"),
    ],
)
def test_unsupported_mat_files_are_errors(variables, options, message, tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", variables, **options)
    with pytest.raises(ValueError, match=message):
        matlab_files.read(tmp_path / "x.mat")


# --- geometry -----------------------------------------------------------------------

position = st.floats(-1, 1)
scale = st.floats(-0.5, 0.5)
angle_rad = st.floats(-10, 10)
attention = st.tuples(position, position, scale, angle_rad)
size = st.sampled_from([(2, 3), (6, 5)])  # few, because each is compiled
matrix = arrays("float64", (2, 3), elements=st.floats(-2, 2))


@pytest.fixture(autouse=True, scope="module")
def exact():
    """Enables 64-bit values, so that rounding errors are tiny."""
    with jax.enable_x64(True):
        yield


def grid_of(gamma, size):
    return np.asarray(geometry.attention_grid(jnp.array([gamma]), size))


@few
@given(size, st.integers(-3, 3), st.integers(0, 10**6))
def test_attention_on_the_whole_image_is_the_image(size, turns, seed):
    image = np.random.default_rng(seed).normal(size=(1, *size, 3))
    grid = grid_of((0.0, 0.0, 1.0, 2 * math.pi * turns), size)
    found = geometry.bilinear_sample(jnp.asarray(image), jnp.asarray(grid))
    assert_allclose(found, image, atol=1e-12)


@few
@given(attention, size, st.integers(-2, 2))
def test_full_rotation_changes_nothing(gamma, size, turns):
    *rest, angle = gamma
    turned = (*rest, angle + 2 * math.pi * turns)
    assert_allclose(grid_of(turned, size), grid_of(gamma, size), atol=1e-12)


@few
@given(matrix, matrix, size)
def test_two_affine_grids_in_turn_are_their_product(first, second, size):
    def whole(theta):
        return np.vstack([theta, [0, 0, 1]])

    def grid(theta):
        return np.asarray(geometry.affine_grid(jnp.asarray(theta)[None], size))[0]

    product = (whole(second) @ whole(first))[:2]
    apart = grid(first) @ second[:, :2].T + second[:, 2]
    assert_allclose(grid(product), apart, atol=1e-12)


raw = arrays("float64", (4,), elements=st.floats(-50, 50))


@few
@given(raw, st.floats(0.1, 1), st.floats(0.1, 0.7), st.booleans())
def test_restricted_gamma_is_within_its_bounds(gamma, alpha_p, alpha_s, inside):
    bounds = {"alpha_p": alpha_p, "alpha_s": alpha_s, "inside": inside}
    found = np.asarray(geometry.restrict(jnp.asarray(gamma), **bounds))
    assert (np.abs(found[:2]) <= alpha_p).all()
    assert abs(found[2]) <= alpha_s
    assert found[3] == gamma[3]
    if inside:
        assert np.abs(grid_of(found, (5, 5))).max() <= 1 + 1e-12


@few
@given(attention, size)
def test_redundancy_is_the_part_of_the_image_outside_the_attention(gamma, size):
    """A point is removed exactly if the inverse attention maps it into [-1, 1]^2."""
    *centre, s, angle = gamma
    assume(abs(s) > 1e-3)
    height, width = size
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    points = np.stack([x, y], -1)
    turn = s * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    inverted = np.abs((points - centre) @ np.linalg.inv(turn).T).max(-1)
    grid = np.asarray(geometry.redundancy_grid(jnp.array([gamma]), size))[0]
    removed = np.abs(grid).max(-1) > 1
    sure = np.abs(inverted - 1) > 1e-9
    assert_array_equal(removed[sure], inverted[sure] < 1)
    assert_allclose(grid[~removed], points[~removed], atol=1e-15)
    weight = geometry.redundancy_weight(jnp.array([gamma]), size, softness=1e-4)
    clear = np.abs(inverted - 1) * abs(s) > 1e-2
    assert_allclose(np.asarray(weight)[0][clear], ~removed[clear], atol=1e-6)


@few
@given(raw, raw, arrays("float64", (4,), elements=st.floats(0.1, 5)))
def test_restriction_loss_is_zero_only_inside_the_thresholds(
    gamma, expectation, threshold
):
    value = losses.restriction_loss(
        jnp.asarray(gamma)[None],
        expectation=tuple(expectation),
        threshold=tuple(threshold),
    )
    distance = np.abs(gamma - expectation)
    assert (float(value[0]) > 0) == bool((distance > threshold).any())
    assert float(value[0]) >= 0
