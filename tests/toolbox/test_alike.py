"""Tools that look alike: what their prompts and trajectories promise."""

from collections import defaultdict

from data.error_filter import decide_masked_turns
from data.trajectories import read_trajectories
from toolbox.alike import CODES, draw_alike_examples
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


def test_trajectories_are_of_one_request_without_mistakes_of_the_teacher(tmp_path):
    make_toolbox(["--only_trajectories", str(tmp_path / "train.json"), "--alike", "--trajectories", "300"])
    trajectories = read_trajectories(str(tmp_path / "train.json"))
    assert len(trajectories) == 300
    for each in trajectories:
        assert len({tool["function"]["name"].rsplit("_", 1)[0] for tool in each.tools[:-2]}) == 1
        turns = decide_masked_turns(each, "structured")
        assert {turn.category for turn in turns} <= {"all_right", "tool_instability"}
        names = {message.call.name for message in each.messages if message.call}
        assert len(names) == 2 and "finish" in names
