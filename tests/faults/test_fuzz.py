"""Every reader of files, on files changed at random: a ValueError, or an answer.

The changes: cut short, bits flipped, bytes replaced by such as break parsers, a piece
left out, doubled, or overwritten by another; of files as they come from their writers.
"""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from cra_jax import (
    archives,
    csv_list,
    pictures,
    provenance,
    run_folder,
    torch_files,
    trained,
    watch,
)

_NASTY = [b"\x00", b"\xff", b"\n", b'"', b"{", b"[", b"-1", b"1e999", b"NaN", b"null"]
_NASTY += [b"../", b",", b"\x80\x04.", b"9" * 30, b"\xff\xff\xff\x7f", "ä".encode()]


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # The beginning, where lengths and types stand, more often than its share.
        end = rng.choice((len(data), min(len(data), 200)))
        place = rng.randrange(end) if end else 0
        span = rng.randrange(1, 1 + rng.choice((1, 8, 64)))
        match rng.randrange(6):
            case 0:
                del data[place:]
            case 1 if data:
                data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 2:
                text = rng.choice(_NASTY)
                data[place : place + len(text)] = text
            case 3:
                del data[place : place + span]
            case 4:
                data[place:place] = data[place : place + span]
            case 5:
                data[place : place + span] = rng.choice(_NASTY)
    return bytes(data)


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.normal(size=(5, 7)).astype(np.float32),
        "fc.bias": rng.normal(size=5).astype(np.float32),
        "bn1.num_batches_tracked": np.array(3),
    }


def _pth(path: Path, *, zipped: bool) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in ("set/images/a.jpg", "set/labels.txt"):
            member = tarfile.TarInfo(name)
            member.size = 300
            archive.addfile(member, io.BytesIO(bytes(range(100)) * 3))


def _picture(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _csv(path: Path) -> None:
    path.write_text(
        "path,label,split,x_min,y_min,x_max,y_max\n"
        + "".join(
            f"img/{i}.jpg,class {i % 3},{'test' if i % 4 == 0 else 'train'},"
            f"0.1,0.2,{0.5 + i / 100},0.9\n"
            for i in range(12)
        )
    )


def _export(path: Path) -> None:
    path.write_text(
        json.dumps(
            {
                "architecture": "resnet10",
                "width": 8,
                "stem": "small",
                "class_names": ["auk", "egret"],
                "mean": [0.5, 0.5, 0.5],
                "std": [0.2, 0.2, 0.2],
                "resize_short_side_px": 36,
                "crop_px": 32,
                "checkpoint_step": 6,
            }
        )
    )


def _lines(path: Path) -> None:
    run_folder.append_lines(
        path, [{"step": i, "epoch": 1, "split": "train", "loss": 0.5} for i in range(9)]
    )


def _results(path: Path) -> None:
    rows = [run_folder.Result(i, f"{i}.jpg", 1, 0, 0.5, 6) for i in range(9)]
    run_folder.write_results(path.parent.parent, "test", "center", rows)


def _config(path: Path) -> None:
    path.write_text(json.dumps({"data": {"mean": [0.5], "source": "cub"}, "seed": 0}))


def _provenance(path: Path) -> None:
    path.write_text(json.dumps({"starts": [{"started": "now", "first_step": 0}]}))


def _unpack(path: Path) -> None:
    target = path.parent / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    archives.unpack_tar(path, target, max_bytes=10**6, progress=False)


# name of the file -> what writes it, and what reads it
READERS = {
    "weights.pth": (lambda p: _pth(p, zipped=True), torch_files.read),
    "legacy.pth": (lambda p: _pth(p, zipped=False), torch_files.read),
    "w.safetensors": (lambda p: save_file(_arrays(), p), torch_files.read),
    "list.csv": (_csv, csv_list.csv_list),
    "set.tgz": (_tar, _unpack),
    **{
        f"picture.{x}": (_picture, lambda p: pictures.read(p, 16))
        for x in ("jpg", "png", "gif")
    },
    "metrics.jsonl": (_lines, lambda p: run_folder.read_metrics(p.parent)),
    "bad_steps.jsonl": (_lines, lambda p: watch.read_bad_steps(p.parent)),
    "results/test-center.csv": (
        _results,
        lambda p: run_folder.read_results(p.parent.parent, "test", "center"),
    ),
    "run/config.json": (_config, lambda p: run_folder.read_config(p.parent)),
    "provenance.json": (_provenance, lambda p: provenance.read(p.parent)),
    "export/config.json": (_export, lambda p: trained.of_export(p.parent)),
}


def fuzz(name: str, folder: Path, count: int, seed: int) -> int:
    """Returns how many changed files were refused; the others gave an answer."""
    write, read = READERS[name]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    write(path)
    whole = path.read_bytes()
    rng, refused = random.Random(seed), 0
    for number in range(count):
        path.write_bytes(mutate(whole, rng))
        try:
            read(path)
        except ValueError as error:
            refused += str(error) != ""
        except Exception as error:
            kept = folder / "kept"
            kept.write_bytes(path.read_bytes())
            pytest.fail(f"change {number} of seed {seed}, kept as {kept}: {error!r}")
    return refused


@pytest.mark.filterwarnings("ignore")  # what Pillow and csv say of damage
@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name, tmp_path):
    refused = fuzz(name, tmp_path, 40, seed=0)
    assert refused or name.endswith(".jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_changed_files(name, tmp_path, note):
    refused = fuzz(name, tmp_path, 1000, seed=1)
    fault = f"`{Path(name).name}` changed at random, and read"
    note(fault, "a ValueError that names it", refused)
    note(fault, "harmless: an answer", 1000 - refused)
