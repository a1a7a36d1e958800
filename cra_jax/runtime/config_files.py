"""The configs of this package: where they are, and the names that `--config` takes.

A checkout has them in `configs/`; an installed package has the same files inside it.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGE = "configs"
"""The name that config files import each other by, with and without a checkout."""


def directory() -> Path:
    """The directory of the configs that belong to this package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / PACKAGE
    is_installed = (installed / "__init__.py").is_file()
    return installed if is_installed else package.parent / PACKAGE


def names() -> list[str]:
    """The names of the shipped configs, sorted."""
    return sorted(
        file.stem for file in directory().glob("*.py") if file.stem != "__init__"
    )


def find(config: str) -> str:
    """The file of a config, `FILE[:VARIANTS]`; variants are kept.

    Args:
      config: a file or the name of a shipped config, each with variants or without.
        A file of that name goes first.

    Raises:
      FileNotFoundError: it is neither; names the shipped configs.
    """
    name, colon, variants = config.partition(":")
    path = Path(name).expanduser()
    if name and path.exists() and not path.is_dir():
        return f"{path}{colon}{variants}"
    if name in names():
        return f"{directory() / name}.py{colon}{variants}"
    raise FileNotFoundError(
        f"--config={config}: there is no such file, and no shipped config of that name "
        f"(shipped are {', '.join(names())})"
    )


def make_importable() -> None:
    """Makes `from configs.cub import get_config` work, also without a checkout.

    A package `configs` that is imported already stays.
    """
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        PACKAGE,
        directory() / "__init__.py",
        submodule_search_locations=[str(directory())],
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
