"""Runs the command: `main` is `cra-jax`, `python -m cra_jax` and `launch.py`."""

import codecs
import os
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import cra_jax
from cra_jax.command import help_text, modes, parsing
from cra_jax.runtime import files, progress


def main() -> None:
    """Parses the command line and runs the mode that it names.

    `-h`, `--help` and `--version` are answered before anything else is imported.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":
        # tensorstore names files in UTF-8 whatever the locale is.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    with progress.protected_output():
        _main()


def _main() -> None:
    flags_given = sys.argv[1:]
    if "--" in flags_given:
        flags_given = flags_given[: flags_given.index("--")]
    if {"-h", "-help", "--help", "--helpshort"} & set(flags_given):
        print(help_text.describe(_program()))
    elif {"-version", "--version"} & set(flags_given):
        print(f"cra_jax {cra_jax.__version__}")
    else:
        logging.get_absl_handler().python_handler.setStream(sys.stderr)
        app.run(_run, flags_parser=parsing.parse_flags)


def _program() -> str:
    """How this command was started: as a program, a module or a script."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        return "python -m cra_jax"
    return f"python {name}" if name.endswith(".py") else name


def _run(argv: list[str]) -> None:
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    file = "compare" if flags.FLAGS.mode == "compare" else file
    name = re.sub(r"\W+", "-", re.sub(r"^.*/|\.py\b", "", file)).strip("-")
    try:
        workdir = files.local_path(flags.FLAGS.workdir or f"runs/{name}", "--workdir")
        modes.run(workdir, argv[1:], flags.FLAGS)
    except (ValueError, OSError) as error:
        if flags.FLAGS.traceback:
            raise
        advice = f": {files.advice(error)}" if isinstance(error, OSError) else ""
        sys.exit(f"error: {error}{advice}\n(--traceback shows where it comes from)")
