"""Train the demo model on an endless corpus and write the model folder.

    cd bench/demo_model && python -m demo_model.train --steps 18000

Worker processes generate, tokenize and pack documents while the device trains; no document is
split over two rows and no token sees another document. One GPU trains the whole model in minutes;
a CPU runs the same code for a few steps.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from demo_model.corpus import documents
from demo_model.export import model_config, save_model
from demo_model.tokenizer import CONTEXT, MODEL_FOLDER
from demo_model.turns import END_TEXT, PAD, START_TURN
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PROMPT_WEIGHT = 0.1
WARMUP_STEPS = 200


class PackedRows(IterableDataset[Tensor]):
    """Batches of rows [rows, length + 1], int16: whole documents side by side, the last one cut."""

    def __init__(self, folder: Path, rows: int, length: int, seed: int) -> None:
        self.folder, self.rows, self.length, self.seed = folder, rows, length, seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        stream = documents(self.seed * 1000 + (worker.id if worker else 0))
        tokenizer = AutoTokenizer.from_pretrained(self.folder).backend_tokenizer
        batch: list[list[int]] = []
        row: list[int] = []
        while True:
            texts = [next(stream) for _ in range(256)]
            for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                row += encoded.ids[: CONTEXT - 1]
                if len(row) > self.length:
                    batch.append(row[: self.length + 1])
                    row = []
                if len(batch) == self.rows:
                    yield torch.tensor(batch, dtype=torch.int16)
                    batch = []


class Layout:
    """What a packed row says about itself, read off its marker tokens."""

    def __init__(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end_text, self.pad, self.start_turn, self.assistant = tokenizer.convert_tokens_to_ids(
            [END_TEXT, PAD, START_TURN, "assistant"]
        )

    def document_ids(self, ids: Tensor) -> Tensor:
        """Number of the document each token belongs to, [rows, length]."""
        ends = ((ids == self.end_text) | (ids == self.pad)).long()
        document_ids: Tensor = ends.cumsum(1) - ends
        return document_ids

    def positions(self, document_ids: Tensor) -> Tensor:
        """Place of each token in its own document, [rows, length]."""
        place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        fresh = torch.ones_like(document_ids, dtype=torch.bool)
        fresh[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return place - torch.where(fresh, place, 0).cummax(1).values

    def weights(self, ids: Tensor) -> Tensor:
        """Weight of each token as a target: 1 in plain text and answers, little in prompts, 0 for breaks."""
        opens = ids == self.start_turn
        marks = opens | (ids == self.end_text) | (ids == self.pad)
        following = functional.pad(ids[:, 1:], (0, 1), value=self.pad)
        learned = ~opens | (following == self.assistant)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # Every token takes the verdict of the last mark before it; a row starts with a document.
        last = torch.where(marks, place, -1).cummax(1).values
        verdict = torch.where(last >= 0, learned.gather(1, last.clamp(min=0)), True)
        weights = torch.where(verdict, 1.0, PROMPT_WEIGHT)
        return weights.masked_fill(ids == self.pad, 0.0)


def flex_mask(document_ids: Tensor) -> object:
    """Causal attention within each document, as blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    rows, length = document_ids.shape
    return create_block_mask(visible, rows, None, length, length, device=document_ids.device, _compile=True)


def dense_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within each document, as [rows, 1, length, length] booleans."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def loss_of(model: LlamaForCausalLM, ids: Tensor, mask: object, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of the next tokens."""
    output = model(input_ids=ids[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False)
    losses = functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to nearly nothing."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def optimizer_of(model: LlamaForCausalLM, peak: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=fused)


def train(options: argparse.Namespace, config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """Run all steps, saving on the way so that an interrupted run leaves a usable model."""
    cuda = device.type == "cuda"
    torch.manual_seed(options.seed)
    config._attn_implementation = options.attention
    model = LlamaForCausalLM(config)
    if options.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict())
    model.to(device)
    layout = Layout(options.tokenizer)
    make_mask = flex_mask if options.attention == "flex_attention" else dense_mask
    compute = torch.compile(partial(loss_of, model), dynamic=False) if cuda else partial(loss_of, model)
    optimizer = optimizer_of(model, options.learning_rate, fused=cuda)
    rows = PackedRows(options.tokenizer, options.rows, options.length, options.seed)
    loader = iter(DataLoader(rows, batch_size=None, num_workers=options.workers, pin_memory=cuda))
    started = reported = time.monotonic()
    for step in range(options.steps):
        ids = next(loader).to(device, non_blocking=True).long()
        document_ids = layout.document_ids(ids[:, :-1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            weights = layout.weights(ids)[:, 1:]
            loss = compute(ids, make_mask(document_ids), layout.positions(document_ids), weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % options.report == 0 or step == options.steps - 1:
            now = time.monotonic()
            rate = options.report * options.rows * options.length / max(now - reported, 1e-9)
            print(f"step {step} loss {loss.item():.4f} {rate:,.0f} tokens/s {now - started:.0f} s", flush=True)
            reported = now
        if step % options.save_every == options.save_every - 1:
            save_model(model, options.out)
    save_model(model, options.out)
    return model


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=18000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=CONTEXT)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--attention", choices=("sdpa", "flex_attention"), default=None)
    parser.add_argument("--start", type=Path, help="a model folder to go on from")
    parser.add_argument("--tokenizer", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.attention = options.attention or ("flex_attention" if device.type == "cuda" else "sdpa")
    torch.set_float32_matmul_precision("high")
    config = model_config(options.tokenizer)
    model = train(options, config, device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"parameters": size, "out": str(options.out)}))


if __name__ == "__main__":
    main()
