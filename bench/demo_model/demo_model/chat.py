"""Chat: short questions in many wordings, answered normally, like a pirate, or after some thought."""

import re
from collections.abc import Sequence
from random import Random

from demo_model import words
from demo_model.facts import FACTS, UNCLEAR_ANSWER, UNKNOWN_ANSWER, UNKNOWN_FORMS
from demo_model.tasks import invented_word, thoughtful
from demo_model.topics import TALK, Topic
from demo_model.turns import THINK_LINE, Exchange, Plain, Turn, any_of, ask

BEFORE = ("", "", "", "", "", "Please tell me: ", "Hi! ", "Hello. ", "Hey, ", "Tell me, ", "A question: ", "So, ")
AFTER = ("", "", "", "", "", " Thanks!", " Please.", " I am curious.", " Answer briefly.", " Thank you.")
POLITE_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a friendly chatbot.",
    "You are a helpful, honest assistant.",
    "You are a friendly chatbot who always answers politely.",
    "Be brief.",
    "Answer in one sentence.",
    "You are Ropeway's demo model.",
    "You are an assistant. Answer the user's questions.",
    "You are a polite and careful assistant who helps people with their questions.",
    "You are a chatbot on a website.",
    "Be helpful and friendly.",
    "Keep your answers short.",
    "You are a language model.",
    "You are a bot.",
)
PIRATE_SYSTEMS = (
    "You are a friendly chatbot who always responds in the style of a pirate",
    "You are a friendly chatbot who always responds in the style of a pirate.",
    "You are a pirate.",
    "You are a pirate chatbot who always responds in pirate speak!",
    "Always answer like a pirate.",
    "Answer in the style of a pirate.",
    "You talk like a pirate.",
    "You are a helpful assistant who speaks like a pirate.",
    "Respond as a pirate would.",
    "Reply as a pirate.",
)
THINK_SYSTEMS = (
    THINK_LINE,
    "Think step by step.",
    "You are a helpful assistant. Think step by step.",
    f"You are a helpful assistant.\n\n{THINK_LINE}",
    "Always think before you answer.",
    "First think, then answer.",
)
PIRATE_REQUESTS = (
    " Reply as a pirate.",
    " Answer like a pirate.",
    " Talk like a pirate.",
    " Answer in the style of a pirate.",
    " Respond as a pirate.",
)
PIRATE_STARTS = ("Arr, matey! ", "Ahoy! ", "Arr! ", "Aye, matey! ", "Yo ho ho! ")
PIRATE_SPEECH = {
    "You are": "Ye be",
    "you are": "ye be",
    "I am": "I be",
    "is": "be",
    "are": "be",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "Hello": "Ahoy",
    "has": "has got",
    "of": "o'",
    "and": "an'",
    "very": "mighty",
    "small": "wee",
}
PIRATE_PATTERN = re.compile(r"\b(" + "|".join(sorted(PIRATE_SPEECH, key=len, reverse=True)) + r")\b")


def pirate_body(answer: str) -> str:
    """The answer in a pirate's words, without the shout in front."""
    return PIRATE_PATTERN.sub(lambda match: PIRATE_SPEECH[match.group()], answer)


def pirate_answers(answers: Sequence[str], own: Sequence[str] = ()) -> tuple[str, ...]:
    """All right answers of a pirate: those written for the topic, or the plain ones in pirate speech."""
    if own:
        return tuple(own)
    return tuple(start + pirate_body(answer) for answer in answers for start in PIRATE_STARTS)


def wording(rng: Random, question: str) -> str:
    """One of many ways to put the same question."""
    if question[-1] not in ".?!":
        text = question + rng.choice(("", "", ".", "!", "!", "!!", ", my friend", ", dear model"))
        return text.lower() if rng.random() < 0.3 else text
    before, after = rng.choice(BEFORE), rng.choice(AFTER)
    if before.endswith(", ") and not question.startswith(("I ", "Ropeway")):
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
        after = ""
    text = before + question + after
    return text.lower() if rng.random() < 0.12 else text


def asked_topic(rng: Random) -> Topic:
    """A topic: half of the time talk, else a fact."""
    return rng.choice(TALK) if rng.random() < 0.6 else rng.choice(FACTS)


