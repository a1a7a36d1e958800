"""Every command and every Python snippet of README.md and docs/ is executed.

A command runs in this process, in a scratch directory that has the datasets, images and
runs that the pages name. What makes it small is appended to it: 32 px, a ResNet of
width 8, one epoch. `EXCEPTIONS` lists the commands that cannot run here.
"""

import argparse
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import absl.app
import jax
import jax.numpy as jnp
import pytest
from absl import flags

from cra_jax.backbones import resnet, weights
from cra_jax.inference import demo_server
from cra_jax.runtime import devices, files
from cra_jax.training import build, check_config, prepare
from cra_jax.training import train as training
from tests.helpers.dataset_folders import save_image, save_mat

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = pytest.mark.filterwarnings(  # how ml_collections loads a config file
    r"ignore:the load_module\(\):DeprecationWarning"
)

EXCEPTIONS = {
    "gcloud compute tpus": "needs a TPU pod slice",
    "srun --nodes": "needs a SLURM cluster",
    "--config.hosts.index=": "needs two hosts",
    "--config.data.source=tfds": "downloads a dataset and needs TensorFlow",
    "make faults": "takes an hour; runs tests/faults",
    "make soak": "takes an hour; runs tests/faults/soak.py",
}
"""Parts of commands that cannot run here, with the reason.

The flags and config keys of a `launch.py` in them are parsed all the same.
"""

TRAINED = [
    "python launch.py --config configs/cub.py --config.data.path=CUB_200_2011",
    "python launch.py --config configs/cub.py:baseline --config.data.path=CUB_200_2011",
    "python launch.py --config configs/cub.py --workdir runs/mine "
    "--config.data.source=folder --config.data.path=my_images",
]
"""Commands whose runs other commands use: these train in every run of the tests.

Of the other trainings config and data are loaded; in the slow tests they train, too.
"""

ENVIRONMENT = ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
"""Variables before a command; XLA has read them already, so they have no effect."""

SKIPPED_IMPORTS = ("torchvision", "timm")
"""Python snippets that need them are skipped where they are not installed."""

_IMAGE = ["data.short_side_px=36", "data.crop_px=32", "art.size_px=16"]
_NETWORK = ["model.backbone=resnet10", "model.width=8", "model.stem=medium"]
_LENGTH = [
    *("train.batch_size=32", "train.epochs=1", "train.log_every_steps=1"),
    *("train.report=False", "eval.batch_size=16", "eval.every_epochs=1"),
    *("eval.snapshots=2", "data.train_size=32", "data.test_size=16"),
    "optim.warmup_epochs=0",
]
TINY = [f"--config.{setting}" for setting in (*_IMAGE, *_NETWORK, *_LENGTH)]


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets_of(page: Path) -> Iterator[Snippet]:
    lines = page.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        assert line.startswith("```"), f"{page.name}:{number}: an indented fence"
        if begin is None:
            begin = number
            continue
        text = "\n".join(lines[begin : number - 1])
        yield Snippet(page, begin, lines[begin - 1].removeprefix("```"), text)
        begin = None
    assert begin is None, f"{page.name}:{begin}: a fence that does not end"


def lines_of(snippet: Snippet) -> list[str]:
    """The commands of a shell snippet, each on one line."""
    whole = re.sub(r"\\\n\s*", "", snippet.text)
    assert "#" not in whole, f"{snippet.place}: a comment; write it above the snippet"
    return [line.strip() for line in whole.splitlines() if line.strip()]


SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]
COMMANDS = {
    line: snippet.place
    for snippet in reversed(SNIPPETS)
    if snippet.language == "shell"
    for line in lines_of(snippet)
}
PYTHON = {x.text: x.place for x in SNIPPETS if x.language == "python"}


CLASSES = ("wren", "tit")
_TEMPLATE = "made by the tests"
"""A file in runs that a training command may replace."""


def save_datasets(folder: Path) -> None:
    """The datasets and images that pages name: 32 for training, 8 for testing."""
    images = folder / "my_images"
    rows, listed = [], []
    for i in range(40):
        split, name = "train" if i < 32 else "test", CLASSES[i % 2]
        file = f"{split}/{name}/{i}.jpg"
        save_image(images / file, i, size=(50, 40))
        rows.append(f"{file},{name},{split}")
        listed.append(f"{i % 2 + 1:03}.{name}/{i}.jpg")
        save_image(folder / "CUB_200_2011" / "images" / listed[-1], i, size=(50, 40))
    (images / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    for name in ("a", "b", "bird"):
        save_image(folder / f"{name}.jpg", size=(60, 45))
    lists: dict[str, list[Any]] = {
        "images": listed,
        "image_class_labels": [i % 2 + 1 for i in range(40)],
        "train_test_split": [int(i < 32) for i in range(40)],
        "classes": [f"{i:03}.{name}" for i, name in enumerate(CLASSES, start=1)],
        "bounding_boxes": ["10.0 5.0 30.0 20.0"] * 40,
    }
    for name, values in lists.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, start=1))
        (folder / "CUB_200_2011" / f"{name}.txt").write_text(text)
    save_cars(folder / "stanford_cars")


