"""Trains, evaluates, exports: `python launch.py [--config F] [--workdir D] [--mode M]`.

Without flags it trains the quickstart. Settings are changed, after `--config`, by
`--config.train.epochs=3` and the like.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = "config"
_DEFAULT = str(Path(__file__).resolve().parent / "configs" / "quickstart.py")


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake in them ends in one line."""
    flags.DEFINE_string("workdir", "", "Run folder; empty: runs/<name of the config>.")
    flags.DEFINE_enum("mode", "train", ["train", "eval", "export"], "What to do.")
    flags.DEFINE_bool("allow_config_change", False, "Go on under another config.")
    flags.DEFINE_bool("traceback", False, "On an error, show where it comes from.")
    try:
        help_text = "File of configs/, with variants after a colon."
        config_flags.DEFINE_config_file(_CONFIG, _DEFAULT, help_text, lock_config=True)
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS.config.seed  # a file that is missing is missed on first use
        return rest
    except (flags.Error, LookupError, AttributeError, OSError, ValueError) as error:
        # What a config file raises arrives with its traceback as text: the last line.
        text = str(error).replace("\\n", "\n").replace("\\", "").strip('" \n')
        lines = [line.strip() for line in text.splitlines()]
        text = lines[-1] if "Traceback" in text else " ".join(lines)
        text = text.removeprefix("ValueError: ").replace("' Did", "'. Did")
        sys.exit(f"error in the flags: {text}")


def main(argv: list[str]) -> None:
    """Hands over to the mode."""
    if argv[1:]:
        sys.exit(f"error in the flags: {argv[1]!r} is no flag; flags begin with --")
    values = flags.FLAGS
    named = config_flags.get_config_filename(values[_CONFIG])
    file, _, variant = named.partition(":")
    name = re.sub(r"\W+", "-", f"{Path(file).stem} {variant}").strip("-")
    workdir = Path(values.workdir or f"runs/{name}")
    logging.set_verbosity(logging.ERROR)  # orbax reports each file that it opens
    from cra_jax import evaluate, export, parallel, store, train  # jax loads slowly

    parallel.keep_compiled(store.default_cache_dir(None) / "compiled")
    try:
        if values.mode == "train":
            train.run(values.config, workdir, allow_change=values.allow_config_change)
        else:
            mode = {"eval": evaluate, "export": export}[values.mode]
            mode.run(_config_of(workdir), workdir)
    except ValueError as error:
        if values.traceback:
            raise
        sys.exit(f"error: {error}\n(--traceback shows where it comes from)")


def _config_of(workdir: Path) -> ConfigDict:
    """The config that was named, else the run's own; with the overrides, either way."""
    from configs.cub import get_config
    from cra_jax import run_folder

    if any(re.match(rf"--?{_CONFIG}(=|$)", argument) for argument in sys.argv):
        return flags.FLAGS.config
    config = get_config()  # for keys that are younger than the run
    config.update(run_folder.read_config(workdir))
    config.update_from_flattened_dict(
        config_flags.get_override_values(flags.FLAGS[_CONFIG])
    )
    return config.lock()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
