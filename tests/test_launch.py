"""The command line: modes, variants, overrides and one-line errors."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from cra_jax.input.normalize import normalize
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.runtime.run_directory import read_metrics
from cra_jax.training import check_config
from tests.helpers import tiny_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Returns one cache directory for prepared images and compiled programs."""
    return tmp_path_factory.mktemp("cache")


def _command(*arguments):
    return [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]


def _environment(cache):
    """Returns a user's environment with one CPU device (fast compile: conftest.py)."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    del environment["XLA_FLAGS"]
    return environment


def _launch(cache, *arguments, cwd):
    return subprocess.run(
        _command(*arguments),
        env=_environment(cache),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_train_then_eval(cache, tmp_path):
    workdir = tmp_path / "run"
    config = f"--config={ROOT}/configs/quickstart.py:baseline"
    trained = _launch(
        cache, f"--workdir={workdir}", config, *tiny_config.flags(), cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    summary = trained.stdout.splitlines()
    assert summary[-1].strip() == f"run directory: {workdir}"
    assert "chosen on 'test'" in summary[-2]
    assert "of 40 images" in summary[-3]
    assert "strongest activation in the box" in summary[-3]
    assert "step 4/12 epoch 1 loss" in trained.stderr
    # Eval uses the run's config, also with --config; an override changes it.
    evaluated = _launch(
        cache,
        "--mode=eval",
        f"--config={ROOT}/configs/cub.py:resnet101",
        f"--workdir={workdir}",
        "--config.eval.checkpoint=best",
        cwd=tmp_path,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    for split in ("test", "test_shifted"):
        for protocol in ("center", "full"):
            assert f"\n{split}, {protocol}: top-1 " in evaluated.stdout
    assert "--config is not used" in evaluated.stderr
    assert "foreign" not in evaluated.stdout
    exported = _launch(cache, "--mode=export", f"--workdir={workdir}", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    names = json.loads((workdir / "export" / "config.json").read_text())["class_names"]
    assert len(names) == 8
    changed = ("--mode=predict", f"--workdir={workdir / 'export'}", "x.jpg")
    refused = _launch(cache, *changed, "--config.data.crop_px=8", cwd=tmp_path)
    assert refused.returncode == 1
    assert "--config.data.crop_px has no effect on" in refused.stderr
    data = _launch(
        cache,
        "--mode=data",
        config,
        f"--workdir={workdir}",
        *tiny_config.flags(),
        cwd=tmp_path,
    )
    assert data.returncode == 0, data.stderr
    assert "train: 96 images of 8 classes" in data.stdout
    assert (workdir / "data.png").stat().st_size > 1000
    again = _launch(
        cache, f"--workdir={workdir}", config, *tiny_config.flags(), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout == trained.stdout
    assert "resumes from step 12" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.train.epoch=3"],
            "no config key 'epoch': Did you mean",
        ),
        (["--config.train.epochs=1e1"], "error in the flags: flag --config.train"),
        (["--config={root}/configs/cub.py:resnet51"], "unknown variant 'resnet51'; ch"),
        (["--config=nowhere.py"], "error in the flags: --config=nowhere.py: there is "),
        (["--config=cubb"], "no shipped config of that name (shipped are cars, cub, q"),
        (["--epochs=3"], "Unknown command line flag 'epochs' (--help lists them;"),
        (
            ["--mode=evaluate"],
            "should be one of <train|prepare|data|weights|eval|export|",
        ),
        (["train"], "'train' is no flag; modes are given by --mode train"),
        (["cub:stn"], "'cub:stn' is no flag; configs are given by --config cub:stn"),
        (["--mode=compare"], "error: there are no runs to compare"),
        (["--mode=predict", "--workdir=empty", "x.jpg"], "error: "),
        (["--config={root}/configs/cars.py"], "error: source 'cars' needs a path"),
        (
            ["--config={root}/configs/cars.py", "--config.data.path=/nowhere"],
            "error: /nowhere: there is no such folder; expected cars_train/",
        ),
        (["--mode=eval", "--workdir=empty"], "error: empty holds no run"),
        (["--workdir=gs://bucket/run"], "error: --workdir=gs://bucket/run is an addr"),
        (
            ["--config.data.path=s3://bucket/birds"],
            "error: --config.data.path=s3://bucket/birds is an address (s3), and only",
        ),
    ],
)
def test_user_error_ends_in_one_message(cache, tmp_path, arguments, message):
    arguments = [a.format(root=ROOT) for a in arguments]
    done = _launch(cache, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_ascii_terminal_and_closed_streams_do_not_end_a_run(cache, tmp_path):
    """Names of classes and directories are not ASCII; nothing reads the output."""
    for split, name in itertools.product(("train", "test"), ("grün", "\x1b[31mrot")):
        folder = tmp_path / "ü" / split / name
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 40), (9 * i, 0, 0)).save(folder / f"{i}.png")
    command = _command(
        *("--config=quickstart:baseline", f"--workdir={tmp_path}/läufe"),
        *(*tiny_config.flags(), "--config.train.epochs=1"),
        *("--config.data.source=folder", f"--config.data.path={tmp_path}/ü"),
    )
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" 2>&1 >&- | head -n 3', "", *command],
        env={**_environment(cache), **ascii_locale},
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    with Checkpoints(tmp_path / "läufe" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout


def test_an_own_config_builds_on_a_shipped_one(cache, tmp_path):
    """From a directory that has a package `configs` of its own, too."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "my.py").write_text(
        "from configs.quickstart import get_config as quickstart\n"
        "def get_config(variant=''):\n"
        "    config = quickstart(variant)\n"
        "    config.train.batch_size = -3\n"
        "    return config\n"
    )
    done = _launch(cache, "--config=my.py:stn", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: train.batch_size=-3" in done.stderr


def test_every_config_and_variant_builds():
    from configs import cars, cub, quickstart

    for module in (cub, cars, quickstart):
        for variant in ("", "resnet101", "baseline", "resnet18,stn", "stn,resnet34"):
            config = module.get_config(variant)
            config.train.batch_size = 64
            check_config.check(config)
            for name in variant.split(","):
                is_kind = name in ("baseline", "stn")
                assert not name or name == (
                    config.model.kind if is_kind else config.model.backbone
                )


def test_defaults_of_configs_cub_are_the_papers_numbers():
    """Source: Sec. 4.1."""
    from configs.cub import get_config

    config = get_config()
    assert (config.data.short_side_px, config.data.crop_px) == (512, 448)
    assert config.art.size_px == 224
    assert (config.art.alpha_p, config.art.alpha_s) == (1, 0.5)
    assert config.contrast.margin == 0.7
    assert config.restriction.expectation == (0, 0, 0.5, 0)
    assert config.restriction.threshold == (0.4, 0.4, 0.4, pytest.approx(3.14159265))
    assert config.train.batch_size == 64
    assert (config.optim.weight_decay, config.optim.momentum) == (5e-4, 0.9)
    assert (config.optim.base_lr, config.optim.factor) == (1e-3, 0.1)
    assert (config.optim.first_epochs, config.optim.period_epochs) == (50, 45)
    assert config.restriction.first_epochs == 50
    assert config.restriction.period_epochs == 45
    assert config.model.backbone == "resnet50"


@pytest.mark.slow
def test_default_config_lowers_the_loss_at_full_size():
    """ResNet-50, 448 px, 200 classes; two images, to fit into a CPU's memory."""
    from configs.cub import get_config
    from cra_jax import train_step
    from cra_jax.training import build, optimizer

    config = get_config()
    network = build.build_network(config, 200)
    optimizer = optimizer.make_optimizer(lambda step: jnp.float32(config.optim.base_lr))
    step = jax.jit(
        train_step.make_train_step(
            build.build_loss(config, network, steps_per_epoch=93),
            optimizer,
            learning_rate=lambda step: jnp.float32(config.optim.base_lr),
            normalize=partial(normalize, mean=config.data.mean, std=config.data.std),
        )
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 448, 448, 3)).astype(np.uint8),
        "flip": np.array([True, False]),
        "label": np.array([3, 7], np.int32),
    }
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=448)
    losses = []
    for _ in range(3):
        state, terms = step(state, batch)
        losses.append(float(terms["loss"]))
    print(f"losses of three steps: {losses}")
    assert np.isfinite(losses).all()
    assert losses[2] < losses[0]


