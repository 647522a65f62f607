"""Targets, weights and classes of one row, counted by hand with a tokenizer small enough to follow."""

import random
from dataclasses import replace

import pytest

from data import loss_weights
from data.batches import drop_unusable, pack
from data.json_records import DataError
from data.loss_weights import encode_trajectory, scale_turn
from data.tool_calls import ToolCall
from data.trajectories import Message, Trajectory
from tests.support.per_turn_rows import expand_per_turn
from tests.support.piece_tokenizer import PieceTokenizer
from tests.support.random_trajectories import random_trajectory


def tool(name, parameter):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string", "description": "d"}},
                "required": [parameter],
            },
        },
    }


TOOLS = [tool("get_paper", "id"), tool("get_paper_details", "id"), tool("finish", "answer")]
SETTINGS = {"error_filter": "structured", "key_tokens": True, "max_key_token_weight": 9.0, "loss_normalization": "sum"}


def trajectory(*messages, trajectory_id="t0", tools=TOOLS):
    return Trajectory(trajectory_id, tools, [Message(*message) for message in messages], "made in a test")


FIND_PAPER = trajectory(
    ("user", "Find it", None),
    ("assistant", "", ToolCall("get_paper", {"id": "7"})),
    ("tool", '{"error": "Invalid API key"}', None),
    ("assistant", "", ToolCall("get_paper_details", {"id": "7"})),
    ("tool", "A title", None),
    ("assistant", "", ToolCall("finish", {"answer": "ok"})),
)
# ` get|_|paper|_|detai|ls|(|id|="|7|")` is 11 pieces; `get_paper(` shares ` get _ paper`, so the second `_` is key:
# |K| = 2, |NK| = 9, w = 4.5; with EOS the turn has 12 targets and weighs 2 * 4.5 + 9 + 1 = 19.
DETAILS_WEIGHTS = [4.5, 1, 1, 4.5, 1, 1, 1, 1, 1, 1, 1, 1]
# ` finis|h|(|answe|r|="|ok|")` is 8 pieces, |K| = 1, |NK| = 7, w = 7; 9 targets, sum 7 + 7 + 1 = 15.
FINISH_WEIGHTS = [7, 1, 1, 1, 1, 1, 1, 1, 1]


def encode(trajectory_, tokenizer=None, **changes):
    return encode_trajectory(trajectory_, tokenizer or PieceTokenizer(), **{**SETTINGS, **changes})


def trained_runs(row):
    """[(first position, weights)] of each unbroken run of one trained message."""
    runs, last = [], None
    for position, (weight, message) in enumerate(zip(row.loss_weights, row.message_indices)):
        if weight and (last is None or message != last[0] or position != last[1] + 1):
            runs.append((position, []))
        if weight:
            runs[-1][1].append(weight)
            last = (message, position)
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_golden_count_and_weights_of_a_trajectory_with_a_failing_call():
    row = encode(FIND_PAPER)
    assert row.trained_tokens == 21 and row.trained_turns == 2  # 12 + 9: the failing first call is not among them
    assert [weights for _, weights in trained_runs(row)] == [DETAILS_WEIGHTS, FINISH_WEIGHTS]
    assert sum(weight != 0 for weight in row.loss_weights) == 21
    assert row.token_classes.count("key") == 3 and row.token_classes.count("eos") == 2
    assert row.token_classes.count("normal") == 16
    assert row.token_classes.count("masked") == 8  # ` get|_|paper|(|id|="|7|")`, no EOS behind a masked turn
    assert [decision.masked for decision in row.turn_decisions] == [True, False, False]


def test_finish_decides_between_tools_whether_it_is_listed_or_not():
    """` finis|h|_|order|(|id|="|7|")`: `finish(` shares two pieces, so K = { finis, _}, |NK| = 7, w = 3.5 (E3)."""
    listed = [tool("finish_order", "id"), tool("finish", "answer"), tool("ask_to_user", "question")]
    messages = (("user", "q", None), ("assistant", "", ToolCall("finish_order", {"id": "7"})))
    for tools in (listed, listed[:1], listed[:2]):
        row = encode(trajectory(*messages, tools=tools))
        assert [weights for _, weights in trained_runs(row)] == [[3.5, 1, 3.5, 1, 1, 1, 1, 1, 1, 1]]


