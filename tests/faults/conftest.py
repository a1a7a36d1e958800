"""What the faults came to: counted as the tests try them, written as a table.

    python -m pytest tests/faults -m "slow or not slow" --write-table docs/faults.md

writes the table from that very run, and nothing by hand. The section on the soak, which
`soak.py` writes below it, stays.
"""

import collections
import datetime
import platform
from pathlib import Path

import pytest

from cra_jax.runtime import provenance
from tests.faults import soak

_HEAD = """# Faults, and what they come to

Written by `make faults`, which tries each and compares. {date}, {system}, CPU,
code of commit {commit}. A fault whose outcome is not the one that is wanted fails
its test, and no table is written.

| fault | times tried | outcome |
|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--write-table", metavar="FILE", help="docs/faults.md")


@pytest.fixture(scope="session")
def outcomes(request):
    """fault -> outcome -> how often."""
    found = collections.defaultdict(collections.Counter)
    request.config.stash[_OUTCOMES] = found
    return found


@pytest.fixture
def note(outcomes):
    """Notes one try of a fault and its outcome, once the test has checked it."""

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
    soaked = page.read_text().partition(soak.TITLE)[1:] if page.exists() else ()
    page.write_text(head + "".join(rows) + "".join(soaked))
