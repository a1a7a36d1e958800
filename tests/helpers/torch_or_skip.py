"""PyTorch for parity tests; without PyTorch, tests that use it are skipped.

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
    """A base class of reference networks; creating an instance skips the test."""

    __init__ = _skip


class _Absent:
    """Replaces a module of PyTorch; access to an attribute skips the test."""

    Conv2d = Module = _Base

    def __getattr__(self, name: str):
        if name.startswith("__"):  # pytest and inspect read these of every object
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
        if error.name != "torch":  # a broken installation is an error
            raise
        safetensors_torch = nn = torch = _Absent()
    else:
        import safetensors.torch as safetensors_torch
        from torch import nn

__all__ = ["nn", "safetensors_torch", "torch"]
