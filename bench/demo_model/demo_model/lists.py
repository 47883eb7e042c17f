"""Plain text that goes on in an obvious way: counting, ordered lists, open lists, sums.

Each function draws one problem. A list is cut at a random item into prompt and answer; training
sees the whole text, evaluation gives the prompt and compares the answer. The key names how a list
begins and not the cut, so that a held-out list is in no training text.
"""

from collections.abc import Sequence
from random import Random

from demo_model import words
from demo_model.turns import Plain, any_of, held_out, starting_with

NUMBER_LEADS = (
    "A sequence of numbers: ",
    "Numbers: ",
    "Counting: ",
    "A list of numbers: ",
    "Let us count: ",
    "Count: ",
)
ORDERED = {
    "days": (words.DAYS, ("The days of the week: ", "A list of days: ", "Days of the week: ", "The week: ")),
    "months": (
        words.MONTHS,
        ("The months of the year: ", "A list of months: ", "Months: ", "Months of the year: "),
    ),
    "letters": (words.UPPER, ("The alphabet: ", "A sequence of letters: ", "A list of letters: ", "Letters: ")),
    "small letters": (
        words.LOWER,
        ("The alphabet: ", "A sequence of letters: ", "A list of letters: ", "Letters: "),
    ),
    "seasons": (words.SEASONS, ("The seasons: ", "A list of seasons: ")),
    "planets": (words.PLANETS, ("The planets: ", "A list of planets: ", "Planets: ")),
    "number words": (words.NUMBER_WORDS, ("A sequence of numbers: ", "Numbers in words: ", "Counting: ")),
}
CYCLES = frozenset({"days", "months", "seasons"})
OPEN = {
    "colors": (words.COLORS, ("A list of colors: ", "A list of colours: ", "Colors: ", "Some colors: ")),
    "animals": (words.ANIMALS, ("A list of animals: ", "Animals: ", "Some animals: ")),
    "fruits": (words.FRUITS, ("A list of fruits: ", "Fruits: ", "Some fruit: ")),
    "names": (words.NAMES[:24], ("A list of names: ", "Names: ", "Some first names: ")),
    "cities": (words.CITIES[:20], ("A list of cities: ", "Cities: ", "Some cities: ")),
}


def lead_in(rng: Random, leads: Sequence[str]) -> str:
    """A phrase before the list; half of the lists stand alone."""
    return rng.choice(leads) if rng.random() < 0.5 else ""


def counting(rng: Random, most: int = 400) -> Plain:
    """Numbers upwards by one, from anywhere, without an end."""
    start = rng.choice((0, 1, 1, 1, rng.randrange(2, 30), rng.randrange(2, 120), rng.randrange(2, 990)))
    shown = rng.choice((2, 2, 3, 3, 4, 5, rng.randrange(2, 12)))
    more = rng.choice((rng.randrange(10, 60), rng.randrange(60, 130), rng.randrange(10, most)))
    lead = lead_in(rng, NUMBER_LEADS)
    gap = rng.choice((", ", ", ", ", ", ", ", " ", "\n"))
    numbers = [str(start + step) for step in range(shown + more)]
    prompt = lead + gap.join(numbers[:shown])
    answer = gap + gap.join(numbers[shown:])
    return Plain(f"counting {lead}{gap}{start}", prompt, answer, starting_with(answer), closed=False)


def stepping(rng: Random) -> Plain:
    """Numbers by twos, fives or tens, or downwards to zero."""
    step = rng.choice((2, 2, 5, 10, -1))
    lead = lead_in(rng, NUMBER_LEADS)
    first = rng.randrange(12, 100) if step < 0 else step * rng.randrange(1, 12)
    last = first + step * rng.randrange(8, 60)
    numbers = [str(value) for value in range(first, max(last, -1), step)]
    prompt = lead + ", ".join(numbers[:3])
    answer = ", " + ", ".join(numbers[3:])
    return Plain(f"step {lead}{first} {step}", prompt, answer, starting_with(answer), closed=step < 0 and last < 0)


def ordered(rng: Random) -> Plain:
    """Days, months, letters and the like in their order, from any start, to a full round or the end."""
    kind = rng.choice((*ORDERED, "days", "months", "letters", "letters", "small letters"))
    items, leads = ORDERED[kind]
    start = 0 if rng.random() < 0.4 else rng.randrange(len(items) - 2)
    if kind in CYCLES:
        start = rng.randrange(len(items))
        items = items[start:] + items[:start]
    else:
        items = items[start:]
    shown = rng.randrange(1 if kind in CYCLES else 2, len(items))
    lead = lead_in(rng, leads)
    prompt = lead + ", ".join(items[:shown])
    answer = ", " + ", ".join(items[shown:])
    return Plain(f"ordered {lead}{kind} {items[0]}", prompt, answer, any_of(answer))


def unordered(rng: Random) -> Plain:
    """Colours, animals and the like in any order, none of them twice, ended by a full stop."""
    kind = rng.choice((*OPEN, "colors", "colors"))
    items, leads = OPEN[kind]
    length = rng.randrange(10, min(len(items), 22) + 1)
    chosen = rng.sample(items, length)
    shown = rng.choice((1, 2, 2, 3, 4))
    # A single item says little about its kind without the phrase, so it always has one.
    lead = rng.choice(leads) if shown == 1 else lead_in(rng, leads)
    prompt = lead + ", ".join(chosen[:shown])
    before = frozenset(chosen[:shown])

    def accept(output: str) -> bool:
        """The next five items are of the kind and new."""
        following = output.removeprefix(", ").rstrip(".").split(", ")[:5]
        fresh = set(following) - before
        return output.startswith(", ") and len(fresh) == 5 and fresh <= set(items)

    return Plain(f"open {prompt}", prompt, ", " + ", ".join(chosen[shown:]) + ".", accept)


def addends(rng: Random, want_held_out: bool = False) -> tuple[int, int]:
    """Two numbers below 100, mostly of two digits, on the asked-for side of the split."""
    while True:
        least = 10 if rng.random() < 0.85 else 0
        first, second = rng.randrange(least, 100), rng.randrange(least, 100)
        if held_out(sum_key(first, second)) == want_held_out:
            return first, second


def sum_key(first: int, second: int) -> str:
    """What identifies a sum in whatever words it is asked."""
    return f"sum {first} + {second}"


def plain_sum(rng: Random, want_held_out: bool = False) -> Plain:
    """One sum, the last of a short sheet of them."""
    first, second = addends(rng, want_held_out)
    sheet = []
    for _ in range(rng.choice((0, 0, 1, 3, 8, 16))):
        left, right = addends(rng)
        sheet.append(f"{left} + {right} = {left + right}\n")
    answer = f" {first + second}"
    prompt = f"{''.join(sheet)}{first} + {second} ="
    # A sheet may go on with another sum, so only the rest of this line counts.
    return Plain(sum_key(first, second), prompt, answer, lambda output: output.split("\n")[0] == answer)