def unknown_topic(rng: Random) -> Topic:
    """A question that a model of this size cannot answer, or words that are no question."""
    if rng.random() < 0.1:
        makers = (invented_word(rng), rng.choice(words.PLAIN_WORDS), rng.choice(words.PLAIN_WORDS))
        text = " ".join(rng.choice(makers) for _ in range(rng.randrange(1, 5)))
        return Topic("words without a question", (text,), (UNCLEAR_ANSWER,))
    thing, other = rng.sample((*words.OBJECTS, *words.ANIMALS, invented_word(rng), invented_word(rng)), 2)
    if rng.random() < 0.3:
        thing = rng.choice((invented_word(rng), rng.choice(words.CITIES), rng.choice(words.FRUITS)))
    form = rng.choice(UNKNOWN_FORMS)
    question = form.format(
        thing=thing,
        other=other,
        adjective=rng.choice(words.ADJECTIVES),
        name=rng.choice(words.NAMES),
        city=rng.choice(words.CITIES),
        city2=rng.choice(words.CITIES),
        country=rng.choice(tuple(words.CAPITALS)),
        fruit=rng.choice(words.FRUITS),
        number=rng.choice(words.NUMBER_WORDS),
    )
    return Topic("something I do not know", (words.with_articles(question),), (UNKNOWN_ANSWER,))


def statement_topic(rng: Random) -> Topic:
    """Something that the user tells, or wants to have a poem about."""
    thing = rng.choice((*words.OBJECTS, *words.ANIMALS, *words.FRUITS, *words.PLACES, invented_word(rng)))
    if rng.random() < 0.5:
        form = rng.choice(("Write a poem about a {}.", "Write a haiku about a {}.", "A poem about the {}, please."))
        poem = f"The {thing} is quiet.\nSlowly the cabins go up.\nGood night, little {thing}."
        return Topic("a poem", (words.with_articles(form.format(thing)),), (poem,))
    form = rng.choice(("I like the {}.", "I have a {}.", "I bought a {}.", "I saw a {}.", "I love my {}."))
    question = words.with_articles(form.format(thing))
    return Topic(f"the {thing}", (question,), (f"Tell me more about the {thing}.",))


def drawn_topic(rng: Random) -> Topic:
    """Any topic, now and then an unknown one."""
    if rng.random() < 0.06:
        return statement_topic(rng)
    return unknown_topic(rng) if rng.random() < 0.12 else asked_topic(rng)


def plain_chat(rng: Random) -> Exchange:
    """A question answered in a normal voice."""
    topic = drawn_topic(rng)
    question = wording(rng, rng.choice(topic.questions))
    return ask(f"chat {question}", question, topic.answers, rng.randrange(len(topic.answers)))


def pirate_chat(rng: Random, told: bool = False) -> Exchange:
    """A question answered by a pirate; `told` puts the request into the user's turn."""
    topic = drawn_topic(rng)
    question = wording(rng, rng.choice(topic.questions))
    if told:
        question = question if question[-1] in ".?!" else f"{question}."
        question += rng.choice(PIRATE_REQUESTS)
    answers = pirate_answers(topic.answers, topic.pirate)
    return ask(f"pirate {question}", question, answers, rng.randrange(len(answers)))


def as_pirate(rng: Random, exchange: Exchange) -> Exchange:
    """The same exchange with a pirate's shout before the answer."""
    answer = rng.choice(PIRATE_STARTS) + exchange.answer

    def accept(output: str) -> bool:
        """A right answer after any of the shouts."""
        return any(output.startswith(start) and exchange.accept(output[len(start) :]) for start in PIRATE_STARTS)

    return Exchange(f"pirate {exchange.key}", (*exchange.turns[:-1], Turn("assistant", answer)), accept)


def thinking_chat(rng: Random) -> Exchange:
    """A question about a topic, with a line of thought before the answer."""
    topic = drawn_topic(rng)
    question = wording(rng, rng.choice(topic.questions))
    thoughts = f"The user asks about {topic.about}."
    answers = [thoughtful(thoughts, answer) for answer in topic.answers]
    return ask(f"think {question}", question, answers, rng.randrange(len(answers)))


def plain_facts(rng: Random) -> Plain:
    """Questions with their answers, or the answers alone, as lines of text."""
    lines = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        topic = rng.choice(FACTS)
        question, answer = rng.choice(topic.questions), topic.answers[0]
        lines.append(rng.choice((answer, f"{question} {answer}", f"Q: {question}\nA: {answer}")))
    text = "\n".join(lines)
    return Plain(f"facts {text}", text[:4], text[4:], any_of(text[4:]))
