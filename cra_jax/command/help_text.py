"""The text of `--help`: modes, flags, config keys and an example of an own config."""

from cra_jax.command import parsing
from cra_jax.command.modes import MODES
from cra_jax.runtime import config_files

_TEXT = """\
usage: {program} [--mode MODE] [--config CONFIG[:VARIANTS]] [FLAG ...]
       {program} --mode predict --workdir DIR IMAGE ...
       {program} --mode compare RUN ...

CRA-CNN (BMVC 2020) in JAX and Flax. Without flags: trains the quickstart.

modes:
{modes}

flags:
{flags}

configs:
  Shipped configs: {configs}. Variants follow a colon, joined by
  commas: a backbone (resnet18, resnet101, ...), a kind (baseline, stn), and
  others. The modes eval, export, predict, demo, figures and report use the
  config of the run in --workdir. Every key and variant is explained in
    {cub}

examples:
  {program} --config cub:resnet101 --config.train.epochs=3
  {program} --mode eval --workdir runs/cub-resnet101
  {program} --mode predict --workdir runs/cub-resnet101 bird.jpg

an own config, my.py, for {program} --config my.py:resnet18

  from configs.cub import get_config as cub

  def get_config(variant=""):
      config = cub(variant)
      config.data.source, config.data.path = "folder", "my_images"
      config.train.epochs = 30
      return config
"""


def describe(program: str) -> str:
    """The help, at most 80 columns wide but for the path of the configs.

    Args:
      program: how the command is started.
    """
    flags = [
        (f"--{name} {flag.value}".rstrip(), flag.summary)
        for name, flag in parsing.HELP.items()
    ]
    flags += [
        ("--config.KEY=VALUE", "override a config key, as in --config.seed=1"),
        ("-h, --help", "show this help"),
        ("--version", "show the version"),
    ]
    return _TEXT.format(
        program=program,
        modes=_table([(name, mode.summary) for name, mode in MODES.items()]),
        flags=_table(flags),
        configs=", ".join(config_files.names()),
        cub=config_files.directory() / "cub.py",
    ).rstrip()


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)
