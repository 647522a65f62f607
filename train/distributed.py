"""The only place for process groups: start-up, FSDP2 wrapping, sums and agreement over ranks, gradient clipping.

One process is a group of one rank, so 1 and N ranks run the same code (only FSDP's wrapping is left out where it would
do nothing: shard_model). Two backends live side by side: gloo carries host tensors (flags), nccl carries CUDA tensors
(parameters, gradients, sums of a step); without CUDA gloo carries both.

Gradient reduction is a plain SUM in fp32. FSDP2 would divide by the world size, which is right only when every rank
holds the same number of trained tokens; our loss is already divided by the global denominator.
"""

import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from command_line import tell_torchrun
from model.config import ModelConfig, ModelFolderError
from model.pretrained_weights import load_value_weights_into, load_weights_into, sized_config
from model.transformer import Transformer
from model.value_model import ValueModel
from printable import message_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# longest wait of a collective while models are loaded, which takes one rank longer than another
LOADING_PATIENCE = timedelta(hours=1)


# of the ranks that notice that another is lost, before they say which
REPORT_SECONDS = 3.0
EXIT_LOST_RANK = os.EX_TEMPFAIL  # 75: not the fault of the command, which may be given again
_ROOT = str(Path(__file__).resolve().parents[1])

# of gloo: a wait that took too long, and a connection that an earlier one has closed
_TIMED_OUT = "Timed out|Application timeout"


class DeviceError(ValueError):
    """The devices or processes asked for are not there. One line."""


class LostRankError(RuntimeError):
    """A rank did not join at the start. What was found."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among its ranks.

    mesh: devices by (shard,) or, where several groups of ranks hold a whole copy each, by (replica, shard).
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def shards(self) -> int:
        """Ranks that hold a whole copy of the parameters together."""
        return self.mesh.size(-1)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and the run folder's small files."""
        return self.rank == 0


# ---------------------------------------------------------------------------------------------------------------------
# Start-up and shut-down


