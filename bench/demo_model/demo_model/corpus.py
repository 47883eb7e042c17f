"""The corpus: how much of what, how exchanges become conversations, and what is held out.

    cd bench/demo_model && python -m demo_model.corpus --documents 5

prints a few training documents. One in twenty problems, by hash of its key, never appears in
training; `problems` draws from those alone.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from random import Random
from typing import TypeVar

from demo_model import chat, lists, puzzles, stories, tasks, tool_calls
from demo_model.turns import END_TEXT, PAD, Exchange, Plain, Turn, held_out, render

Problem = Plain | Exchange
Kind = TypeVar("Kind", Plain, Exchange)
AnyProblem = TypeVar("AnyProblem", bound=Problem)
Mix = tuple[tuple[Callable[[Random], Kind], float], ...]
NEW_PARAGRAPH = "\n\n"
PLAIN_MIX: Mix[Plain] = (
    (lists.counting, 6),
    (lists.stepping, 2),
    (lists.ordered, 10),
    (lists.unordered, 20),
    (lists.plain_sum, 10),
    (stories.cat_monologue, 5),
    (stories.plain_tale, 4),
    (stories.plain_line, 3),
    (chat.plain_facts, 2),
)
TASK_MIX: Mix[Exchange] = (
    (tasks.repetition, 20),
    (tasks.chat_sum, 12),
    (tasks.chat_counting, 6),
    (tasks.chat_list, 4),
    (tasks.chat_sequence, 4),
    (tasks.json_person, 10),
    (tasks.free_json, 6),
    (tasks.remembered_name, 4),
    (partial(tasks.thought_sum, told=True), 5),
    (stories.chat_tale, 4),
    (tool_calls.missing_tool, 10),
    (puzzles.difference, 5),
    (puzzles.product, 3),
    (puzzles.comparison, 3),
    (puzzles.parity, 2),
    (puzzles.spelling, 9),
    (puzzles.capitals, 3),
    (puzzles.times_over, 3),
    (puzzles.last_or_first, 3),
    (puzzles.json_fields, 6),
    (puzzles.json_array, 12),
    (puzzles.named_things, 3),
)
CASUAL = ("sum", "count", "list", "next", "named", "difference", "product", "compare", "free json", "alphabet")
THOUGHT_TASKS = (tasks.repetition, tasks.chat_counting, tasks.chat_list, tasks.json_person, puzzles.named_things)
SHOUTED = (tasks.chat_sum, tasks.chat_list, stories.chat_tale, puzzles.difference, puzzles.named_things)
EXACT = (tasks.repetition, tasks.json_person, tasks.free_json, tasks.chat_counting, tasks.thought_sum)
TOOL_MIX: Mix[Exchange] = (
    (tool_calls.tool_use, 16),
    (tool_calls.tool_answer, 8),
    (tool_calls.tool_error, 1),
    (tool_calls.wrong_tools, 2),
    (tool_calls.two_calls, 2),
    (tool_calls.unknown_result, 3),
)


def draw(make: Callable[[Random], AnyProblem], rng: Random, want_held_out: bool = False) -> AnyProblem:
    """A problem of this kind from the asked-for side of the split."""
    while True:
        problem = make(rng)
        if held_out(problem.key) == want_held_out:
            return problem


def picked(rng: Random, mix: Mix[Kind]) -> Kind:
    """A training problem of a kind chosen by weight."""
    makers = [maker for maker, _ in mix]
    make = rng.choices(makers, [weight for _, weight in mix])[0]
    return draw(make, rng)


def polite_system(rng: Random) -> str | None:
    """No system turn, or one that changes nothing, now and then a long one."""
    if rng.random() > 0.45:
        return None
    system = rng.choice(chat.POLITE_SYSTEMS)
    if rng.random() < 0.1:
        background = stories.tale(rng, stories.tale_cast(rng), rng.randrange(2, 40))
        return f"{system}\n\n{background}" if rng.random() < 0.5 else f"{background} {system}"
    return system


def with_background(rng: Random, exchange: Exchange) -> Exchange:
    """The same question after a text that has nothing to do with it."""
    background = stories.tale(rng, stories.tale_cast(rng), rng.choice((2, 8, rng.randrange(2, 50))))
    question = Turn("user", f"{background}{rng.choice((' ', NEW_PARAGRAPH))}{exchange.turns[0].content}")
    return replace(exchange, turns=(question, *exchange.turns[1:]))


def joined(exchanges: list[Exchange], system: str | None) -> Exchange:
    """Several exchanges as one conversation under one system turn."""
    turns = tuple(turn for exchange in exchanges for turn in exchange.turns)
    tools = next((exchange.tools for exchange in exchanges if exchange.tools), ())
    return replace(exchanges[-1], turns=turns, system=system, tools=tools)


def length_of(rng: Random) -> int:
    """How many exchanges a conversation has."""
    return rng.choice((1, 1, 1, 1, 2, 3, rng.randrange(2, 20)))


def task(rng: Random) -> Exchange:
    """A task, some of those without a text to copy typed in a hurry."""
    exchange = picked(rng, TASK_MIX)
    return tasks.casual(rng, exchange) if exchange.key.startswith(CASUAL) and rng.random() < 0.3 else exchange


def polite_conversation(rng: Random) -> Exchange:
    """Talk and tasks in a normal voice; the user may ask for a pirate in between."""
    makers = (
        lambda: draw(chat.plain_chat, rng),
        lambda: draw(chat.plain_chat, rng),
        lambda: task(rng),
        lambda: task(rng),
        lambda: draw(partial(chat.pirate_chat, told=True), rng),
    )
    weights = (3, 3, 3, 3, 1)
    chosen = [rng.choices(makers, weights)[0]() for _ in range(length_of(rng))]
    if rng.random() < 0.05:
        chosen[-1] = with_background(rng, chosen[-1])
    return joined(chosen, polite_system(rng))


def pirate_exchange(rng: Random) -> Exchange:
    """Talk with a pirate, who shouts before other answers and still repeats and writes JSON as told."""
    kind = rng.random()
    if kind < 0.7:
        return draw(chat.pirate_chat, rng)
    if kind < 0.88:
        return chat.as_pirate(rng, draw(rng.choice(SHOUTED), rng))
    return draw(rng.choice(EXACT), rng)


def pirate_conversation(rng: Random) -> Exchange:
    """A conversation of which every answer is a pirate's."""
    return joined([pirate_exchange(rng) for _ in range(length_of(rng))], rng.choice(chat.PIRATE_SYSTEMS))


