"""E3 and E4 against numbers counted by hand, on bare ids and on LLaMA-2's own pieces (Figure 2 of the paper)."""

import random
from pathlib import Path

import pytest

from data.key_tokens import find_key_tokens, key_token_weights
from data.loss_weights import count_tokens_before, encode_names

LLAMA2 = Path(__file__).parents[3] / "shared" / "fixtures" / "llama2-tokenizer" / "tokenizer.model"

# Ids by hand. 10 `.get`, 11 `P`, 12 `apers`, 13 `aper`, 14 `Details`, 15 `(`, 16 `()`, 17 `.search`, 18 `_`, 19 `ad`,
# 20 `vice`, 21 `mov`, 22 `ies`, 23 `.finish`, 24 `)`, 30... = arguments.
PAPERS_NAME = [10, 11, 12, 31, 32, 33, 15]  # .get P apers By Key words (
DETAILS_NAME = [10, 11, 13, 14, 15]  # .get P aper Details (
FINISH_NAME = [23, 15]


# ---------------------------------------------------------------------------------------------------------------------
# Ids by hand


def test_figure_2_papers_by_keywords_on_hand_written_ids():
    call = PAPERS_NAME + list(range(100, 118))  # 7 + 18 = 25 tokens
    assert len(call) == 25
    assert find_key_tokens(call, [DETAILS_NAME, FINISH_NAME]) == [0, 2]  # .get, apers
    # |K| = 2, |NK| = 23, 23 / 2 = 11.5, clipped to 9
    assert key_token_weights(call, [DETAILS_NAME, FINISH_NAME], 9.0) == [9.0, 1.0, 9.0] + [1.0] * 22
    assert key_token_weights(call, [DETAILS_NAME, FINISH_NAME], 100.0)[0] == 11.5


def test_figure_2_paper_details_on_hand_written_ids():
    call = DETAILS_NAME + list(range(100, 115))  # 5 + 15 = 20 tokens
    # |K| = 2, |NK| = 18, 18 / 2 = 9 without any clipping
    assert key_token_weights(call, [PAPERS_NAME, FINISH_NAME], 100.0) == [9.0, 1.0, 9.0] + [1.0] * 17


def test_figure_2_finish_on_hand_written_ids():
    call = FINISH_NAME + list(range(100, 148))  # 50 tokens, no other name begins like it
    weights = key_token_weights(call, [PAPERS_NAME, DETAILS_NAME], 9.0)
    assert weights == [9.0] + [1.0] * 49
    assert key_token_weights(call, [PAPERS_NAME, DETAILS_NAME], 1000.0)[0] == 49.0


def test_search_advice_beside_search_movies():
    call = [17, 18, 19, 20, 15, 101, 102, 103, 104, 105]  # .search _ ad vice ( query =" lo ve ")
    movies = [17, 18, 21, 22, 15]
    assert key_token_weights(call, [movies], 9.0) == [4.0, 1.0, 4.0] + [1.0] * 7  # |K| = 2, |NK| = 8


def test_a_name_that_begins_another_name_gets_its_bracket_as_key_token():
    other = [10, 11, 13, 14, 15]  # .get P aper Details (
    assert find_key_tokens([10, 11, 13, 15, 101, 24], [other]) == [0, 3]  # getPaper( x )
    assert find_key_tokens([10, 11, 13, 16], [other]) == [0, 3]  # getPaper(): the bracket is merged with its partner
    # and seen from the longer name: the first token after what getPaper( shares
    assert find_key_tokens([10, 11, 13, 14, 15, 101, 24], [[10, 11, 13, 15]]) == [0, 3]


def test_several_others_may_point_at_the_same_or_at_different_tokens():
    call = [1, 2, 3, 4, 5, 6]
    assert find_key_tokens(call, [[1, 2, 9], [1, 2, 8, 8]]) == [0, 2]
    assert find_key_tokens(call, [[1, 9], [1, 2, 3, 9], [7, 7]]) == [0, 1, 3]


def test_equal_names_and_strangers_add_nothing():
    call = [1, 2, 15, 5, 6]
    assert find_key_tokens(call, [[1, 2, 15]]) == [0]
    assert find_key_tokens(call, [[7, 2, 15]]) == [0]
    assert find_key_tokens(call, []) == [0]


def test_the_whole_call_shared_leaves_no_token_to_mark():
    assert find_key_tokens([1, 2], [[1, 2, 3]]) == [0]
    assert key_token_weights([1], [[1, 2]], 9.0) == [1.0]  # |NK| = 0: clipped up to 1
    assert key_token_weights([], [[1, 2]], 9.0) == []


