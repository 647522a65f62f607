"""Settings that SFT and PPO have in common: how a run resumes, computes, saves and is planned."""

from dataclasses import dataclass

from command_line import setting

MAX_GIB = 2.0**20  # a number of bytes that fits into 64 bits
MAX_RANKS = 4096  # to plan for


@dataclass(slots=True)
class RunConfig:
    """The settings of train/sft_config.py and rl/ppo_config.py that mean the same, with one default, in both.

    The first three have their defaults and help there. Help lines give meaning, unit and source.
    """

    # files
    model: str = setting("", "folder of the model", free=True)
    data: str = setting("", "file of the data", free=True)
    output: str = setting("", "folder of this run", free=True)
    resume: str = setting(
        "auto",
        "auto continues from the newest good checkpoint in output; never refuses a folder that has one",
        choices=("auto", "never"),
        free=True,
    )
    override: str = setting(
        "",
        "settings of the optimisation that may differ when the run is resumed, separated by commas; each change is "
        "noted in output/history.jsonl (ours)",
        free=True,
    )
    # optimisation
    adam_beta1: float = setting(0.9, "AdamW decay of the gradient mean (released code: 0.9)", low=0.0, high=1.0)
    adam_beta2: float = setting(
        0.95, "AdamW decay of the squared gradient's mean (released code: 0.95)", low=0.0, high=1.0
    )
    adam_epsilon: float = setting(1e-8, "AdamW term that keeps the division finite (PyTorch's default)", low=0.0)
    # machine
    device: str = setting("auto", "auto takes CUDA where present", choices=("auto", "cpu", "cuda"), free=True)
    deterministic: str = setting(
        "off",
        "on CUDA, use only algorithms that give the same bits in each run: slower, attention most of all (ours)",
        choices=("on", "off"),
        free=True,
    )
    shard_group_size: int = setting(
        0,
        "ranks that shard one copy of the model; the groups sum their gradients (HSDP); 0 = all ranks (ours)",
        low=0,
        free=True,
    )
    collective_timeout: float = setting(
        600.0, "seconds that a rank waits for the others in a step before the run ends (ours)", low=1.0, free=True
    )
    activation_checkpointing: str = setting(
        "off",
        "recompute each block in backward: less memory, a third more time (ours)",
        choices=("on", "off"),
        free=True,
    )
    compile: str = setting(
        "off",
        "have PyTorch compile what each block computes around its attention: faster steps, a minute more at the start; "
        "changes rounding only, but a resumed run may then differ from one in a piece in its last bits (ours)",
        choices=("on", "off"),
        free=True,
    )
    reduce_gradients: str = setting(
        "step",
        "when ranks add up their gradients: once per step, until then each rank keeps all of them in float32; or after "
        "each micro-batch, which keeps shards only: less memory, more traffic; changes rounding only (ours)",
        choices=("step", "micro_batch"),
        free=True,
    )
    offload: str = setting(
        "off",
        "keep parameters, gradients and optimizer state in host memory, and update there: slower, but a 7B model then "
        "trains on one GPU of 80 GB (ours)",
        choices=("on", "off"),
        free=True,
    )
    plan: str = setting(
        "off",
        "print the run's steps, memory and disk, and end: 0 if it fits, 2 if not; reads no weights (ours)",
        choices=("on", "off"),
        free=True,
    )
    plan_ranks: int = setting(
        0, "ranks to plan for; 0 = those of torchrun, or 1 (ours)", low=0, high=MAX_RANKS, free=True
    )
    gpu_memory_gib: float = setting(
        0.0,
        "memory of one rank in GiB: a run whose plan needs more ends before step 1; 0 = the device's (ours)",
        low=0.0,
        high=MAX_GIB,
        free=True,
    )
    # run folder
    keep_checkpoints: int = setting(2, "newest checkpoints kept; 0 = all (ours)", low=0, free=True)
    async_checkpoint: str = setting(
        "off",
        "write checkpoints in a thread while training goes on, from a copy in host memory (ours)",
        choices=("on", "off"),
        free=True,
    )
    tensorboard: str = setting(
        "off",
        "also write the figures to output/tensorboard, where the package tensorboard is installed (ours)",
        choices=("on", "off"),
        free=True,
    )

    def validate(self) -> None:
        """Checks beyond choices and bounds; raises ValueError that begins with the field's name."""
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a value below 1")
