"""The table of docs/safety.md has exactly the cases that the tests cause."""

from __future__ import annotations

import tests.runtime.test_faults
import tests.runtime.test_faults_of_processes
import tests.runtime.test_faults_of_the_service  # noqa: F401 - importing the tests registers their cases
from tests.runtime.faults import FAULTS, table
from tests.runtime.write_fault_table import DOCS


def test_the_table_in_the_docs_is_that_of_the_tests() -> None:
    wanted = [line.rsplit("|", 2)[0] for line in table(lambda _: "")]
    found = [line.rsplit("|", 2)[0] for line in DOCS.read_text().splitlines() if line.startswith("|")]
    start = found.index(wanted[0])
    assert found[start : start + len(wanted)] == wanted


def test_there_are_twenty_six_of_them() -> None:
    assert len(FAULTS) == 26