def save_cars(folder: Path) -> None:
    names = {"train": "cars_train_annos", "test": "cars_test_annos_withlabels"}
    box = {"bbox_x1": 11, "bbox_y1": 1, "bbox_x2": 40, "bbox_y2": 25}
    for split, count in (("train", 32), ("test", 8)):
        files = [f"{i:05}.jpg" for i in range(1, count + 1)]
        for i, file in enumerate(files):
            save_image(folder / f"cars_{split}" / file, i, size=(50, 40))
        annotations = [
            {**box, "class": i % 3 + 1, "fname": file} for i, file in enumerate(files)
        ]
        kit = folder / "devkit" if split == "train" else folder
        save_mat(kit / f"{names[split]}.mat", "annotations", annotations)
    save_mat(folder / "devkit" / "cars_meta.mat", "unused", [{"a": 1}])


def save_weights(file: Path) -> None:
    model = resnet.create("resnet10", len(CLASSES), width=8, stem="medium")
    weights.save_torch(
        file, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )


def save_template(folder: Path) -> None:
    """Saves all files that the pages name, and trains the runs that they use."""
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    save_datasets(folder)
    save_weights(folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in TRAINED:
            start(shlex.split(line))
        start(["cra-jax", "--mode", "export", "--workdir", "runs/cub"])
    for name in "abc":
        shutil.copytree(folder / "runs" / "cub", folder / "runs" / name)
    for run in (folder / "runs").iterdir():
        (run / _TEMPLATE).touch()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The directory of `save_template`, made once for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "documentation"
    with files.locked(base / "documentation.lock", "the template", show=False):
        if not folder.exists():
            shutil.rmtree(base / "documentation.partial", ignore_errors=True)
            save_template(base / "documentation.partial")
            (base / "documentation.partial").rename(folder)
    return folder


@pytest.fixture
def scratch(template, tmp_path, monkeypatch):
    """A copy of the template, and the current directory."""
    copy = shutil.copytree(template, tmp_path / "scratch", symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return copy


def entry_point(words: list[str]) -> Callable[[], Any]:
    """What `python launch.py` or the installed command `cra-jax` runs."""
    if words[0] == "cra-jax":
        module, name = PROJECT["project"]["scripts"]["cra-jax"].split(":")
        return getattr(importlib.import_module(module), name)
    return lambda: runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")


def start(words: list[str], *, until: str = "end") -> None:
    """Runs `python launch.py ...` or `cra-jax ...` in this process, made small.

    Args:
      words: the command.
      until: "end"; "data": of a training, config and data are loaded; "config": the
        config is checked, for any mode.
    """
    count = 1 if words[0] == "cra-jax" else 2
    arguments = [*words[count:]]
    mode = flag_value(arguments, "mode") or "train"
    if mode in ("train", "prepare", "data", "weights"):
        # What the command itself says of the weights stays; none is downloaded.
        named = any(x.startswith("--config.model.pretrained=") for x in arguments)
        arguments += TINY if named else [*TINY, "--config.model.pretrained="]
        if not flag_value(arguments, "config.data.path") and any(
            "cub" in x for x in arguments
        ):
            arguments.append("--config.data.path=CUB_200_2011")
    if mode == "demo":
        arguments.append("--port=0")
    run_training = training.run

    def train_or_check(config: Any, workdir: Path, **options: Any) -> Any:
        if until != "end":
            check_config.check(config)
            return until == "config" or build.load_dataset(config)
        if (workdir / _TEMPLATE).exists():
            shutil.rmtree(workdir)
        return run_training(config, workdir, **options)

    known = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(sys, "argv", [words[count - 1], *arguments])
        inner.setattr(
            absl.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))
        )
        inner.setattr(training, "run", train_or_check)
        if until == "config":
            inner.setattr(prepare, "run", train_or_check)
        inner.setattr(devices, "keep_memory_and_programs", lambda folder: None)
        inner.setattr(demo_server.Server, "serve_forever", _interrupt)
        code: Any = 0
        try:
            entry_point(words)()
        except SystemExit as end:
            code = end.code
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        assert not code, f"{shlex.join(words)}\n{code}"


def flag_value(arguments: list[str], name: str) -> str:
    """The value of `--name=value` or `--name value`; empty: it is not there."""
    text = " ".join(arguments)
    found = re.search(rf"(?:^| )--{re.escape(name)}[= ](\S+)", text)
    return found[1] if found else ""


def _interrupt(server: Any) -> None:
    raise KeyboardInterrupt


class Parsed(Exception):
    """The arguments of a benchmark are right."""


