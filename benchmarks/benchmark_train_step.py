"""Training tokens per second: our model and loss over transformers' LlamaForCausalLM with eager weighted cross-entropy.

    python -m benchmarks.benchmark_train_step
    python -m benchmarks.benchmark_train_step --dtypes bfloat16 --tokens 128 --repeats 3

All sides hold the same weights and see the same batch (four sequences of equal length: no padding for either), the
same weights per token and the same AdamW and clipping; they run in one process, alternating, and the figure is the
median of the pairs' ratios. On a machine with other work use `--clock cpu` with OMP_NUM_THREADS=1: seconds of processor
time, which waiting for the processor does not lengthen. Sides:
    eager   LlamaForCausalLM (sdpa), logits of every token, F.cross_entropy(reduction="none") * w
    ours    model/transformer.py to hidden states, linear_weighted_cross_entropy on the trained rows
    loop    the same through train.sft_loop.train_step on one rank, checks and counts included (fp32 only)
Goal (fp32, ours over eager): >= 1.0 with every token trained, >= 1.4 with 10 % trained. Exit code 1 if missed.

The gain at 10 % comes from the head, so it depends on the head's share of the work, which is printed: large in a small
model with a large vocabulary, about 2 % in a 7B model.

Share of the matmul rate: useful floating-point operations of our step, divided by its seconds and by the rate of a
large matmul measured in the same process. Counted: 6 * parameters of the blocks' matrices * tokens, 6 * layers * heads
* head_dim
* sum of squared sequence lengths for causal attention, 6 * V * D * trained rows for the head.

Shape suffixes: B batch (eager: one row per sequence; ours: one packed row), T tokens, K trained tokens (weight above
0), D model dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from data.batches import PackedBatch
from model.config import ModelConfig
from model.transformer import Transformer
from train.distributed import close_world, init_world, shard_model
from train.optimizer import make_adamw
from train.sft_config import SFTConfig
from train.sft_loop import train_step
from train.weighted_cross_entropy import linear_weighted_cross_entropy

N_SEQUENCES = 4
GOALS = {100: 1.0, 10: 1.4}  # percent trained -> tokens/s over eager
ADAMW = {"learning_rate": 1e-6, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0
HF_NAMES = (  # ours -> transformers
    ("tok_embeddings", "model.embed_tokens"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Models and batch


def make_config(args) -> ModelConfig:
    return ModelConfig(
        vocab_size=args.vocab_size,
        dim=args.dim,
        n_layers=args.layers,
        n_heads=args.dim // 64,
        n_kv_heads=args.dim // 64,
        head_dim=64,
        ffn_dim=args.dim * 8 // 3 // 32 * 32,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=False,
        qkv_bias=False,
        max_positions=4096,
    )


def transformers_copy(model: Transformer) -> torch.nn.Module:
    """LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    peer = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=False,
        ),
        attn_implementation="sdpa",
    )
    peer.load_state_dict({name: tensor.clone() for name, tensor in transformers_state(model).items()}, strict=True)
    return peer


