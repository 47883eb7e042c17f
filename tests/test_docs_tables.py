"""Pages generated from the code are up to date."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
assert spec and spec.loader
make_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tables)


@pytest.mark.parametrize("name", sorted(make_tables.PAGES))
def test_page_is_up_to_date(name: str) -> None:
    """Guards readers against pages older than the code; mend with `python docs/make_tables.py`."""
    assert (DOCS / name).read_text() == make_tables.PAGES[name]()