def test_eos_is_the_target_where_the_next_input_is_a_newline():
    tokenizer = PieceTokenizer()
    row = encode(FIND_PAPER, tokenizer)
    (first, details), (second, finish) = trained_runs(row)
    last = first + len(details) - 1
    assert row.target_ids[last] == tokenizer.eos_id and tokenizer.piece(row.input_ids[last + 1]) == "\n"
    assert tokenizer.piece(row.input_ids[last]) == '")' and tokenizer.piece(row.target_ids[first]) == " get"
    assert tokenizer.piece(row.input_ids[first]) == ":"  # the header's last token predicts the name
    assert second + len(finish) == len(row) and row.target_ids[-1] == tokenizer.eos_id  # nothing follows the last call
    differs = [i for i in range(len(row) - 1) if row.target_ids[i] != row.input_ids[i + 1]]
    assert differs == [last]  # the only position that is not plain next-token
    assert tokenizer.eos_id not in row.input_ids


def test_turns_of_weight_0_are_their_own_class_and_combine_with_masking():
    messages = list(FIND_PAPER.messages)
    messages[1], messages[3] = replace(messages[1], weight=0), replace(messages[3], weight=0)
    row = encode(replace(FIND_PAPER, messages=messages))
    plain = encode(FIND_PAPER)
    assert row.input_ids == plain.input_ids  # context stays
    assert row.excluded_turns == 2 and row.trained_turns == 1 and row.trained_tokens == 9
    assert sum(row.loss_weights) == 15 and plain.excluded_turns == 0
    by_turn = {index: set() for index in (1, 3, 5)}
    for kind, index in zip(row.token_classes, row.message_indices, strict=True):
        if index in by_turn and kind != "context":
            by_turn[index].add(kind)
    assert by_turn == {1: {"masked"}, 3: {"excluded"}, 5: {"key", "normal", "eos"}}  # the filter wins
    assert row.token_classes.count("excluded") == 11  # the 11 pieces; EOS is no target there
    unfiltered = encode(replace(FIND_PAPER, messages=messages), error_filter="none")
    assert "masked" not in unfiltered.token_classes and sum(unfiltered.loss_weights) == 15


def test_masked_turn_stays_in_the_context_word_for_word():
    tokenizer = PieceTokenizer()
    masked, unmasked = encode(FIND_PAPER, tokenizer), encode(FIND_PAPER, tokenizer, error_filter="none")
    assert masked.input_ids == unmasked.input_ids
    assert unmasked.trained_turns == 3 and unmasked.trained_tokens == 30  # 8 + EOS more
    text = "".join(tokenizer.piece(i) for i in masked.input_ids)
    assert ' get_paper(id="7")\nOutput: {"error": "Invalid API key"}\nAssistant: get_paper_details(' in text


@pytest.mark.parametrize(
    "normalization,first,second,denominator",
    [("sum", 4.5, 7.0, 0.0), ("token_mean", 4.5, 7.0, 34.0), ("turn_mean", 4.5 / 19, 7 / 15, 2.0)],
)
def test_normalisations_by_hand(normalization, first, second, denominator):
    row = encode(FIND_PAPER, loss_normalization=normalization)
    runs = trained_runs(row)
    assert runs[0][1][0] == pytest.approx(first, abs=1e-15) and runs[1][1][0] == pytest.approx(second, abs=1e-15)
    assert row.denominator == denominator
    if normalization == "turn_mean":
        assert [sum(weights) for _, weights in runs] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="found 'mean', expected one of turn_mean, token_mean, sum"):
        scale_turn([1.0], "mean")


def test_key_tokens_off_weighs_every_trained_token_one():
    row = encode(FIND_PAPER, key_tokens=False)
    assert set(row.loss_weights) == {0.0, 1.0} and "key" not in row.token_classes and row.trained_tokens == 21


def test_plain_text_weighs_one_and_ends_with_eos():
    chat = trajectory(("user", "Hello", None), ("assistant", "get_paper is what I have", None))
    row = encode(chat)
    # ` get|_|paper| is| what| I| have` + EOS
    assert [weights for _, weights in trained_runs(row)] == [[1.0] * 8]
    assert row.token_classes[-8:] == ["normal"] * 7 + ["eos"]


