"""Counts the outcomes of the faults and writes them as a table.

    python -m pytest tests/faults -m "slow or not slow" --write-table docs/faults.md

writes the table from the outcomes of this run. The section below the table, which
`soak.py` writes, is kept.
"""

import collections
import datetime
import platform
from pathlib import Path

import pytest

from cra_jax.runtime import provenance
from tests.faults import soak

_HEAD = """# Faults and their outcomes

`make faults` causes each fault and compares its outcome with the expected one. If an
outcome differs, its test fails and this page is not written. Written on {date},
{system}, CPU, commit {commit}.

| fault | times tried | outcome |
|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--write-table", metavar="FILE", help="docs/faults.md")


@pytest.fixture(scope="session")
def outcomes(request):
    """Counts by fault and outcome."""
    found = collections.defaultdict(collections.Counter)
    request.config.stash[_OUTCOMES] = found
    return found


@pytest.fixture
def note(outcomes):
    """Function that counts an outcome of a fault. Tests call it after their checks."""

    def add(fault: str, outcome: str, times: int = 1) -> None:
        outcomes[fault][outcome] += times

    return add


_OUTCOMES = pytest.StashKey[dict[str, collections.Counter]]()


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--write-table", None)
    found = session.config.stash.get(_OUTCOMES, {})
    if not path or exitstatus != 0 or not found:
        return
    head = _HEAD.format(
        date=datetime.date.today().isoformat(),
        system=f"{platform.system()} {platform.machine()}",
        commit=provenance.describe_commit(provenance.describe_code()),
    )
    rows = [
        f"| {fault} | {sum(tries.values())} | "
        + "; ".join(
            text if len(tries) == 1 else f"{count} x {text}"
            for text, count in tries.most_common()
        )
        + " |\n"
        for fault, tries in found.items()
    ]
    page = Path(path)
    soak_section = page.read_text().partition(soak.TITLE)[1:] if page.exists() else ()
    page.write_text(head + "".join(rows) + "".join(soak_section))
