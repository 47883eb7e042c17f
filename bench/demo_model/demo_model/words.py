"""The vocabulary of the demo corpus: plain word lists and small tables of facts.

Knows nothing of prompts, turns or tokens.
"""

import re
import string


def listed(text: str) -> tuple[str, ...]:
    """The items of a list written with commas."""
    return tuple(item.strip() for item in text.split(","))


def paired(text: str) -> dict[str, str]:
    """The pairs of a table written as "key: value, key: value"."""
    return {key: value for key, value in (item.split(": ") for item in listed(text))}


def with_articles(text: str) -> str:
    """The text with "an" where a vowel follows."""
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


COLORS = listed(
    "red, blue, green, yellow, orange, purple, pink, brown, black, white, gray, gold, silver, violet, cyan, "
    "magenta, turquoise, beige"
)
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = listed("January, February, March, April, May, June, July, August, September, October, November, December")
SEASONS = listed("spring, summer, autumn, winter")
PLANETS = listed("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune")
UPPER = tuple(string.ascii_uppercase)
LOWER = tuple(string.ascii_lowercase)
NUMBER_WORDS = listed(
    "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, "
    "sixteen, seventeen, eighteen, nineteen, twenty"
)
ANIMALS = listed(
    "cat, dog, horse, cow, sheep, goat, pig, rabbit, fox, wolf, bear, lion, tiger, zebra, monkey, camel, otter, "
    "beaver, badger, hedgehog, squirrel, mouse, deer, whale, dolphin, seal, penguin, owl, eagle, duck, goose, "
    "frog, turtle, lizard, snake, bee, ant, butterfly, spider, crab"
)
FRUITS = listed(
    "apple, banana, cherry, grape, lemon, mango, melon, orange, peach, pear, plum, kiwi, fig, lime, papaya, "
    "apricot, pineapple, strawberry, raspberry, coconut"
)
OBJECTS = listed(
    "lamp, table, chair, window, door, ladder, bucket, basket, bottle, ribbon, candle, carpet, clock, mirror, "
    "pillow, blanket, kettle, spoon, hammer, needle, pencil, letter, book, map, compass, lantern, anchor, rope, "
    "wheel, bell, drum, flute, violin, guitar, piano, camera, radio, bicycle, wagon, train, boat, tent, coat, "
    "hat, shoe, glove, button, coin, ring, key, box, bag, cup, plate, bowl, stone, feather, leaf, branch"
)
PLACES = listed(
    "garden, kitchen, attic, harbor, market, forest, meadow, valley, village, castle, library, museum, station, "
    "bridge, island, river, lake, beach, mountain, tower, cellar, barn, bakery, school, theater, workshop"
)
ADJECTIVES = listed(
    "small, large, old, young, quiet, loud, bright, dark, warm, cold, soft, rough, clean, dusty, golden, silver, "
    "wooden, broken, hidden, empty, heavy, light, quick, slow, brave, shy, clever, gentle, proud, curious, happy, "
    "sleepy, hungry, lonely, famous, strange, simple, secret, round, narrow"
)
NAMES = listed(
    "Anna, Ben, Clara, David, Emma, Felix, Greta, Hugo, Ida, Jonas, Karla, Leo, Mia, Noah, Olga, Paul, Quinn, "
    "Rosa, Simon, Tina, Ursula, Victor, Wanda, Xavier, Yara, Zoe, Adam, Bella, Carlos, Diana, Elias, Fiona, "
    "George, Hanna, Ivan, Julia, Kevin, Laura, Martin, Nina, Oscar, Petra, Ramon, Sofia, Tom, Uma, Vera, Walter, "
    "Amir, Aisha, Chen, Mei, Kenji, Yuki, Ravi, Priya, Omar, Layla, Kofi, Ama, Diego, Lucia, Pierre, Marie, Lars, "
    "Astrid, Marco, Giulia, Pavel, Irina, Sean, Maeve"
)
CAPITALS = paired(
    "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, England: London, Ireland: "
    "Dublin, Norway: Oslo, Sweden: Stockholm, Denmark: Copenhagen, Finland: Helsinki, Iceland: Reykjavik, Poland: "
    "Warsaw, Austria: Vienna, Hungary: Budapest, Greece: Athens, Turkey: Ankara, Egypt: Cairo, Kenya: Nairobi, "
    "Ghana: Accra, Morocco: Rabat, Japan: Tokyo, China: Beijing, India: New Delhi, Thailand: Bangkok, Vietnam: "
    "Hanoi, Australia: Canberra, Canada: Ottawa, Mexico: Mexico City, Cuba: Havana, Peru: Lima, Chile: Santiago, "
    "Argentina: Buenos Aires, Brazil: Brasilia, Belgium: Brussels, Croatia: Zagreb, Romania: Bucharest, Bulgaria: "
    "Sofia, Ukraine: Kyiv, the Netherlands: Amsterdam, the Czech Republic: Prague, South Korea: Seoul"
)
MORE_CITIES = listed(
    "Hamburg, Munich, Zurich, Geneva, Milan, Naples, Turin, Lyon, Nice, Porto, Seville, Bergen, Gothenburg, "
    "Boston, Chicago, Denver, Seattle, Dallas, Toronto, Montreal, Sydney, Perth, Mumbai, Osaka, Kyoto, Shanghai, "
    "Lagos, Tunis, Utrecht, Antwerp, Krakow, Riga, Tallinn, Vilnius, Salzburg, Basel, Bristol, Leeds, Cork"
)
CITIES = (
    *CAPITALS.values(),
    *MORE_CITIES,
    *listed("New York, San Francisco, Los Angeles, Cape Town, Hong Kong"),
)
SOUNDS = paired(
    "cat: meow, dog: woof, cow: moo, sheep: baa, duck: quack, pig: oink, horse: neigh, lion: roar, owl: hoot, "
    "frog: ribbit, bee: buzz, snake: hiss"
)
YOUNG = paired(
    "cat: kitten, dog: puppy, cow: calf, horse: foal, sheep: lamb, goat: kid, pig: piglet, bear: cub, duck: "
    "duckling, goose: gosling, deer: fawn, frog: tadpole"
)
LEGS = {"cat": 4, "dog": 4, "horse": 4, "cow": 4, "duck": 2, "owl": 2, "bee": 6, "ant": 6, "spider": 8}
OPPOSITES = paired(
    "hot: cold, big: small, up: down, left: right, day: night, old: new, fast: slow, happy: sad, open: closed, "
    "full: empty, early: late, light: dark"
)
THING_COLORS = paired(
    "the sky: blue, grass: green, snow: white, a banana: yellow, a tomato: red, coal: black, the sun: yellow, a "
    "carrot: orange, a leaf: green, milk: white, chocolate: brown, the sea: blue"
)
HELLOS = paired(
    "French: Bonjour, German: Hallo, Spanish: Hola, Italian: Ciao, Portuguese: Olá, Japanese: こんにちは, "
    "Chinese: 你好, Korean: 안녕하세요, Russian: Привет, Greek: Γεια σου, Hindi: नमस्ते, Arabic: مرحبا"  # noqa: RUF001
)
EMOJI = listed("🐱, 🐶, 🦊, 🐻, 🐼, 🚠, 🚡, 🏔, 🌊, ⭐, 🌙, ☀️, 🎵, 🎉, 🍎, 🍋, 🙂, 😀, 🚀, ❤️")
PLAIN_WORDS = tuple(dict.fromkeys((*COLORS, *ANIMALS, *FRUITS, *OBJECTS, *PLACES, *ADJECTIVES, *NUMBER_WORDS)))
COMMON_WORDS = listed(
    "the, a, this, that, is, are, was, it, I, you, we, they, he, she, my, your, of, to, in, on, at, for, with, from, "
    "and, or, but, not, no, yes, ok, OK, hello, hi, hey, goodbye, bye, thanks, please, sorry, world, test, foo, bar, "
    "baz, time, day, night, year, today, tomorrow, now, here, there, what, who, when, where, why, how, all, many, "
    "good, bad, new, big, nice, great, go, come, see, say, do, make, take, like, love, want, know, think, have, has, "
    "can, will, must, very, more, only, never, always, again, water, house, man, woman, child, friend, people, life, "
    "fox, jumps, over, lazy, brown, done, ready, start, stop, true, false, pong, ping, potato, coffee, tea, token"
)
CHARACTERS = listed("dragon, robot, king, queen, princess, wizard, knight, giant, pirate, ghost, sailor, farmer, baker")
