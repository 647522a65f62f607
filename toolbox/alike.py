"""Tools that differ in the last part of their name alone, by a convention that only the trajectories teach.

All tools of such a dialogue are `verb_noun_qualifier` of one verb and noun, with the same document and parameters. A
request names the qualifier by a code word ("find the hotel fresh in Oslo"). Neither the base's corpus nor any document
says which code means which qualifier, as with a company's own words for its products: fine-tuning alone can teach it.
The token that chooses is the qualifier, which PKT weighs more.
"""

import json
import random
from collections.abc import Iterator

from toolbox.words import COLORS, DOMAINS, QUALIFIER_PHRASES, RESULT_WORDS, Domain
from toolbox.world import (
    TOOLBOX_SEED,
    draw_request,
    example_record,
    held_out_pairs,
    make_tool,
    name_parts,
    raw_record,
    right_calls,
    special_tools,
)

# Qualifier -> its code, twice because a request may say an ordinary qualifier in two ways. The base knows these words
# from results and as values, not as qualifiers.
CODES = {
    qualifier: (code, code) for qualifier, code in zip(QUALIFIER_PHRASES, [*RESULT_WORDS, *COLORS[:4]], strict=True)
}


def build_family(domain: Domain, verb: str, noun: str) -> list[dict]:
    """All tools of a verb and a noun, always the same; held-out pairs of noun and qualifier are left out."""
    held_out = held_out_pairs()
    plain = make_tool(random.Random(f"{TOOLBOX_SEED} {verb} {noun}"), domain, verb, noun, None)["function"]
    names = [f"{verb}_{noun}_{qualifier}" for qualifier in domain.qualifiers if (noun, qualifier) not in held_out]
    return [{"type": "function", "function": {**plain, "name": name}} for name in names]


def draw_alike_request(rng: random.Random) -> tuple[list[dict], dict, str, dict]:
    """(tools without the special ones, the tool asked for, the request, its arguments); three or four tools."""
    domain = rng.choice(DOMAINS)
    noun, verb = rng.choice(list(domain.nouns)), rng.choice(domain.verbs)
    tools = rng.sample(build_family(domain, verb, noun), rng.choice((3, 4, 4)))
    target = rng.choice(tools)
    return tools, target, *draw_request(rng, target, CODES)


def draw_alike_trajectories(seed: int, count: int) -> Iterator[dict]:
    """`count` training records in the authors' raw format, of one request each. The teacher makes no mistake."""
    rng = random.Random(seed)
    for index in range(count):
        tools, target, query, arguments = draw_alike_request(rng)
        calls = right_calls(tools, target, arguments)
        answer = f"{name_parts(target)[1]} : {json.loads(calls[-1][2])['result']}"
        calls.append(("finish", {"answer": answer}, ""))
        yield raw_record(index, tools + special_tools(), query, calls)


def draw_alike_examples(seed: int, count: int) -> Iterator[dict]:
    """`count` prompts of `tiny-alike`: one request, its gold call, tools that share all but the last part of a name."""
    rng = random.Random(seed)
    for index in range(count):
        tools, target, request, arguments = draw_alike_request(rng)
        yield example_record(f"tiny-alike-{index:03d}", tools + special_tools(), request, target, arguments)
