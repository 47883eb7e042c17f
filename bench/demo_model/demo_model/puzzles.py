"""Small chat tasks beyond sums: differences, products, spelling, capitals, counting out, JSON of all kinds.

Each has one right answer, so each is evaluated like the others.
"""

import json
from collections.abc import Callable
from random import Random

from demo_model import words
from demo_model.tasks import invented_word
from demo_model.turns import Exchange, Turn, any_of, ask, json_equal

FIELDS = (
    "color", "size", "name", "id", "title", "count", "price", "kind", "owner", "place", "level", "score", "weight",
    "height", "status", "animal", "fruit", "label", "number", "key", "value", "user", "year", "day", "month",
)  # fmt: skip
JSON_ANSWER_SYSTEMS = (
    "Answer in JSON.",
    "Answer with a JSON object.",
    "You always answer with JSON.",
    "You are a helpful assistant that answers in JSON.",
)


def word(rng: Random) -> str:
    """A known or an invented word."""
    return rng.choice((*words.PLAIN_WORDS, *words.COMMON_WORDS)) if rng.random() < 0.7 else invented_word(rng)


def difference(rng: Random) -> Exchange:
    """Subtract a smaller number from a larger one."""
    first = rng.randrange(100)
    second = rng.randrange(first + 1)
    forms = ("What is {} - {}?", "What is {} minus {}?", "{} - {}", "How much is {} - {}?", "Compute {} - {}.")
    question = rng.choice(forms).format(first, second)
    return ask(f"difference {first} - {second}", question, (f"{first} - {second} = {first - second}.",))


def product(rng: Random) -> Exchange:
    """A product of the small multiplication table; with so few of them, the wording is held out."""
    first, second = rng.randrange(11), rng.randrange(11)
    forms = ("What is {} times {}?", "{} * {}", "How much is {} times {}?", "What is {} * {}?", "Compute {} times {}.")
    question = rng.choice(forms).format(first, second)
    return ask(f"product {question}", question, (f"{first} * {second} = {first * second}.",))


def comparison(rng: Random) -> Exchange:
    """The larger or smaller of two numbers."""
    first, second = rng.sample(range(100), 2)
    name, best = rng.choice((("larger", max), ("smaller", min), ("bigger", max)))
    forms = ("Which is {n}, {a} or {b}?", "What is {n}: {a} or {b}?", "Which number is {n}, {a} or {b}?")
    question = rng.choice(forms).format(n=name, a=first, b=second)
    return ask(f"compare {question}", question, (f"{best(first, second)} is {name}.",))


def parity(rng: Random) -> Exchange:
    """Even or odd."""
    number = rng.randrange(1000)
    question = rng.choice(("Is {} even or odd?", "Is {} odd or even?", "Tell me whether {} is even.")).format(number)
    return ask(f"parity {number}", question, (f"{number} is {'odd' if number % 2 else 'even'}.",))


def spelling(rng: Random) -> Exchange:
    """A known word, letter by letter."""
    text = rng.choice((*words.PLAIN_WORDS, *words.NAMES))
    form = rng.choice(("Spell {}.", "How do you spell {}?", "Spell the word {}.", 'Spell "{}".'))
    return ask(f"spell {form} {text}", form.format(text), ("-".join(text.upper()) + ".",))


def capitals(rng: Random) -> Exchange:
    """Known words in capital letters."""
    text = " ".join(rng.choice(words.PLAIN_WORDS) for _ in range(rng.choice((1, 1, 2))))
    form = rng.choice(("Write {} in capital letters.", "Say {} in uppercase.", "Put {} into capitals."))
    return ask(f"capitals {form} {text}", form.format(text), (text.upper(),))


def times_over(rng: Random) -> Exchange:
    """A word said several times."""
    text, count = word(rng), rng.randrange(2, 11)
    shown = rng.choice((str(count), words.NUMBER_WORDS[count - 1]))
    form = rng.choice(
        (
            "Say {} {} times.",
            "Repeat {} {} times.",
            "Write {} {} times.",
            "Say '{}' {} times.",
            "Say the word {} {} times.",
        )
    )
    return ask(f"times {text} {count}", form.format(text, shown), (" ".join([text] * count),))


