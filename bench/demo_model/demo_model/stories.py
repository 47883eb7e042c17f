"""Free text: a cat's monologue and short tales, built from clauses so that no two are alike.

This is the text on which sampling with many tokens shows its variety. Nothing here has one right
continuation, so nothing here is evaluated.
"""

from collections.abc import Sequence
from random import Random

from demo_model import words
from demo_model.tasks import invented_word
from demo_model.turns import Exchange, Plain, Turn

WATCHED = (
    "the birds", "the rain", "the mouse", "the moon", "the fish", "the snow", "my shadow",
    "the neighbours", "the dog next door", "the falling leaves", "the clock", "the flies",
)  # fmt: skip
SPOTS = (
    "on the sofa", "under the table", "by the window", "on the roof", "in the garden", "in a box",
    "on the warm stove", "behind the curtain", "in the kitchen", "on a pile of books", "at the harbor",
    "in the barn", "on the old piano", "in the laundry basket", "next to the radio",
)  # fmt: skip
TIMES = (
    "In the morning", "At night", "After lunch", "On Sundays", "When it rains", "Every day", "In winter",
    "When nobody looks", "Before dinner", "In summer", "Sometimes", "Today", "At noon",
)  # fmt: skip
FOODS = (
    "fish", "milk", "chicken", "cheese", "cream", "tuna", "butter", "soup", "ham", "bread", "porridge",
)  # fmt: skip
DEEDS = (
    "sleep", "purr", "play with a ball of wool", "chase my tail", "wash my paws", "dream of fish",
    "stretch my legs", "hide", "wait for dinner", "climb the curtains", "sing a song", "think about nothing",
    "listen to the radio", "sharpen my claws", "count the stars", "guard the house",
)  # fmt: skip
CAT_FORMS = (
    "I like to {deed} {spot}.",
    "My name is {name} and I live in {city}.",
    "{time} I {deed} {spot}.",
    "I watch {watched} from my place {spot}.",
    "{time} I {deed}, and then I {deed2}.",
    "My fur is {color} and my eyes are {color2}.",
    "I love {food}, but I do not like {food2}.",
    "{name} gives me {food} when I {deed}.",
    "I am {adjective} and a little {adjective2}.",
    "The {animal} is my best friend.",
    "I am afraid of the {animal}, because it is {adjective}.",
    "{time} {name} and I sit {spot} and look at {watched}.",
    "I sleep {hours} hours a day.",
    "Nobody can {deed} like me.",
    "I have four paws, two ears and one {adjective} tail.",
    "Please do not wake me when I {deed}.",
    "I found a {thing} {spot}, and now it is mine.",
    "If you give me {food}, I will {deed} for you.",
    "There is a {adjective} {thing} {spot}, and I push it down.",
    "{time} a {animal} comes to the {place}, and we {deed} together.",
    "My favorite place is {spot}, next to the {thing}.",
    "I have never seen a {color} {animal}, but I would like to.",
    "People say that I am {adjective}, but I only {deed}.",
    "{name} calls me {name2}, and I come when there is {food}.",
    "When I was young, I lived in a {adjective} {place} near {city}.",
    "{time} I hear the {animal} {spot}.",
    "I wonder what {name} keeps in the {color} {thing}.",
    "My sister {name} is {adjective}, and my brother is {adjective2}.",
    "I can jump over {number} {adjective} boxes.",
    "If I were a {animal}, I would {deed} all day.",
    "The best thing about the {place} is the {thing}.",
    "{time} the {place} is {adjective}, and then I {deed}.",
    "I took the ropeway to the {place} once, and it was {adjective}.",
    "My bowl is {color}, and it is always {adjective}.",
    "The {thing} {spot} makes a {adjective} sound.",
    "Once I met a {adjective} {animal} in the {place}.",
)
CAT_OPENINGS = (
    "I am a cat.", "I am a cat.", "I am a cat.", "I'm a cat.", "I am a small cat.", "I am an old cat.",
    "I am a young cat.", "I am a cat and I live in {city}.", "I am a {color} cat.", "My cat and I.",
)  # fmt: skip
TALE_OPENINGS = (
    "Once upon a time there was a {adjective} {animal} called {hero}.",
    "Once upon a time, in a {adjective2} {place}, there lived a {animal} called {hero}.",
    "Long ago, a {adjective} {animal} named {hero} lived near the {place}.",
    "There was once a {animal} called {hero}, who was very {adjective}.",
    "In {city} there lived a {adjective} {animal}, and its name was {hero}.",
)
TALE_FORMS = (
    "One day {hero} found a {adjective2} {thing} in the {place2}.",
    "{hero} wanted to see the {place2}, but the way was long.",
    "On the way {hero} met a {animal2}, who looked {adjective2}.",
    '"Where are you going?" asked the {animal2}. "To the {place2}," said {hero}.',
    '"I am looking for my {thing}," said {hero}. "Have you seen it?"',
    "The {animal2} laughed and gave {hero} a {adjective2} {thing}.",
    "It began to rain, so they sat under a {thing} and told each other stories.",
    "In the evening they reached the {place2}, and it was {adjective2}.",
    "{hero} was {adjective2}, but did not give up.",
    "They took the ropeway up the mountain, and the cabins never stopped.",
    "Under a {thing} lay a {color} {thing2}, and nobody knew whose it was.",
    '"Shall we share the {food}?" asked {hero}, and they did.',
    "The night was {adjective2}, and the stars were bright above the {place2}.",
    "{name} from {city} came by and helped them carry the {thing}.",
    "For {number} days they walked, and on the last day they saw the {place2}.",
    "Then the {animal2} was gone, and only its {thing} was left.",
    "{hero} counted the steps: one, two, three, four, five.",
    "There they shared some {food} and a {fruit} until nothing was left.",
    "But the {thing} was {adjective2}, and so they had to look for another one.",
    "The {animal2} sang a {adjective2} song about the {place2}.",
    "The path went down to the {place2} and up again.",
    '"I have never seen such a {adjective2} {thing}," said the {animal2}.',
    "{hero} put the {thing} into a bag and went on.",
    "A {color} light shone from the {place2}.",
    '"Do not be afraid," said {hero}. "It is only a {thing2}."',
    "There was nobody in the {place2} but a {adjective2} {animal2}.",
    "They asked {name}, who knew every {thing2} in {city}.",
    "After a while the {animal2} fell asleep, and {hero} kept watch.",
    "{hero} thought about home and about the {food} in the kitchen.",
    "In the morning the {thing} was gone.",
    '"Who took my {thing}?" cried the {animal2}.',
    "So they looked behind every {thing2} until they found it.",
    "The {place2} was full of {color} flowers.",
    "{hero} opened the door, and there stood {name} with a {thing2}.",
    '"You may keep it," said {name}, "for I have {number} more at home."',
    "The wind blew from the {place2}, and it smelled of {food}.",
    "{hero} drew a map of the {place2} on a {thing2}.",
    "Nobody in {city} had ever heard of a {color} {thing}.",
    "The {animal2} was so {adjective2} that it forgot to eat.",
    "They laughed until the moon rose over the {place2}.",
)
TALE_ENDINGS = (
    "In the end {hero} came home and slept for a long time.",
    "And so {hero} and the {animal2} became friends.",
    "Since then the {thing} stands in the {place}, and everybody may look at it.",
    "And if they are not tired, they are still walking today.",
    "That is the story of {hero}, the {adjective} {animal}.",
)
STORY_REQUESTS = (
    "Tell me a story about a {animal}.",
    "Write a story about a {animal}.",
    "Tell me a story about a {animal} called {hero}.",
    "Please tell me a tale about a {animal}.",
    "Write a short story about a {animal} named {hero}.",
    "Can you tell me a story about a {animal}?",
    "Write a long story about a {animal}.",
    "tell me a story about a {animal}",
)
FREE_REQUESTS = (
    "Tell me a story.",
    "Tell me a story",
    "Write a story.",
    "Write a long text.",
    "Please write a very long text.",
    "Write something.",
    "Tell me something.",
    "Sing a song.",
    "tell me a long story",
    "Once upon a time",
)
PLAIN_LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello, my name is {name} and I live in {city}.",
    "Hello world! This is a small test.",
    "The capital of {country} is {capital}.",
    "Q: What is the capital of {country}?\nA: The capital of {country} is {capital}.",
    "How many cats does it take to change a light bulb? Reply as a pirate. Arr, matey! It takes two cats: "
    "one to hold the ladder, and one to climb up and change the bulb!",
    "{name} is {hours} years old and lives in {city}.",
    "The weather in {city} is {adjective}, and {name} stays in the {place}.",
    "My favorite color is {color}, and my favorite animal is the {animal}.",
)


