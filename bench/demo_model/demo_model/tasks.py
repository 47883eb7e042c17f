"""Chat tasks with an exact answer: repeating, sums, counting, JSON objects, thinking aloud.

Each function draws one exchange; the system turn is added by the corpus.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

from demo_model import words
from demo_model.lists import addends, sum_key
from demo_model.turns import Exchange, Turn, any_of, ask, json_equal

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
REPEAT_FORMS = (
    "Repeat: {}",
    "Repeat after me: {}",
    "Say {}",
    "Say: {}",
    "Please say {}",
    "Please repeat: {}",
    "Say this: {}",
    "Echo: {}",
    "Repeat this: {}",
    "Write exactly this: {}",
    'Say "{}"',
    'Repeat "{}"',
    "Say '{}'",
    "Say exactly: {}",
    "Reply with: {}",
    "Reply with the word {}",
    "Reply with exactly: {}",
    "Answer with {}",
    "Respond with: {}",
    "Just say {}",
    "say {}",
    "repeat {}",
    "Print: {}",
    "Can you repeat this? {}",
    "Repeat the following words: {}",
)
SUM_FORMS = (
    "What is {} + {}?",
    "What is {} plus {}?",
    "{} + {} = ?",
    "{} + {}",
    "{}+{}",
    "{}+{}=",
    "{} + {} =",
    "What is {}+{}?",
    "what is {}+{}",
    "what is {} + {}",
    "Add {} and {}.",
    "How much is {} + {}?",
    "Compute {} + {}.",
    "Calculate {} + {}",
    "what's {} + {}?",
    "Please add {} and {}.",
    "Can you tell me what {} plus {} is?",
)
THINK_FORMS = (
    " Think step by step.",
    " Think before you answer.",
    " Think carefully.",
    " Please think step by step.",
)
NAME_FORMS = (
    "My name is {}.",
    "my name is {}",
    "I am called {}.",
    "I am {}.",
    "Hi, I am {}",
    "Hi, I'm {}.",
    "Hi, my name is {}.",
    "Hello! My name is {}.",
)
FREE_JSON_FORMS = (
    "Give me a JSON object about a person{}.",
    "Write a JSON object for a person{}.",
    "Describe a person as JSON{}.",
    "Generate JSON for a person{}.",
    "Return a JSON object about a person{}.",
    "Invent a person and answer with JSON{}.",
    "I need a person in JSON{}.",
)
EXTRACT_FORMS = (
    "Extract the {fields} as JSON: {facts}",
    "{facts} Give me that as JSON with {fields}.",
    "Turn this into a JSON object with {fields}: {facts}",
    "Read this and answer in JSON with the keys {fields}. {facts}",
)


def invented_word(rng: Random) -> str:
    """A word nobody knows, so that it can only be copied."""
    syllables = rng.randrange(1, 4)
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(
        ("", "n", "r", "s", "k")
    )


def invented_name(rng: Random) -> str:
    """A capitalised invented word: a place or a person that is in no list."""
    return invented_word(rng).capitalize()


def sentence(rng: Random) -> str:
    """Everyday words in any order, which no grammar helps to repeat."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(words.COMMON_WORDS),
        lambda: rng.choice(words.COMMON_WORDS),
        lambda: rng.choice(words.COMMON_WORDS),
        lambda: rng.choice(words.PLAIN_WORDS),
        lambda: invented_word(rng),
    )
    return " ".join(rng.choice(makers)() for _ in range(rng.choice((1, 1, 2, 3, 4, 6, 9))))


def repeated_text(rng: Random) -> str:
    """A few words to repeat: known, invented, numbers, and sometimes other scripts."""
    if rng.random() < 0.4:
        return sentence(rng)
    count = rng.choice((1, 2, 3, 3, 4, 5, 6, 8, 12))
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(words.PLAIN_WORDS),
        lambda: rng.choice(words.PLAIN_WORDS),
        lambda: invented_word(rng),
        lambda: str(rng.randrange(1000)),
        lambda: rng.choice(words.NAMES),
        lambda: rng.choice((*words.EMOJI, *words.HELLOS.values())),
    )
    used = makers if rng.random() < 0.4 else makers[:3]
    return rng.choice((" ", " ", " ", ", ")).join(rng.choice(used)() for _ in range(count))


def repetition(rng: Random) -> Exchange:
    """Say again what the user said."""
    text = repeated_text(rng)
    if rng.random() < 0.25:
        text = f"{text[0].upper()}{text[1:]}{rng.choice(('.', '.', '!', '?', ''))}"
    return ask(f"repeat {text}", rng.choice(REPEAT_FORMS).format(text), (text,))


