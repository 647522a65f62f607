"""The stages of benchmarks/gpu_check.py, which starts each in a process of its own. NOT YET RUN on a GPU.

A stage yields items as it goes: {name: figure}, {"fault": what is wrong}, {"not_run": what and why}, {"skipped": why}.
An item may hold a figure and its fault. Each stage runs on the CPU too, on shapes of `small`; figures that only a CUDA
device has are then named under not_run.

Shape suffixes: B rows, T tokens, L keys, N query heads, K key/value heads, H head dim.
"""

import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import xml.etree.ElementTree as xml
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import distributions
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.benchmark_loss_cuda import make_inputs, make_sides, median_seconds, roof_rates, run_step
from benchmarks.benchmark_plan import make_batch
from benchmarks.benchmark_train_step import ADAMW, transformers_state
from benchmarks.gpu_decode_stage import decode
from benchmarks.gpu_measures import (
    Items,
    at_most,
    compute_dtype,
    count_calls,
    llama_shape,
    must_be,
    needs_cuda,
    peak_gib,
    random_model,
    seconds_of,
)
from data.batches import PackedBatch
from model.config import PRESETS, ModelConfig, config_to_hf, count_parameters
from model.tokenizer import load_tokenizer
from model.transformer import Segments, Transformer, attend, describe_attention
from model.value_model import ValueModel
from rl.models import Models
from rl.ppo_config import PPOConfig
from rl.ppo_loop import FIRST_UPDATE_TOLERANCE, update_models
from rl.prompts import read_prompts
from rl.rollout import (
    Iteration,
    credit_responses,
    judge_responses,
    measure_responses,
    pack_minibatches,
    sample_responses,
)
from rl.watch import describe_rollout
from train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from train.compilation import compile_blocks
from train.cuda.launch import choose_loss_backend
from train.cuda.runtime import CudaKernelError, nvrtc_version
from train.distributed import World, init_world, local_part, shard_model
from train.optimizer import make_adamw, set_learning_rates
from train.plan import GIB, Setup, plan_step
from train.sft_config import SFTConfig
from train.sft_loop import train_step

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL, TINY_DATA = ROOT / "assets" / "tiny_model", ROOT / "assets" / "tiny_data" / "train.json"
# dense bf16 operations per second, from NVIDIA's data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


# ---------------------------------------------------------------------------------------------------------------------
# Which stage


def run(name: str, device: str, small: bool) -> Items:
    """The items of a stage."""
    if device == "cpu":
        torch.set_num_threads(1)  # decoding promises equal bits in whole batches only then
    elif not torch.cuda.is_available():
        yield {"fault": "found no CUDA device, expected one"}
        if name != "versions":
            return
    stages = (versions, gpu_tests, attention, transformers_logits, bundled_sft, training_step, decode)
    stages += (ppo_and_checkpoint, loss_kernels)
    yield from {stage.__name__: stage for stage in stages}[name](device, small)


# ---------------------------------------------------------------------------------------------------------------------
# a, b