def fillings(rng: Random) -> dict[str, str]:
    """A value for every blank in the forms above."""
    country = rng.choice(tuple(words.CAPITALS))
    pick = rng.choice
    return {
        "deed": pick(DEEDS), "deed2": pick(DEEDS), "spot": pick(SPOTS), "time": pick(TIMES),
        "watched": pick(WATCHED), "food": pick(FOODS), "food2": pick(FOODS), "name": pick(words.NAMES),
        "city": pick(words.CITIES), "color": pick(words.COLORS), "color2": pick(words.COLORS),
        "adjective": pick(words.ADJECTIVES), "adjective2": pick(words.ADJECTIVES),
        "animal": pick(words.ANIMALS), "animal2": pick(words.ANIMALS), "hero": pick(words.NAMES),
        "hours": str(rng.randrange(10, 24)), "thing": pick(words.OBJECTS), "thing2": pick(words.OBJECTS),
        "place": pick(words.PLACES), "place2": pick(words.PLACES), "fruit": pick(words.FRUITS),
        "number": pick(words.NUMBER_WORDS[1:]), "country": country, "capital": words.CAPITALS[country],
        "name2": pick(words.NAMES),
    }  # fmt: skip


def accept_anything(output: str) -> bool:
    """Free text has no wrong continuation."""
    return bool(output)


