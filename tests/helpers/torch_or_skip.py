"""PyTorch for parity tests: where it is not installed, a test that uses it is skipped.

    from tests.helpers.torch_or_skip import nn, torch

The other tests of the same file still run.
"""

from typing import TYPE_CHECKING, NoReturn

import pytest

_REASON = (
    "SKIPPED, NOT PASSED: PyTorch is not installed; parity tests need it "
    "(pip install torch==2.13.0, Python 3.11)"
)


def _skip(*_args, **_kwargs) -> NoReturn:
    pytest.skip(_REASON)


class _Base:
    """Lets reference networks be defined; building one skips the test."""

    __init__ = _skip


class _Absent:
    """Stands for a module of PyTorch: reading an attribute of it skips the test."""

    Conv2d = Module = _Base

    def __getattr__(self, name: str):
        if name.startswith("__"):  # pytest and inspect look at every object of a file
            raise AttributeError(name)
        _skip()


if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    from torch import nn
else:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # installed, and broken: an error
            raise
        safetensors_torch = nn = torch = _Absent()
    else:
        import safetensors.torch as safetensors_torch
        from torch import nn

__all__ = ["nn", "safetensors_torch", "torch"]