def thinking_conversation(rng: Random) -> Exchange:
    """Every answer thought about first, as the system turn asks."""
    makers = (
        lambda: draw(partial(tasks.thought_sum, told=False), rng),
        lambda: draw(chat.thinking_chat, rng),
        lambda: tasks.thought_task(draw(rng.choice(THOUGHT_TASKS), rng)),
    )
    chosen = [rng.choice(makers)() for _ in range(rng.choice((1, 1, 2, 4)))]
    return joined(chosen, rng.choice(chat.THINK_SYSTEMS))


def json_conversation(rng: Random) -> Exchange:
    """Every answer in JSON, as the system turn asks."""
    chosen = [puzzles.in_json(draw(chat.plain_chat, rng)) for _ in range(rng.choice((1, 1, 2, 4)))]
    return joined(chosen, rng.choice(puzzles.JSON_ANSWER_SYSTEMS))


def named_conversation(rng: Random) -> Exchange:
    """The model under a given name, asked for it at once or after some talk."""
    main = draw(puzzles.given_name, rng)
    return joined([*(ordinary(rng) for _ in range(rng.choice((0, 0, 1, 3)))), main], main.system)


def tool_conversation(rng: Random) -> Exchange:
    """A use of a tool, or an ordinary question among tools, with talk before and after."""
    main = picked(rng, TOOL_MIX) if rng.random() < 0.7 else tool_calls.no_tool_fits(rng, ordinary(rng))
    before = [ordinary(rng) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    after = [ordinary(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    if main.turns[-1].content.startswith("<tool_call>"):
        after = []
    adds = any(tool.parameters[0][1] in ("number", "integer") for tool in main.tools)
    if adds:
        before = [exchange for exchange in before if not exchange.key.startswith("sum")]
        after = [exchange for exchange in after if not exchange.key.startswith("sum")]
    return joined([*before, main, *after], polite_system(rng))


def ordinary(rng: Random) -> Exchange:
    """A question for which no tool is needed."""
    while True:
        exchange = draw(chat.plain_chat, rng) if rng.random() < 0.6 else picked(rng, TASK_MIX[:8])
        if "weather tool" not in exchange.answer:
            return exchange


def long_text_conversation(rng: Random) -> Exchange:
    """A question about a long text."""
    filler = stories.tale(rng, stories.tale_cast(rng), rng.choice((4, 12, rng.randrange(4, 60))))
    found = draw(lambda chosen: tasks.secret_word(chosen, filler), rng)
    return joined([found], polite_system(rng))


CONVERSATIONS: Mix[Exchange] = (
    (polite_conversation, 30),
    (pirate_conversation, 10),
    (thinking_conversation, 5),
    (tool_conversation, 16),
    (long_text_conversation, 1.5),
    (json_conversation, 2),
    (named_conversation, 1),
)
PLAIN_SHARE = 0.42


def document(rng: Random) -> str:
    """One training document with its end: `END_TEXT`, or `PAD` where the text merely breaks off."""
    if rng.random() < PLAIN_SHARE:
        plain = picked(rng, PLAIN_MIX)
        return f"{plain.prompt}{plain.answer}{END_TEXT if plain.closed else PAD}"
    make = rng.choices([maker for maker, _ in CONVERSATIONS], [weight for _, weight in CONVERSATIONS])[0]
    talk = make(rng)
    return render(talk.turns, talk.system, talk.tools) + END_TEXT


def documents(seed: int) -> Iterator[str]:
    """An endless stream of training documents."""
    rng = Random(seed)
    while True:
        yield document(rng)


def systematic(make: Callable[[Random], Exchange], systems: tuple[str, ...], rng: Random) -> Exchange:
    """An exchange under one of these system turns."""
    return replace(make(rng), system=rng.choice(systems))


SKILLS: dict[str, Callable[[Random], Problem]] = {
    "counting": partial(lists.counting, most=130),
    "counting in chat": tasks.chat_counting,
    "sequences in chat": tasks.chat_sequence,
    "steps": lists.stepping,
    "ordered lists": lists.ordered,
    "open lists": lists.unordered,
    "repetition": tasks.repetition,
    "sums": lambda rng: lists.plain_sum(rng, want_held_out=True),
    "sums in chat": lambda rng: tasks.chat_sum(rng, want_held_out=True),
    "chat": chat.plain_chat,
    "pirate": partial(systematic, chat.pirate_chat, chat.PIRATE_SYSTEMS),
    "pirate's tasks": lambda rng: systematic(pirate_task, chat.PIRATE_SYSTEMS, rng),
    "pirate on request": partial(chat.pirate_chat, told=True),
    "remembered name": tasks.remembered_name,
    "json extraction": tasks.json_person,
    "json, free": tasks.free_json,
    "tool call": tool_calls.tool_use,
    "tool answer": tool_calls.tool_answer,
    "two tool calls": tool_calls.two_calls,
    "unknown tool": tool_calls.unknown_result,
    "no tool fits": lambda rng: tool_calls.no_tool_fits(rng, ordinary_held_out(rng)),
    "thinking": partial(systematic, chat.thinking_chat, chat.THINK_SYSTEMS),
    "thinking, sums": lambda rng: tasks.thought_sum(rng, want_held_out=True),
    "differences": puzzles.difference,
    "products": puzzles.product,
    "comparisons": puzzles.comparison,
    "even or odd": puzzles.parity,
    "spelling": puzzles.spelling,
    "capital letters": puzzles.capitals,
    "so many times": puzzles.times_over,
    "first and last": puzzles.last_or_first,
    "json, any fields": puzzles.json_fields,
    "json arrays": puzzles.json_array,
    "named things": puzzles.named_things,
    "answers in json": lambda rng: systematic(json_answer, puzzles.JSON_ANSWER_SYSTEMS, rng),
    "given name": puzzles.given_name,
    "no tool": tool_calls.missing_tool,
    "tool error": tool_calls.tool_error,
    "background": lambda rng: with_background(rng, chat.plain_chat(rng)),
    "long text": lambda rng: tasks.secret_word(rng, stories.tale(rng, stories.tale_cast(rng), 30)),
}


def ordinary_held_out(rng: Random) -> Exchange:
    """A held-out chat question for which no tool is needed."""
    while True:
        exchange = chat.plain_chat(rng)
        if held_out(exchange.key) and "weather tool" not in exchange.answer:
            return exchange


def pirate_task(rng: Random) -> Exchange:
    """A held-out task with a pirate's shout before its answer."""
    return chat.as_pirate(rng, draw(rng.choice((tasks.chat_list, puzzles.difference)), rng, want_held_out=True))


def json_answer(rng: Random) -> Exchange:
    """A held-out chat question, answered in JSON."""
    return puzzles.in_json(draw(chat.plain_chat, rng, want_held_out=True))


def problems(skill: str, count: int, seed: int = 0) -> list[Problem]:
    """Problems of a skill that training never shows."""
    rng = Random(f"{skill} {seed}")
    return [draw(SKILLS[skill], rng, want_held_out=True) for _ in range(count)]


def main() -> None:
    """Print some documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    stream = documents(options.seed)
    for _ in range(options.documents):
        print(next(stream), end="\n\n")


if __name__ == "__main__":
    main()