def _newest_arrays(workdir):
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        return step, checkpoints.restore(step, checkpoints.shapes(step))


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_same_bits(cache, tmp_path):
    """Repeats the same command until it ends, killed at moments drawn by the seed."""
    seed = int(os.environ.get("CRA_JAX_KILL_SEED", "0"))
    rng = random.Random(seed)
    options = [
        f"--config={ROOT}/configs/quickstart.py",
        *tiny_config.flags(**{"train.epochs": 30, "checkpoint.every_steps": 5}),
    ]
    whole = _launch(cache, f"--workdir={tmp_path}/whole", *options, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    kills, resumed = 0, 0
    while True:
        process = subprocess.Popen(
            _command(f"--workdir={tmp_path}/killed", *options),
            env=_environment(cache),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        # Kill only after the first step, so that each start makes progress.
        for line in process.stderr:
            resumed += "resumes from step" in line
            if line.startswith("step "):
                break
        if kills < 6:
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stderr.close()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert resumed >= 2
    (step, arrays), (expected_step, expected) = (
        _newest_arrays(tmp_path / name) for name in ("killed", "whole")
    )
    assert step == expected_step == 180
    jax.tree.map(assert_array_equal, arrays, expected)
    untimed = [
        [
            json.dumps({k: v for k, v in x.items() if "second" not in k})
            for x in read_metrics(tmp_path / name)
        ]
        for name in ("killed", "whole")
    ]
    assert untimed[0] == untimed[1]
    print(f"seed {seed}: {kills} kills, {resumed} resumes, same bits at step {step}")
