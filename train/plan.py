"""Memory of a run before it starts: no weight is read and no GPU is needed.

What is resident is counted: parameters, optimizer state, key/value cache. What forward and backward need at their peak
is traced: the model's own forward and the training loss run on fake tensors, sharded by FSDP2 over a fake process
group, while PyTorch's memory tracker adds up what is alive (torch.distributed._tools). The optimizer step needs nothing
beyond its state: fused AdamW writes in place.

Shape suffixes: B batch, T tokens, D model dim, K trained tokens.

Not seen: the allocator's fragmentation, and the buffers of NCCL and cuBLAS. RESERVED_BYTES allows for them on CUDA.
Gradients that a bf16 run keeps unreduced count as activations: the tracker does not tell them apart.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule

from command_line import EXIT_BAD_INPUT, ConfigError
from data.batches import PackedBatch, pack, steps_per_epoch
from data.loss_weights import EncodedTrajectory
from model.config import ModelConfig, count_parameters
from model.pretrained_weights import read_config
from model.transformer import Transformer
from train.distributed import DTYPES, World, make_mesh, ranks_that_hold_shards_only, set_gradient_sync, shard_model
from train.run_config import RunConfig
from train.run_logging import log_line
from train.sft_config import SFTConfig
from train.weighted_cross_entropy import MAX_LOGITS_BYTES, linear_weighted_cross_entropy

GIB = 2**30
RESERVED_BYTES = {"cuda": 2 * GIB, "cpu": 0}
FP32_BYTES = 4
ADAM_BYTES = 2 * FP32_BYTES  # both means of a parameter

FEW_LAYERS = 4  # enough for FSDP's prefetching to be as in a deep model

# The tracker's categories in the words of the table, for FSDP and for a model of one rank.
PARTS = {
    "Sharded Param": "parameters",
    "Parameter": "parameters",
    "Unsharded Param": "gathered parameters",
    "All Gather": "gathered parameters",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Gradient": "gradients",
    "Reduce Scatter": "gradients",
}
OTHER_PART = "activations and loss"


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model will run."""

    n_ranks: int
    dtype: str = "float32"  # compute type
    device_type: str = "cpu"
    checkpointing: bool = False  # of activations
    shard_group_size: int = 0  # ranks that share a copy of the parameters; 0 = all
    reduces_often: bool = False  # gradients after each micro-batch, not once per step
    offload: bool = False  # parameters, gradients and optimizer state lie in host memory

    def shard(self, n_parameters: int) -> int:
        """Parameters of one rank."""
        return -(-n_parameters // (self.shard_group_size or self.n_ranks))


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a run: what lies in the memory of one rank at its peak, bytes by part."""

    name: str
    bytes_by_part: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes_by_part.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need, per rank."""

    facts: list[str]  # lines on steps, tokens, disk
    phases: list[Phase]
    reserved: int  # bytes that nothing below sees: RESERVED_BYTES
    limit: int  # bytes that one rank may use
    host: int = 0  # bytes of host memory that the ranks of this machine offload to together
    host_limit: int = 0  # bytes of this machine's memory; 0 = not known

    @property
    def peak(self) -> int:
        """Bytes of the largest phase, with what is reserved."""
        return max(phase.total for phase in self.phases) + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the peak and what is offloaded are within their limits."""
        return self.peak <= self.limit and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether the host has the memory for what is offloaded, as far as that is known."""
        return not self.host_limit or self.host <= self.host_limit


def planned_ranks(plan_ranks: int) -> int:
    """The number of ranks to plan for: that of the setting, else torchrun's, else 1."""
    return plan_ranks or int(os.environ.get("WORLD_SIZE", "1"))


def device_type_of(device: str) -> str:
    """Where the run would compute: "cuda" or "cpu"."""
    return "cuda" if device == "cuda" or device == "auto" and torch.cuda.is_available() else "cpu"


def memory_limit(gpu_memory_gib: float, device_type: str, n_ranks: int) -> int:
    """Bytes that one rank may use: the setting; else the device's memory; on a CPU each rank's share of the machine's.

    Without a CUDA device to ask, a run planned for CUDA has 80 GiB.
    """
    if gpu_memory_gib:
        return int(gpu_memory_gib * GIB)
    if device_type == "cpu":
        return machine_memory() // n_ranks
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_memory(config: RunConfig, setup: Setup, bytes_per_rank: int) -> tuple[int, int]:
    """`host` and `host_limit` of a Plan whose ranks offload so much; without torchrun all ranks are on this machine.

    A plan that is only printed, for a GPU that --gpu_memory_gib describes, is one for another machine.
    """
    is_elsewhere = config.plan == "on" and config.gpu_memory_gib > 0
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", setup.n_ranks))
    return n_ranks * bytes_per_rank * setup.offload, 0 if is_elsewhere else machine_memory()


def setup_of(config: RunConfig, dtype: str) -> Setup:
    """The settings of a run that matter for memory. On a CPU nothing can be offloaded: host memory is all there is."""
    device_type = device_type_of(config.device)
    return Setup(
        planned_ranks(config.plan_ranks),
        dtype,
        device_type,
        config.activation_checkpointing == "on",
        config.shard_group_size,
        config.reduce_gradients == "micro_batch",
        config.offload == "on" and device_type == "cuda",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


def trace_peak(
    build: Callable[[ModelConfig], torch.nn.Module],
    shape: ModelConfig,
    run: Callable[[torch.nn.Module, FakeTensorMode], None],
    n_calls: int,
    setup: Setup,
) -> dict[str, int]:
    """Bytes by part at the peak of n_calls of run(model) on rank 0.

    build: makes the model, Transformer or ValueModel. run: one forward of a micro-batch, with its backward where the
    model has to learn; the last call reduces the gradients. Layers are alike, so a deep model is traced with
    FEW_LAYERS and twice as many, and the difference goes on to its depth. Joins and leaves a fake process group: no
    other may exist.
    """
    parts = _trace(build, replace(shape, n_layers=min(shape.n_layers, 2 * FEW_LAYERS)), run, n_calls, setup)
    if shape.n_layers > 2 * FEW_LAYERS:
        few = _trace(build, replace(shape, n_layers=FEW_LAYERS), run, n_calls, setup)
        steps = (shape.n_layers - 2 * FEW_LAYERS) / FEW_LAYERS
        parts = {part: int(parts[part] + (parts[part] - few[part]) * steps) for part in parts}
    if setup.offload:
        del parts["parameters"]
        block = count_parameters(replace(shape, n_layers=shape.n_layers + 1)) - count_parameters(shape)
        parts["gathered parameters"] += setup.shard(block) * FP32_BYTES  # on the way from the host
    return parts


def _trace(
    build: Callable[[ModelConfig], torch.nn.Module],
    shape: ModelConfig,
    run: Callable[[torch.nn.Module, FakeTensorMode], None],
    n_calls: int,
    setup: Setup,
) -> dict[str, int]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setup.n_ranks)
    try:
        mesh = make_mesh(setup.n_ranks, setup.shard_group_size, "cpu")
        world = World(rank=0, size=setup.n_ranks, device=torch.device("cpu"), mesh=mesh)
        with FakeTensorMode() as mode:
            model = _fake_model(build, shape, world, setup)
            model.activation_checkpointing = setup.checkpointing
            tracker = FSDPMemTracker(model) if isinstance(model, FSDPModule) else MemTracker()
            if not isinstance(model, FSDPModule):
                tracker.track_external(model)
            with tracker:
                for number in range(1, n_calls + 1):
                    is_last = number == n_calls
                    set_gradient_sync(model, synchronize=is_last or setup.reduces_often, is_last=is_last)
                    run(model, mode)
                    tracker.reset_mod_stats()
            snapshot = tracker.get_tracker_snapshot("peak")
    finally:
        dist.destroy_process_group()
    bytes_by_part: dict[str, int] = {}
    for category, n_bytes in snapshot[torch.device("cpu")].items():
        if category != "Total":
            part = PARTS.get(category, OTHER_PART)
            bytes_by_part[part] = bytes_by_part.get(part, 0) + n_bytes
    return bytes_by_part


def _fake_model(
    build: Callable[[ModelConfig], torch.nn.Module], config: ModelConfig, world: World, setup: Setup
) -> torch.nn.Module:
    """A model whose parameters take no memory, sharded where the run shards it."""
    with torch.device("meta"):
        model = build(config)
    shard_model(model, world, dtype=setup.dtype, offload=setup.offload)
    if not isinstance(model, FSDPModule):
        return build(config)
    model.to_empty(device="cpu")
    if setup.offload:
        for parameter in model.parameters():  # a reduced gradient leaves the device at once
            parameter.register_post_accumulate_grad_hook(lambda reduced: setattr(reduced, "grad", None))
    for module in model.modules():
        if isinstance(module, Transformer):
            module.inverse_frequencies = torch.empty_like(module.inverse_frequencies, device="cpu")
    return model


def loss_rows(n_rows: int, vocab_size: int, device_type: str) -> int:
    """Rows whose logits exist at once on that device, as train.weighted_cross_entropy chooses them."""
    return max(1, min(n_rows, MAX_LOGITS_BYTES[device_type] // (vocab_size * FP32_BYTES)))


def logits_bytes(n_rows: int, vocab_size: int, dtype: str) -> int:
    """Bytes of the logits of n_rows and of their fp32 copy: they live inside an operator, where no tracker looks."""
    itemsize = DTYPES[dtype].itemsize
    return n_rows * vocab_size * (itemsize + FP32_BYTES * (itemsize < FP32_BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# SFT


def plan_sft(config: SFTConfig, encoded: Sequence[EncodedTrajectory]) -> Plan:
    """The plan of `python run_sft.py` with these settings on these trajectories.

    The largest micro-batch is taken to be the micro_batch_size longest trajectories together; which ones meet is up to
    the seed. Reads config.json of the model folder only. Raises ModelFolderError.
    """
    setup, shape = setup_of(config, config.dtype), read_config(config.model)
    n_ranks, device_type = setup.n_ranks, setup.device_type
    n_mine = -(-min(config.global_batch_size, len(encoded)) // n_ranks)  # trajectories of rank 0 in one step
    batch = pack(sorted(encoded, key=len, reverse=True)[: min(config.micro_batch_size, n_mine)])
    phases = plan_step(shape, batch, -(-n_mine // config.micro_batch_size), setup)
    n_parameters = count_parameters(shape)
    steps = steps_per_epoch(len(encoded), config.global_batch_size)
    facts = [
        f"{n_parameters:,} parameters, {n_ranks} rank{'s' * (n_ranks > 1)}, {config.dtype} on {device_type}",
        f"{config.epochs} x {steps} = {config.epochs * steps} steps; {sum(map(len, encoded)):,} tokens per epoch; "
        f"largest micro-batch {len(batch.input_ids_T):,} tokens, {batch.trained_tokens:,} of them trained",
        *disk_facts(n_parameters * (FP32_BYTES + ADAM_BYTES), n_parameters * FP32_BYTES, config.keep_checkpoints),
    ]
    if line := ranks_that_hold_shards_only(n_ranks, min(config.global_batch_size, len(encoded))):
        facts.append(line)
    limit = memory_limit(config.gpu_memory_gib, device_type, n_ranks)
    host, host_limit = host_memory(config, setup, setup.shard(n_parameters) * (2 * FP32_BYTES + ADAM_BYTES))
    return Plan(facts, phases, RESERVED_BYTES[device_type], limit, host, host_limit)


def plan_step(shape: ModelConfig, batch: PackedBatch, n_micro_batches: int, setup: Setup) -> list[Phase]:
    """The two phases of an optimizer step over n_micro_batches like `batch`."""
    n_rows = loss_rows(batch.trained_tokens, shape.vocab_size, setup.device_type)
    traced = trace_peak(
        Transformer,
        shape,
        lambda model, mode: _loss_sum(model, _fake_batch(batch, mode), n_rows).backward(),
        min(2, n_micro_batches),  # without and with a reduction: more repeat the first
        setup,
    )
    traced[OTHER_PART] += logits_bytes(n_rows, shape.vocab_size, setup.dtype)
    shard = 0 if setup.offload else setup.shard(count_parameters(shape))
    optimizer = {"optimizer state": shard * ADAM_BYTES}
    step = {"parameters": shard * FP32_BYTES, "gradients": shard * FP32_BYTES}
    return [Phase("forward and backward", traced | optimizer), Phase("optimizer step", step | optimizer)]


def _loss_sum(model: torch.nn.Module, batch: PackedBatch, chunk_rows: int) -> torch.Tensor:
    """A micro-batch's weighted loss, as train_step of train/sft_loop.py computes it."""
    hidden_BTD = model(
        batch.input_ids_T[None],
        position_ids_BT=batch.position_ids_T[None],
        segment_lengths=batch.segment_lengths,
        return_hidden=True,
    )
    return linear_weighted_cross_entropy(
        hidden_BTD[0],
        model.head_weight(),
        batch.target_ids_T,
        batch.loss_weights_T,
        chunk_rows=chunk_rows,
        trained_index_K=batch.trained_index_K,
    )


def _fake_batch(batch: PackedBatch, mode: FakeTensorMode) -> PackedBatch:
    """The batch's shapes without its numbers."""
    tensors = {name: getattr(batch, name) for name in batch.__slots__ if name.endswith(("_T", "_K"))}
    return replace(batch, **{name: mode.from_tensor(tensor) for name, tensor in tensors.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The table


def disk_facts(checkpoint_bytes: int, final_bytes: int, keep_checkpoints: int) -> list[str]:
    """Lines on the disk that a run needs: kept checkpoints, the one being written, and final/."""
    line = f"checkpoint {checkpoint_bytes / GIB:.3f} GiB, final model {final_bytes / GIB:.3f} GiB; disk needed: "
    if not keep_checkpoints:
        return [line + "every checkpoint is kept, so that it grows with the run"]
    needed = (keep_checkpoints + 1) * checkpoint_bytes + final_bytes
    return [line + f"{needed / GIB:.3f} GiB ({keep_checkpoints} kept and one being written)"]


def plan_lines(plan: Plan) -> list[str]:
    """The plan as text: facts, GiB per rank by part and phase, and the verdict."""
    parts = list(dict.fromkeys(part for phase in plan.phases for part in phase.bytes_by_part))
    width = max(map(len, [*parts, "total"])) + 2
    widths = [max(len(phase.name), 8) + 2 for phase in plan.phases]
    names = [phase.name for phase in plan.phases]
    host_line = f"host memory of all ranks here: {plan.host / GIB:.2f} GiB before rounding"
    if plan.host_limit:
        host_line += f"; limit {plan.host_limit / GIB:.2f} GiB: {'fits' if plan.fits_host else 'does not fit'}"
    lines = [
        *plan.facts,
        *([host_line] if plan.host else []),
        "GiB per rank".ljust(width) + "".join(map(str.rjust, names, widths)),
    ]
    rows = {part: [phase.bytes_by_part.get(part, 0) for phase in plan.phases] for part in parts}
    for name, cells in (rows | {"total": [phase.total for phase in plan.phases]}).items():
        lines.append(name.ljust(width) + "".join(f"{n / GIB:{w}.3f}" for n, w in zip(cells, widths, strict=True)))
    reserve = f", {plan.reserved / GIB:.0f} GiB of it reserved for CUDA and NCCL" if plan.reserved else ""
    verdict = "fits" if plan.peak <= plan.limit else "does not fit"
    return [*lines, f"peak {plan.peak / GIB:.3f} GiB per rank{reserve}; limit {plan.limit / GIB:.3f} GiB: {verdict}"]


def report_plan(plan: Plan) -> int:
    """Writes the plan to the log of rank 0; returns the exit code: 0 if the run fits, 2 if not."""
    if os.environ.get("RANK", "0") == "0":
        for line in plan_lines(plan):
            log_line(line)
    return 0 if plan.fits else EXIT_BAD_INPUT


def refuse_too_large(config: RunConfig, make_plan: Callable[[], Plan]) -> None:
    """Raises ConfigError for a run that does not fit: better now than out of memory in an hour.

    Asked where a limit is given, and on CUDA, where memory is what runs out.
    """
    if config.gpu_memory_gib > 0 or device_type_of(config.device) == "cuda":
        plan = make_plan()
        if not plan.fits_host:
            raise ConfigError(
                f"--offload: found a plan of {plan.host / GIB:.2f} GiB of host memory, expected at most "
                f"{plan.host_limit / GIB:.2f}, this machine's; --plan prints it"
            )
        if not plan.fits:
            raise ConfigError(
                f"--gpu_memory_gib: found a plan of {plan.peak / GIB:.3f} GiB per rank, expected at most "
                f"{plan.limit / GIB:.3f}; --plan prints it by part"
            )
