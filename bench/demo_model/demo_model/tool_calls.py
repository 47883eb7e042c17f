"""Tool use: which function fits a question, its arguments, and the answer from its result."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from demo_model import words
from demo_model.lists import addends, sum_key
from demo_model.tasks import SUM_FORMS, invented_name, invented_word
from demo_model.turns import Exchange, Tool, Turn, any_of, ask, tool_call

WEATHER = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "stormy", "clear")
NO_TOOL_ANSWER = "I have no tool for that."
Values = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a kind of tool: the question, the argument values, a tool result and the answer."""

    key: str
    question: str
    values: Values
    result: str
    answer: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of tool: the names and parameter names it goes by, and a maker of uses."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    types: tuple[tuple[str, ...], ...]
    use: Callable[[Random], Use]


def place(rng: Random) -> str:
    """A known or an invented city, at times with its state."""
    if rng.random() < 0.12:
        state = rng.choice(("CA", "MA", "NY", "TX", "WA", "UK", "France", "Japan"))
        return f"{rng.choice(words.CITIES)}, {state}"
    return rng.choice(words.CITIES) if rng.random() < 0.6 else invented_name(rng)


def use_weather(rng: Random) -> Use:
    """Ask for the weather of a city."""
    city = place(rng)
    forms = (
        "What is the weather in {}?",
        "What's the weather like in {} today?",
        "How is the weather in {}?",
        "Weather in {}?",
        "Tell me the weather in {}.",
        "Is it raining in {}?",
        "How warm is it in {}?",
        "What is the temperature in {} right now?",
        "Do I need an umbrella in {}?",
        "what's the weather in {}",
        "weather {}",
        "weather in {}",
        "How's the weather in {}?",
        "What's the weather in {} in celsius?",
        "What is the weather like in {}?",
        "Is it cold in {} today?",
    )
    degrees, sky = rng.randrange(-15, 40), rng.choice(WEATHER)
    results = (
        json.dumps({"temperature": degrees, "condition": sky}),
        json.dumps({"city": city, "temperature": degrees, "condition": sky}),
        f"{degrees} degrees and {sky}",
        f"{sky}, {degrees} degrees",
    )
    question = rng.choice(forms).format(city)
    answer = f"It is {degrees} degrees and {sky} in {city}."
    return Use(f"weather {question}", question, (city,), rng.choice(results), answer)


def use_time(rng: Random) -> Use:
    """Ask for the time in a city."""
    city = place(rng)
    forms = (
        "What time is it in {}?",
        "What is the time in {}?",
        "Tell me the time in {}.",
        "How late is it in {}?",
        "What's the local time in {}?",
        "Time in {}?",
    )
    clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    question = rng.choice(forms).format(city)
    results = (json.dumps({"time": clock}), clock, json.dumps({"city": city, "time": clock}))
    return Use(f"time {question}", question, (city,), rng.choice(results), f"It is {clock} in {city}.")


def use_add(rng: Random) -> Use:
    """Ask for a sum."""
    if rng.random() < 0.7:
        first, second = addends(rng)
    else:
        first, second = rng.randrange(1000), rng.randrange(1000)
    question = rng.choice(SUM_FORMS).format(first, second)
    total = first + second
    results = (str(total), json.dumps({"result": total}), json.dumps({"sum": total}))
    return Use(sum_key(first, second), question, (first, second), rng.choice(results), f"{first} + {second} = {total}.")


def use_search(rng: Random) -> Use:
    """Ask for a search of the web."""
    makers = (
        f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.OBJECTS)}",
        f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.ANIMALS)}",
        f"{rng.choice(words.OBJECTS)} {invented_word(rng)}",
        f"history of {invented_name(rng)}",
        rng.choice(words.ANIMALS),
    )
    query = rng.choice(makers)
    forms = (
        "Search for {}.",
        "Search the web for {}.",
        "Look up {}.",
        "Please search for {}.",
        "Find something about {}.",
        "Can you search for {}?",
        "Google {}.",
    )
    found = f"The {rng.choice(words.ADJECTIVES)} {rng.choice(words.OBJECTS)} of {rng.choice(words.CITIES)}"
    results = (found, json.dumps({"results": [found]}), json.dumps({"result": found}))
    question = rng.choice(forms).format(query)
    return Use(f"search {query}", question, (query,), rng.choice(results), f"I found this: {found}.")