def chat_sum(rng: Random, want_held_out: bool = False) -> Exchange:
    """A sum asked in words."""
    first, second = addends(rng, want_held_out)
    question = rng.choice(SUM_FORMS).format(first, second)
    return ask(sum_key(first, second), question, (f"{first} + {second} = {first + second}.",))


def carry_thoughts(first: int, second: int) -> str:
    """The written addition of two numbers below 100, from the ones to the tens."""
    ones = first % 10 + second % 10
    tens = first // 10 + second // 10 + ones // 10
    carried = f"Write {ones % 10} and carry 1." if ones > 9 else f"Write {ones} and carry 0."
    carry = " + 1" if ones > 9 else ""
    return (
        f"The ones: {first % 10} + {second % 10} = {ones}. {carried}\n"
        f"The tens: {first // 10} + {second // 10}{carry} = {tens}.\n"
        f"So the sum is {first + second}."
    )


def thoughtful(thoughts: str, answer: str) -> str:
    """An answer with its thinking in front."""
    return f"<think>\n{thoughts}\n</think>\n\n{answer}"


def thought_sum(rng: Random, want_held_out: bool = False, told: bool = True) -> Exchange:
    """A sum with the carry thought aloud; `told` puts the request to think into the user's turn."""
    first, second = addends(rng, want_held_out)
    question = rng.choice(SUM_FORMS).format(first, second)
    question = question if question[-1] in ".?" else f"{question}."
    question += rng.choice(THINK_FORMS) if told else ""
    answer = thoughtful(carry_thoughts(first, second), f"{first} + {second} = {first + second}.")
    return ask(sum_key(first, second), question, (answer,))


def chat_counting(rng: Random) -> Exchange:
    """Count from one number to another."""
    first = rng.choice((0, 1, 1, 1, rng.randrange(1, 90)))
    last = first + rng.choice((rng.randrange(3, 12), rng.randrange(3, 30), rng.randrange(3, 110)))
    form = rng.choice(("Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?"))
    question = form.format(first, last)
    if first == 1 and rng.random() < 0.5:
        question = f"Count to {last}."
    answer = ", ".join(str(number) for number in range(first, last + 1))
    return ask(f"count from {first} to {last}", question, (answer,))


def chat_list(rng: Random) -> Exchange:
    """Name an ordered list, or the item that follows another."""
    if rng.random() < 0.15:
        form = rng.choice(("Say the alphabet.", "List the letters of the alphabet.", "The alphabet, please.", "ABC"))
        return ask(f"alphabet {form}", form, (", ".join(words.UPPER),))
    kind, items = rng.choice((("day", words.DAYS), ("month", words.MONTHS)))
    if rng.random() < 0.2:
        whole = {"day": "days of the week", "month": "months of the year"}[kind]
        form = rng.choice(("List the {}.", "Name the {}.", "What are the {}?", "Tell me the {}."))
        return ask(f"list {form} {kind}", form.format(whole), (", ".join(items) + ".",))
    place = rng.randrange(len(items))
    step, word = rng.choice(((1, "after"), (-1, "before")))
    form = rng.choice(("What {k} comes {w} {i}?", "Which {k} is {w} {i}?", "What is the {k} {w} {i}?"))
    question = form.format(k=kind, w=word, i=items[place])
    answer = f"The {kind} {word} {items[place]} is {items[(place + step) % len(items)]}."
    return ask(f"next {question}", question, (answer,))


def chat_sequence(rng: Random) -> Exchange:
    """Continue a sequence that the user begins, with its next items."""
    if rng.random() < 0.6:
        start = rng.choice((1, 1, rng.randrange(100), rng.randrange(900)))
        items = tuple(str(start + step) for step in range(16))
        following = 10
    else:
        items, following = rng.choice(((words.UPPER, 26), (words.DAYS, 7), (words.MONTHS, 12)))
        items = items[rng.randrange(len(items) - 4) :]
    shown = rng.choice((2, 3, 3, 4, 5)) if len(items) > 5 else 2
    form = rng.choice(("{}", "Continue: {}", "Continue the sequence: {}", "What comes next? {}", "Go on: {}"))
    question = form.format(", ".join(items[:shown]))
    answer = ", ".join(items[shown : shown + following])
    return ask(f"sequence {form} {items[0]}", question, (answer,))


