"""What functions the demo model is shown in training, and how people ask for what they do."""

from __future__ import annotations

from typing import NamedTuple

from . import tables

PLACES = (
    *tables.CAPITALS.values(), "Hamburg", "Munich", "Cologne", "Barcelona", "Granada", "Milan", "Naples", "Turin",
    "Porto", "Marseille", "Nice", "Toulouse", "Geneva", "Zurich", "Antwerp", "Rotterdam", "Manchester", "Glasgow",
    "Liverpool", "Cork", "Krakow", "Prague", "Riga", "Chicago", "Boston", "Denver", "Dallas", "Miami", "Toronto",
    "Montreal", "Vancouver", "Sydney", "Melbourne", "Mumbai", "Delhi", "Seoul", "Osaka", "Shanghai", "Bangkok",
    "Dubai", "Istanbul", "New York", "San Francisco", "Los Angeles", "Cape Town", "Rio", "Bogota", "Santiago",
)  # fmt: skip
ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "garage", "hall", "office", "garden", "cellar", "attic")
ITEMS = (
    "tea", "coffee", "bread", "milk", "cheese", "butter", "rice", "sugar", "salt", "water", "chocolate", "honey",
    "pasta", "soup", "wine", "apples", "bananas", "eggs", "potatoes", "onions", "books", "pencils", "paper", "shoes",
)  # fmt: skip
SAYINGS = (
    "hello", "good morning", "thank you", "dinner is ready", "I am late", "see you soon", "call me", "good night",
    "the train is late", "come home", "I am here", "happy birthday", "the door is open", "well done", "wait for me",
)  # fmt: skip
LANGUAGES = ("French", "Spanish", "German", "Italian", "Latin", "Chinese", "Arabic", "Russian", "Japanese", "Korean")
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear", "dry", "cold")


class Kind(NamedTuple):
    """Functions of one purpose.

    Attributes:
        names: of such functions.
        about: descriptions.
        parameters: by parameter, what it may be called; behind a colon its type, if it is no string.
        asks: questions, with `{0}`, `{1}` for the values.
        answer: what is said of a plain result `{r}`.
        values: by parameter, where values come from: a name in `calling._draw`.
        results: where the result comes from.
    """

    names: tuple[str, ...]
    about: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    asks: tuple[str, ...]
    answer: str
    values: tuple[str, ...]
    results: str