def init_world(device: str, *, shard_group_size: int = 0, patience: timedelta = LOADING_PATIENCE) -> World:
    """Join the process group that torchrun describes in the environment, or make a group of one rank.

    device: "auto" (CUDA where present), "cpu" or "cuda". shard_group_size: neighbouring ranks that shard a copy of the
    model together; 0 = all. patience: longest wait of a collective, until limit_waiting. Raises DeviceError when CUDA
    is asked for and absent, and when the ranks do not make whole groups.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DeviceError("--device: found cuda, expected cpu or auto (this machine has no usable CUDA device)")
    on_cuda = has_cuda and device != "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda:
        torch.cuda.set_device(local_rank)
        set_up_cuda()
    if not dist.is_initialized():
        store, rank, size = dist.HashStore(), 0, 1
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            store, rank, size = next(dist.rendezvous("env://", timeout=patience))
            store = dist.PrefixStore(agree_on_attempt(store, rank, size, patience), store)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = make_mesh(size, shard_group_size, "cuda" if on_cuda else "cpu")
    torch_device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    return World(rank=rank, size=size, device=torch_device, mesh=mesh)


def set_up_cuda() -> None:
    """PyTorch's choices that a run on CUDA must not leave to its defaults, before the first kernel."""
    # cuDNN's attention plans for each new shape, and nearly every row has a new length; 0.4 to 0.6 s each were reported
    torch.backends.cuda.enable_cudnn_sdp(False)
    # products in half precision are summed in fp32 also where cuBLAS sums in parts
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def make_mesh(size: int, shard_group_size: int, device_type: str) -> DeviceMesh:
    """The mesh of World for `size` ranks of a process group that exists. Raises DeviceError as init_world."""
    shards = shard_group_size or size
    if size % shards:
        raise DeviceError(f"--shard_group_size: found {shards}, expected 0 or a divisor of {size}, the number of ranks")
    # ranks of one node have neighbouring numbers: shards travel within a node, sums of gradients between nodes
    shape, names = ((size,), ("shard",)) if shards == size else ((size // shards, shards), ("replica", "shard"))
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def limit_waiting(seconds: float, world: World) -> None:
    """From now on a collective that waits longer for a rank raises (with CUDA, PyTorch's watchdog ends the process)."""
    for group in (dist.group.WORLD, *world.mesh.get_all_groups()):
        group.set_timeout(timedelta(seconds=seconds))


def agree_on_attempt(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A name that only the processes of this attempt share, to keep their keys apart from those of earlier attempts.

    torchrun (2.13) keeps one store for all attempts of a run: after a restart the addresses of dead processes are still
    there, and connecting to them is refused. Its restart counter is no name: the counters of two nodes differ, since
    only the node whose worker failed counts. So each rank leaves a random number, and rank 0 answers it with its own.
    Rank 0 may answer a number of a dead process first; it goes on until the living ones confirm.
    """
    own, end = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    if rank > 0:
        store.set(f"asks/{rank}", own)
        while not store.check([f"answer/{own}"]):
            _pause_until(end, "rank 0")
        attempt = store.get(f"answer/{own}").decode()
        store.set(f"joined/{attempt}/{rank}", "")
        return attempt
    waiting = set(range(1, size))
    while waiting:
        for other in waiting:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        waiting = {other for other in waiting if not store.check([f"joined/{own}/{other}"])}
        if waiting:
            _pause_until(end, f"rank {min(waiting)}")
    return own


def _pause_until(end: float, whom: str) -> None:
    """A short sleep, in which signals arrive; raises LostRankError after the time `end`."""
    if time.monotonic() > end:
        raise LostRankError(f"no sign of {whom}")
    time.sleep(0.02)


def close_world() -> None:
    """Leave the process group, after success only: it may wait for the other ranks. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Lost ranks


def leave_if_a_rank_is_lost(error: RuntimeError) -> None:
    """If `error` came from a collective that a rank did not join, end the process with one line and EXIT_LOST_RANK.

    Returns on any other error. The ranks that are left note it in the store; the first of them names those that do not.
    The process ends without clean-up: that of the process groups would wait for the ranks that are lost.
    """
    has_timed_out = re.search(_TIMED_OUT, str(error)) is not None
    if not isinstance(error, (dist.DistError, LostRankError)) and "gloo/" not in str(error) and not has_timed_out:
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends one as soon as it notices the dead rank
        signal.signal(number, signal.SIG_IGN)
    here, lost = int(os.environ.get("RANK", "0")), None
    if dist.is_initialized():
        lost = _ranks_without_a_note(here)
        whom = f"rank{'s' * (len(lost) != 1)} {', '.join(map(str, lost))}" if lost else "another rank"
        what = "did not come in time" if has_timed_out else "ended or does not answer"
        found = f"found that {whom} {what}, expected all ranks; the same command continues from the newest checkpoint"
    else:
        found = f"found {error}, expected all ranks to join"
    line = message_line(f"{_stage_of(error)}: {found}")
    if lost is None or all(rank in lost for rank in range(here)):
        sys.stderr.write(f"rank {here}: " * (here != 0) + line + "\n")
        tell_torchrun(line)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_LOST_RANK)


def _ranks_without_a_note(here: int) -> list[int] | None:
    """Ranks that do not notice within REPORT_SECONDS that one of them is lost; None where the store is lost too."""
    size, end = dist.get_world_size(), time.monotonic() + REPORT_SECONDS
    try:
        store = dist.group.WORLD.get_group_store()
        store.set(f"left/{here}", "")
        while True:
            missing = [rank for rank in range(size) if not store.check([f"left/{rank}"])]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(0.1)
    except RuntimeError:
        return None


def _stage_of(error: BaseException) -> str:
    """Where in our code a collective failed, e.g. "step 12: train_sft > train_step > sum_over_ranks"."""
    names, step = [], None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith(_ROOT) and "site-packages" not in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
            step = frame.f_locals.get("step", step)
    names = [name for name in names if name != "main" and not name.startswith("<")]
    return f"step {step}: " * isinstance(step, int) + (" > ".join(names[-3:]) or "start")


# ---------------------------------------------------------------------------------------------------------------------
# Agreement over ranks (all are collectives: every rank must call them, in the same order)


def global_sum(values: list[float]) -> list[float]:
    """Element-wise sums over all ranks, in fp64 on the host (counts stay exact up to 2**53)."""
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return totals.tolist()


def sum_over_ranks(totals: torch.Tensor) -> torch.Tensor:
    """The element-wise sums over all ranks of a tensor on the run's device, in its place; the host does not wait."""
    dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return totals


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    return global_sum([float(flag)])[0] > 0


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """The JSON-like `value` of every rank, in rank order, on every rank. group: of all ranks, for another thread."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def host_group() -> dist.ProcessGroup:
    """A second group of all ranks, for collectives of another thread than the training loop's; a collective."""
    return dist.new_group(backend="gloo")


def ranks_that_hold_shards_only(n_ranks: int, n_units: int) -> str:
    """A line for the log if a step has fewer units of work (trajectories, responses) than ranks; else ""."""
    idle = n_ranks - n_units
    if idle <= 0:
        return ""
    return f"{idle} of {n_ranks} ranks will only hold shards: a step has work for {n_units}"


def wait_for_all() -> None:
    """Barrier on the host group."""
    any_rank(False)


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


def shard_model(model: torch.nn.Module, world: World, *, dtype: str, offload: bool = False) -> None:
    """Shard a Transformer or ValueModel in place by `apply_fsdp`, where there is something to shard, cast or move.

    One rank whose parameters are in the compute type has nothing of the kind: its model stays as it is, because FSDP's
    copies of every parameter and gradient cost a step of the bundled model 13 % of its time.
    Build the optimizer after this call: it may replace the parameters by DTensors.
    """
    if world.size > 1 or offload or any(parameter.dtype != DTYPES[dtype] for parameter in model.parameters()):
        apply_fsdp(model, world, dtype=dtype, offload=offload)


def apply_fsdp(model: torch.nn.Module, world: World, *, dtype: str, offload: bool = False) -> None:
    """Shard a Transformer or ValueModel in place with FSDP2, from outside, in a fixed order: each block, then the root.

    dtype: compute type, "float32" or "bfloat16". Parameters given to the optimizer stay fp32 shards (master weights)
    and gradients are reduced in fp32 either way. The model may live on the meta device or hold weights.
    offload: the shards and their gradients lie in host memory, so that the optimizer keeps its state and works there; a
    block's weights come to the device when it is gathered.
    The root group (embeddings, final norm, head) stays gathered between forward and backward: train_step uses the head
    after the forward call, and its gradient joins the root's reduction at the end of backward.
    """
    compute = DTYPES[dtype]
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # one rank holds everything anyway: freeing the gathered copy would only mean making it again
    reshard = world.shards > 1
    place = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=place)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False, offload_policy=place)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        # gloo has neither AVG nor a pre-multiplied sum: reduce with SUM only
        module.set_force_sum_reduction_for_comms(True)