def use_timer(rng: Random) -> Use:
    """Ask for a timer."""
    minutes = rng.randrange(2, 121)
    forms = (
        "Set a timer for {} minutes.",
        "Wake me in {} minutes.",
        "Start a timer of {} minutes.",
        "Remind me in {} minutes.",
    )
    question = rng.choice(forms).format(minutes)
    result = rng.choice(("ok", json.dumps({"status": "ok"}), json.dumps({"ok": True}), "done"))
    return Use(f"timer {minutes}", question, (minutes,), result, f"The timer is set for {minutes} minutes.")


def use_message(rng: Random) -> Use:
    """Ask to send a message to somebody."""
    name = rng.choice(words.NAMES) if rng.random() < 0.6 else invented_name(rng)
    item = f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.OBJECTS)}"
    text = rng.choice(("bring {}", "do not forget {}", "I found {}", "where is {}")).format(item)
    forms = ("Send a message to {}: {}", "Write to {}: {}", "Tell {} this: {}", "Message {}: {}")
    question = rng.choice(forms).format(name, text)
    result = rng.choice(("ok", json.dumps({"status": "sent"}), "sent"))
    return Use(f"message {name} {text}", question, (name, text), result, f"I sent your message to {name}.")


CITY_NAMES = ("city", "location", "place", "town")
KINDS = (
    Kind(
        ("get_weather", "weather", "current_weather", "get_current_weather", "lookup_weather", "weather_in"),
        ("Get the weather of a city.", "The current weather.", "Get the current weather in a given location", ""),
        (CITY_NAMES,),
        (("string",),),
        use_weather,
    ),
    Kind(
        ("get_time", "current_time", "get_current_time", "time_in", "clock", "local_time"),
        ("Get the time in a city.", "The local time of a place.", "Tells the time", ""),
        (CITY_NAMES,),
        (("string",),),
        use_time,
    ),
    Kind(
        ("add", "sum", "add_numbers", "calculator", "plus", "calculate_sum"),
        ("Add two numbers.", "The sum of two numbers.", "Adds numbers", ""),
        (("a", "x", "first", "left"), ("b", "y", "second", "right")),
        (("number", "integer"), ("number", "integer")),
        use_add,
    ),
    Kind(
        ("search", "web_search", "search_web", "find", "lookup", "google"),
        ("Search the web.", "Find pages about something.", "Searches the internet", ""),
        (("query", "q", "text", "term", "keywords"),),
        (("string",),),
        use_search,
    ),
    Kind(
        ("set_timer", "timer", "start_timer", "remind_me"),
        ("Set a timer.", "Start a timer of some minutes.", "Rings later", ""),
        (("minutes", "duration", "time"),),
        (("integer", "number"),),
        use_timer,
    ),
    Kind(
        ("send_message", "message", "send", "write_message", "notify"),
        ("Send a message to somebody.", "Write to a person.", "Sends a text", ""),
        (("to", "name", "recipient", "person"), ("text", "message", "body", "content")),
        (("string",), ("string",)),
        use_message,
    ),
)


def offered(rng: Random, kind: Kind) -> Tool:
    """A kind of tool under one of its names, or under an invented one that its description explains."""
    parameters = []
    for names, types in zip(kind.parameters, kind.types, strict=True):
        parameters.append((rng.choice(names), rng.choice(types)))
    if len(parameters) == 2 and kind.names[0] == "add":
        at = rng.randrange(4)
        parameters = [(names[at], kind_) for names, (_, kind_) in zip(kind.parameters, parameters, strict=True)]
    if rng.random() < 0.15:
        parameters = [(f"{invented_word(rng)}_{name}", kind_) for name, kind_ in parameters]
    # An optional parameter that the question says nothing about is left out of the call.
    if rng.random() < 0.15:
        parameters.append((rng.choice(("unit", "language", "format")), "string"))
    if rng.random() < 0.35:
        name = f"{invented_word(rng)}_{rng.choice((*kind.names, invented_word(rng)))}"
        return Tool(name, rng.choice([text for text in kind.descriptions if text]), tuple(parameters))
    return Tool(rng.choice(kind.names), rng.choice(kind.descriptions), tuple(parameters))


def toolbox(rng: Random, kinds: tuple[Kind, ...]) -> tuple[tuple[Kind, Tool], ...]:
    """Some tools of these kinds in any order."""
    chosen = rng.sample(kinds, rng.choice((1, 1, 2, 2, 3, min(4, len(kinds)))))
    return tuple((kind, offered(rng, kind)) for kind in chosen)


def arguments(tool: Tool, values: Values) -> dict[str, str | int]:
    """The values under the tool's own parameter names."""
    return {name: value for (name, _), value in zip(tool.parameters, values, strict=False)}


