"""The planner's benchmark, shortly."""

from scripts import rows


def test_two_sizes() -> None:
    """Guards the script against the scheduler's interfaces; a step's parts and the cost per row are there."""
    small, large = rows("scheduler.py", "--rows", "3", "--rows", "8", "--steps", "40", "--objects", "10")
    assert (small["rows"], large["rows"]) == (3, 8)
    for row in (small, large):
        assert row["us_per_row"] > 0
        assert row["step_ms"]["50"] >= row["plan_ms"]["50"] > 0 and row["update_ms"]["50"] > 0