def load_sharded_model(
    model_dir: str, world: World, *, dtype: str, tokenizer_size: int, offload: bool = False, frozen: bool = False
) -> Transformer:
    """A pretrained model, sharded; built without memory, then filled tensor by tensor: no rank ever holds all of it.

    dtype, offload: as in apply_fsdp. frozen: the model will not learn. Its shards are then in the compute type:
    rounding the weights once gives the bits that rounding them at each use does. Raises ModelFolderError when the
    folder is unusable or the embedding has fewer rows than the tokenizer has ids.
    """
    config = _read_config_for(model_dir, tokenizer_size)
    with torch.device("meta"):
        model = Transformer(config)
    if frozen:
        model.to(DTYPES[dtype]).requires_grad_(False).eval()
    shard_model(model, world, dtype=dtype, offload=offload)
    load_weights_into(model, model_dir, device="cpu" if offload else world.device)
    return model


def load_sharded_value_model(
    model_dir: str, world: World, *, dtype: str, tokenizer_size: int, offload: bool = False
) -> ValueModel:
    """load_sharded_model for a critic: the folder's backbone, and its value head or one of zeros if it has none."""
    config = _read_config_for(model_dir, tokenizer_size)
    with torch.device("meta"):
        model = ValueModel(config)
    shard_model(model, world, dtype=dtype, offload=offload)
    load_value_weights_into(model, model_dir, device="cpu" if offload else world.device)
    return model


