"""What each mode does, and the module that does it."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags, logging
from ml_collections import config_flags


class Mode(NamedTuple):
    """A value of `--mode`.

    Attributes:
      module: the module below `cra_jax` whose `run` does it.
      summary: what it does, in a line of the help.
    """

    module: str
    summary: str


MODES = {
    "train": Mode("training.train", "train a network; the default"),
    "prepare": Mode("training.prepare", "download and decode all that training needs"),
    "data": Mode("training.preview", "describe the dataset, and draw some of it"),
    "weights": Mode(
        "training.preview", "list the pretrained weights that training would load"
    ),
    "eval": Mode("inference.evaluate", "evaluate a run on its test splits"),
    "export": Mode("inference.export", "write the plain network of a run to export/"),
    "predict": Mode("inference.predict", "predict the classes of images"),
    "demo": Mode("inference.demo", "serve a local web page that predicts images"),
    "figures": Mode("reports.figures", "draw the figures of a run"),
    "report": Mode("reports.report", "write report/index.html of a run"),
    "compare": Mode("reports.compare", "compare several runs with each other"),
}

_OF_A_RUN = ("eval", "export", "predict", "demo", "figures", "report")


def run(workdir: Path, rest: list[str], values: flags.FlagValues) -> None:
    """Runs the mode that the flags name.

    Args:
      workdir: the run directory.
      rest: arguments that are no flags: images of `predict`, runs of `compare`.
      values: the parsed flags.

    Raises:
      ValueError: as the mode.
    """
    logging.set_verbosity(logging.ERROR)  # orbax reports each file that it opens
    from cra_jax.inference import run_options, trained
    from cra_jax.input import image_cache
    from cra_jax.runtime import devices, files, progress, signals

    devices.keep_memory_and_programs(image_cache.default_cache_dir(None) / "compiled")
    mode, subject = values.mode, values.config
    files.check_no_links_out(trained.output_directory(workdir))
    baseline, output = (
        path and files.local_path(path, f"--{name}")
        for name, path in (("baseline", values.baseline), ("output", values.output))
    )
    runs = [files.local_path(run, "RUN") for run in rest] if mode == "compare" else []
    _check_paths(subject)
    if mode in _OF_A_RUN:
        given = any(re.match("--?config(=|$)", a) for a in sys.argv)
        changes = config_flags.get_override_values(values["config"])
        # Prediction takes exports and checkpoints, too, which have no config to change.
        is_run = mode not in ("predict", "demo") or (workdir / "checkpoints").is_dir()
        if not is_run:
            if changes or given:
                what = [*(f"--config.{key}" for key in changes), "--config"][0]
                raise ValueError(
                    f"{what} has no effect on {workdir}, which has its own config: "
                    "leave it out, or set --workdir to a run directory"
                )
            subject = None
        elif given and not (workdir / "config.json").is_file():
            subject = run_options.from_config(subject)
        else:
            from cra_jax.training import build

            if given:
                progress.print_line(
                    f"--config is not used: {workdir / 'config.json'} counts; change "
                    "keys of it with --config.KEY=VALUE"
                )
            config = build.config_of_run(workdir, subject, changes)
            _check_paths(config)
            subject = run_options.from_config(config)
    elif mode in ("train", "weights"):
        from cra_jax.training import check_config

        chosen = config_flags.get_override_values(values["config"])
        check_config.turn_off_cra_options(subject, chosen)
    more = {
        "train": {
            "allow_change": values.allow_config_change,
            "allow_data_change": values.allow_data_change,
        },
        "eval": {"allow_data_change": values.allow_data_change},
        **{look: {"what": look} for look in ("data", "weights")},
        **{draw: {"baseline": baseline} for draw in ("figures", "report")},
        "predict": {
            "images": [*values.images, *rest],
            "overlays": values.overlay,
            "output": output,
            "untrusted": values.untrusted,
        },
        "demo": {"port": values.port},
        "compare": {"runs": runs},
    }.get(mode, {})
    with signals.exit_in_one_line():
        import_module(f"cra_jax.{MODES[mode].module}").run(subject, workdir, **more)


def _check_paths(config: Any) -> None:
    """Checks that no path of a config is an address."""
    from cra_jax.runtime import files, run_directory

    for key, value in run_directory.flatten(config.to_dict()).items():
        if key.startswith(("data.", "model.")) and isinstance(value, str):
            files.local_path(value, f"--config.{key}")
