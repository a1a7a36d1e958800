"""The flags of the command, and one line for each mistake in them."""

import re
import sys
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from cra_jax.command.modes import MODES
from cra_jax.runtime import config_files


class FlagHelp(NamedTuple):
    """A flag's line in the help.

    Attributes:
      value: a name for its value; empty: it is a switch.
      summary: what it says.
    """

    value: str
    summary: str


HELP = {
    "config": FlagHelp("CONFIG", "config file, or name of a shipped config (below)"),
    "mode": FlagHelp("MODE", "what to do (above)"),
    "workdir": FlagHelp("DIR", "run directory; default: runs/<config name>"),
    "allow_config_change": FlagHelp("", "train: resume under a changed config"),
    "allow_data_change": FlagHelp("", "train, eval: use data that has changed"),
    "images": FlagHelp("IMAGE", "predict: file, directory, pattern, or - for stdin"),
    "overlay": FlagHelp("", "predict: draw activation and attention of images"),
    "output": FlagHelp("FILE", "predict: file of the lines; must not exist"),
    "untrusted": FlagHelp("", "predict: decode with limits on time and memory"),
    "port": FlagHelp("PORT", "demo: port of the page; 0: any free port"),
    "baseline": FlagHelp("RUN", "figures, report: run directory to compare with"),
    "traceback": FlagHelp("", "show the Python traceback of an error"),
}
"""The flags, in the order of the help."""


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake in them ends in one line."""
    text = {name: flag.summary for name, flag in HELP.items()}
    flags.DEFINE_enum("mode", "train", list(MODES), text["mode"])
    flags.DEFINE_string("workdir", "", text["workdir"])
    flags.DEFINE_bool("allow_config_change", False, text["allow_config_change"])
    flags.DEFINE_bool("allow_data_change", False, text["allow_data_change"])
    flags.DEFINE_multi_string("images", [], text["images"])
    flags.DEFINE_bool("overlay", False, text["overlay"])
    flags.DEFINE_string("output", None, text["output"])
    flags.DEFINE_bool("untrusted", False, text["untrusted"])
    flags.DEFINE_integer("port", 8000, text["port"])
    flags.DEFINE_string("baseline", None, text["baseline"])
    flags.DEFINE_bool("traceback", False, text["traceback"])
    flags.FLAGS.set_gnu_getopt(True)  # images and runs may stand before flags
    config_files.make_importable()
    try:
        default = str(config_files.directory() / "quickstart.py")
        config_flags.DEFINE_config_file("config", default, text["config"])
        flags.FLAGS["config"].parser = _ConfigParser("config")
        rest, _ = flags.FLAGS(argv), flags.FLAGS.config.seed  # a missing file shows
        if rest[1:] and flags.FLAGS.mode not in ("predict", "compare"):
            raise ValueError(f"{rest[1]!r} is no flag; {_hint(rest[1])}")
        return rest
    except (flags.Error, LookupError, AttributeError, OSError, ValueError) as error:
        text = str(error).replace("\\n", "\n").replace("\\", "").strip('" \n')
        # What a config file raises arrives with its traceback as text: the last line.
        text = " ".join(text.rpartition("ValueError: ")[-1].split())
        if key := re.match(r"'{1,2}(\w+)'(?= Did|'?$)", text):  # of a LookupError
            hint = text[key.end() :].strip("' ") or "configs/cub.py has them all"
            text = f"no config key {key[1]!r}: {hint}"
        if isinstance(error, flags.UnrecognizedFlagError):
            text += " (--help lists them; config keys are set as --config.seed=1)"
        sys.exit(f"error in the flags: {text}")


def _hint(argument: str) -> str:
    """What to type instead of an argument that is no flag."""
    if argument in MODES:
        return f"modes are given by --mode {argument}"
    name = argument.partition(":")[0]
    if name in config_files.names() or name.endswith(".py"):
        return f"configs are given by --config {argument}"
    return "flags begin with --"


class _ConfigParser(ConfigFileFlagParser):
    """Reads a config file, or a shipped config by its name."""

    def parse(self, path: str) -> Any:
        return super().parse(config_files.find(path))
