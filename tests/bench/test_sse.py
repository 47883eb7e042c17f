"""The benchmark of streams, shortly: that it starts its server, measures and leaves nothing behind."""

from scripts import rows


def test_a_few_streams() -> None:
    """Guards the script against the server's interfaces; at this pace every token is an event of its own."""
    (row,) = rows("sse.py", "--streams", "4", "--rate", "100", "--seconds", "1.5")
    assert 60 < row["events_per_s"] < 140
    assert row["worker_cpu"] < 0.8 and row["streams"] == 4
