"""The shared table: what one process writes the others read; a dead worker's line."""

import subprocess
import sys
from pathlib import Path

from ropeway.scheduler.admission_table import AdmissionTable, Column

WORKER = """
import sys
from ropeway.scheduler.admission_table import AdmissionTable, Column
line = int(sys.argv[2])
AdmissionTable.open(sys.argv[1]).add(line, Column.SLOTS, 10 + line)
"""


def test_processes_share_it(tmp_path: Path) -> None:
    """Guards the sums: every process sees what the others wrote, and no line runs into the next."""
    table = AdmissionTable.create(str(tmp_path), 3)
    for line in ("0", "2"):
        subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), line], check=True)
    assert [table.get(line, Column.SLOTS) for line in range(3)] == [10, 0, 12]
    assert [table.total(column) for column in Column] == [22, 0, 0, 0, 0]


def test_a_cleared_line(tmp_path: Path) -> None:
    """Guards the slots of a dead worker: nothing of it is in flight; what was freed, by which the drain rate is
    measured, does not shrink; the others keep theirs."""
    table = AdmissionTable.create(str(tmp_path), 2)
    for line in range(2):
        for column in Column:
            table.add(line, column, 5)
    table.clear(1)
    assert {column: table.get(1, column) for column in Column if table.get(1, column)} == {
        Column.FREED_SLOTS: 5,
        Column.FREED_TOKENS: 5,
    }
    assert all(table.get(0, column) == 5 for column in Column)


def test_a_server_without_workers(tmp_path: Path) -> None:
    """Guards `ropeway check`: an empty file cannot be mapped."""
    assert AdmissionTable.create(str(tmp_path), 0).total(Column.SLOTS) == 0
