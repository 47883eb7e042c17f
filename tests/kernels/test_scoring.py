"""Prompt logprobs: equal to those of the model's own forward, in every chunk size, layout and slice."""

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, build
from ragged_steps import token_rows
from small_runner import make_runner, table
from transformers import PreTrainedModel

from ropeway.kernels import scoring
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.runner import ModelRunner
from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.scoring import bytes_of_scores, score_tokens
from ropeway.kernels.step import RowInput, RowState, Score, ScoredToken, StepInput, scores_per_step

GREEDY = SamplingParams(temperature=0.0)
PROMPT, OTHER, SHORT = token_rows((13, 11, 4), VOCAB_SIZE, seed=9)
LAYOUTS = pytest.mark.parametrize("layout", [PackedForward, PaddedForward])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build(FAMILIES["llama"])


def reference(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[P-1, V]: logprobs of what follows each token, by the plain model."""
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def matches(scored: list[ScoredToken], expected: torch.Tensor, targets: list[int], top: int) -> None:
    assert len(scored) == len(targets)
    for token, logprobs, target in zip(scored, expected, targets, strict=True):
        assert token.logprob == pytest.approx(float(logprobs[target]), abs=1e-4)
        assert token.rank == int((logprobs > logprobs[target]).sum()) + 1
        best = logprobs.topk(top)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def score_in_chunks(runner: ModelRunner, prompt: list[int], size: int, beside: list[RowInput]) -> list[ScoredToken]:
    """The prompt in row 0, `size` tokens a step; the rows beside it are in its first step."""
    scored: list[ScoredToken] = []
    for start in range(0, len(prompt), size):
        stop = min(start + size, len(prompt))
        row = RowInput(0, prompt[start:stop], start, table(0), sample=stop == len(prompt))
        rows = [*beside, row] if start == 0 else [row]
        joins = [RowState(one.state_slot, GREEDY, one.token_ids, []) for one in rows] if start == 0 else []
        targets = prompt[start + 1 : stop + 1]
        scores = {len(rows) - 1: Score(targets, 3)} if targets else {}
        scored += runner.launch(StepInput(rows, joins, scores=scores)).read().scored.get(len(rows) - 1, [])
    return scored


@LAYOUTS
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13])
def test_logprobs_are_those_of_the_plain_model(
    model: PreTrainedModel, layout: type[PackedForward] | type[PaddedForward], size: int
) -> None:
    """Guards lines and targets at every chunk's edge: one off, and each token has its neighbour's logprob."""
    beside = [RowInput(1, OTHER, 0, table(1)), RowInput(2, SHORT, 0, table(2), sample=False)]
    scored = score_in_chunks(make_runner(model, layout), PROMPT, size, beside)
    matches(scored, reference(model, PROMPT), PROMPT[1:], 3)


@LAYOUTS
def test_several_rows_score_at_once(model: PreTrainedModel, layout: type[PackedForward] | type[PaddedForward]) -> None:
    """Guards rows against each other: who asked for one token at each place, or none, gets no more."""
    rows = [RowInput(place, prompt, 0, table(place)) for place, prompt in enumerate((SHORT, OTHER, PROMPT))]
    joins = [RowState(row.state_slot, GREEDY, row.token_ids, []) for row in rows]
    scores = {0: Score(SHORT[1:], 0), 2: Score(PROMPT[1:6], 1)}
    output = make_runner(model, layout).launch(StepInput(rows, joins, scores=scores)).read()
    assert output.scored.keys() == {0, 2}
    matches(output.scored[0], reference(model, SHORT), SHORT[1:], 0)
    matches(output.scored[2], reference(model, PROMPT)[:5], PROMPT[1:6], 1)


@LAYOUTS
def test_neighbours_sample_the_same(model: PreTrainedModel, layout: type[PackedForward] | type[PaddedForward]) -> None:
    """Guards the rows beside one that scores: each must still be sampled from its own last token's logits."""
    rows = [RowInput(place, prompt, 0, table(place)) for place, prompt in enumerate((OTHER, PROMPT, SHORT))]
    params = SamplingParams(temperature=2.0, seed=3, logprobs=2)
    joins = [RowState(row.state_slot, params, row.token_ids, []) for row in rows]
    plain = make_runner(model, layout).launch(StepInput(rows, joins)).read()
    output = make_runner(model, layout).launch(StepInput(rows, joins, scores={1: Score(PROMPT[1:], 1)})).read()
    assert output.token_ids == plain.token_ids
    for row, logprobs in plain.logprobs.items():
        assert output.logprobs[row].logprob == pytest.approx(logprobs.logprob, abs=1e-4)
    assert (output.finite, output.computed_slots >= plain.computed_slots) == (plain.finite, True)


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the seams between slices, and equal logits: the lower id is the more likely one."""
    logits = torch.randn(9, 21, generator=torch.Generator().manual_seed(1)).round()
    lines, targets = torch.tensor([0, 1, 2, 5, 6, 7, 8]), torch.tensor([20, 0, 3, 3, 9, 11, 1])
    whole = score_tokens(logits, lines, targets, 4)
    for size in (1, 2, 3):
        monkeypatch.setattr(scoring, "SLICE_BYTES", 4 * 21 * size)
        part = score_tokens(logits, lines, targets, 4)
        assert torch.equal(part.logprobs, whole.logprobs) and torch.equal(part.ranks, whole.ranks)
        assert torch.equal(part.top_ids, whole.top_ids) and torch.equal(part.top_logprobs, whole.top_logprobs)
    order = torch.sort(logits[lines], dim=-1, descending=True, stable=True).indices
    assert torch.equal(whole.top_ids, order[:, :4])


def test_memory_is_bounded_whatever_the_vocabulary() -> None:
    """Guards large vocabularies: 8192 tokens of 128,000 would be 4 GB of logits."""
    for vocab_size in (1000, 32_000, 151_936, 262_144):
        assert bytes_of_scores(scores_per_step(vocab_size), vocab_size) < 450 * 2**20
