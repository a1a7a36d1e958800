"""Set-up that every test shares: eight CPU devices, and the fixtures below.

The environment is set before anything imports jax, because jax reads it only once.
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
# The same arithmetic, compiled in half the time, run more slowly; programs that tests
# start inherit it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles all as users have it.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    # XLA's older way to fuse compiles these sooner (optimized ones later). jaxlib 0.11
    # no longer has it, and XLA ends the process at a flag that it does not know.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if _JAXLIB < (0, 11) else []
_given = os.environ.get("XLA_FLAGS", "")
_ours = [flag for flag in _FLAGS if flag.partition("=")[0] not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_ours]).strip()

import jax  # noqa: E402

# Jobs in the background ignore Ctrl-C, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Runs the test in 64 bits, so that values can be compared to 12 digits."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the folder of real photographs; skips the test where there is none.

    The environment variable CRA_JAX_SHARED_DATA overrides the usual place, the folder
    `shared/data` beside the repository.
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
    """Runs of the same shapes share their compiled programs, as runs of users do.

    So do the processes that share the tests.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture(scope="module")
def optimized():
    """With the optimizations of users' programs, but for the way to fuse (above)."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
