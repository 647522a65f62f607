"""Small records in the shape of RoTBench's and ToolAlpaca's files, made for the tests."""

import json


def react(name, arguments) -> str:
    return f"Thought:\nAction: {name}\nAction Input: {json.dumps(arguments)}"


def rotbench_tool(name, **parameters) -> dict:
    return {
        "name": name,
        "description": f"Does {name}.",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": key} for key in parameters},
            "required": [key for key, is_required in parameters.items() if is_required],
        },
    }


NAMES = ("get_weather", "get_news", "ask_to_user", "finish")


def rotbench_record(answers, *, names=NAMES, turns=(), scenario="RS") -> dict:
    weather, news, ask, end = names
    tools = [
        rotbench_tool(weather, city=True, unit=False),
        rotbench_tool(news),
        rotbench_tool(ask, question=True),
        rotbench_tool(end, answer=True),
    ]
    system = f"Use these tools:\n{json.dumps(tools)}\n\nLet's Begin!"
    return {
        "id": "Turn 1: Weather in Oslo?",
        "scenario": scenario,
        "conversations": [
            {"from": "system", "value": system},
            {"from": "user", "value": "Weather in Oslo?\nBegin!\n"},
            *({"from": role, "value": value} for role, value in turns),
            {"from": "assistant", "value": answers},
        ],
    }


def toolalpaca_record(name="Rates") -> dict:
    """Three instructions: two gold calls with a key; a doubled JSON key; a function without document."""
    return {
        "Name": name,
        "Authentication": {"key": "***"},
        "Function_Description": {
            "latest_get": 'Get rates.\nParameters: {"key": "Required. string. Your key.", '
            '"base": "Required. string. ", "days": "integer. How many. At most 5."}\nOutput: OK.',
            "list_get": "Parameters: {}\nOutput: OK.",
            "components": "prose",
        },
        "Instructions": ["Rates of the euro?", "Dollar to euro?", "The secret?"],
        "Golden_Answers": [
            [
                {"Action": "latest_get", "Action_Input": '{"key": "0123abcd", "base": "EUR", "days": 2}'},
                {"Action": "list_get", "Action_Input": "{}"},
            ],
            [{"Action": "latest_get", "Action_Input": '{"base": "USD", "symbols": "symbols": ["EUR"]}'}],
            [{"Action": "secret_get", "Action_Input": "{}"}],
        ],
    }
