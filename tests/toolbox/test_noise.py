"""Noise in the tools' documents: what each level changes, and that prompts stay valid."""

import json
import random

import pytest

from eval.evaluate_tiny import load_tiny
from model.tokenizer import SentencePieceTokenizer
from tests.support.tiny_run import ROOT
from toolbox.make import draw_split
from toolbox.noise import LEVELS, NOISE_WORDS, SPECIAL_NAMES, add_noise, changed_name, new_names
from toolbox.world import build_toolbox, name_parts

CLEAN = [*draw_split("seen", 77, 60)]
NOISY = {level: [*add_noise(CLEAN, level, 3)] for level in LEVELS}


def names_of(example: dict) -> list[str]:
    return [tool["function"]["name"] for tool in example["tools"]]


def parameters_of(example: dict) -> dict[str, dict]:
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in example["tools"]}


def call_of(example: dict) -> dict:
    return example["gold"][0]["calls"][0]


def test_clean_is_the_same_and_nothing_is_changed_in_place():
    before = json.dumps(CLEAN)
    assert json.dumps([*add_noise(CLEAN, "clean", 3)]) == before
    for level in LEVELS:
        assert json.dumps([*add_noise(CLEAN, level, 3)]) == json.dumps(NOISY[level])
        assert level == "clean" or json.dumps([*add_noise(CLEAN, level, 4)]) != json.dumps(NOISY[level])
    assert json.dumps(CLEAN) == before


@pytest.mark.parametrize("level", LEVELS[1:])
def test_prompts_stay_valid(tmp_path, level):
    path = tmp_path / "test_seen.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in NOISY[level]))
    assert len(load_tiny(path)) == 60  # each gold tool is offered
    tokenizer = SentencePieceTokenizer(ROOT / "assets/tiny_model/tokenizer.model")
    for clean, noisy in zip(CLEAN, NOISY[level], strict=True):
        names, call = names_of(noisy), call_of(noisy)
        assert len(set(names)) == len(names) and names[-2:] == ["ask_to_user", "finish"]
        assert [tool["function"]["description"] for tool in noisy["tools"]] == [
            tool["function"]["description"] for tool in clean["tools"]
        ]
        gold_tool = names_of(clean).index(call_of(clean)["name"])
        assert names.index(call["name"]) == gold_tool and noisy["messages"] == clean["messages"]
        for name, parameters in parameters_of(noisy).items():
            properties, required = parameters["properties"], parameters["required"]
            assert [*properties][: len(required)] == required
            for each in (name, *properties):  # words and "_": no letter alone
                pieces = [tokenizer.piece(token_id) for token_id in tokenizer.encode_continuation(each)]
                assert pieces == [part for word in each.split("_") for part in (word, "_")][:-1]
        gold_parameters = parameters_of(noisy)[call["name"]]
        assert {*gold_parameters["required"]} <= call["arguments"].keys() <= gold_parameters["properties"].keys()
        for name, value in call["arguments"].items():
            assert isinstance(value, int) == (gold_parameters["properties"][name]["type"] == "integer")
        old_values = [*call_of(clean)["arguments"].values()]
        assert [*call["arguments"].values()][: len(old_values)] == old_values


@pytest.mark.parametrize("level", LEVELS[1:4])
def test_every_second_prompt_has_it_in_the_tools_names(level):
    for index, (clean, noisy) in enumerate(zip(CLEAN, NOISY[level], strict=True)):
        tools, parameters = names_of(clean) != names_of(noisy), [*parameters_of(clean).values()]
        changed = json.dumps(parameters) != json.dumps([*parameters_of(noisy).values()])
        assert noisy["meta"]["noise"] == ("tool", "parameter")[index % 2]
        assert tools == (index % 2 == 0) and (not changed or index % 2 == 1)
        if index % 2 == 0:
            assert call_of(clean)["name"] != call_of(noisy)["name"]
        elif call_of(clean)["arguments"]:
            assert call_of(clean)["arguments"] != call_of(noisy)["arguments"]
    assert all(example["meta"]["noise"] == "both" for example in NOISY["union"])


def test_heavy_names_change_places_or_a_parameter_is_added():
    kinds = set()
    for index, (clean, noisy) in enumerate(zip(CLEAN, NOISY["heavy"], strict=True)):
        if index % 2 == 0:
            pairs = [*zip(names_of(clean), names_of(noisy))][:-2]
            assert all(old != new for old, new in pairs) and {*names_of(clean)} == {*names_of(noisy)}
            continue
        old, new = parameters_of(clean)[call_of(clean)["name"]], parameters_of(noisy)[call_of(clean)["name"]]
        added = [each for each in new["required"] if each not in old["properties"]]
        if added:
            document = new["properties"][added[0]]
            assert document == {"type": "string", "description": f'always "{call_of(noisy)["arguments"][added[0]]}"'}
        else:
            assert {*old["properties"]} == {*new["properties"]}
            assert [*old["properties"].values()] == [*new["properties"].values()]
        kinds.add(len(added))
    assert kinds == {0, 1}


def test_names_by_level():
    words = {word for unseen in (False, True) for tool in build_toolbox(unseen) for word in name_parts(tool)}
    assert not words & {*NOISE_WORDS} and {"ask_to_user", "finish"} == SPECIAL_NAMES
    rng, name = random.Random(0), "get_rain_today"
    slight = {changed_name(rng, name, "slight", ()) for _ in range(3000)}
    assert {"get_rain", "get_today", "rain_today", "calm_rain_today", "get_rain_calm", "get_calm_rain_today"} <= slight
    n = len(NOISE_WORDS)
    assert len(slight) == 3 + 3 * n + 3 * n  # one left out, replaced, put in front of one
    medium = {changed_name(rng, name, "medium", ()) for _ in range(300)}
    assert "today_rain_get" in medium
    assert all({*each.split("_")} <= {*NOISE_WORDS} for each in medium - {"today_rain_get"})
    assert {len(each.split("_")) for each in medium} == {1, 2, 3}
    assert {len(changed_name(rng, "city", "slight", ()).split("_")) for _ in range(50)} == {1, 2}
    assert changed_name(rng, "get_rain", "slight", {"get", "rain"}) not in ("get", "rain")
    assert new_names(random.Random(1), ["a_b", "c_d", "e_f"], "heavy", ()) in (
        {"a_b": "c_d", "c_d": "e_f", "e_f": "a_b"},
        {"a_b": "e_f", "c_d": "a_b", "e_f": "c_d"},
    )