KINDS: dict[str, Kind] = {
    "weather": Kind(
        ("get_weather", "weather", "get_current_weather", "weather_in", "fetch_weather", "lookup_weather", "forecast"),
        (
            "Says what the weather is.", "Get the weather for a city.", "Get the current weather in a given location.",
            "Current weather of a place.", "Returns the weather.", "The weather in a city.",
        ),
        (("city", "city", "location", "place", "town", "where"),),
        (
            "What is the weather in {0}?", "What is the weather in {0}?", "What's the weather like in {0}?",
            "How is the weather in {0}?", "Is it raining in {0}?", "Is it sunny in {0}?", "How warm is it in {0}?",
            "How cold is it in {0}?", "Tell me the weather in {0}.", "Weather in {0}?", "Do I need a coat in {0}?",
            "What is the weather in {0} today?", "Will it rain in {0}?", "What is the temperature in {0}?",
            "I am going to {0}. How is the weather?", "Check the weather in {0}.", "Give me the weather for {0}.",
        ),
        "In {0} it is {r}.", ("place",), "weather",
    ),
    "time": Kind(
        ("get_time", "current_time", "time_in", "get_current_time", "local_time", "clock"),
        ("Says what time it is.", "Get the time in a city.", "Current time of a place.", "Returns the local time."),
        (("city", "city", "place", "location", "timezone"),),
        (
            "What time is it in {0}?", "What time is it in {0}?", "What is the time in {0}?", "How late is it in {0}?",
            "Tell me the time in {0}.", "Time in {0}?", "What time is it now in {0}?", "Give me the time in {0}.",
            "Which time is it in {0}?",
        ),
        "It is {r} in {0}.", ("place",), "time",
    ),
    "add": Kind(
        ("add", "add_numbers", "sum", "plus", "get_sum"),
        ("Adds two numbers.", "Add two numbers.", "The sum of two numbers.", "Returns a plus b."),
        (("a:number", "x:number", "first:number", "a:integer"), ("b:number", "y:number", "second:number", "b:integer")),
        (
            "What is {0} + {1}?", "What is {0} + {1}?", "Add {0} and {1}.", "How much is {0} plus {1}?", "{0} + {1}",
            "What is the sum of {0} and {1}?", "Calculate {0} + {1}.", "What is {0} plus {1}?", "Sum {0} and {1}.",
        ),
        "{0} + {1} = {r}.", ("number", "number"), "sum",
    ),
    "multiply": Kind(
        ("multiply", "mul", "times", "product"),
        ("Multiplies two numbers.", "Multiply two numbers.", "The product of two numbers."),
        (("a:number", "x:number", "first:number"), ("b:number", "y:number", "second:number")),
        (
            "What is {0} * {1}?", "What is {0} times {1}?", "Multiply {0} by {1}.", "Calculate {0} * {1}.",
            "How much is {0} times {1}?", "What is the product of {0} and {1}?",
        ),
        "{0} * {1} = {r}.", ("number", "number"), "product",
    ),
    "calculate": Kind(
        ("calculate", "calculator", "calc", "evaluate", "compute", "math"),
        ("Calculates.", "Evaluates an expression.", "Calculate a mathematical expression.", "A calculator."),
        (("expression", "formula", "expr", "input"),),
        ("What is {0}?", "What is {0}?", "Calculate {0}.", "How much is {0}?", "Compute {0}.", "{0} = ?", "{0}"),
        "{0} = {r}.", ("expression",), "expression",
    ),
    "distance": Kind(
        ("get_distance", "distance", "how_far", "route"),
        ("Distance between two cities.", "How far two places are apart.", "Get the distance from one city to another."),
        (("start", "from", "origin"), ("end", "to", "destination")),
        (
            "How far is it from {0} to {1}?", "What is the distance from {0} to {1}?",
            "What is the distance between {0} and {1}?", "How many km are between {0} and {1}?",
        ),
        "It is {r} from {0} to {1}.", ("place", "place"), "km",
    ),
    "population": Kind(
        ("get_population", "population", "count_people", "inhabitants"),
        ("How many people live in a city.", "The population of a place.", "Get the population of a city."),
        (("city", "place", "name"),),
        (
            "How many people live in {0}?", "What is the population of {0}?", "How big is {0}?",
            "Tell me the population of {0}.", "How many inhabitants does {0} have?",
        ),
        "{r} people live in {0}.", ("place",), "large",
    ),
    "price": Kind(
        ("get_price", "price", "price_of", "lookup_price", "shop_price"),
        ("Price of a product.", "Says what something costs.", "Get the price of an item.", "What things cost."),
        (("item", "product", "name", "thing"),),
        (
            "What is the price of {0}?", "What does it cost to buy {0}?", "Tell me the price of {0}.",
            "What do I pay for {0}?", "Price of {0}?", "Find the price of {0}.",
        ),
        "The price of {0} is {r}.", ("item",), "euros",
    ),
    "search": Kind(
        ("search", "web_search", "search_web", "find_pages", "look_up"),
        ("Searches the web.", "Search for something.", "Finds pages.", "Search the internet."),
        (("query", "q", "text", "words"),),
        (
            "Search for {0}.", "Search the web for {0}.", "Look up {0} on the web.", "Find pages about {0}.",
            "Can you search for {0}?", "Do a search for {0}.", "Search {0}.",
        ),
        "I found {r}.", ("topic",), "pages",
    ),
    "light": Kind(
        ("turn_on", "switch_on", "light_on", "turn_on_light"),
        ("Turns on a light.", "Switches a light on.", "Turn on the light in a room."),
        (("room", "where", "place"),),
        (
            "Turn on the light in the {0}.", "Switch on the light in the {0}.", "Light on in the {0}, please.",
            "I need light in the {0}.", "It is dark in the {0}. Turn on the light.", "Turn the {0} light on.",
        ),
        "Done.", ("room",), "ok",
    ),
    "timer": Kind(
        ("set_timer", "start_timer", "timer", "alarm_in"),
        ("Starts a timer.", "Set a timer.", "Rings after some minutes."),
        (("minutes:integer", "min:integer", "minutes:number"),),
        (
            "Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Wake me in {0} minutes.",
            "Timer for {0} minutes, please.", "Remind me in {0} minutes.",
        ),
        "Done.", ("minutes",), "ok",
    ),
    "message": Kind(
        ("send_message", "send", "write_to", "send_text"),
        ("Sends a message.", "Send a message to somebody.", "Writes to a person."),
        (("to", "name", "person"), ("text", "message")),
        (
            'Send {0} the message "{1}".', 'Write "{1}" to {0}.', "Tell {0}: {1}", 'Send a message to {0}: "{1}"',
            'Send "{1}" to {0}.',
        ),
        "Done.", ("name", "saying"), "ok",
    ),
    "translate": Kind(
        ("translate", "translate_text", "translation"),
        ("Translates text.", "Translate a text into a language.", "Says it in another language."),
        (("text", "words"), ("language", "to", "lang")),
        (
            'Translate "{0}" to {1}.', 'Translate "{0}" into {1}.', 'What is "{0}" in {1}?',
            'How do you say "{0}" in {1}?',
        ),
        "{r}", ("saying", "language"), "foreign",
    ),
    "date": Kind(
        ("get_date", "today", "current_date", "date"),
        ("Says which day it is.", "Get the date.", "The date of today."),
        (),
        ("What is the date?", "Which day is today?", "What day is it?", "What is the date today?", "Tell me the date."),
        "It is {r}.", (), "date",
    ),
}  # fmt: skip
WEIGHTS = {"weather": 26, "time": 15, "add": 11, "calculate": 11, "multiply": 6}
"""How often a kind is asked for beside the others, which have 4."""
