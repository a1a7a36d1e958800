"""A program that runs as one of two hosts; `begin` starts it twice.

    python one_of_two_hosts.py communicate|train|stop INDEX PORT DIRECTORY

Prints one JSON line for each call: its result or its error.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # tests import this file, too
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


def begin(mode, folder):
    """Starts two hosts in a mode; returns their processes."""
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
                mode,
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


def start(mode, folder):
    """Runs two hosts to their end; returns (results, stdout, stderr) of each."""
    started = begin(mode, folder)
    outputs = []
    try:
        for process in started:
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, err[-3000:]
            lines = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
            outputs.append(({k: v for x in lines for k, v in x.items()}, out, err))
    finally:
        for process in started:
            process.kill()
    return outputs


def config(folder, **changes):
    """Returns a config of 2 steps an epoch with equal results on any device count."""
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


def communicate(index, port, folder):
    """Calls the functions of `hosts`, a training step and an evaluation."""
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

    def fail_on_second_host():
        with hosts.all_or_none():
            if index:
                raise ValueError("no such folder: mine")

    print_results(
        {
            "shard": hosts.shard,
            "broadcast": lambda: hosts.broadcast_from_first({"text": f"é {index}"}),
            "arrays": lambda: hosts.broadcast_arrays(np.arange(3) + index).tolist(),
            "sum": lambda: hosts.sum_over_hosts(np.arange(3) + index).tolist(),
            "same": lambda: hosts.check_same("alike", "it"),
            "different": lambda: hosts.check_same("like " + "me" * index, "looks"),
            "fails": fail_on_second_host,
            "steps": steps,
            "scores": scores,
            "devices": devices.describe_devices,
        }
    )


def train_and_evaluate(index, port, folder):
    """Trains, resumes and evaluates; then makes three errors, two on one host only."""
    options = _host_options(index, port)
    run = folder / "run"
    # Only the first host's run directory is used if hosts share no disk.
    own_run = folder / "nowhere" if index else run
    two_epochs = {**options, "train.epochs": 2}
    other_data = {**options, "data.test_size": 20 + index}
    no_folder = {**options, "data.source": "folder"}
    no_folder["data.path"] = str(folder / ("nowhere" if index else "."))
    print_results(
        {
            "train": lambda: train.run(config(folder, **options), own_run),
            "resume": lambda: train.run(
                config(folder, **two_epochs), own_run, allow_change=True
            ),
            "eval": lambda: evaluate.run(
                run_options.from_config(config(folder, **two_epochs)), run
            ),
            "changed": lambda: train.run(config(folder, **options), own_run),
            "other data": lambda: train.run(config(folder, **other_data), folder / "b"),
            "no folder": lambda: train.run(config(folder, **no_folder), folder / "c"),
        }
    )


def train_until_stopped(index, port, folder):
    """Trains as `launch.py` does, long enough to be stopped by a signal."""
    changes = _host_options(index, port) | {"train.epochs": 12}
    with signals.exit_in_one_line():
        train.run(config(folder, **changes), folder / ("nowhere" if index else "run"))


def _host_options(index, port):
    jax.config.update("jax_disable_most_optimizations", True)
    logging.set_verbosity(logging.ERROR)
    return {
        "hosts.coordinator": f"localhost:{port}",
        "hosts.count": 2,
        "hosts.index": index,
    }


def print_results(calls):
    """Prints the result or the error of each call."""
    for name, call in calls.items():
        try:
            result = call()
        except ValueError as error:
            result = f"ValueError: {error}"
        print(json.dumps({name: result}), flush=True)


if __name__ == "__main__":
    function = {
        "communicate": communicate,
        "train": train_and_evaluate,
        "stop": train_until_stopped,
    }[sys.argv[1]]
    function(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