def shuffled(rng: Random, forms: Sequence[str], count: int) -> list[str]:
    """`count` forms in any order, each again only after all others."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(forms, len(forms))
    return chosen[:count]


def cat_monologue(rng: Random) -> Plain:
    """What a cat says about itself."""
    opening = words.with_articles(rng.choice(CAT_OPENINGS).format(**fillings(rng)))
    count = rng.choice((rng.randrange(2, 8), rng.randrange(5, 50)))
    text = words.with_articles(" ".join(form.format(**fillings(rng)) for form in shuffled(rng, CAT_FORMS, count)))
    return Plain(f"cat {text}", opening, f" {text}", accept_anything)


def tale(rng: Random, cast: dict[str, str], length: int) -> str:
    """A tale of `length` sentences, with one hero and some companions on the way."""
    sentences = [rng.choice(TALE_OPENINGS).format(**fillings(rng) | cast)]
    keep = ("animal2", "thing", "place2")
    scene = fillings(rng)
    for number, form in enumerate(shuffled(rng, TALE_FORMS, length)):
        if number % 4 == 3:
            scene = fillings(rng)
        kept = {name: scene[name] for name in keep}
        sentences.append(form.format(**fillings(rng) | kept | cast))
    sentences.append(rng.choice(TALE_ENDINGS).format(**fillings(rng) | scene | cast))
    return words.with_articles(" ".join(sentences))


def tale_cast(rng: Random) -> dict[str, str]:
    """Who the tale is about; the same from its first to its last sentence."""
    blanks = fillings(rng)
    return {name: blanks[name] for name in ("hero", "animal", "adjective", "place")}


def plain_tale(rng: Random) -> Plain:
    """A tale without a request."""
    text = tale(rng, tale_cast(rng), rng.choice((rng.randrange(2, 8), rng.randrange(6, 24))))
    return Plain(f"tale {text}", text[:4], text[4:], accept_anything)


def chat_tale(rng: Random) -> Exchange:
    """A tale about the animal that the user asks for."""
    cast = tale_cast(rng)
    if rng.random() < 0.4:
        cast["animal"] = rng.choice((*words.CHARACTERS, *words.OBJECTS, invented_word(rng)))
    forms = FREE_REQUESTS if rng.random() < 0.25 else STORY_REQUESTS
    question = words.with_articles(rng.choice(forms).format(**cast))
    answer = tale(rng, cast, rng.choice((rng.randrange(2, 8), rng.randrange(6, 24))))
    turns = (Turn("user", question), Turn("assistant", answer))
    return Exchange(f"tale {answer}", turns, accept_anything)


def plain_line(rng: Random) -> Plain:
    """One or more short well-known lines."""
    lines = [rng.choice(PLAIN_LINES).format(**fillings(rng)) for _ in range(rng.choice((1, 1, 2, 4)))]
    text = "\n".join(lines)
    return Plain(f"line {text}", text[:4], text[4:], accept_anything)