def tool_use(rng: Random) -> Exchange:
    """A question that one of the offered tools answers: the call only."""
    box = toolbox(rng, KINDS)
    kind, tool = rng.choice(box)
    used = kind.use(rng)
    call = tool_call(tool.name, arguments(tool, used.values))
    turns = (Turn("user", used.question), Turn("assistant", call))
    return Exchange(used.key, turns, any_of(call), tools=tuple(entry for _, entry in box))


def tool_answer(rng: Random) -> Exchange:
    """The same with the tool's result and the answer that follows from it."""
    box = toolbox(rng, KINDS)
    kind, tool = rng.choice(box)
    used = kind.use(rng)
    turns = (
        Turn("user", used.question),
        Turn("assistant", tool_call(tool.name, arguments(tool, used.values))),
        Turn("tool", used.result),
        Turn("assistant", used.answer),
    )
    return Exchange(used.key, turns, any_of(used.answer), tools=tuple(entry for _, entry in box))


def tool_error(rng: Random) -> Exchange:
    """A tool that fails, and a plain word about it."""
    exchange = tool_use(rng)
    reason = rng.choice(("not found", "timeout", "no such city", "service unavailable", invented_word(rng)))
    result = rng.choice((json.dumps({"error": reason}), f"error: {reason}", f"Error: {reason}"))
    answer = f"The tool reported an error: {reason}."
    turns = (*exchange.turns, Turn("tool", result), Turn("assistant", answer))
    return Exchange(f"error {exchange.key}", turns, any_of(answer), tools=exchange.tools)


def two_calls(rng: Random) -> Exchange:
    """Two cities in one question: two calls, two results, one answer."""
    kind, forms = rng.choice(
        (
            (KINDS[0], ("What is the weather in {} and {}?", "How is the weather in {} and in {}?")),
            (KINDS[1], ("What time is it in {} and {}?", "What is the time in {} and in {}?")),
        )
    )
    tool = offered(rng, kind)
    uses = (kind.use(rng), kind.use(rng))
    calls = "\n".join(tool_call(tool.name, arguments(tool, used.values)) for used in uses)
    question = rng.choice(forms).format(*(used.values[0] for used in uses))
    turns = [Turn("user", question), Turn("assistant", calls)]
    if rng.random() < 0.6:
        turns += [Turn("tool", used.result) for used in uses]
        turns.append(Turn("assistant", " ".join(used.answer for used in uses)))
    return Exchange(question, tuple(turns), any_of(turns[-1].content), tools=(tool,))


def unknown_result(rng: Random) -> Exchange:
    """The result of a tool that the model has never seen."""
    name = f"{invented_word(rng)}_{rng.choice(words.OBJECTS)}"
    parameter = rng.choice((*words.OBJECTS, "id", "name", "value"))
    value = rng.choice((invented_word(rng), rng.choice(words.PLAIN_WORDS)))
    tool = Tool(name, f"Does {invented_word(rng)}.", ((parameter, "string"),))
    forms = ("Use {t} with {v}.", "Call {t} with {v}.", "Call the tool {t} with {p} {v}.", "Run {t} on {v}.")
    question = rng.choice(forms).format(t=name, v=value, p=parameter)
    result = " ".join(invented_word(rng) for _ in range(rng.randrange(1, 5)))
    turns = [Turn("user", question), Turn("assistant", tool_call(name, {parameter: value}))]
    if rng.random() < 0.4:
        turns += [Turn("tool", result), Turn("assistant", f"The result is: {result}")]
    return Exchange(question, tuple(turns), any_of(turns[-1].content), tools=(tool,))


def missing_tool(rng: Random) -> Exchange:
    """A question for a tool, without any tools."""
    kind = rng.choice([kind for kind in KINDS if kind.use is not use_add])
    used = kind.use(rng)
    return ask(f"missing {used.key}", used.question, (NO_TOOL_ANSWER,))


def wrong_tools(rng: Random) -> Exchange:
    """A question for a tool, among other tools."""
    kind = rng.choice([kind for kind in KINDS if kind.use is not use_add])
    used = kind.use(rng)
    others = tuple(other for other in KINDS if other is not kind)
    tools = tuple(tool for _, tool in toolbox(rng, others))
    return replace(ask(f"wrong {used.key}", used.question, (NO_TOOL_ANSWER,)), tools=tools)


def no_tool_fits(rng: Random, exchange: Exchange) -> Exchange:
    """An ordinary question among tools that do not help with it."""
    kinds = tuple(kind for kind in KINDS if kind.use is not use_add or not exchange.key.startswith("sum"))
    tools = tuple(tool for _, tool in toolbox(rng, kinds))
    return Exchange(exchange.key, exchange.turns, exchange.accept, tools=tools)
