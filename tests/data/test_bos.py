"""BOS: prompts of dialogues and of plain texts begin with it together, or not at all."""

import json

import pytest

from data.formats.table import encode_prompt
from data.trajectories import Message
from eval.predict.generate import encode_text
from model.tokenizer import load_tokenizer
from tests.support.tiny_run import copy_of_model


@pytest.mark.parametrize(("stated", "bos_id"), [(None, 1), (True, 1), (False, None)])
def test_prompts_and_texts_agree(stated, bos_id, tmp_path):
    folder = copy_of_model(tmp_path / "model")
    if stated is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": stated}))
    tokenizer = load_tokenizer(folder)
    rows = [encode_prompt([], [Message("user", "hello")], tokenizer), encode_text("hello", tokenizer)]
    assert tokenizer.bos_id == bos_id
    assert [row.count(1) for row in rows] == ([0, 0] if bos_id is None else [1, 1])
    assert bos_id is None or [row[0] for row in rows] == [1, 1]