@pytest.mark.parametrize("max_weight", [0.5, 0, -1, float("nan"), float("inf")])
def test_a_cap_below_one_is_refused(max_weight):
    with pytest.raises(ValueError, match="max_weight: found"):
        key_token_weights([1, 2], [], max_weight)


def test_bounds_and_set_sizes_on_random_ids():
    generator = random.Random(0)
    for _ in range(500):
        call = [generator.randrange(4) for _ in range(generator.randrange(1, 12))]
        others = [
            [generator.randrange(4) for _ in range(generator.randrange(1, 8))] for _ in range(generator.randrange(5))
        ]
        w_max = generator.choice([1.0, 2.5, 9.0])
        keys, weights = find_key_tokens(call, others), key_token_weights(call, others, w_max)
        assert keys[0] == 0 and len(keys) <= 1 + len(others) and max(keys) < len(call)
        assert len(weights) == len(call) and all(1.0 <= weight <= w_max for weight in weights)
        assert len({weights[i] for i in keys}) == 1  # one weight for all key tokens of a call
        assert all(weights[i] == 1.0 for i in range(len(call)) if i not in keys)
        for position in keys[1:]:  # brute force: some other name agrees before the position and differs there
            assert any(
                other[:position] == call[:position] and len(other) > position and other[position] != call[position]
                for other in others
            )


# ---------------------------------------------------------------------------------------------------------------------
# LLaMA-2's pieces


@pytest.fixture(scope="module")
def llama2():
    if not LLAMA2.exists():
        pytest.skip("the tokenizer of LLaMA-2 is not beside this checkout")
    from model.tokenizer import load_tokenizer

    return load_tokenizer(LLAMA2)


def weigh(tokenizer, call_text, offered_names, w_max=9.0):
    ids = tokenizer.encode_continuation(" " + call_text)
    call_ids = ids[count_tokens_before(ids, " ", tokenizer) :]
    name = call_text[: call_text.index("(")]
    others = [ids for other, ids in encode_names(offered_names, tokenizer).items() if other != name]
    return [tokenizer.piece(i).strip() for i in call_ids], key_token_weights(call_ids, others, w_max)


OFFERED = ["getPapersByKeywords", "getPaperDetails", "ask_to_user", "finish"]


def test_figure_2_in_llama2_pieces(llama2):
    pieces, weights = weigh(llama2, 'getPapersByKeywords(keywords="tool learning", year=2024, limit=50)', OFFERED)
    assert pieces[:7] == ["get", "P", "apers", "By", "Key", "words", "("] and len(pieces) == 25
    assert weights == [9.0, 1.0, 9.0] + [1.0] * 22
    pieces, weights = weigh(llama2, 'getPaperDetails(paper_id="2412.15495")', OFFERED, w_max=50.0)
    assert pieces[:5] == ["get", "P", "aper", "Details", "("] and len(pieces) == 20
    assert weights == [9.0, 1.0, 9.0] + [1.0] * 17
    pieces, weights = weigh(llama2, f'finish(answer="{"very " * 45}")', OFFERED)
    assert pieces[:2] == ["finish", "("] and len(pieces) == 50
    assert weights == [9.0] + [1.0] * 49


def test_search_advice_in_llama2_pieces(llama2):
    pieces, weights = weigh(llama2, 'search_advice(query="love")', ["search_movies", "search_advice", "finish"])
    assert pieces == ["search", "_", "ad", "vice", "(", "query", '="', "lo", "ve", '")']
    assert weights == [4.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_brackets_merged_by_llama2(llama2):
    pieces, weights = weigh(llama2, "getPaper()", ["getPaperDetails", "getPaper", "getPaper"])
    assert pieces == ["get", "P", "aper", "()"]
    assert weights == [1.0, 1.0, 1.0, 1.0]  # |K| = 2 (get, the bracket), |NK| = 2
    pieces, weights = weigh(llama2, 'getPaper(x="a long enough text")', ["getPaperDetails", "getPaper"])
    assert [piece for piece, weight in zip(pieces, weights) if weight > 1] == ["get", "("]
    # `(_` is one piece: the released scan for a lone bracket runs past the end of such a name
    pieces, weights = weigh(llama2, "foo_(_x=1)", ["foo_bar", "foo_"])
    assert pieces == ["foo", "_", "(_", "x", "=", "1", ")"]
    assert weights == [2.5, 1.0, 2.5, 1.0, 1.0, 1.0, 1.0]  # |K| = 2, |NK| = 5