def _read_config_for(model_dir: str, tokenizer_size: int) -> ModelConfig:
    config = sized_config(model_dir)
    if tokenizer_size > config.vocab_size:
        raise ModelFolderError(
            f"{model_dir}: found a tokenizer of {tokenizer_size} ids, expected at most {config.vocab_size}, "
            "the rows of the embedding"
        )
    return config


def reshard_all(model: torch.nn.Module) -> None:
    """Free the gathered copies and put the shards back in their place; local, and nothing on a model that has none.

    After a forward without backward the root (on one rank every block) is still gathered: its named_parameters() are
    then the copies, so that anything read from or written to them misses the shards, and their memory stays taken.
    """
    for module in fsdp_modules(model):
        module.reshard()


@torch.no_grad()
def gathered_model(model: Transformer, world: World, *, dtype: str) -> Transformer:
    """A plain Transformer with all parameters of a sharded one, for rollouts; a collective, tensor by tensor.

    Its forward is local: under FSDP every decoded token would gather the model again, and all ranks would have to
    decode equally often. dtype: "float32" or "bfloat16", of all its parameters; with the compute type of shard_model
    its logits are those of the sharded model. It costs one full copy in that type on world.device until the caller
    drops it. On one rank in float32 on the shards' own device there is no copy: it shares their memory, follows the
    optimizer and must only be read (eval mode, no gradients); on CUDA, decoding replaces its matrices by copies
    (model/decode.py). On several ranks it is a snapshot: gather again after every update.
    """
    reshard_all(model)
    with torch.device("meta"):
        plain = Transformer(model.config)
    full = {}
    for name, parameter in model.named_parameters():
        shard = parameter.detach().to(device=world.device, dtype=DTYPES[dtype])
        if isinstance(shard, DTensor):
            shard = shard.to_local() if world.size == 1 else shard.full_tensor()
        full[name] = shard
    plain.load_state_dict(full, assign=True)
    return plain.requires_grad_(False).eval()


def fsdp_modules(model: torch.nn.Module) -> list[FSDPModule]:
    """All modules that own an FSDP parameter group, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_gradient_sync(model: torch.nn.Module, *, synchronize: bool, is_last: bool) -> None:
    """Reduce gradients over ranks in the next backward or keep them local; `is_last` = last micro-batch of the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(synchronize)
        model.set_is_last_backward(is_last)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Gradient norm


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_grad_norm: float) -> float:
    """Scale all gradients by min(1, max_grad_norm / norm), where norm is the global L2 norm (E14); returns norm.

    max_grad_norm = 0 only measures. A non-finite norm leaves gradients alone. A collective, which waits for the device.
    """
    parameters = list(parameters)
    norm = sum_over_ranks(gradient_square(parameters)).item() ** 0.5  # E14
    scale_gradients(parameters, norm, max_grad_norm)
    return norm


def gradient_square(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """This rank's part of the squared global L2 norm of all gradients, fp64 on their device; the ranks' parts add up.

    Of a gradient that several ranks hold, each counts its share. Squares are summed in fp64: 7e9 fp32 squares would
    lose digits.
    """
    squares = []
    for parameter in parameters:
        if parameter.grad is not None and (gradient := local_part(parameter.grad)).numel():
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            squares.append(square / replicas_of(parameter.grad))
    if not squares:  # the other ranks wait for a number on the same device
        return torch.zeros((), dtype=torch.float64, device=local_part(parameters[0]).device)
    return torch.stack(squares).sum()


def scale_gradients(parameters: Sequence[torch.nn.Parameter], norm: float, max_grad_norm: float) -> None:
    """Scale all gradients to max_grad_norm if their global norm is larger and finite (E14)."""
    # NaN compares false, inf would multiply everything by 0: the caller refuses to step on both
    if 0 < max_grad_norm < norm < float("inf"):
        gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_grad_norm / norm)  # E14


def replicas_of(tensor: torch.Tensor) -> int:
    """Ranks that hold the same shard of a DTensor; 1 for an ordinary tensor."""
    return tensor.device_mesh.size(0) if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 2 else 1