def run_module(module: str, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """Runs `python -m module`; a benchmark up to its parsed arguments or its table."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *args, **kwargs):
        _, rest = parse(parser, *args, **kwargs)
        if not all(x.startswith("--config.") for x in rest):
            parser.error(f"unrecognized arguments: {rest}")
        raise Parsed

    patch.setattr(sys, "argv", [module, *arguments])
    for name in (module, f"{module}.__main__"):  # runpy warns of imported modules
        patch.delitem(sys.modules, name, raising=False)
    if module.startswith("benchmarks.") and "--table" not in arguments:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            pytest.skip("SKIPPED, NOT PASSED: no torch here, its peer")
        except Parsed:
            return
        pytest.fail(f"{module} parses no arguments")
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code, f"{module} {arguments}: {end.value.code}"


def check_install(words: list[str]) -> None:
    """`pip install` names the package, a package that it needs, or a file in it."""
    for option, word in zip(["", *words], words, strict=False):
        if option == "-r":
            assert (ROOT / word).is_file(), f"there is no {word}"
            continue
        if word.startswith("-"):
            if word == "-r":
                continue
            assert word in ("-U", "--upgrade"), f"unknown option {word}"
            continue
        found = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", word)
        assert found, f"{word} is no name of a package"
        name, extras = found[1], found[2]
        if name in (".", "cra_jax"):
            known = PROJECT["project"]["optional-dependencies"]
            for extra in filter(None, (extras or "").split(",")):
                assert extra in known, f"{word}: the package has no extra {extra}"
        else:
            needed = (ROOT / "requirements.txt").read_text()
            assert re.search(rf"^{name}\b", needed, re.M), f"{name} is not needed"


def run_make(words: list[str], patch: pytest.MonkeyPatch, *, until: str) -> None:
    """A target exists, and what it runs of the package is right."""
    made = subprocess.run(
        ["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    for line in made.stdout.splitlines():
        if found := re.search(r"\bpython (launch\.py.*|-m benchmarks\..*)", line):
            run(f"python {found[1].partition(' > ')[0]}", patch, until=until)


def run(line: str, patch: pytest.MonkeyPatch, *, until: str = "data") -> None:
    """Runs one command of a page; `until` as in `start`."""
    *before, last = line.split(" | ")
    if before:
        shell = subprocess.run(
            ["bash", "-o", "pipefail", "-c", " | ".join(before)], capture_output=True
        )
        assert shell.returncode == 0, shell.stderr.decode()
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(shell.stdout)))
    words = shlex.split(last)
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert name in ENVIRONMENT, f"{name} is not known here"
    match words:
        case ["python", "launch.py", *_] | ["cra-jax", *_]:
            start(words, until=until)
        case ["python", "-m", module, *rest]:
            run_module(module, rest, patch)
        case ["pip", "install", *rest]:
            check_install(rest)
        case ["make", *_]:
            run_make(words, patch, until=until)
        case _:
            pytest.fail(f"it is not known how to test this command: {last}")


def trains(line: str) -> bool:
    is_launch = line.endswith("launch.py") or "launch.py " in line or "cra-jax" in line
    return (is_launch and "--mode" not in line) or line == "make run"


def exception_of(line: str) -> str | None:
    return next((part for part in EXCEPTIONS if part in line), None)


def test_what_the_template_trains_is_in_the_pages():
    assert set(TRAINED) <= set(COMMANDS)


@pytest.mark.parametrize("line", COMMANDS, ids=COMMANDS.get)
def test_a_command_runs(line, scratch, monkeypatch):
    if not exception_of(line):
        run(line, monkeypatch)
        return
    # Also of the command that another program starts on another machine.
    for found in re.finditer(r"python launch\.py [^\"]*", line):
        words = shlex.split(found[0])
        here = [x for x in words if not x.startswith("--config.hosts.index=")]
        start(here, until="config")


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in COMMANDS if trains(x)], ids=COMMANDS.get)
def test_a_training_command_trains(line, scratch, monkeypatch):
    if reason := exception_of(line):
        pytest.skip(f"SKIPPED, NOT PASSED: {EXCEPTIONS[reason]}")
    run(line, monkeypatch, until="end")


@pytest.mark.parametrize("text", PYTHON, ids=PYTHON.get)
def test_a_python_snippet_runs(text, scratch):
    for name in SKIPPED_IMPORTS:
        if re.search(rf"^(import|from) .*\b{name}\b", text, re.M):
            pytest.importorskip(name, reason=f"SKIPPED, NOT PASSED: no {name} here")
    exec(compile(text.replace("resnet50", "resnet10"), "snippet", "exec"), {})


def test_every_exception_is_needed():
    used = {exception_of(line) for line in COMMANDS} - {None}
    assert used == set(EXCEPTIONS)


def test_blocks_without_a_language_hold_no_commands():
    for snippet in SNIPPETS:
        assert snippet.language in ("", "shell", "python"), snippet.place
        if not snippet.language:
            found = re.search(
                r"^\s*(python|pip|make|cra-jax|srun)\b", snippet.text, re.M
            )
            assert not found, f"{snippet.place}: mark it as shell: {found}"


def test_a_misspelt_key_fails(scratch, monkeypatch):
    line = "python launch.py --config configs/cub.py --config.train.epoch=3"
    with pytest.raises(AssertionError, match="no config key 'epoch'"):
        run(line, monkeypatch)


def test_an_unknown_command_fails(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="not known how to test"):
        run("rm -r runs", monkeypatch)
    with pytest.raises(AssertionError, match="no extra lite1"):
        run('pip install ".[lite1]"', monkeypatch)
    with pytest.raises(AssertionError, match="No rule to make target"):
        run("make coffee", monkeypatch)