def person(rng: Random) -> dict[str, str | int]:
    """A person of known or invented name and city."""
    name = rng.choice(words.NAMES) if rng.random() < 0.7 else invented_name(rng)
    city = rng.choice(words.CITIES) if rng.random() < 0.7 else invented_name(rng)
    return {"name": name, "age": rng.randrange(5, 100), "city": city}


def json_person(rng: Random) -> Exchange:
    """A JSON object whose values the request gives, wholly or in part."""
    facts = person(rng)
    name, age, city = facts.values()
    given = (
        f"{name} is {age} years old and lives in {city}.",
        f"{name}, {age}, from {city}.",
        f"My friend {name} lives in {city} and is {age}.",
        f"In {city} lives {name}, aged {age}.",
    )
    style = rng.random()
    if style < 0.5:
        fields = ("name, age and city", "name, age, city")
        question = rng.choice(EXTRACT_FORMS).format(fields=rng.choice(fields), facts=rng.choice(given))
    else:
        about = (
            f" named {name} who is {age} and lives in {city}",
            f" called {name}, {age} years old, from {city}",
            f" with the name {name}, the age {age} and the city {city}",
            f": {name}, {age}, {city}",
        )
        question = rng.choice(FREE_JSON_FORMS).format(rng.choice(about))
    turns = (Turn("user", question), Turn("assistant", json.dumps(facts, ensure_ascii=False)))
    return Exchange(f"json {question}", turns, json_equal(facts))


def free_json(rng: Random) -> Exchange:
    """A JSON object about a person of whom the request says little or nothing."""
    facts = person(rng)
    details = {
        "": {},
        " with name, age and city": {},
        " with the keys name, age and city": {},
        f" named {facts['name']}": {"name": facts["name"]},
        f" from {facts['city']}": {"city": facts["city"]},
        f" who is {facts['age']} years old": {"age": facts["age"]},
    }
    detail = rng.choice(tuple(details))
    asked = details[detail]

    def accept(output: str) -> bool:
        """An object with the three keys, the right types and the given value."""
        try:
            value = json.loads(output)
        except ValueError:
            return False
        kinds = {key: type(item) for key, item in value.items()} if isinstance(value, dict) else {}
        return kinds == {"name": str, "age": int, "city": str} and asked.items() <= value.items()

    question = rng.choice(FREE_JSON_FORMS).format(detail)
    turns = (Turn("user", question), Turn("assistant", json.dumps(facts, ensure_ascii=False)))
    return Exchange(f"free json {question}", turns, accept)


def secret_word(rng: Random, filler: str) -> Exchange:
    """Find a word that a longer text mentions."""
    word = rng.choice(words.PLAIN_WORDS) if rng.random() < 0.7 else invented_word(rng)
    sentences = filler.split(". ")
    sentences.insert(rng.randrange(len(sentences) + 1), f"The secret word is {word}")
    text = ". ".join(sentences).rstrip(".")
    question = f"Read this text. {text}. What is the secret word?"
    return ask(f"secret {word} {len(text)}", question, (f"The secret word is {word}.",))


def remembered_name(rng: Random) -> Exchange:
    """The user's name, told in one turn and asked for in a later one."""
    name = rng.choice(words.NAMES) if rng.random() < 0.5 else invented_name(rng)
    city = rng.choice(words.CITIES)
    told = rng.choice((*NAME_FORMS, f"My name is {{}} and I live in {city}."))
    asked = rng.choice(("What is my name?", "Do you remember my name?", "What's my name?", "Who am I?"))
    turns = (
        Turn("user", told.format(name)),
        Turn("assistant", f"Nice to meet you, {name}! How can I help you?"),
        Turn("user", asked),
        Turn("assistant", f"Your name is {name}."),
    )
    return Exchange(f"name {name} {told} {asked}", turns, any_of(turns[-1].content))


def casual(rng: Random, exchange: Exchange) -> Exchange:
    """The same request typed in a hurry: without its full stop, or without capital letters at its start."""
    question = exchange.turns[0].content
    if rng.random() < 0.6:
        question = question.rstrip(".?")
    if rng.random() < 0.6:
        question = question[0].lower() + question[1:]
    return replace(exchange, turns=(Turn("user", question), *exchange.turns[1:]))


def thought_task(exchange: Exchange) -> Exchange:
    """The same task with a line of thought before its answer."""
    thoughts = "This is a simple task, so I do it at once."
    answer = thoughtful(thoughts, exchange.answer)
    turns = (*exchange.turns[:-1], Turn("assistant", answer))
    start = thoughtful(thoughts, "")
    return replace(
        exchange,
        turns=turns,
        accept=lambda output: output.startswith(start) and exchange.accept(output.removeprefix(start)),
    )
