"""Noise in the tools' documents, in RoTBench's five levels: names change and the gold call with them, requests stay.

    clean    as drawn
    slight   a word of the name is left out, replaced, or one is put in
    medium   the words are in reverse order, or one to three others without meaning stand for them
    heavy    names change places; or the tool gets another required parameter, whose document says its value
    union    tools by one of these three levels, then parameters by one of them

In slight, medium and heavy every second prompt has the noise in the names of tools, the others in those of parameters.
In slight and medium the tool asked for, or all its parameters, get another name, and so does half of the others.
`ask_to_user` and `finish` stay. RoTBench changes letters. Here a word is what a letter is there, the smallest part
of a name: the base has one piece for each word and never met a name that is spelled in letters.
"""

import copy
import random
from collections.abc import Collection, Iterable, Iterator, Sequence

from toolbox.words import RESULT_WORDS
from toolbox.world import special_tools, tool_name

LEVELS = ("clean", "slight", "medium", "heavy", "union")
HALVES = ("tool", "parameter")  # where an even and an odd prompt of slight, medium and heavy has its noise
SPECIAL_NAMES = {tool_name(tool) for tool in special_tools()}
NOISE_WORDS = RESULT_WORDS  # part of no name in the world


def add_noise(examples: Iterable[dict], level: str, seed: int) -> Iterator[dict]:
    """The lines of a single-turn test file with noise of one of LEVELS; the same for the same seed.

    `meta` says where it is: "noise" is "tool", "parameter" or "both".
    """
    for index, example in enumerate(examples):
        rng, single = random.Random(f"{seed} {level} {index}"), LEVELS[1:4]
        if level != "clean":
            example = copy.deepcopy(example)
            kind = "both" if level == "union" else HALVES[index % 2]
            example["meta"]["noise"] = kind
            if kind != "parameter":
                _change_tools(rng, example, rng.choice(single) if level == "union" else level)
            if kind != "tool":
                _change_parameters(rng, example, rng.choice(single) if level == "union" else level)
        yield example


def _gold_call(example: dict) -> dict:
    return example["gold"][0]["calls"][0]


def _ordinary_tools(example: dict) -> list[dict]:
    return [tool["function"] for tool in example["tools"] if tool_name(tool) not in SPECIAL_NAMES]


def _change_tools(rng: random.Random, example: dict, level: str) -> None:
    tools, call = _ordinary_tools(example), _gold_call(example)
    names = new_names(rng, [tool["name"] for tool in tools], level, {call["name"]})
    for tool in tools:
        tool["name"] = names[tool["name"]]
    call["name"] = names[call["name"]]


def _change_parameters(rng: random.Random, example: dict, level: str) -> None:
    call = _gold_call(example)
    for tool in _ordinary_tools(example):
        is_gold, parameters = tool["name"] == call["name"], tool["parameters"]
        properties, required = parameters["properties"], parameters["required"]
        if level == "heavy" and (len(properties) < 2 or rng.random() < 0.5):
            name, value = changed_name(rng, "", "medium", properties), rng.choice(NOISE_WORDS)
            added = {name: {"type": "string", "description": f'always "{value}"'}}
            first = {each: properties[each] for each in required}  # documents list required parameters first
            parameters |= {"properties": first | added | properties, "required": [*required, name]}
            if is_gold:
                call["arguments"][name] = value
        else:
            names = new_names(rng, list(properties), level, properties if is_gold else ())
            parameters["properties"] = {names[each]: schema for each, schema in properties.items()}
            parameters["required"] = [names[each] for each in required]
            if is_gold:
                call["arguments"] = {names[each]: value for each, value in call["arguments"].items()}


def new_names(rng: random.Random, names: Sequence[str], level: str, always: Collection[str]) -> dict[str, str]:
    """Name -> its name with noise; no two are equal. Below heavy those in `always` change, and half of the others."""
    if level == "heavy":
        turn = rng.randrange(1, len(names))
        return dict(zip(names, [*names[turn:], *names[:turn]]))
    changed: dict[str, str] = {}
    for name in names:
        taken = {*names, *changed.values()}
        changes = name in always or rng.random() < 0.5
        changed[name] = changed_name(rng, name, level, taken) if changes else name
    return changed


def changed_name(rng: random.Random, name: str, level: str, taken: Collection[str]) -> str:
    """Another name, none of `taken`, by slight or medium noise."""
    while True:
        words = name.split("_")
        if level == "slight":
            place = rng.randrange(len(words))
            edits = [[], [rng.choice(NOISE_WORDS)], [rng.choice(NOISE_WORDS), words[place]]]
            words[place : place + 1] = rng.choice(edits[len(words) == 1 :])  # a name keeps one word
        elif len(words) > 1 and rng.random() < 0.5:
            words.reverse()
        else:
            words = rng.sample(NOISE_WORDS, rng.randint(1, 3))
        new = "_".join(words)
        if new != name and new not in taken:
            return new
