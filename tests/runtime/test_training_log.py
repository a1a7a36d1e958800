"""The metrics of a run and of a resumed run, in files and on the terminal."""

import importlib
import json
from typing import Any

from cra_jax.runtime import run_directory, training_log


def test_resumed_log_removes_later_steps(tmp_path):
    numbers = {"loss": 1.0, "top1": 0.5, "images_per_second": 9.0, "eta_seconds": 75.0}
    with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
        for step in (2, 4, 6):
            log.train(step=step, epoch=1, numbers=numbers)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "epo')  # killed during the write
    with training_log.Log(tmp_path, first_step=4, total_steps=8) as log:
        log.train(step=6, epoch=1, numbers={**numbers, "loss": 2.0})
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(x["step"], x["loss"]) for x in lines] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert all(x["split"] == "train" for x in lines)
    assert list((tmp_path / "tensorboard").iterdir())


def test_log_prints_lines_without_a_terminal(tmp_path, capsys):
    numbers = {"loss": 1.0, "top1": 0.5, "images_per_second": 9.0, "eta_seconds": 3675}
    with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
        log.train(step=2, epoch=1, numbers=numbers)
    line = capsys.readouterr().err.strip()
    assert line == "step 2/8 epoch 1 loss 1.000 top1 0.500 images/s 9 ETA 1:01:15"


def _log_attention(log, step):
    log.attention(
        step=step,
        epoch=step // 2,
        split="test",
        names={5: "five", 9: "nine"},
        matrices={5: [[1, 0, step], [0, 1, 0]], 9: [[0.1234567, 0, 0], [0, 1, 0]]},
    )


def test_snapshots_of_a_resumed_run_are_complete_and_unique(tmp_path):
    assert run_directory.read_snapshots(tmp_path) == []
    for _ in range(2):  # killed before the first checkpoint: restarts
        with training_log.Log(tmp_path, first_step=0, total_steps=8) as log:
            for step in (0, 2, 4, 6):
                _log_attention(log, step)
    with training_log.Log(tmp_path, first_step=4, total_steps=8) as log:
        _log_attention(log, 6)
    lines = run_directory.read_snapshots(tmp_path)
    found = [(x["step"], x["epoch"], x["index"], x["name"]) for x in lines]
    assert found == [
        (step, step // 2, *image)
        for step in (0, 2, 4, 6)
        for image in ((5, "five"), (9, "nine"))
    ]
    assert lines[2]["matrix"] == [[1, 0, 2], [0, 1, 0]]
    assert lines[1]["matrix"][0][0] == 0.123457
    assert {x["split"] for x in lines} == {"test"}


def test_run_without_attention_has_no_snapshots_file(tmp_path):
    with training_log.Log(tmp_path, first_step=0, total_steps=8):
        pass
    assert not (tmp_path / run_directory.SNAPSHOTS).exists()


def test_tensorboard_has_every_number(tmp_path):
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")

    with training_log.Log(tmp_path, first_step=2, total_steps=8) as log:
        numbers = {"top1": 0.5, "count": 4, "protocol": "center"}
        log.test(step=4, epoch=1, split="test", numbers=numbers)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # length, checksum, event, checksum
        end = 12 + int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12:end]))
        data = data[end + 4 :]
    assert [event.step for event in events] == [0, 3, 4, 4]
    values = [value for event in events for value in event.summary.value]
    assert [(x.tag, x.simple_value) for x in values] == [
        ("test/top1", 0.5),
        ("test/count", 4),
    ]