def versions(device: str, small: bool) -> Items:
    """What this machine has, and what the product chooses on it."""
    yield {"python": platform.python_version(), "cpus": os.cpu_count(), "torch": torch.__version__}
    yield {"torch_cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    peers = ("transformers", "liger_kernel", "liger-kernel", "triton", "cuda-bindings")
    yield {"packages": {each.metadata["Name"]: each.version for each in distributions() if each.name in peers}}
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    yield {"sdpa_enabled": [kind for kind in kinds if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()]}
    order = getattr(torch._C, "_get_sdp_priority_order", list)()  # no public name
    yield {"sdpa_order": list(map(backend_name, order)) or "unknown: this torch does not tell it"}
    try:
        yield {"nvrtc": ".".join(map(str, nvrtc_version()))}
    except CudaKernelError as error:
        yield {"fault" if device == "cuda" else "not_run": str(error)}
    yield from needs_cuda(device, "name, memory and driver of the device")
    if device == "cuda":
        if not torch.cuda.is_available():
            return
        card = torch.cuda.get_device_properties(0)
        yield {"device": card.name, "capability": f"{card.major}.{card.minor}", "memory_gib": card.total_memory / GIB}
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            yield {"driver": subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()}
    backend, reason = choose_loss_backend("auto", torch.device(device))
    yield {"loss_backend": f"{backend}: {reason}"}
    if backend != device.replace("cpu", "torch"):
        yield {"fault": f"loss backend: found {backend}, expected {device}: {reason}"}


def backend_name(number: int) -> str:
    """The name of an SDPA backend."""
    names = {int(value): name for name, value in SDPBackend.__members__.items()}
    return names.get(int(number), str(number))


def gpu_tests(device: str, small: bool) -> Items:
    """The tests marked gpu, but for compute-sanitizer's, which take minutes. Without a device they only show that they
    can be collected."""
    import pytest

    os.chdir(ROOT)
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    report = Path(tempfile.mkdtemp()) / "report.xml"
    flags = ["-m", "gpu", "-k", "not compute_sanitizer", "-p", "no:cacheprovider", f"--junitxml={report}"]
    code = pytest.main([*flags, *files])
    suite = xml.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    yield {"pytest": counts}
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            yield {"fault": f"{case.get('name')}: {problem.get('message')}"}
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        yield {"fault": f"found exit code {int(code)} of pytest, expected 0"}
    yield {"not_run": "tests under compute-sanitizer: they take minutes"}
    if counts["skipped"] == counts["tests"]:
        yield {"fault" if device == "cuda" else "skipped": "all tests were skipped: they need a CUDA device"}


# ---------------------------------------------------------------------------------------------------------------------
# c attention


def attention(device: str, small: bool) -> Items:
    """model.transformer.attend on lengths that are new to it, by backend, against fp64, and decoding's rows."""
    n_heads, head_dim = (4, 16) if small else (32, 128)
    lengths = (5, 17, 33, 65, 129) if small else (509, 1021, 2039, 4093, 8191)
    for kind, n_kv_heads in (("mha", n_heads), ("gqa", n_heads // 4)):

        def inputs(n_tokens: int, dtype: torch.dtype, n_kv_heads: int = n_kv_heads) -> list[Tensor]:
            torch.manual_seed(n_tokens)
            heads = (n_heads, n_kv_heads, n_kv_heads)
            return [torch.randn(1, n_tokens, n, head_dim, device=device).to(dtype).requires_grad_() for n in heads]

        yield {f"{kind}_chosen": chosen_backend(*inputs(lengths[0], compute_dtype(device)))}
        yield {f"{kind}_first_second_ms": {n: first_second_ms(inputs(n, compute_dtype(device))) for n in lengths}}
        by_backend = {}
        for name, backend in SDPBackend.__members__.items():
            if name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
                try:
                    with sdpa_kernel(backend):
                        by_backend[name] = first_second_ms(inputs(lengths[2] + 2, compute_dtype(device)))
                except RuntimeError as error:
                    by_backend[name] = f"refused: {str(error)[:80]}"
        yield {f"{kind}_by_backend_ms": by_backend}
        for dtype, limit in {torch.float32: 1e-4, compute_dtype(device): 2e-2 if device == "cuda" else 1e-4}.items():
            yield at_most(f"{kind}_{str(dtype)[6:]}_error", error_of_attend(inputs(lengths[1], dtype)), limit)
        yield from packed_attention(kind, inputs(lengths[2], compute_dtype(device)))
        yield from decode_attention(device, n_heads, n_kv_heads, head_dim, 64 if small else 1024)
    yield from needs_cuda(device, "bf16", "the backends of CUDA", "varlen_attn")


def chosen_backend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> str:
    """SDPA's choice for these."""
    inputs, is_grouped = (each.transpose(1, 2) for each in (q_BTNH, k_BTKH, v_BTKH)), q_BTNH.shape != k_BTKH.shape
    try:  # it has no public name
        return backend_name(torch._fused_sdp_choice(*inputs, is_causal=True, enable_gqa=is_grouped))
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"unknown: {str(error)[:80]}"


def packed_attention(kind: str, row: Sequence[Tensor]) -> Items:
    """The row as four sequences of ever new lengths: one call of varlen_attn, where it can be, and one per sequence."""
    q_1TNH, k_1TKH, _ = row
    n_tokens, n_heads, head_dim = q_1TNH.shape[1:]
    lengths = [1, n_tokens // 2, n_tokens // 3]
    lengths.append(n_tokens - sum(lengths))
    shape = replace(PRESETS["codellama_7b"], n_heads=n_heads, n_kv_heads=k_1TKH.shape[2], head_dim=head_dim)
    chosen = describe_attention(shape, q_1TNH.dtype, q_1TNH.device)
    ways = {"per_sequence": Segments(lengths, None, [None] * len(lengths))}
    if chosen.startswith("varlen_attn"):
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q_1TNH.device)
        ways["one_call"] = Segments(lengths, ends, [None] * len(lengths))
    yield {f"{kind}_packed_chosen": chosen}
    for name, segments in ways.items():
        yield {f"{kind}_packed_{name}_ms": first_second_ms(row, segments=segments)}
        limit = 1e-4 if q_1TNH.dtype == torch.float32 else 2e-2
        yield at_most(f"{kind}_packed_{name}_error", error_of_attend(row, segments=segments), limit)


def first_second_ms(inputs: Sequence[Tensor], **segments: Segments) -> list[float]:
    """Forward and backward, twice: the first call may build a plan for its shape."""
    device = inputs[0].device.type
    return [1000 * seconds_of(lambda: attend(*inputs, **segments).sum().backward(), device) for _ in range(2)]


def error_of_attend(inputs: Sequence[Tensor], **segments: Segments) -> float:
    """Largest relative error of output and gradients against the formula, step by step in fp64."""
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    q_TNH, k_LNH, v_LNH = (each[0].repeat_interleave(inputs[0].shape[2] // each.shape[2], 1) for each in exact_inputs)
    scores_NTL = torch.einsum("tnh,lnh->ntl", q_TNH, k_LNH) / q_TNH.shape[-1] ** 0.5
    unseen_TL = torch.ones_like(scores_NTL[0], dtype=torch.bool).triu(1)
    for each in segments.values():
        own_T = torch.arange(len(each.lengths)).repeat_interleave(torch.tensor(each.lengths)).to(unseen_TL.device)
        unseen_TL |= own_T[:, None] != own_T
    exact_TNH = torch.einsum("ntl,lnh->tnh", scores_NTL.masked_fill(unseen_TL, -inf).softmax(-1), v_LNH)
    out_TNH = attend(*inputs, **segments)[0]
    incoming_TNH = torch.randn_like(out_TNH)
    gradients = torch.autograd.grad(out_TNH, inputs, incoming_TNH)
    exact_gradients = torch.autograd.grad(exact_TNH, exact_inputs, incoming_TNH.double())
    pairs = [(out_TNH, exact_TNH), *zip(gradients, exact_gradients, strict=True)]
    return max(((found.double() - exact).norm() / exact.norm()).item() for found, exact in pairs)


@torch.no_grad()
def decode_attention(device: str, n_heads: int, n_kv_heads: int, head_dim: int, n_slots: int) -> Items:
    """One query per row, masked at the row's length, as decode_step asks: 16 rows at once against each alone."""
    torch.manual_seed(1)
    q_B1NH = torch.randn(16, 1, n_heads, head_dim, device=device).to(compute_dtype(device))
    k_BLKH, v_BLKH = torch.randn(2, 16, n_slots, n_kv_heads, head_dim, device=device).to(q_B1NH.dtype)
    unseen_BL = torch.arange(n_slots, device=device) >= torch.randint(1, n_slots, (16, 1), device=device)
    mask_B11L = torch.zeros_like(unseen_BL, dtype=q_B1NH.dtype).masked_fill_(unseen_BL, -inf)[:, None, None]
    rows = q_B1NH, k_BLKH, v_BLKH, mask_B11L
    together_B1NH = attend(*rows)
    alone_B1NH = torch.cat([attend(*(each[row : row + 1] for each in rows)) for row in range(16)])
    name = "decode_mha" if n_heads == n_kv_heads else "decode_gqa"
    yield must_be(f"{name}_bits_of_1_row_and_16", torch.equal(together_B1NH, alone_B1NH))
    yield {f"{name}_ms": [1000 * seconds_of(lambda: attend(*rows), device) for _ in range(2)]}


# ---------------------------------------------------------------------------------------------------------------------
# d logits


def transformers_logits(device: str, small: bool) -> Items:
    """Two layers of each family, random weights, ours against transformers'."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        yield {"skipped": "transformers is not installed"}
        return
    shapes = {name: replace(PRESETS[name], n_layers=2) for name in ("codellama_7b", "llama31_8b", "qwen25_7b")}
    if small:
        tiny = {"vocab_size": 500, "dim": 64, "n_heads": 4, "head_dim": 16, "ffn_dim": 172}
        shapes = {name: replace(shape, **tiny, n_kv_heads=shape.n_kv_heads // 8 or 2) for name, shape in shapes.items()}
    for family, shape in shapes.items():
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            ours = random_model(Transformer, shape, device, dtype)
            with torch.device(device):
                config = AutoConfig.for_model(**config_to_hf(shape))
                peer = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
            peer.load_state_dict(transformers_state(ours), strict=True, assign=True)
            ids = torch.randint(0, shape.vocab_size, (2, 32 if small else 512), device=device)
            with torch.no_grad():
                found, expected = ours(ids).float(), peer.eval()(ids).logits.float()
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            yield at_most(f"{family}_{str(dtype)[6:]}", difference, limit)
            del ours, peer


# ---------------------------------------------------------------------------------------------------------------------
# e SFT


def bundled_sft(device: str, small: bool) -> Items:
    """The bundled run: CUDA against CPU, and with deterministic algorithms resumed against undisturbed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    from run_sft import main

    half, folder = 1 if small else 10, Path(tempfile.mkdtemp())
    data = first_records(folder, 8 * half)

    def trained(name: str, steps: int, **flags: object) -> list[dict]:
        values = {"model": TINY_MODEL, "data": data, "output": folder / name, "max_steps": steps, "device": device}
        values |= {"plot": "off", "checkpoint_every": 0} | flags
        if code := main([part for flag, value in values.items() for part in (f"--{flag}", str(value))]):
            raise RuntimeError(f"run_sft.py ended with code {code}")
        return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]

    default = trained("default", 2 * half)
    yield {"losses": [row["sft/loss"] for row in default]}
    if device == "cuda":
        on_cpu = trained("cpu", half, device="cpu", loss_backend="torch")
        pairs = [(a["sft/loss"], b["sft/loss"]) for a, b in zip(default, on_cpu, strict=False)]
        yield at_most("loss_difference_to_cpu", max(abs(a - b) / b for a, b in pairs), 1e-3)
    yield from needs_cuda(device, "losses on CUDA against those on the CPU")
    # last, because PyTorch keeps the switch
    whole = trained("whole", 2 * half, deterministic="on")
    trained("resumed", half, deterministic="on")
    resumed = trained("resumed", 2 * half, deterministic="on")
    weights = [(folder / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    yield must_be("resumed_losses_equal", [row["sft/loss"] for row in whole] == [row["sft/loss"] for row in resumed])
    yield must_be("resumed_weights_equal", weights[0] == weights[1])
    times = [statistics.median(row["time/step_seconds"] for row in rows[1:]) for rows in (default, whole)]
    yield {"step_seconds": times[0], "deterministic_over_default": times[1] / times[0]}


def first_records(folder: Path, n_records: int) -> Path:
    """A file of the first bundled trajectories."""
    path = folder / "data.json"
    path.write_text(json.dumps(json.loads(TINY_DATA.read_text(encoding="utf-8"))[:n_records]), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# f training step


def training_step(device: str, small: bool) -> Items:
    """Eight layers of 7B width, one sequence, through train_step: time, share of the peak, memory against the plan."""
    shape, batch = llama_shape(small, n_layers=2 if small else 8), make_batch(64 if small else 8192)
    planned = {}
    for checkpointing in ("on", "off"):  # before a process group exists: tracing makes its own
        setup = Setup(1, "bfloat16", device, checkpointing == "on")
        planned[checkpointing] = max(phase.total for phase in plan_step(shape, batch, 1, setup)) / GIB
    yield {"parameters": count_parameters(shape), "tokens": len(batch.input_ids_T), "planned_gib": planned}
    world = init_world(device)
    model = random_model(Transformer, shape, device)
    shard_model(model, world, dtype="bfloat16")
    optimizer, flops, rate = make_adamw(model, **ADAMW), useful_flops(shape, batch), matmul_rate(device, small)
    yield {"matmul_tflops": rate / 1e12}
    card, room = "", inf
    if device == "cuda":
        card, room = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
    peak_flops = next((each for name, each in PEAK_FLOPS.items() if name in card), None)
    set_learning_rates(optimizer, 0.0)  # the weights stay, so that all cases have one loss
    auto, losses = choose_loss_backend("auto", world.device)[0], []
    cases = [("off", each, backend) for each in planned for backend in sorted({"torch", auto})]
    for compiling, checkpointing, backend in [*cases, *(("on", each, auto) for each in planned)]:
        name, planned_gib = f"compile_{compiling}_checkpointing_{checkpointing}_loss_{backend}", planned[checkpointing]
        if planned_gib > room:
            yield {"not_run": f"{name}: {planned_gib:.1f} GiB planned, {room:.1f} here"}
            continue
        model.activation_checkpointing = checkpointing == "on"
        if compiling == "on":  # the last cases: what is compiled stays so
            compile_blocks(model, "eager" if device == "cpu" else "inductor")

        def step(backend: str = backend) -> None:
            result = train_step(SFTConfig(), model, optimizer, [batch], world, step=1, loss_backend=backend)
            losses.append(result.loss)

        first_seconds = seconds_of(step, device)
        peak_gib(device)
        seconds = statistics.median(seconds_of(step, device) for _ in range(1 if small else 3))
        peak = peak_gib(device)
        figures = {"first_ms": 1000 * first_seconds, "ms": 1000 * seconds, "peak_gib": peak}
        figures |= {"share_of_matmul_rate": flops / seconds / rate}
        figures |= {"model_flop_utilisation": flops / seconds / peak_flops} if peak_flops else {}
        yield {name: figures | count_calls(step, device)}
        yield at_most(f"{name}_loss_off_by", abs(losses[-1] / losses[0] - 1), 2e-3)
        if peak is not None:  # compiled blocks keep less than the plan says
            off_by = peak / planned_gib - 1
            yield at_most(f"{name}_plan_off_by", off_by if compiling == "on" else abs(off_by), 0.15)
    yield from needs_cuda(device, "loss backend cuda", "peak memory against the plan", "kernels and synchronizations")
    yield from needs_cuda(device, "compile on to machine code: here the blocks are only traced")


def useful_flops(shape: ModelConfig, batch: PackedBatch) -> float:
    """Floating-point operations of forward and backward: matrices of the blocks, causal attention, head."""
    width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    matrices = shape.n_layers * shape.dim * (2 * width + 2 * kv_width + 3 * shape.ffn_dim)
    attention_flops = 6 * shape.n_layers * width * sum(length**2 for length in batch.segment_lengths)
    head = 6.0 * shape.vocab_size * shape.dim * batch.trained_tokens
    return 6.0 * matrices * len(batch.input_ids_T) + attention_flops + head


def matmul_rate(device: str, small: bool) -> float:
    """Floating-point operations per second of a square bf16 product, best of 5."""
    size = 128 if small else 8192
    left, right = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(5))


# ---------------------------------------------------------------------------------------------------------------------
# h PPO


def ppo_and_checkpoint(device: str, small: bool) -> Items:
    """One PPO iteration of random models of 4 layers, in the order of run_iteration; then a checkpoint and its load."""
    tokenizer = load_tokenizer(TINY_MODEL)
    config = PPOConfig(
        prompt_format="tl",
        dtype="bfloat16" if device == "cuda" else "float32",
        device=device,
        rollout_batch_size=4 if small else 16,
        minibatch_size=4 if small else 16,
        max_response_tokens=8 if small else 64,
        critic_only_iterations=0,
    )
    path, settings = first_records(Path(tempfile.mkdtemp()), 2 * config.rollout_batch_size), {"max_prompt_tokens": 900}
    settings |= {"error_filter": "structured", "prompt_turns": "first", "unparsable_calls": "error"}
    prompts = read_prompts(path, tokenizer, **settings)[0][: config.rollout_batch_size]
    shape = llama_shape(small, n_layers=4, dim=2048, vocab_size=tokenizer.vocab_size)
    world = init_world(device)
    backend = choose_loss_backend("auto", world.device)[0]
    seconds, peaks, began = {}, {}, time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal began
        peaks[phase] = peak_gib(device)
        seconds[phase] = time.perf_counter() - began
        began = time.perf_counter()

    built = [random_model(build, shape, device) for build in (Transformer, Transformer, ValueModel)]
    for model in built:
        shard_model(model, world, dtype=config.dtype)
    built[1].requires_grad_(False).eval()  # the reference, which equals the policy
    optimizers = [make_adamw(model, **ADAMW) for model in built[::2]]
    models = Models(*built, *optimizers, tokenizer, starts_at_reference=True, loss_backend=backend)
    iteration = Iteration(0, 0, total_steps=10, kl_coef=config.kl_coef, prompts=prompts)
    mark("models")
    responses = sample_responses(config, models, world, iteration, must_stop=lambda: False)
    mark("rollout")
    sampled = judge_responses(prompts, responses, tokenizer, world.device)
    minibatches = pack_minibatches(config, world, sampled, range(len(prompts)))
    measured = measure_responses(config, models, sampled, [batch for each in minibatches for batch in each])
    credited = credit_responses(config, measured, config.kl_coef)
    yield at_most("kl_k3", describe_rollout(credited)["ppo/kl_k3"], FIRST_UPDATE_TOLERANCE)
    mark("measure")
    figures = update_models(config, models, world, iteration, credited, minibatches)[0]
    mark("update")
    yield {"seconds": seconds, "peak_gib": peaks}
    yield at_most("max_ratio_deviation", figures["ppo/max_ratio_deviation"], FIRST_UPDATE_TOLERANCE)
    yield {name: figures[f"ppo/{name}"] for name in ("policy_loss", "value_loss", "policy_grad_norm")}
    yield from save_and_load(models, world, device)
    yield from needs_cuda(device, "peak memory of each phase", "bf16")


def state_tensors(models: Models) -> list[Tensor]:
    """This rank's parameters of policy and critic, each with its two means of the optimizer."""
    return [
        local_part(tensor)
        for model, optimizer in models.trained().values()
        for parameter in model.parameters()
        for tensor in (parameter.detach(), *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")))
    ]


def save_and_load(models: Models, world: World, device: str) -> Items:
    """A checkpoint of policy, critic and their optimizers: GB/s, and every bit after a load."""
    folder, tensors = Path(tempfile.mkdtemp()), state_tensors(models)
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    if shutil.disk_usage(folder).free < 2 * n_bytes:
        yield {"not_run": f"checkpoint: found no room for {n_bytes / 1e9:.1f} GB among temporary files"}
        return
    expected, name = [tensor.to("cpu", copy=True) for tensor in tensors], "gpu_check"
    save_seconds = seconds_of(
        lambda: save_checkpoint(folder, 1, models.trained(), world, identity=name, keep=1, extra={}), device
    )
    for tensor in tensors:
        tensor.zero_()
    load_seconds = seconds_of(lambda: load_checkpoint(list_checkpoints(folder)[0], models.trained(), world), device)
    rates = {"save_gb_per_s": n_bytes / save_seconds / 1e9, "load_gb_per_s": n_bytes / load_seconds / 1e9}
    yield {"checkpoint": {"gb": n_bytes / 1e9} | rates}
    found = [tensor.cpu() for tensor in state_tensors(models)]
    yield must_be("checkpoint_equal_after_load", all(map(torch.equal, expected, found)))


# ---------------------------------------------------------------------------------------------------------------------
# i loss kernels


def loss_kernels(device: str, small: bool) -> Items:
    """The kernels over the device's copy rate; the loss against its peers."""
    sizes = {"tokens": 16384, "vocab_size": 32016, "dim": 4096, "warmup": 3, "repeats": 10}
    if small:
        sizes = {"tokens": 64, "vocab_size": 500, "dim": 32, "warmup": 1, "repeats": 1}
    args, dtype = Namespace(device=device, peer_chunk=1024, seed=0, **sizes), torch.bfloat16
    rates = {name: rate for name, (_, rate) in roof_rates(args, dtype).items()}
    copy_rate = next(iter(rates.values()))
    yield {"gb_per_s": {name: rate / 1e9 for name, rate in rates.items()}}
    yield {"share_of_copy_rate": {name: rate / copy_rate for name, rate in rates.items()}}
    backend = choose_loss_backend("auto", torch.device(device))[0]
    sides = make_sides(args, dtype, backend) | liger_side()
    for percent in (20, 100):
        inputs, milliseconds, losses = make_inputs(args, dtype, percent), {}, {}
        for name, side in sides.items():
            try:
                milliseconds[name] = 1000 * median_seconds(lambda side=side: run_step(side, inputs), args)
                losses[name] = run_step(side, inputs).item()
            except (TypeError, RuntimeError) as error:
                if name.startswith("ours"):
                    raise
                milliseconds[name] = f"{type(error).__name__}: {str(error)[:80]}"
        yield {f"percent_{percent}_ms": milliseconds}
        exact = losses["eager, fp32 logits"]
        for name in losses:
            if name.startswith("ours"):
                yield at_most(f"percent_{percent}_{name}_off_by", abs(losses[name] / exact - 1), 5e-3)
    if "fused, fixed" not in sides:
        yield {"not_run": "F.linear_cross_entropy: this torch has none"}
    if "Liger, unweighted" not in sides:
        yield {"not_run": "Liger: not importable here"}
    yield from needs_cuda(device, "our kernels")


def liger_side() -> dict[str, Callable]:
    """Liger's fused loss of the trained rows; it takes no weight per token."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except Exception:  # noqa: BLE001, without a GPU its import may fail in many ways
        return {}
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return {"Liger, unweighted": lambda hidden, head, targets, _, index: loss(head, hidden[index], targets[index])}
