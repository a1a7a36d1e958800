"""Setup shared by all tests: eight CPU devices and the fixtures below.

The environment is set before any import of jax, because jax reads it only once.
"""

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

_JAXLIB = tuple(int(number) for number in version("jaxlib").split(".")[:2])
_FLAGS = ["--xla_force_host_platform_device_count=8"]

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could set its platform; "
        "remove the pytest plugin (-p ...) that imports it"
    )
os.environ["JAX_PLATFORMS"] = "cpu"
# Fewer optimizations: the results are the same, compiling takes half the time, running
# takes longer. Programs that tests start inherit the variable. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0, programs compile as they do for users.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    # XLA's older fusion compiles unoptimized programs faster (optimized ones slower).
    # jaxlib 0.11 has no such flag, and XLA ends the process at an unknown flag.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if _JAXLIB < (0, 11) else []
_given = os.environ.get("XLA_FLAGS", "")
_ours = [flag for flag in _FLAGS if flag.partition("=")[0] not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_ours]).strip()

import jax  # noqa: E402

# Background jobs ignore Ctrl-C; programs that tests start would inherit this.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Enables 64-bit values in the test, so that 12 digits can be compared."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the directory of real photographs; skips the test if there is none.

    The environment variable CRA_JAX_SHARED_DATA overrides the default, the directory
    `shared/data` next to the repository.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRA_JAX_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(
            f"SKIPPED, NOT PASSED: no real photographs at {folder}; set "
            "CRA_JAX_SHARED_DATA to the folder that holds cub_10 and stanford_cars_98"
        )
    return folder


@pytest.fixture(autouse=True, scope="session")
def compile_once(tmp_path_factory):
    """Shares compiled programs between tests and between pytest-xdist workers.

    User runs share their compiled programs in the same way.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture(scope="module")
def optimized():
    """Enables the optimizations of user programs, except for the fusion (see above)."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny_lite0(monkeypatch):
    """Adds a small network with every type of block of EfficientNet-Lite0."""
    from cra_jax.backbones import efficientnet

    stages = (
        efficientnet.Stage(1, size=3, stride=1, expansion=1, features=8),
        efficientnet.Stage(2, size=5, stride=2, expansion=2, features=16),
    )
    architecture = efficientnet.Architecture(8, stages, 32)
    monkeypatch.setitem(efficientnet.ARCHITECTURES, "tiny_lite0", architecture)