def transformers_state(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights of a model that is not tied, under transformers' names."""
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in HF_NAMES:
            name = name.replace(ours, theirs)
        prefix = "" if name.startswith("model.") else "lm_head" if name.startswith("output") else "model."
        state["lm_head.weight" if prefix == "lm_head" else prefix + name] = tensor
    return state


def make_batch(args, percent: int) -> PackedBatch:
    """Random ids; `percent` of the targets trained, with weights 1 to 9."""
    generator = torch.Generator().manual_seed(args.seed)
    length = args.tokens // N_SEQUENCES
    loss_weights_T = torch.zeros(args.tokens)
    chosen = torch.randperm(args.tokens, generator=generator)[: round(args.tokens * percent / 100)]
    loss_weights_T[chosen] = 1 + 8 * torch.rand(len(chosen), generator=generator)
    return PackedBatch(
        input_ids_T=torch.randint(0, args.vocab_size, (args.tokens,), generator=generator),
        target_ids_T=torch.randint(0, args.vocab_size, (args.tokens,), generator=generator),
        loss_weights_T=loss_weights_T,
        position_ids_T=torch.arange(length).repeat(N_SEQUENCES),
        trained_index_K=loss_weights_T.nonzero().squeeze(1),
        segment_lengths=[length] * N_SEQUENCES,
        ids=[str(i) for i in range(N_SEQUENCES)],
        denominator=loss_weights_T.sum().item(),
        trained_turns=N_SEQUENCES,
        trained_tokens=len(chosen),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sides


def eager_loss(model, batch: PackedBatch):
    logits_BTV = model(input_ids=batch.input_ids_T.view(N_SEQUENCES, -1), use_cache=False).logits
    rows = cross_entropy(logits_BTV.flatten(0, 1).float(), batch.target_ids_T, reduction="none")
    return (rows * batch.loss_weights_T).sum() / batch.denominator


def our_loss(model, batch: PackedBatch):
    hidden_BTD = model(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
        return_hidden=True,
    )
    return (
        linear_weighted_cross_entropy(
            hidden_BTD[0],
            model.head_weight(),
            batch.target_ids_T,
            batch.loss_weights_T,
            trained_index_K=batch.trained_index_K,
        )
        / batch.denominator
    )


def plain_step(loss_function, model, optimizer, batch: PackedBatch) -> float:
    loss = loss_function(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def make_sides(args, dtype: torch.dtype, world) -> dict:
    """Name -> step(batch) -> loss, each with a model and optimizer of its own, all from the same weights."""
    ours = Transformer(make_config(args))
    ours.init_weights(torch.Generator().manual_seed(args.seed))
    models = {"eager": transformers_copy(ours)}
    if dtype == torch.float32 and args.loop == "on":
        models["loop"] = Transformer(make_config(args))
        models["loop"].load_state_dict(ours.state_dict())
        shard_model(models["loop"], world, dtype="float32")
    models["ours"] = ours
    models = {name: models[name].to(dtype).train() for name in ("eager", "ours", "loop") if name in models}
    optimizers = {name: make_adamw(model, **ADAMW) for name, model in models.items()}
    sides = {
        name: lambda batch, name=name, loss=loss: plain_step(loss, models[name], optimizers[name], batch)
        for name, loss in (("eager", eager_loss), ("ours", our_loss))
    }
    if "loop" in models:
        sides["loop"] = lambda batch: (
            train_step(
                SFTConfig(loss_normalization="token_mean", max_grad_norm=MAX_GRAD_NORM),
                models["loop"],
                optimizers["loop"],
                [batch],
                world,
                step=1,
            ).loss
        )
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def useful_flops(args, trained_rows: int) -> tuple[float, float]:
    """(blocks, head) floating-point operations of one forward and backward."""
    config = make_config(args)
    attention_width = config.n_heads * config.head_dim
    block_weights = config.n_layers * config.dim * (4 * attention_width + 3 * config.ffn_dim)
    length = args.tokens // N_SEQUENCES
    attention = 6 * config.n_layers * attention_width * N_SEQUENCES * length**2
    return 6.0 * block_weights * args.tokens + attention, 6.0 * config.vocab_size * config.dim * trained_rows


def matmul_rate(dtype: torch.dtype, size: int, clock) -> float:
    """Floating-point operations per second of one large square matmul, best of 5."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = clock()
        left @ right
        best = min(best, clock() - start)
    return 2 * size**3 / best


def measure(args, dtype_name: str, percent: int, sides: dict) -> dict:
    batch, dtype = make_batch(args, percent), getattr(torch, dtype_name)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    losses = {name: [step(batch)] for name, step in sides.items()}  # warm-up
    seconds, rates = {name: [] for name in sides}, []
    for _ in range(args.repeats):
        for name, step in sides.items():
            start = clock()
            losses[name].append(step(batch))
            seconds[name].append(clock() - start)
        rates.append(matmul_rate(dtype, 2048 if dtype == torch.float32 else 1024, clock))
    block_flops, head_flops = useful_flops(args, batch.trained_tokens)
    ratios = {
        name: statistics.median(eager / other for eager, other in zip(seconds["eager"], seconds[name]))
        for name in sides
        if name != "eager"
    }
    return {
        "dtype": dtype_name,
        "percent_trained": percent,
        "tokens_per_second": {name: args.tokens / statistics.median(values) for name, values in seconds.items()},
        "ratio_over_eager": ratios,
        "matmul_gflops": statistics.median(rates) / 1e9,
        "share_of_matmul_rate": statistics.median(
            (block_flops + head_flops) / duration / rate for duration, rate in zip(seconds["ours"], rates)
        ),
        "head_share_all_rows": useful_flops(args, args.tokens)[1] / sum(useful_flops(args, args.tokens)),
        "loss_relative_difference": max(
            abs(a - b) / abs(b) for name in sides for a, b in zip(losses[name], losses["eager"])
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32", help="comma-separated: float32, bfloat16 (weights and compute)")
    parser.add_argument("--dim", type=int, default=512, help="model dimension, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="number of blocks")
    parser.add_argument("--vocab_size", type=int, default=32016, help="vocabulary (32016 = CodeLLaMA)")
    parser.add_argument("--tokens", type=int, default=1024, help=f"tokens per step, in {N_SEQUENCES} sequences")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds over the sides")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="wall time, or processor time")
    parser.add_argument("--loop", choices=["on", "off"], default="on", help="measure the side `loop` too")
    args = parser.parse_args()
    world = init_world("cpu")
    print(
        f"{args.layers} layers, D {args.dim}, V {args.vocab_size}, {N_SEQUENCES} x {args.tokens // N_SEQUENCES} "
        f"tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} alternating rounds, "
        f"{args.clock} time"
    )
    print(
        "dtype     trained  eager tok/s  ours tok/s  loop tok/s  ours/eager  loop/eager  matmul GF/s  share  loss diff"
    )
    rows = []
    for dtype_name in args.dtypes.split(","):
        sides = make_sides(args, getattr(torch, dtype_name), world)
        for percent in GOALS:
            row = measure(args, dtype_name, percent, sides)
            rows.append(row)
            speed, ratio = row["tokens_per_second"], row["ratio_over_eager"]
            print(
                f"{dtype_name:9s} {percent:6d}%  {speed['eager']:11.1f}  {speed['ours']:10.1f}  "
                f"{speed.get('loop', float('nan')):10.1f}  {ratio['ours']:10.3f}  "
                f"{ratio.get('loop', float('nan')):10.3f}  "
                f"{row['matmul_gflops']:11.1f}  {row['share_of_matmul_rate']:5.2f}  "
                f"{row['loss_relative_difference']:9.1e}",
                flush=True,
            )
        del sides
    close_world()
    print(f"head: {rows[0]['head_share_all_rows']:.0%} of the operations when every row goes through it")
    met = all(
        row["ratio_over_eager"]["ours"] >= GOALS[row["percent_trained"]] for row in rows if row["dtype"] == "float32"
    )
    print(json.dumps({"benchmark": "train_step", "rows": rows, "goal_met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
