"""Stage g of benchmarks/gpu_check.py: decoding, eager and by CUDA graph. NOT YET RUN on a GPU."""

import statistics

import torch

from benchmarks.gpu_measures import (
    Items,
    compute_dtype,
    count_calls,
    llama_shape,
    must_be,
    needs_cuda,
    random_model,
    seconds_of,
)
from model.decode import DecodeWeights
from model.sampling import Response, RowDecoder, generate
from model.transformer import Transformer


def decode(device: str, small: bool) -> Items:
    """Tokens drawn from a random 7B model: ms, tokens/s, share of the rate at which the device copies; equal output."""
    shape, dtype = llama_shape(small, n_layers=2 if small else 32), compute_dtype(device)
    model = random_model(Transformer, shape, device, dtype).requires_grad_(False).eval()
    weights = DecodeWeights(model, cuda_graphs=True)
    torch.manual_seed(3)
    prompts = [torch.randint(3, shape.vocab_size, (20 + 3 * n,)).tolist() for n in range(16)]
    kinds = {"eager": False, "graph": True} if weights.has_graphs else {"eager": False}
    for kind, has_graphs in kinds.items():
        weights.has_graphs = has_graphs
        batched, alone = (generate(weights, each, max_new_tokens=8, eos_id=None) for each in (prompts, prompts[:1]))
        yield must_be(f"{kind}_greedy_output_independent_of_batching", batched[0] == alone[0])
    source, target = torch.zeros(2, 2**20 if small else 2**30, dtype=torch.int8, device=device)
    copy_rate = 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    weight_bytes = sum(each.nbytes for each in model.parameters()) - model.tok_embeddings.weight.nbytes
    yield {"copy_gb_per_s": copy_rate / 1e9, "weight_gb": weight_bytes / 1e9}
    for n_rows in (1, 8) if small else (1, 8, 16, 64):
        responses = {}
        for kind, has_graphs in kinds.items():
            weights.has_graphs = has_graphs
            responses[kind], seconds, calls = decoded(weights, n_rows, device, n_blocks=2 if small else 16)
            rates = {"tokens_per_s": n_rows / seconds, "weights_share_of_copy_rate": weight_bytes / seconds / copy_rate}
            yield {f"rows_{n_rows}_{kind}": {"ms": 1000 * seconds} | rates | calls}
        if len(kinds) > 1:
            yield must_be(f"rows_{n_rows}_graph_equals_eager", responses["graph"] == responses["eager"])
    yield from needs_cuda(device, "CUDA graphs", "kernels and synchronizations", "bf16")


def decoded(weights: DecodeWeights, n_rows: int, device: str, n_blocks: int) -> tuple[list, float, dict]:
    """Responses to n_rows prompts, seconds per step of all rows, and what the steps between two looks for ends call."""
    decoder = RowDecoder(
        weights,
        n_rows=n_rows,
        max_tokens=128,  # one bucket of slots
        max_new_tokens=96,
        stop_ids=(),
        temperature=1.0,
        rows_per_forward=n_rows,
    )
    responses = [Response(torch.Generator().manual_seed(row)) for row in range(n_rows)]
    for row, response in enumerate(responses):
        decoder.begin(row, 0, [3 + row, *range(3, 34)], response)
    while decoder.waiting:
        decoder.forward()
    for _ in range(2):  # kernels are loaded, graphs recorded
        decoder.forward()
    n_steps = decoder.steps_per_stop_test
    seconds = statistics.median(seconds_of(decoder.forward, device) for _ in range(n_blocks)) / n_steps
    calls = {f"{name}_in_{n_steps}_steps": n for name, n in count_calls(decoder.forward, device).items()}
    return [(response.ids, response.logprobs) for response in responses], seconds, calls
