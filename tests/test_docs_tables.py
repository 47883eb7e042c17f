"""Pages generated from the code are up to date."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_tables = script("make_tables")


@pytest.mark.parametrize("name", sorted(make_tables.PAGES))
def test_page_is_up_to_date(name: str) -> None:
    """Guards readers against pages older than the code; mend with `python docs/make_tables.py`."""
    assert (DOCS / name).read_text() == make_tables.PAGES[name]()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_families_are_up_to_date() -> None:
    """Guards the promise of families: a layout that the probe no longer gives, or logits beyond the stated bound, show;
    mend with `python docs/make_families.py`."""
    make_families = script("make_families")
    page = (DOCS / "families.md").read_text()
    assert make_families.families_page(page) == page
    bounds = make_families.stated_bounds(page)
    assert set(bounds) == set(make_families.FAMILIES) and all(float(bound) <= 1e-4 for bound in bounds.values())
    assert sum(family.packed for family in make_families.FAMILIES.values()) >= 25
    for name, family in make_families.FAMILIES.items():
        layout = "Packed" if family.packed else "Padded"
        assert f"| {name} | " in page.partition(f"## {layout}")[2].partition("\n## ")[0]


def test_a_bound_that_does_not_hold_is_not_kept() -> None:
    """Guards the page's honesty: a stated bound is kept only while the difference is below it."""
    make_families = script("make_families")
    verdict = make_families.Verdict("llama", "LlamaForCausalLM", "packed", difference=2e-5)
    assert make_families.bound(verdict, {"llama": "1e-4"}) == "< 1e-4"
    assert make_families.bound(verdict, {"llama": "1e-5"}) == "< 1e-4"
    assert make_families.bound(verdict, {}) == "< 1e-4"
