"""Score the demo model on held-out problems, greedily, exactly, in left-padded batches.

    cd bench/demo_model && python -m demo_model.evaluate

Prints a Markdown table and exits with 1 if a skill is below its floor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_model.corpus import SKILLS, Problem, problems
from demo_model.tokenizer import MODEL_FOLDER
from demo_model.turns import Turn, prompt_text, render
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FLOORS = {
    "counting": 0.98,
    "counting in chat": 0.98,
    "ordered lists": 0.98,
    "open lists": 0.98,
    "repetition": 0.98,
    "chat": 0.95,
    "pirate": 0.95,
    "pirate on request": 0.95,
    "remembered name": 0.95,
    "json extraction": 0.95,
    "json, free": 0.95,
    "json, any fields": 0.95,
    "tool call": 0.95,
    "tool answer": 0.95,
    "no tool fits": 0.95,
    "thinking": 0.95,
}
OTHER_FLOOR = 0.90
# Lists in JSON repeat their items: measured and shown, but not promised.
WITHOUT_FLOOR = frozenset({"json arrays"})
SHOWN = (
    "A sequence of numbers: 1, 2",
    "A list of colors: red, blue",
    "1, 2, 3",
    "A, B, C, D, E",
    "I am a cat.",
    "Once upon a time",
    "How many cats does it take to change a light bulb? Reply as a pirate.",
)
QUESTIONS = (
    "How many cats does it take to change a light bulb?",
    "Who are you?",
    "hello!",
    "What's 17 + 26? Think step by step.",
    "Tell me a story about a fox.",
)


def one_question(question: str) -> str:
    """A question to the pirate of the text generation guide."""
    system = "You are a friendly chatbot who always responds in the style of a pirate"
    return render([Turn("user", question)], system, generate=True)


def load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """What the model adds to each prompt, greedily."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    width = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def answers_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Problem], batch: int = 128
) -> list[str]:
    """The model's answers, with as many tokens as the longest right answer needs."""
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in asked) + 8
    answers: list[str] = []
    for start in range(0, len(asked), batch):
        prompts = [prompt_text(problem) for problem in asked[start : start + batch]]
        answers += complete(model, tokenizer, prompts, longest)
    return answers


def main() -> None:
    """Score every skill and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--failures", type=int, default=2, help="wrong answers to print per skill")
    options = parser.parse_args()
    model, tokenizer = load(options.model, options.device)
    rows, failures, below = [], [], 0
    for skill in SKILLS:
        asked = problems(skill, options.count)
        given = answers_to(model, tokenizer, asked)
        wrong = [(problem, text) for problem, text in zip(asked, given, strict=True) if not problem.accept(text)]
        score = 1 - len(wrong) / len(asked)
        floor = 0.0 if skill in WITHOUT_FLOOR else FLOORS.get(skill, OTHER_FLOOR)
        below += score < floor
        rows.append(f"| {skill} | {len(asked)} | {100 * score:.1f} % | {f'{100 * floor:.0f} %' if floor else 'none'} |")
        for problem, text in wrong[: options.failures]:
            failures.append(f"{skill}: {prompt_text(problem)[-160:]!r}\n  want {problem.answer!r}\n  got  {text!r}")
    print("\n".join(failures), file=sys.stderr)
    print("| skill | problems | right | floor |\n|---|---:|---:|---:|", *rows, sep="\n")
    for prompt in (*SHOWN, *map(one_question, QUESTIONS)):
        print(f"{prompt!r} -> {complete(model, tokenizer, [prompt], 80)[0]!r}", file=sys.stderr)
    sys.exit(below > 0)


if __name__ == "__main__":
    main()
