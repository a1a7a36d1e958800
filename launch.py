"""Trains, evaluates, predicts: `launch.py [--config F] [--workdir D] [--mode M]`.

Without flags: the quickstart. Settings follow `--config`: `--config.train.epochs=3`.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_DEFAULT = str(Path(__file__).resolve().parent / "configs" / "quickstart.py")
_OF_A_RUN = ("eval", "export", "predict", "demo", "figures", "report")
MODES = {
    "train": "training.train",
    "prepare": "training.prepare",
    "data": "training.preview",
    "weights": "training.preview",
    "eval": "inference.evaluate",
    "export": "inference.export",
    "predict": "inference.predict",
    "demo": "inference.demo",
    "figures": "reports.figures",
    "report": "reports.report",
    "compare": "reports.compare",
}
"""The module whose `run` does what each mode says."""


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake in them ends in one line."""
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
    flags.DEFINE_string(
        "workdir", "", "Run directory; empty: runs/<name of the config>."
    )
    flags.DEFINE_bool("allow_config_change", False, "Go on under another config.")
    flags.DEFINE_multi_string("images", [], "predict: files, folders, patterns, or -.")
    flags.DEFINE_bool("overlay", False, "predict: draw where the network looks, too.")
    flags.DEFINE_integer("port", 8000, "demo: of the page, on this machine.")
    flags.DEFINE_string("baseline", None, "figures, report: a run to compare with.")
    flags.DEFINE_bool("traceback", False, "On an error, show where it comes from.")
    flags.FLAGS.set_gnu_getopt(True)  # images and runs may stand before flags
    try:
        config_flags.DEFINE_config_file("config", _DEFAULT, "FILE[:VARIANT[,VARIANT]].")
        rest, _ = flags.FLAGS(argv), flags.FLAGS.config.seed  # a missing file shows
        if rest[1:] and flags.FLAGS.mode not in ("predict", "compare"):
            raise ValueError(f"{rest[1]!r} is no flag; flags begin with --")
        return rest
    except (flags.Error, LookupError, AttributeError, OSError, ValueError) as error:
        text = str(error).replace("\\n", "\n").replace("\\", "").strip('" \n')
        # What a config file raises arrives with its traceback as text: the last line.
        text = " ".join(text.rpartition("ValueError: ")[-1].split())
        if key := re.match(r"'{1,2}(\w+)'(?= Did|'?$)", text):  # of a LookupError
            hint = text[key.end() :].strip("' ") or "configs/cub.py has them all"
            text = f"no config key {key[1]!r}: {hint}"
        sys.exit(f"error in the flags: {text}")


def _main(argv: list[str]) -> None:
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    file = "compare" if flags.FLAGS.mode == "compare" else file
    name = re.sub(r"\W+", "-", re.sub(r"^.*/|\.py\b", "", file)).strip("-")
    try:
        _run(Path(flags.FLAGS.workdir or f"runs/{name}"), argv[1:], flags.FLAGS)
    except ValueError as error:
        if not flags.FLAGS.traceback:
            sys.exit(f"error: {error}\n(--traceback shows where it comes from)")
        raise


def _run(workdir: Path, rest: list[str], values: flags.FlagValues) -> None:
    logging.set_verbosity(logging.ERROR)  # orbax reports each file that it opens
    from cra_jax.inference import run_options
    from cra_jax.input import image_cache
    from cra_jax.runtime import devices, signals
    from cra_jax.training import build, check_config

    devices.keep_memory_and_programs(image_cache.default_cache_dir(None) / "compiled")
    mode, subject = values.mode, values.config
    baseline = values.baseline and Path(values.baseline)
    if mode in _OF_A_RUN:
        given = any(re.match("--?config(=|$)", a) for a in sys.argv)
        # Prediction takes exports and checkpoints, too, which have no config to change.
        is_run = mode not in ("predict", "demo") or (workdir / "checkpoints").is_dir()
        if not given and is_run:
            changes = config_flags.get_override_values(values["config"])
            subject = build.config_of_run(workdir, subject, changes)
        if mode == "eval":
            check_config.check_normalization(subject)
        takes_options = given or is_run
        subject = run_options.from_config(subject) if takes_options else None
    more = {
        "train": {"allow_change": values.allow_config_change},
        **{look: {"what": look} for look in ("data", "weights")},
        **{draw: {"baseline": baseline} for draw in ("figures", "report")},
        "predict": {"images": [*values.images, *rest], "overlays": values.overlay},
        "demo": {"port": values.port},
        "compare": {"runs": [Path(run) for run in rest]},
    }.get(mode, {})
    with signals.exit_in_one_line():
        import_module(f"cra_jax.{MODES[mode]}").run(subject, workdir, **more)


if __name__ == "__main__":
    app.run(_main, flags_parser=parse_flags)