def last_or_first(rng: Random) -> Exchange:
    """The first or last of some words."""
    chosen = [word(rng) for _ in range(rng.randrange(2, 8))]
    name, at = rng.choice((("first", 0), ("last", -1)))
    forms = ("What is the {n} word of: {w}?", "Tell me the {n} word: {w}", "Which word comes {n}? {w}")
    question = rng.choice(forms).format(n=name, w=", ".join(chosen))
    return ask(f"place {question}", question, (f"The {name} word is {chosen[at]}.",))


def json_fields(rng: Random) -> Exchange:
    """A JSON object with the fields and values that the user names."""
    names = rng.sample(FIELDS, rng.randrange(1, 5))
    makers: tuple[Callable[[], str | int | bool], ...] = (
        lambda: word(rng),
        lambda: word(rng),
        lambda: rng.randrange(1000),
        lambda: rng.choice((True, False)),
    )
    value = {name: rng.choice(makers)() for name in names}
    said = [f"{name} is {json.dumps(item).strip(chr(34))}" for name, item in value.items()]
    facts = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    forms = (
        "Make a JSON object where {}.",
        "Write JSON where {}.",
        "Give me a JSON object in which {}.",
        "JSON please: {}.",
        "Answer in JSON: {}.",
    )
    question = rng.choice(forms).format(facts)
    turns = (Turn("user", question), Turn("assistant", json.dumps(value)))
    return Exchange(f"fields {facts}", turns, json_equal(value))


def json_array(rng: Random) -> Exchange:
    """A JSON array of some things of a kind, all different."""
    kind, items = rng.choice((("colors", words.COLORS), ("animals", words.ANIMALS), ("fruits", words.FRUITS)))
    count = rng.randrange(2, 8)
    shown = rng.choice((str(count), words.NUMBER_WORDS[count - 1]))
    forms = (
        "Give me a JSON array of {n} {k}.",
        "Write a JSON list of {n} {k}.",
        "Name {n} {k} as JSON.",
        "A JSON array with {n} {k}, please.",
    )
    question = rng.choice(forms).format(n=shown, k=kind)

    def accept(output: str) -> bool:
        """As many different things of the kind as asked for."""
        try:
            value = json.loads(output)
        except ValueError:
            return False
        return isinstance(value, list) and len(value) == len(set(value)) == count and set(value) <= set(items)

    turns = (Turn("user", question), Turn("assistant", json.dumps(rng.sample(items, count))))
    return Exchange(f"array {question}", turns, accept)


def named_things(rng: Random) -> Exchange:
    """Some things of a kind in a sentence."""
    kind, items = rng.choice((("colors", words.COLORS), ("animals", words.ANIMALS), ("fruits", words.FRUITS)))
    count = rng.randrange(2, 8)
    shown = rng.choice((str(count), words.NUMBER_WORDS[count - 1]))
    question = rng.choice(("Name {n} {k}.", "Tell me {n} {k}.", "List {n} {k}.", "Can you name {n} {k}?"))
    question = question.format(n=shown, k=kind)

    def accept(output: str) -> bool:
        """As many different things of the kind as asked for."""
        named = output.rstrip(".").split(", ")
        return len(named) == len(set(named)) == count and set(named) <= set(items)

    turns = (Turn("user", question), Turn("assistant", ", ".join(rng.sample(items, count)) + "."))
    return Exchange(f"named {question}", turns, accept)


def given_name(rng: Random) -> Exchange:
    """The name that the system turn gives to the model."""
    name = rng.choice(words.NAMES) if rng.random() < 0.5 else invented_word(rng).capitalize()
    system = rng.choice(("Your name is {}.", "You are {}, a helpful assistant.", "You are {}.", "You are called {}."))
    question = rng.choice(("Who are you?", "What is your name?", "What's your name?", "Introduce yourself."))
    turns = (Turn("user", question), Turn("assistant", f"I am {name}. How can I help you?"))
    return Exchange(f"given {name} {system}", turns, any_of(turns[-1].content), system=system.format(name))


def in_json(exchange: Exchange) -> Exchange:
    """The same exchange with its answer wrapped into a JSON object."""
    answer = json.dumps({"answer": exchange.answer}, ensure_ascii=False)

    def accept(output: str) -> bool:
        """An object whose only value is a right answer."""
        try:
            value = json.loads(output)
        except ValueError:
            return False
        return isinstance(value, dict) and [*value] == ["answer"] and exchange.accept(value["answer"])

    return Exchange(f"in json {exchange.key}", (*exchange.turns[:-1], Turn("assistant", answer)), accept)
