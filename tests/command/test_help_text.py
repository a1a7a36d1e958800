"""`--help` and `--version`: complete, narrow and quick."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cra_jax
from cra_jax.command import help_text, parsing
from cra_jax.command.modes import MODES
from cra_jax.runtime import config_files
from cra_jax.training import check_config

ROOT = Path(__file__).resolve().parents[2]


def _run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("program", ["cra-jax", "python launch.py"])
def test_each_mode_and_flag_has_a_line_of_at_most_80_columns(program):
    lines = help_text.describe(program).splitlines()
    path = str(config_files.directory() / "cub.py")
    assert [x for x in lines if len(x) > 80 and x.strip() != path] == []
    assert any(x.strip() == path for x in lines)
    for name, mode in MODES.items():
        assert sum(x.split() == [name, *mode.summary.split()] for x in lines) == 1
    for name, flag in parsing.HELP.items():
        words = [f"--{name}", *flag.value.split(), *flag.summary.split()]
        assert sum(x.split() == words for x in lines) == 1
    assert lines[0].startswith(f"usage: {program} [--mode MODE]")


def test_the_help_has_exactly_the_flags_that_are_parsed():
    code = (
        "import sys; sys.argv = ['cra-jax']\n"
        "from absl import flags; from cra_jax.command import parsing\n"
        "parsing.parse_flags(sys.argv)\n"
        "own = flags.FLAGS.flags_by_module_dict()['cra_jax.command.parsing']\n"
        "print(*sorted(f'{x.name}={x.boolean}' for x in own))"
    )
    done = _run("-c", code)
    assert done.stdout.split() == sorted(
        f"{name}={not flag.value}" for name, flag in parsing.HELP.items()
    )


def test_the_own_config_of_the_help_is_a_config(tmp_path):
    text = help_text.describe("cra-jax")
    (code,) = re.findall(r"^  from configs.*\Z", text, re.MULTILINE | re.DOTALL)
    namespace = {}
    exec("\n".join(line[2:] for line in code.splitlines()), namespace)
    config = namespace["get_config"]("resnet18")
    assert config.model.backbone == "resnet18"
    assert config.data.source == "folder"
    config.train.batch_size = 64
    check_config.check(config)


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
@pytest.mark.parametrize("command", [[str(ROOT / "launch.py")], ["-m", "cra_jax"]])
def test_help_and_version_are_answered_with_status_0(command, flag):
    done = _run(*command, "--config=nowhere", flag)
    assert done.returncode == 0
    assert done.stderr == ""
    if flag == "--version":
        assert done.stdout == f"cra_jax {cra_jax.__version__}\n"
    else:
        program = "python launch.py" if len(command) == 1 else "python -m cra_jax"
        assert done.stdout == f"{help_text.describe(program)}\n"


def test_help_and_version_import_nothing_slow():
    for flag in ("--help", "--version"):
        code = (
            f"import sys; sys.argv = ['cra-jax', {flag!r}]\n"
            "from cra_jax.command.main import main; main()\n"
            "slow = {'jax', 'flax', 'numpy', 'scipy', 'PIL'} & set(sys.modules)\n"
            "assert not slow, slow"
        )
        done = _run("-c", code)
        assert done.returncode == 0, done.stderr
