"""One of two hosts: what tests start twice, as a user would, with `begin`.

    python one_of_two_hosts.py talk|train|stop INDEX PORT FOLDER

Prints a JSON line of what each call said or raised.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # the tests import it, too, for its config
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from cra_jax.inference import evaluate, run_options
from cra_jax.input.batches import center_batches
from cra_jax.runtime import devices, hosts, signals
from cra_jax.training import train
from tests.helpers import tiny_config

HERE = Path(__file__).resolve().parent


def begin(what, folder):
    """Starts two hosts; returns their processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1])]),
        "JAX_COMPILATION_CACHE_DIR": str(
            jax.config.values["jax_compilation_cache_dir"]
        ),
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                what,
                str(index),
                str(port),
                folder,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]


def start(what, folder):
    """Of each of two hosts what its calls said, and all that it printed."""
    started = begin(what, folder)
    said = []
    try:
        for process in started:
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, err[-3000:]
            lines = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
            said.append(({k: v for x in lines for k, v in x.items()}, out, err))
    finally:
        for process in started:
            process.kill()
    return said


def config(folder, **changes):
    """A run of 2 steps an epoch, whose numbers no number of devices changes."""
    return tiny_config.config(
        folder / "cache",
        **{
            "bn.sync": True,
            "model.width": 4,
            "data.train_size": 32,
            "data.test_size": 20,
            "train.epochs": 1,
            "train.log_every_steps": 1,
            **changes,
        },
    )


def talk(index, port, folder):
    """What hosts tell each other; a step, and a pass over a split."""
    del folder
    hosts.start(f"localhost:{port}", count=2, index=index)

    def step(state, batch):
        mean = devices.all_mean(batch["x"].mean())
        return {"x": state["x"] + mean}, {"mean": mean}

    def steps():
        state = devices.on_each_device({"x": jnp.zeros(2)})
        run = devices.train_step(step)
        rows = np.split(np.arange(16.0), 2)[index]
        for _ in range(3):
            state, metrics = run(state, devices.split({"x": rows}))
        return jax.device_get(state)["x"].tolist(), float(metrics["mean"])

    def scores():
        images = np.arange(13, dtype=np.uint8)[:, None, None, None] * np.ones(
            (1, 4, 4, 3), np.uint8
        )
        batches = center_batches(
            images,  # pyright: ignore[reportArgumentType]
            np.arange(13),
            batch_size=devices.round_up(5, hosts=2),
            crop_px=2,
            shard=hosts.shard(),
        )
        found = evaluate.predict_split(
            devices.eval_step(
                lambda scale, batch: {"logits": scale * batch["image"][:, 0, 0, :2]}
            ),
            jnp.float32(0.5),
            batches,
            13,
            shared=True,
        )
        return found.logits.tolist(), found.labels.tolist(), len(batches[0]["label"])

    def fails_on_the_second():
        with hosts.all_or_none():
            if index:
                raise ValueError("no such folder: mine")

    report(
        {
            "shard": hosts.shard,
            "told": lambda: hosts.broadcast_from_first({"text": f"é {index}"}),
            "arrays": lambda: hosts.broadcast_arrays(np.arange(3) + index).tolist(),
            "sum": lambda: hosts.sum_over_hosts(np.arange(3) + index).tolist(),
            "same": lambda: hosts.check_same("alike", "it"),
            "different": lambda: hosts.check_same("like " + "me" * index, "looks"),
            "fails": fails_on_the_second,
            "steps": steps,
            "scores": scores,
            "devices": devices.describe_devices,
        }
    )


def learn(index, port, folder):
    """Trains, goes on, evaluates; then three mistakes, of which one host makes two."""
    together = _together(index, port)
    run = folder / "run"
    # Only the first host's run directory counts, where hosts share no disk.
    mine = folder / "nowhere" if index else run
    two_epochs = {**together, "train.epochs": 2}
    more = {**together, "data.test_size": 20 + index}
    no_folder = {**together, "data.source": "folder"}
    no_folder["data.path"] = str(folder / ("nowhere" if index else "."))
    report(
        {
            "train": lambda: train.run(config(folder, **together), mine),
            "resume": lambda: train.run(
                config(folder, **two_epochs), mine, allow_change=True
            ),
            "eval": lambda: evaluate.run(
                run_options.from_config(config(folder, **two_epochs)), run
            ),
            "changed": lambda: train.run(config(folder, **together), mine),
            "other data": lambda: train.run(config(folder, **more), folder / "b"),
            "no folder": lambda: train.run(config(folder, **no_folder), folder / "c"),
        }
    )


def be_stopped(index, port, folder):
    """Trains as `launch.py` does, for so long that a signal ends it."""
    changes = _together(index, port) | {"train.epochs": 12}
    with signals.exit_in_one_line():
        train.run(config(folder, **changes), folder / ("nowhere" if index else "run"))


def _together(index, port):
    jax.config.update("jax_disable_most_optimizations", True)
    logging.set_verbosity(logging.ERROR)
    return {
        "hosts.coordinator": f"localhost:{port}",
        "hosts.count": 2,
        "hosts.index": index,
    }


def report(calls):
    """Makes the calls, and prints what comes of each."""
    for name, call in calls.items():
        try:
            said = call()
        except ValueError as error:
            said = f"ValueError: {error}"
        print(json.dumps({name: said}), flush=True)


if __name__ == "__main__":
    what = {"talk": talk, "train": learn, "stop": be_stopped}[sys.argv[1]]
    what(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
