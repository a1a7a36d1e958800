"""Trains, evaluates, exports: `python launch.py [--config F] [--workdir D] [--mode M]`.

Without flags: the quickstart. Settings follow `--config`: `--config.train.epochs=3`.
"""

import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = "config"
_DEFAULT = str(Path(__file__).resolve().parent / "configs" / "quickstart.py")
_MODES = ["train", "eval", "export", "data", "weights"]


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake in them ends in one line."""
    flags.DEFINE_string("workdir", "", "Run folder; empty: runs/<name of the config>.")
    flags.DEFINE_enum("mode", "train", _MODES, "What to do; the last two look.")
    flags.DEFINE_bool("allow_config_change", False, "Go on under another config.")
    flags.DEFINE_bool("traceback", False, "On an error, show where it comes from.")
    try:
        config_flags.DEFINE_config_file(_CONFIG, _DEFAULT, "FILE[:VARIANT[,VARIANT]].")
        rest, _ = flags.FLAGS(argv), flags.FLAGS.config.seed  # a missing file shows
        return rest
    except (flags.Error, LookupError, AttributeError, OSError, ValueError) as error:
        text = str(error).replace("\\n", "\n").replace("\\", "").strip('" \n')
        # What a config file raises arrives with its traceback as text: the last line.
        text = text.rpartition("ValueError: ")[-1].replace("''", "no setting '")
        sys.exit(f"error in the flags: {' '.join(text.split())}")


def main(argv: list[str]) -> None:
    """Hands over to the mode."""
    if argv[1:]:
        sys.exit(f"error in the flags: {argv[1]!r} is no flag; flags begin with --")
    values = flags.FLAGS
    file, _, variant = config_flags.get_config_filename(values[_CONFIG]).partition(":")
    name = re.sub(r"\W+", "-", f"{Path(file).stem} {variant}").strip("-")
    try:
        _run(values.mode, Path(values.workdir or f"runs/{name}"))
    except ValueError as error:
        if not values.traceback:
            sys.exit(f"error: {error}\n(--traceback shows where it comes from)")
        raise


def _run(mode: str, workdir: Path) -> None:
    logging.set_verbosity(logging.ERROR)  # orbax reports each file that it opens
    from cra_jax import evaluate, experiment, export, parallel, store, train

    parallel.keep_compiled(store.default_cache_dir(None) / "compiled")
    values = flags.FLAGS
    if mode == "train":
        train.run(values.config, workdir, allow_change=values.allow_config_change)
    elif mode in ("data", "weights"):
        experiment.describe(mode, values.config, workdir)
    else:
        {"eval": evaluate, "export": export}[mode].run(_config_of(workdir), workdir)


def _config_of(workdir: Path) -> Any:
    """The config that was named, else the run's own; with the overrides, either way."""
    if any(re.match(rf"--?{_CONFIG}(=|$)", argument) for argument in sys.argv):
        return flags.FLAGS.config
    from configs.cub import get_config
    from cra_jax import run_folder

    config = get_config()  # for keys that are younger than the run
    config.update(run_folder.read_config(workdir))
    overrides = config_flags.get_override_values(flags.FLAGS[_CONFIG])
    config.update_from_flattened_dict(overrides)
    return config.lock()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
