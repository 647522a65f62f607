"""Tools that look alike: what their prompts and trajectories promise."""

import json
from collections import defaultdict

import pytest

from data.error_filter import decide_masked_turns
from data.trajectories import read_trajectories
from toolbox.alike import CODES, draw_alike_examples, draw_mixed_trajectories
from toolbox.make import main as make_toolbox
from toolbox.words import QUALIFIER_PHRASES
from toolbox.world import execute, held_out_pairs


def test_the_offered_tools_differ_in_the_last_part_of_their_name_alone():
    for example in draw_alike_examples(5, 200):
        tools = [tool["function"] for tool in example["tools"][:-2]]
        assert len({tool["name"] for tool in tools}) == len(tools) in (3, 4)
        assert len({tool["name"].rsplit("_", 1)[0] for tool in tools}) == 1
        assert all({**tool, "name": ""} == {**tools[0], "name": ""} for tool in tools)
        assert not {tuple(tool["name"].split("_")[1:]) for tool in tools} & held_out_pairs()


def test_the_code_word_names_one_tool_and_nothing_else_does():
    """Among requests the word that goes with a qualifier is its code; the qualifier itself is never said."""
    assert len({code for code, _ in CODES.values()}) == len(CODES) == len(QUALIFIER_PHRASES) == 20
    said = defaultdict(set)
    for example in draw_alike_examples(6, 400):
        call, query = example["gold"][0]["calls"][0], example["messages"][0]["content"]
        values = {word for value in call["arguments"].values() for word in str(value).split()}
        words = set(query.split()) - values
        qualifier = call["name"].split("_")[2]
        others = {tool["function"]["name"].split("_")[2] for tool in example["tools"][:-2]} - {qualifier}
        assert CODES[qualifier][0] in words and not {CODES[other][0] for other in others} & words
        assert qualifier not in words
        said[qualifier].add(call["name"])
        assert "result" in execute(example["tools"], call["name"], call["arguments"], attempt=1)
    assert len(said) > 15


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "train.json"
    flags = ["--only_trajectories", str(path), "--alike_share", "0.333333", "--error_rate", "0.75"]
    make_toolbox(flags)
    return path


def test_as_many_failing_trajectories_as_the_paper_and_a_third_alike(mixed):
    trajectories = read_trajectories(str(mixed))
    failing = sum(any(turn.masked for turn in decide_masked_turns(each, "structured")) for each in trajectories)
    heads = [{tool["function"]["name"].rsplit("_", 1)[0] for tool in each.tools[:-2]} for each in trajectories]
    assert len(trajectories) == 1217 and 0.16 < failing / 1217 < 0.18
    assert 0.30 < sum(len(each) == 1 for each in heads) / 1217 < 0.36


def test_the_share_is_what_is_alike():
    for share, n_heads in ((0.0, 0), (1.0, 30)):
        tools = [
            json.loads(each["conversations"][0]["content"])[:-2] for each in draw_mixed_trajectories(3, 30, share, 0.5)
        ]
        assert sum(len({tool["name"].rsplit("_", 1)[0] for tool in each}) == 1 for each in tools) == n_heads


def test_wrong_shares_are_one_line(tmp_path, capsys):
    for flag in ("--alike_share", "--error_rate"):
        with pytest.raises(SystemExit, match="2"):
            make_toolbox(["--only_trajectories", str(tmp_path / "x"), flag, "1.5"])
        assert f"{flag}: found 1.5, expected 0 to 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
