"""bench/drift.py on a tiny model: every line is of the precision that it names."""

from scripts import rows


def test_a_tiny_model_on_the_cpu() -> None:
    """Guards the table: fp32 is the reference's, coarser numbers drift further, and what is rounded is not the same."""
    found = {
        row["precision"]: row
        for row in rows("drift.py", "--shape", "llama-tiny", "--rows", "2", "--tokens", "48", "--device", "cpu")
    }
    assert found["fp32"]["max"] < 1e-4 and found["fp32"]["top1"] == 1
    mean = {name: row["mean"] for name, row in found.items()}
    assert mean["fp32"] < mean["fp16"] < mean["bf16"] < mean["bf16, FP8 cache"] < mean["FP8 weights"]
    assert mean["FP8 weights"] < mean["FP8 weights, FP8 cache"] < mean["nf4"]
    assert 0.5 < mean["bf16"] / mean["bf16, transformers alone"] < 2
    assert len({row["max"] for row in found.values()}) > 7
