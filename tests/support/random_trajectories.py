"""Random trajectories for property tests: tools whose names share prefixes, failing calls, plain text, many turns."""

import random

from data.tool_calls import ToolCall
from data.trajectories import Message, Trajectory

NAMES = [
    "get_paper",
    "get_paper_details",
    "get_papers",
    "getRain",
    "search_advice",
    "search_movies",
    "search",
    "sum_two",
    "finish",
    "ask_to_user",
]
VALUES = ["love", "Comedy of Errors", "it's (odd)", "a, b", "", 3, -2.5, True, None, [1, "x"], {"k": [2]}]
FAILURES = ['{"error": "Invalid API key"}', "Connection error: HTTPSConnectionPool, Max retries exceeded"]
FEEDBACK = ['{"result": [1, 2, 3]}', "sunny, 21 degrees", '{"names": ["The Hobbit"], "error": null}', "ok\nsecond line"]


def random_tool(generator: random.Random, name: str) -> dict:
    parameters = generator.sample(["query", "limit", "city", "year"], generator.randrange(4))
    properties = {p: {"type": generator.choice(["string", "integer"]), "description": "d"} for p in parameters}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "for tests",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": parameters[: generator.randrange(len(parameters) + 1)],
            },
        },
    }


def random_call(generator: random.Random, tool: dict) -> ToolCall:
    parameters = tool["function"]["parameters"]
    names = [p for p in parameters["properties"] if p in parameters["required"] or generator.random() < 0.5]
    if generator.random() < 0.1:
        names.append("bogus")  # not documented: the structured filter masks this turn
    return ToolCall(tool["function"]["name"], {name: generator.choice(VALUES) for name in names})


def random_trajectory(generator: random.Random, trajectory_id: str) -> Trajectory:
    """One or two users' turns, up to four calls each; about a quarter of the calls fail; texts in between."""
    tools = [random_tool(generator, name) for name in generator.sample(NAMES, generator.randrange(1, 5))]
    messages = []
    for _ in range(generator.randrange(1, 3)):
        messages.append(Message("user", generator.choice(["What about love?", "Oslo\nplease", "2 + 2?"]), None))
        for _ in range(generator.randrange(1, 5)):
            messages.append(Message("assistant", "", random_call(generator, generator.choice(tools))))
            feedback = generator.choice(FAILURES if generator.random() < 0.25 else FEEDBACK)
            messages.append(Message("tool", feedback, None))
        if generator.random() < 0.4:
            messages.append(Message("assistant", generator.choice(["Here you are.", "Done: 3 (three)"]), None))
    if generator.random() < 0.5:
        messages.append(Message("assistant", "", random_call(generator, generator.choice(tools))))
    return Trajectory(trajectory_id, tools, messages, f"made in a test, {trajectory_id}")
