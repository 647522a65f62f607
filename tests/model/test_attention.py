"""model.transformer.attend against one oracle in fp64, however it is computed: per segment, as one call of varlen_attn,
with a mask.

varlen_attn needs a GPU, which these tests do not have: a stand-in with its signature checks what it is given and
computes the same in plain steps. So the call is tested, the kernel is not.

Shape suffixes: T tokens of a row, L keys, N query heads, K key/value heads, H head dim; B rows.
"""

import math
from dataclasses import replace
from inspect import signature

import pytest
import torch
import torch.nn.functional as F

from model import transformer
from model.config import PRESETS
from model.transformer import Segments, attend, describe_attention
from tests.support.tiny_run import tiny_model

LENGTHS = [1, 5, 3]  # of the segments of a row
HEADS = [(4, 4), (6, 2)]  # query heads, key/value heads


def exact_attention(q_TNH, k_LKH, v_LKH, seen_TL):
    """One query and one head at a time, in fp64."""
    out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float64)
    group = q_TNH.shape[1] // k_LKH.shape[1]
    for t in range(q_TNH.shape[0]):
        for n in range(q_TNH.shape[1]):
            keys = [key for key in range(k_LKH.shape[0]) if seen_TL[t][key]]
            scores = [sum(a * b for a, b in zip(q_TNH[t, n].tolist(), k_LKH[key, n // group].tolist())) for key in keys]
            largest = max(scores) / math.sqrt(q_TNH.shape[2])
            weights = [math.exp(score / math.sqrt(q_TNH.shape[2]) - largest) for score in scores]
            for key, weight in zip(keys, weights, strict=True):
                out_TNH[t, n] += weight / sum(weights) * v_LKH[key, n // group].double()
    return out_TNH


def packed_row(n_heads, n_kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_heads)
    shapes = [(1, sum(LENGTHS), heads, 8) for heads in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def seen_in_row():
    """seen[t][key] in a row of LENGTHS: the key is in the query's segment and not after it."""
    owner = [segment for segment, length in enumerate(LENGTHS) for _ in range(length)]
    return [[owner[key] == owner[t] and key <= t for key in range(len(owner))] for t in range(len(owner))]


def standin(version, calls):
    """varlen_attn with the signature of a version of torch; notes its arguments and attends sequence by sequence."""

    def compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **keywords):
        calls.append({"max_q": max_q, "max_k": max_k, "cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, **keywords})
        pieces = []
        for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
            one = [each[start:end].transpose(0, 1) for each in (query, key, value)]
            pieces.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True).transpose(0, 1))
        return torch.cat(pieces)

    def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal)

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def torch_2_13(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        unused = (return_aux, seqused_k, block_table, num_splits)
        assert unused == (None,) * 4 and (enable_gqa or query.shape[1] == key.shape[1])
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return {"2.10": torch_2_10, "2.11": torch_2_11, "2.13": torch_2_13}[version]


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows


@pytest.mark.parametrize("heads", HEADS)
def test_segment_by_segment_equals_the_oracle(heads):
    q_1TNH, k_1TKH, v_1TKH = packed_row(*heads)
    expected_TNH = exact_attention(q_1TNH[0], k_1TKH[0], v_1TKH[0], seen_in_row())
    found_1TNH = attend(q_1TNH, k_1TKH, v_1TKH, segments=Segments(LENGTHS, None, [None] * len(LENGTHS)))
    torch.testing.assert_close(found_1TNH[0], expected_TNH, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version, heads", [("2.10", (4, 4)), ("2.11", (4, 4)), ("2.13", (4, 4)), ("2.13", (6, 2))])
def test_one_call_for_the_row_equals_the_oracle(monkeypatch, version, heads):
    calls = []
    monkeypatch.setattr(transformer, "_varlen_attn", lambda: standin(version, calls))
    row = packed_row(*heads, torch.bfloat16)
    borders = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    found_1TNH = attend(*row, segments=Segments(LENGTHS, borders, [None] * len(LENGTHS)))
    expected_TNH = exact_attention(*(each[0] for each in row), seen_in_row())
    torch.testing.assert_close(found_1TNH[0].double(), expected_TNH, rtol=2e-2, atol=1e-2)  # bf16 keeps 8 bits
    (call,) = calls
    assert call.pop("cu_seq_q") is borders and call.pop("cu_seq_k") is borders
    how = {"is_causal": True} if version == "2.10" else {"scale": None, "window_size": (-1, 0)}
    assert call == {"max_q": 5, "max_k": 5, **how}


def test_the_standin_has_the_signature_of_the_installed_one():
    installed = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the stand-in repeats torch 2.13")
    found, expected = (signature(each).parameters.values() for each in (standin("2.13", []), installed))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.name, ours.kind, ours.default) == (theirs.name, theirs.kind, theirs.default)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_asks_once_per_layer_and_learns_the_same(monkeypatch, checkpointing):
    """Logits and gradients of a packed row, with the stand-in and segment by segment."""
    ids_1T = torch.arange(9)[None]
    model = tiny_model()
    model.activation_checkpointing = checkpointing
    results, calls = [], []
    for is_whole in (False, True):
        monkeypatch.setattr(transformer, "_takes_whole_rows", lambda *_, is_whole=is_whole: is_whole)
        monkeypatch.setattr(transformer, "_varlen_attn", lambda: standin("2.13", calls))
        logits_1TV = model(ids_1T, segment_lengths=LENGTHS)
        gradients = torch.autograd.grad(logits_1TV.square().sum(), list(model.parameters()))
        results.append([logits_1TV, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(model.layers) * (1 + checkpointing)
    for call in calls:
        borders = call["cu_seq_q"]
        assert borders.dtype == torch.int32 and borders.tolist() == [0, 1, 6, 9]
        assert (call["max_q"], call["max_k"]) == (5, 5)


def test_when_a_row_is_one_call(monkeypatch):
    version = {"torch": "2.13", "capability": (9, 0)}
    functions = {each: standin(each, []) for each in ("2.10", "2.11", "2.13")} | {"2.9": None}
    monkeypatch.setattr(transformer, "_varlen_attn", lambda: functions[version["torch"]])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version["capability"])

    def is_one_call(n_kv_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda"):
        config = replace(PRESETS["codellama_7b"], n_heads=4, n_kv_heads=n_kv_heads, head_dim=head_dim)
        return describe_attention(config, dtype, torch.device(device)) == "varlen_attn, one call per packed row"

    assert is_one_call() and is_one_call(n_kv_heads=2) and is_one_call(dtype=torch.float16)
    assert not is_one_call(dtype=torch.float32) and not is_one_call(device="cpu")
    assert not is_one_call(head_dim=12) and not is_one_call(head_dim=264)
    for older in ("2.10", "2.11"):
        version["torch"] = older
        assert is_one_call() and not is_one_call(n_kv_heads=2)
    version["torch"] = "2.9"
    assert not is_one_call()
    version.update(torch="2.13", capability=(7, 5))
    assert not is_one_call()


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("is_number", [False, True])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_a_mask_equals_the_oracle_and_is_never_given_with_grouped_heads(monkeypatch, heads, is_number, n_queries):
    """n_queries after 4 cached keys, 2 free slots after them; heads in groups reach SDPA as queries of one head."""
    n_heads, n_kv_heads = heads
    asked, sdpa = [], F.scaled_dot_product_attention

    def watched(*inputs, attn_mask=None, is_causal=False, enable_gqa=False):
        asked.append((inputs[0].shape[1], attn_mask is not None, enable_gqa))
        return sdpa(*inputs, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.manual_seed(1)
    q_BTNH = torch.randn(2, n_queries, n_heads, 8, dtype=torch.float64)
    k_BLKH, v_BLKH = torch.randn(2, 2, 4 + n_queries + 2, n_kv_heads, 8, dtype=torch.float64)
    seen_TL = [[key <= 4 + t for key in range(k_BLKH.shape[1])] for t in range(n_queries)]
    mask_TL = torch.tensor(seen_TL)
    if is_number:
        mask_TL = torch.zeros(mask_TL.shape, dtype=torch.float64).masked_fill_(~mask_TL, -math.inf)
    found_BTNH = attend(q_BTNH, k_BLKH, v_BLKH, mask_TL)
    for row in range(2):
        expected_TNH = exact_attention(q_BTNH[row], k_BLKH[row], v_BLKH[row], seen_TL)
        torch.testing.assert_close(found_BTNH[row], expected_TNH, rtol=1e-12, atol=1e-12)
    assert asked == [(n_kv_heads, True, False)]


def test_rows_with_masks_of_their_own_equal_the_oracle():
    """As decoding asks: one query per row, (B, 1, 1, L) added to the scores."""
    torch.manual_seed(2)
    q_B1NH = torch.randn(3, 1, 6, 8, dtype=torch.float64)
    k_BLKH, v_BLKH = torch.randn(2, 3, 7, 2, 8, dtype=torch.float64)
    seen_BL = [[key < length for key in range(7)] for length in (1, 7, 4)]
    mask_B11L = torch.zeros(3, 1, 1, 7, dtype=torch.float64)
    mask_B11L.masked_fill_(~torch.tensor(seen_BL)[:, None, None], -math.inf)
    found_B1NH = attend(q_B1NH, k_BLKH, v_BLKH, mask_B11L)
    for row in range(3):
        expected_1NH = exact_attention(q_B1NH[row], k_BLKH[row], v_BLKH[row], [seen_BL[row]])
        torch.testing.assert_close(found_B1NH[row], expected_1NH, rtol=1e-12, atol=1e-12)
