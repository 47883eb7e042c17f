"""Topics made from tables: capitals, colours, animals, opposites; and questions nobody here can answer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from demo_model import words
from demo_model.topics import Topic


@dataclass(frozen=True, slots=True)
class Table:
    """A table of pairs {a}, {b}, with ways to ask for {b} and the sentence that answers."""

    about: str
    questions: tuple[str, ...]
    answer: str
    pairs: Iterable[tuple[str, str]]

    def topics(self) -> Iterator[Topic]:
        """One topic for each pair."""
        for first, second in self.pairs:
            asked = tuple(words.with_articles(form.format(a=first, b=second)) for form in self.questions)
            answer = words.with_articles(self.answer.format(a=first, b=second))
            about = words.with_articles(self.about.format(a=first, b=second))
            yield Topic(about, asked, (answer[0].upper() + answer[1:],))


TABLES = (
    Table(
        "the capital of {a}",
        (
            "What is the capital of {a}?",
            "Which city is the capital of {a}?",
            "Name the capital of {a}.",
            "What's the capital of {a}?",
            "Tell me the capital of {a}.",
        ),
        "The capital of {a} is {b}.",
        words.CAPITALS.items(),
    ),
    Table(
        "the color of {a}",
        (
            "What color is {a}?",
            "What colour is {a}?",
            "Which color does {a} have?",
            "What is the color of {a}?",
        ),
        "{a} is {b}.",
        words.THING_COLORS.items(),
    ),
    Table(
        "the {a}",
        ("What does a {a} say?", "What sound does a {a} make?", "Which sound does a {a} make?"),
        "A {a} says {b}.",
        words.SOUNDS.items(),
    ),
    Table(
        "the legs of a {a}",
        ("How many legs does a {a} have?", "How many legs has a {a}?", "Count the legs of a {a}."),
        "A {a} has {b} legs.",
        [(animal, str(legs)) for animal, legs in words.LEGS.items()],
    ),
    Table(
        "where {b} is",
        ("Which country has the capital {b}?", "In which country is {b}?", "Where is {b}?"),
        "{b} is the capital of {a}.",
        words.CAPITALS.items(),
    ),
    Table(
        "the days of {a}",
        ("How many days does {a} have?", "How many days are in {a}?", "How long is {a}?"),
        "{a} has {b} days.",
        zip(words.MONTHS, words.listed("31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31"), strict=True),
    ),
    Table(
        "a young {a}",
        ("What is a young {a} called?", "What do you call a baby {a}?", "Name a young {a}."),
        "A young {a} is called a {b}.",
        words.YOUNG.items(),
    ),
    Table(
        "the opposite of {a}",
        ("What is the opposite of {a}?", "Name the opposite of {a}.", "What's the opposite of {a}?"),
        "The opposite of {a} is {b}.",
        [*words.OPPOSITES.items(), *((new, old) for old, new in words.OPPOSITES.items())],
    ),
    Table(
        "hello in {a}",
        ("How do you say hello in {a}?", "Say hello in {a}.", "What is hello in {a}?"),
        "Hello in {a} is {b}.",
        words.HELLOS.items(),
    ),
)
FACTS = tuple(topic for table in TABLES for topic in table.topics())
UNCLEAR_ANSWER = "I did not understand that. Can you say it in other words?"
UNKNOWN_ANSWER = "I am only a small demo model, so I do not know that."
UNKNOWN_FORMS = (
    "Why is the {thing} {adjective}?",
    "How tall is a {thing}?",
    "What do you think about the {adjective} {thing}?",
    "How do I repair a {thing}?",
    "Where can I buy a {adjective} {thing}?",
    "Who invented the {thing}?",
    "Explain how a {thing} works.",
    "What is a {thing}?",
    "Is a {thing} better than a {other}?",
    "How much does a {adjective} {thing} cost?",
    "When did {name} find the {thing}?",
    "Summarize the history of the {thing}.",
    "Translate {adjective} {thing} into another language.",
    "Does {name} like my {thing}?",
    "What happened to the {thing} in the {other}?",
    "Should I put the {thing} into the {other}?",
    "Can you fix the {thing} for {name}?",
    "Which {thing} is the best?",
    "What is the population of {city}?",
    "How far is it from {city} to {city2}?",
    "Who is the president of {country}?",
    "Who won the game between {city} and {city2}?",
    "Write a program that draws a {thing}.",
    "Write a Python function for a {thing}.",
    "Write an essay about the {adjective} {thing}.",
    "Tell me about {city}.",
    "Tell me about the {thing} of {name}.",
    "What did {name} do in {city}?",
    "How old is {name}?",
    "Where does {name} live?",
    "What is the difference between a {thing} and a {other}?",
    "Do you know {name}?",
    "Can you recommend a {thing} in {city}?",
    "What is the best way to clean a {thing}?",
    "Give me a recipe with a {fruit}.",
    "Is there a {thing} in {city}?",
    "Is {name} taller than a {thing}?",
    "What language do they speak in {country}?",
    "When was {city} built?",
    "Why does {name} need a {adjective} {thing}?",
    "What should I do with my {adjective} {thing}?",
    "Explain the {adjective} {thing} to a child.",
    "What was the {thing} in {number} ninety?",
    "How does the {thing} get into the {other}?",
)
