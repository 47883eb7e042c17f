"""CUDA graphs on a GPU: replays against kernels launched one by one, over steps that shake the batch. By hand."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import BLOCK_SIZE
from replayed import CHUNK, MAX_LEN, NUM_BLOCKS, ROWS, requests, run
from transformers import PreTrainedModel

from ropeway.kernels.fusion import fuse
from ropeway.kernels.graphs import CudaCapture, StepGraph
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.sampling_state import SamplingState
from ropeway.kernels.staging import Size
from ropeway.kernels.step import UNREAD, RowInput, RowState, StepInput
from ropeway.kernels.triton_sampler import TritonSampler

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SIZES = [Size(1, 1), Size(4, 4), Size(ROWS, ROWS), Size(12, 4), Size(CHUNK, 4), Size(CHUNK, ROWS), Size(28, ROWS + 1)]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.9),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, logit_bias={3: 1.0}, stop_token_ids=(1,), min_tokens=9),
    SamplingParams(temperature=1.0, logprobs=3),
]


def make_runner(model: PreTrainedModel, sizes: list[Size]) -> ModelRunner:
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=torch.nan)
    sampler = TritonSampler(SamplingState(ROWS, VOCAB_SIZE, CUDA))
    runner = ModelRunner(
        PackedForward(model, pool),
        pool,
        sampler,
        BLOCK_SIZE,
        CUDA,
        max_blocks=MAX_LEN // BLOCK_SIZE,
        sizes=sizes,
        capture=CudaCapture(CUDA) if sizes else None,
        logits_dtype=model.dtype,
    )
    runner.launch(StepInput([RowInput(0, [1], 0, [1])], [RowState(0, PARAMS[0], [1], [])])).read()  # makes the pools
    return runner


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "cohere2", "opt"])
@pytest.mark.parametrize("fused", [False, True])
def test_replays_give_the_same_tokens(name: str, fused: bool) -> None:
    """Guards pads, static tensors, memory that graphs share and the lag: rows join, leave, are preempted, forked and
    aborted, prompts come in chunks, sizes are captured in between."""
    model = build(FAMILIES[name]).cuda()
    if fused:
        fuse(model, MAX_LEN)
    expected = run(make_runner(model, []), requests(2), lambda step: None)
    runner = make_runner(model, SIZES)
    assert runner.prepare(lambda stage, share: None) is None
    replays = []
    assert runner._graphs is not None

    def poison(step: int) -> None:
        runner._staging._static.fill_(0x7E)
        runner._logits.fill_(torch.nan)
        if step % 9 == 5:
            runner.idle_work()

    find = runner._graphs.find

    def spy(size: Size) -> StepGraph | None:
        graph = find(size)
        replays.append(graph is not None)
        return graph

    runner._graphs.find = spy  # type: ignore[method-assign]
    assert run(runner, requests(2), poison) == expected
    assert sum(replays) > len(replays) / 2


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_captured_or_refused(name: str, dtype: torch.dtype) -> None:
    """Guards models whose experts are chosen by code that may wait for the device: a graph or a reason, no crash."""
    model = build(FAMILIES[name]).to(CUDA, dtype)
    runner = make_runner(model, SIZES)
    refusal = runner.prepare(lambda stage, share: None)
    got = run(runner, requests(2), lambda step: None)
    if dtype == torch.bfloat16:  # its grouped products wait for nothing
        assert refusal is None or name == "deepseek_v3"
    else:
        assert refusal is not None
        assert got == run(make_runner(model, []), requests(2), lambda step: None)


@pytest.mark.parametrize("sizes", [SIZES, []])
def test_launch_waits_for_nothing(sizes: list[Size]) -> None:
    """Guards the overlap of host and device: with work queued, a launch with joins, copies, new blocks, bans, logprobs
    and unread tokens returns before that work is done."""
    runner = make_runner(build(FAMILIES["llama"]).cuda(), sizes)
    runner.prepare(lambda stage, share: None)

    def step(start: int) -> StepInput:
        ids, previous = ([UNREAD], 0) if start else ([5], -1)
        tables = [list(range(1 + 5 * row, 2 + 5 * row + start // BLOCK_SIZE)) for row in range(4)]
        rows = [RowInput(row, ids, start, tables[row], row if start else previous) for row in range(4)]
        joins = [RowState(row, params, [1, 2], [3]) for row, params in enumerate(PARAMS)]
        return StepInput(rows, joins, [(28, 29)])

    for start in range(BLOCK_SIZE):
        runner.launch(step(start)).read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        done = torch.cuda.Event()
        done.record()
        first = runner.launch(step(BLOCK_SIZE))
        second = runner.launch(step(BLOCK_SIZE + 1))
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outputs = [first.read(), second.read()]
    assert outputs[0].host_gap_seconds == 0
    assert outputs[1].host_gap_seconds < 0.1
    assert all(0 < output.seconds < 0.1 for output in outputs), "the device's own time, without what was queued before"
