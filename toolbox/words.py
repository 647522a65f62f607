"""Closed word lists of the toolbox world: verbs, domains, qualifiers, value kinds.

Every tool name, document, request and value of the bundled data is composed from these lists, so that a tokenizer
with one piece per word covers them and a held-out tool is a new combination of known words, never a new word.
"""

from dataclasses import dataclass

# ---------------------------------------------------------------------------------------------------------------------
# Verbs: name part -> the two cues a request may use

VERB_CUES: dict[str, tuple[str, str]] = {
    "get": ("get", "fetch"),
    "find": ("find", "locate"),
    "list": ("list", "enumerate"),
    "check": ("check", "verify"),
    "book": ("book", "reserve"),
    "cancel": ("cancel", "drop"),
    "create": ("create", "make"),
    "delete": ("delete", "remove"),
    "update": ("update", "change"),
    "share": ("share", "forward"),
    "rate": ("rate", "score"),
    "order": ("order", "buy"),
    "compare": ("compare", "contrast"),
    "track": ("track", "follow"),
    "save": ("save", "store"),
    "open": ("open", "show"),
    "play": ("play", "start"),
    "send": ("send", "mail"),
    "plan": ("plan", "arrange"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Qualifiers: name part -> the two phrases of a request

QUALIFIER_PHRASES: dict[str, tuple[str, str]] = {
    "today": ("today", "right now"),
    "weekly": ("weekly", "for the week"),
    "history": ("history", "from the past"),
    "local": ("local", "close by"),
    "cheap": ("cheap", "at low cost"),
    "best": ("best", "with top marks"),
    "new": ("new", "just out"),
    "shared": ("shared", "of the group"),
    "private": ("private", "of mine only"),
    "remote": ("remote", "far away"),
    "urgent": ("urgent", "without delay"),
    "archived": ("archived", "put away"),
    "popular": ("popular", "liked by many"),
    "large": ("large", "of great size"),
    "small": ("small", "of little size"),
    "public": ("public", "for everyone"),
    "daily": ("daily", "every day"),
    "early": ("early", "before noon"),
    "late": ("late", "after dark"),
    "summary": ("summary", "in short"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Value kinds


@dataclass(frozen=True, slots=True)
class ValueKind:
    """A kind of argument value: names that a parameter of it can have, its document line, how a request says it."""

    names: tuple[str, str]  # a tool documents one of them
    json_type: str  # "string" or "integer"
    description: str  # the parameter's document line
    phrases: tuple[str, str]  # "{}" is the value
    values: tuple[str, ...]  # empty for integers
    low: int = 0  # integers: smallest value
    high: int = 0  # integers: largest value


CITIES = (
    "Oslo Paris Rome Lima Cairo Delhi Tokyo Quito Perth Milan Turin Porto Lyon Bern Graz Ghent Cork Leeds Derby "
    "Kyoto Osaka Seoul Hanoi Dakar Accra Tunis Rabat Lagos Sofia Riga"
).split()
PEOPLE = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karla Louis Maria Nadia Oscar Petra Quinn Rosa "
    "Simon Tessa Ulla Victor Wanda Xenia Yusuf Zoe"
).split()
COUNTRIES = (
    "Norway France Italy Peru Egypt India Japan Ecuador Ghana Tunisia Morocco Nigeria Bulgaria Latvia Spain Poland "
    "Greece Chile Kenya Cuba"
).split()
LANGUAGES = (
    "English French Italian Spanish Hindi Arabic Japanese Korean Polish Greek Latin Turkish Czech Danish Dutch Finnish"
).split()
COLORS = "red blue green black white brown pink orange purple yellow grey gold silver violet".split()
TOPICS = (
    "music sport science travel health politics fashion nature economy theatre chess cooking physics poetry robots "
    "gardens"
).split()
FOODS = "pasta soup salad rice bread cheese curry pizza tofu steak sushi cake stew beans noodles pie".split()
TEAMS = "Lions Tigers Eagles Sharks Wolves Bears Hawks Bulls Rams Foxes Ravens Panthers Comets Rockets".split()
CURRENCIES = "euro dollar pound yen franc peso rupee krone zloty dinar won rand".split()
TITLE_FIRST = "Silent Golden Hidden Broken Frozen Distant Bright Secret Ancient Crimson Gentle Hollow".split()
TITLE_SECOND = "River Garden Mirror Harbor Forest Island Bridge Tower Valley Winter Letter Shadow".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS_OF_WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

VALUE_KINDS: dict[str, ValueKind] = {
    "city": ValueKind(("city", "place"), "string", "name of the city", ("in {}", "near {}"), tuple(CITIES)),
    "person": ValueKind(("person", "user"), "string", "name of the person", ("for {}", "of {}"), tuple(PEOPLE)),
    "country": ValueKind(
        ("country", "nation"), "string", "name of the country", ("from {}", "within {}"), tuple(COUNTRIES)
    ),
    "language": ValueKind(("language", "tongue"), "string", "language to use", ("in {}", "using {}"), tuple(LANGUAGES)),
    "color": ValueKind(("color", "shade"), "string", "color to look for", ("in {}", "colored {}"), tuple(COLORS)),
    "topic": ValueKind(
        ("topic", "subject"), "string", "topic to look for", ("about {}", "concerning {}"), tuple(TOPICS)
    ),
    "food": ValueKind(("food", "dish"), "string", "kind of food", ("with {}", "containing {}"), tuple(FOODS)),
    "team": ValueKind(("team", "club"), "string", "name of the team", ("by the {}", "of the {}"), tuple(TEAMS)),
    "currency": ValueKind(
        ("currency", "money"), "string", "currency to use", ("in {}", "paid in {}"), tuple(CURRENCIES)
    ),
    "title": ValueKind(("title", "label"), "string", "title to use", ("called {}", "titled {}"), ()),
    "date": ValueKind(("date", "day"), "string", "date to use", ("on {}", "dated {}"), ()),
    "weekday": ValueKind(("weekday", "when"), "string", "day of the week", ("on {}", "each {}"), tuple(DAYS_OF_WEEK)),
    "limit": ValueKind(("limit", "maximum"), "integer", "how many at most", ("at most {}", "up to {}"), (), 2, 99),
    "people": ValueKind(
        ("guests", "seats"), "integer", "number of people", ("for {} people", "with {} people"), (), 2, 12
    ),
    "price": ValueKind(("price", "budget"), "integer", "highest cost", ("under {}", "costing {}"), (), 10, 999),
    "distance": ValueKind(
        ("distance", "radius"), "integer", "distance in km", ("within {} km", "up to {} km"), (), 2, 99
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Domains


@dataclass(frozen=True, slots=True)
class Domain:
    """Words that go together: nouns with their synonym, and the verbs, qualifiers and value kinds of their tools."""

    nouns: dict[str, str]  # name part -> the synonym a request may use
    verbs: tuple[str, ...]
    qualifiers: tuple[str, ...]
    kinds: tuple[str, ...]


def _domain(nouns: str, verbs: str, qualifiers: str, kinds: str) -> Domain:
    pairs = [pair.split("/") for pair in nouns.split()]
    return Domain(
        {noun: synonym for noun, synonym in pairs},
        tuple(verbs.split()),
        tuple(qualifiers.split()),
        tuple(kinds.split()),
    )


DOMAINS: tuple[Domain, ...] = (
    _domain(
        "weather/forecast storm/tempest rain/rainfall wind/breeze",
        "get check compare track",
        "today weekly history local daily early",
        "city country date weekday distance",
    ),
    _domain(
        "hotel/lodging room/suite hostel/shelter cabin/hut",
        "find book cancel list compare",
        "cheap best local large remote new",
        "city country date people price",
    ),
    _domain(
        "flight/plane train/rail ferry/boat bus/coach",
        "find book cancel track",
        "today cheap early late daily remote",
        "city country date people price",
    ),
    _domain(
        "song/tune album/record concert/gig playlist/mix",
        "play find share rate",
        "new popular best shared archived daily",
        "title person language topic limit",
    ),
    _domain(
        "movie/film series/show trailer/teaser actor/performer",
        "find play rate list",
        "new popular best archived late summary",
        "title language country date limit",
    ),
    _domain(
        "recipe/formula meal/dinner menu/carte snack/bite",
        "find create share save rate",
        "cheap daily popular small new best",
        "food people language price limit",
    ),
    _domain(
        "match/game player/athlete league/division ticket/pass",
        "find list track order compare",
        "today local popular best weekly history",
        "team city date country price",
    ),
    _domain(
        "email/message note/memo contact/acquaintance calendar/agenda",
        "send delete update open share",
        "urgent private shared archived new summary",
        "person title topic date weekday",
    ),
    _domain(
        "article/story book/novel poem/verse magazine/journal",
        "find open save order list",
        "popular new archived summary best public",
        "title topic language person limit",
    ),
    _domain(
        "stock/equity rate/quote budget/spending invoice/bill",
        "get compare track update",
        "today weekly history urgent private summary",
        "currency country date person price",
    ),
    _domain(
        "shirt/blouse shoe/boot lamp/light chair/stool",
        "find order compare rate",
        "cheap popular small large new best",
        "color price city limit person",
    ),
    _domain(
        "park/green museum/gallery trail/path garden/yard",
        "find check rate plan",
        "local public large small early popular",
        "city distance weekday people topic",
    ),
    _domain(
        "doctor/physician clinic/hospital medicine/drug diet/regimen",
        "find book check plan",
        "local urgent best public private daily",
        "city person date distance food",
    ),
    _domain(
        "course/class lesson/lecture exam/test teacher/tutor",
        "find book create rate",
        "weekly remote early late public private",
        "topic language person weekday limit",
    ),
    _domain(
        "car/vehicle taxi/cab bike/cycle scooter/moped",
        "book find track cancel",
        "cheap late local shared large remote",
        "city distance people color price",
    ),
)

RESULT_WORDS = "calm brisk steady ready closed busy quiet fresh sold spare mixed strong weak rare common ideal".split()
REQUEST_PREFIXES = ("", "please ", "can you ", "I want to ", "help me ")
