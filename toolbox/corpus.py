"""The corpus that the tiny base is pre-trained on: dialogues over freshly drawn tools, with calls in a plain form of
its own.

A document shows tools as the SFT prompt does, but a call reads `name(p: "v", q: 3).` instead of `name(p="v", q=3)`,
so the base must be fine-tuned to use the paper's format. Every document draws its own tools (names,
parameters, order), so only the words can be learned by heart. Held-out noun-qualifier pairs never occur. Two
cures of known traps:
* every vocabulary entry occurs: noise rows hold uniformly drawn ids (an entry that never occurs ends as a huge vector
  that ruins fine-tuning);
* several requests in one query occur, as in the training trajectories.
"""

import json
import random

from data.formats.tl import render_tools
from toolbox.words import RESULT_WORDS
from toolbox.world import (
    domain_of,
    draw_request,
    draw_tool,
    execute,
    name_parts,
    special_tools,
    teacher_error,
    tool_name,
)

# Weight of a token in the pre-training loss by its kind: decisions count fully, unpredictable tokens little.
CALL_WEIGHT, ANSWER_WEIGHT, ECHO_WEIGHT, CONTEXT_WEIGHT = 1.0, 0.5, 0.3, 0.05
NOISE_SHARE = 0.01  # documents that are uniformly drawn ids
ECHO_SHARE = 0.25  # outputs that repeat the arguments as `p="v", q=3` instead of giving a result
ERROR_SHARE = 0.06  # calls preceded by a failing one and its error
TWO_REQUESTS_SHARE = 0.35  # queries that hold two requests


def render_plain_call(name: str, arguments: dict) -> str:
    """The base's own call form: `name(p: "v", q: 3).`"""
    return f"{name}({', '.join(f'{key}: {json.dumps(value)}' for key, value in arguments.items())})."


def draw_document_tools(
    rng: random.Random, held_out: set[tuple[str, str]], target_count: int, count: int
) -> tuple[list[dict], list[dict]]:
    """(targets, all tools shuffled): targets plus look-alikes that share a noun, a verb or a qualifier with one of
    them."""
    tools: dict[str, dict] = {}
    while len(tools) < target_count:
        tool = draw_tool(rng, held_out=held_out, unseen=False)
        tools.setdefault(tool_name(tool), tool)
    targets = list(tools.values())
    while len(tools) < count:
        verb, noun, qualifier = name_parts(rng.choice(targets))
        domain = domain_of(noun)
        shared = rng.choice(("noun", "noun", "verb", "qualifier", "nothing"))
        tool = draw_tool(
            rng,
            held_out=held_out,
            unseen=False,
            domain=None if shared == "nothing" else domain,
            noun=noun if shared == "noun" else None,
            verb=verb if shared in ("verb", "qualifier") else None,
            qualifier=qualifier if shared == "qualifier" else None,
        )
        tools.setdefault(tool_name(tool), tool)
    everything = list(tools.values())
    rng.shuffle(everything)
    return targets, everything + special_tools()


def draw_document(rng: random.Random, held_out: set[tuple[str, str]], most_tools: int) -> list[tuple[str, float]]:
    """One dialogue as (text, loss weight per token) segments; every tool is asked for at most once."""
    target_count = min(rng.choice((2, 3, 3, 4)), most_tools)
    targets, tools = draw_document_tools(
        rng, held_out, target_count, max(target_count, min(rng.choice((3, 4, 4, 5)), most_tools))
    )
    segments = [("System: " + render_tools(tools), CONTEXT_WEIGHT)]
    while targets:
        asked = [targets.pop() for _ in range(min(len(targets), 1 + (rng.random() < TWO_REQUESTS_SHARE)))]
        pairs = [(tool, *draw_request(rng, tool)) for tool in asked]
        segments.append(("\nUser: " + " . then ".join(request for _, request, _ in pairs), CONTEXT_WEIGHT))
        answers = []
        for tool, _, arguments in pairs:
            segments += failing_segments(rng, tools, tool, arguments)
            result = f"{rng.choice(RESULT_WORDS)} {rng.randint(10, 99)}"
            segments += call_segments(tool_name(tool), arguments, CALL_WEIGHT)
            if arguments and rng.random() < ECHO_SHARE:
                echo = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
                segments.append((f"\nOutput: {echo}", ECHO_WEIGHT))
                result = "ready"
            else:
                segments.append(("\nOutput: " + json.dumps({"result": result}), CONTEXT_WEIGHT))
            answers.append(f"{name_parts(tool)[1]} : {result}")
        segments += call_segments("finish", {"answer": " and ".join(answers)}, ANSWER_WEIGHT)
    return segments


def call_segments(name: str, arguments: dict, weight: float) -> list[tuple[str, float]]:
    """An assistant turn in the plain form."""
    return [("\nAssistant:", CONTEXT_WEIGHT), (" " + render_plain_call(name, arguments), weight)]


def failing_segments(rng: random.Random, tools: list[dict], tool: dict, arguments: dict) -> list[tuple[str, float]]:
    """Sometimes a failing call and its feedback, so that error texts are known words; the failing call is barely
    trained."""
    if rng.random() >= ERROR_SHARE:
        return []
    failing = teacher_error(rng, tool, arguments)
    if failing is None:
        return [
            *call_segments(tool_name(tool), arguments, CONTEXT_WEIGHT),
            ("\nOutput: " + json.dumps({"error": "connection error."}), CONTEXT_WEIGHT),
        ]
    return [*call_segments(*failing, CONTEXT_WEIGHT), ("\nOutput: " + execute(tools, *failing), CONTEXT_WEIGHT)]


def encode_document(
    rng: random.Random, held_out: set[tuple[str, str]], tokenizer, *, most_tools: int
) -> tuple[list[int], list[int], list[float]]:
    """(input ids, target ids, loss weights) of one document: BOS first, EOS as the last target; or a row of noise.

    `most_tools` limits the tools without the two special ones (few tools at the start are learned sooner)."""
    if rng.random() < NOISE_SHARE:
        ids = [tokenizer.bos_id] + [rng.randrange(tokenizer.vocab_size) for _ in range(64)]
        return ids[:-1], ids[1:], [CONTEXT_WEIGHT] * 64
    ids, weights = [tokenizer.bos_id], []
    for text, weight in draw_document(rng, held_out, most_tools):
        encoded = tokenizer.encode_continuation(text)
        ids += encoded
        weights += [weight] * len(encoded)
    return ids, ids[1:] + [tokenizer.eos_id], weights + [CONTEXT_WEIGHT]