def test_a_name_offered_twice_or_called_itself_adds_no_key_token():
    # ` get|_|paper|()`: the bracket is merged, so the ids of `get_paper(` alone would look like another name
    call = trajectory(
        ("user", "x", None),
        ("assistant", "", ToolCall("get_paper", {})),
        tools=[{"type": "function", "function": {"name": "get_paper"}}] * 2,
    )
    assert [weights for _, weights in trained_runs(encode(call))] == [[3, 1, 1, 1, 1]]  # |K| = 1, |NK| = 3, EOS
    beside_longer = trajectory(
        ("user", "x", None),
        ("assistant", "", ToolCall("get_paper", {})),
        tools=[*call.tools, {"type": "function", "function": {"name": "get_paper_details"}}],
    )
    assert encode(beside_longer).token_classes[-5:] == ["key", "normal", "normal", "key", "eos"]


def test_a_space_that_is_its_own_piece_is_neither_key_nor_counted():
    row = encode(FIND_PAPER, PieceTokenizer(bare_spaces=True))
    # the call's pieces are as above behind one space; finish: `finis|h`, the same 8 pieces without their space
    assert [weights for _, weights in trained_runs(row)] == [[1, *DETAILS_WEIGHTS], [1, *FINISH_WEIGHTS]]


def test_a_tokenizer_without_bos_starts_with_text():
    tokenizer = PieceTokenizer(bos_id=None)  # numbers its pieces as they come
    with_bos, without = encode(FIND_PAPER), encode(FIND_PAPER, tokenizer)
    assert list(without.input_ids) == list(with_bos.input_ids[1:])
    assert without.target_ids == with_bos.target_ids[1:] and without.loss_weights == with_bos.loss_weights[1:]
    rows = expand_per_turn(FIND_PAPER, tokenizer, **SETTINGS)
    assert rows[-1].input_ids == without.input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Nothing to train


def test_a_trajectory_with_nothing_trained_is_dropped_with_count_and_id():
    failed = trajectory(*[(m.role, m.content, m.call) for m in FIND_PAPER.messages[:3]], trajectory_id="only failures")
    row = encode(failed)
    assert row.trained_tokens == 0 and row.denominator == 0.0 and set(row.loss_weights) == {0.0}
    kept, notes = drop_unusable([encode(FIND_PAPER), row], 10_000)
    assert [kept_row.id for kept_row in kept] == ["t0"]
    assert notes == ["dropped 1 of 2 trajectories, without a trained turn: only failures"]
    with pytest.raises(DataError, match="1 without a trained turn"):
        drop_unusable([row], 10_000)


# ---------------------------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("error_filter", ["structured", "substring", "none"])
def test_random_rows_are_consistent(error_filter):
    generator, tokenizer = random.Random(1), PieceTokenizer()
    for number in range(40):
        sample = random_trajectory(generator, f"r{number}")
        row = encode(sample, tokenizer, error_filter=error_filter)
        n = len(row)
        assert [len(x) for x in (row.target_ids, row.loss_weights, row.token_classes, row.message_indices)] == [n] * 4
        kept = [d.message_index for d in row.turn_decisions if not d.masked]
        assert row.trained_turns == len(kept) and row.token_classes.count("eos") == len(kept)
        assert sorted({m for m, w in zip(row.message_indices, row.loss_weights) if w}) == kept
        for weight, kind, message in zip(row.loss_weights, row.token_classes, row.message_indices):
            assert (weight > 0) == (kind in ("normal", "key", "eos")) and (kind == "key" or weight in (0.0, 1.0))
            assert kind in ("context", "masked") or sample.messages[message].role == "assistant"
        for i in range(n - 1):
            assert row.target_ids[i] == (tokenizer.eos_id if row.token_classes[i] == "eos" else row.input_ids[i + 1])
        assert pack([row]).trained_tokens == row.trained_tokens == sum(w != 0 for w in row.loss_weights)


def test_key_tokens_are_found_once_per_trained_turn_and_names_encoded_once_per_trajectory(monkeypatch):
    found, named = [], []
    find, encode_all = loss_weights.find_key_tokens, loss_weights.encode_names
    monkeypatch.setattr(loss_weights, "find_key_tokens", lambda *each: (found.append(each), find(*each))[1])
    monkeypatch.setattr(loss_weights, "encode_names", lambda *each: (named.append(each), encode_all(*each))[1])
    assert encode(FIND_PAPER).trained_turns == len(found) == 2
    assert len(named) == 1
    assert encode(FIND_PAPER, key_tokens=False).trained_turns == 2
    assert len(found) == 2 and len(named) == 1  # not asked for: not computed
