"""Settings of one SFT run."""

from dataclasses import dataclass

from command_line import setting
from data.formats.table import DEFAULT_FORMAT, TRAINING_FORMATS
from train.optimizer import SCHEDULES
from train.run_config import RunConfig
from train.run_history import check_override

# what `--override` may name: settings of the optimisation, never of data, model, format or loss
OVERRIDABLE = (
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
)


@dataclass(slots=True)
class SFTConfig(RunConfig):
    """All settings of one SFT run. Defaults: the bundled tiny run; configs/paper.json holds the paper's 7B values.

    Those that SFT and PPO share are in train/run_config.py. Help lines give meaning, unit and source: the paper
    (section 4.1), its released code, or ours.
    """

    # files
    model: str = setting(
        "assets/tiny_model", "folder of the base model, Hugging Face layout (paper: CodeLLaMA-2-7B)", free=True
    )
    data: str = setting(
        "assets/tiny_data/train.json", "training trajectories: the authors' JSON, OpenAI JSONL or ShareGPT", free=True
    )
    output: str = setting("runs/sft", "folder of this run: config, metrics, checkpoints, final model", free=True)
    # method
    prompt_format: str = setting(
        DEFAULT_FORMAT,
        "form of prompts and calls (docs/data_format.md); tl is the paper's, the others are those of other models",
        choices=TRAINING_FORMATS,
    )
    error_filter: str = setting(
        "structured",
        "which erroneous turns get no loss (MAE): documents and feedback "
        "patterns, the released substring test, or none",
        choices=("structured", "substring", "none"),
    )
    key_tokens: str = setting("on", "weigh the tokens that decide between tools (PKT)", choices=("on", "off"))
    max_key_token_weight: float = setting(9.0, "upper bound of a key token's weight, no unit (paper: 9)", low=1.0)
    loss_normalization: str = setting(
        "turn_mean",
        "mean over turns (released code), over weighted tokens, or plain sum (paper's formula)",
        choices=("turn_mean", "token_mean", "sum"),
    )
    unparsable_calls: str = setting(
        "error",
        "an assistant turn whose call does not parse: stop, or keep it as context without training it (ours)",
        choices=("error", "mask"),
    )
    # optimisation
    learning_rate: float = setting(4e-4, "peak learning rate (paper: 1e-6 for 7B)", low=0.0)
    schedule: str = setting(
        "cosine", "learning rate after warm-up (paper: cosine; released code: constant)", choices=SCHEDULES
    )
    warmup_ratio: float = setting(
        0.02, "share of all optimizer steps spent warming up (paper: 0.01)", low=0.0, high=1.0
    )
    weight_decay: float = setting(
        0.01, "AdamW decay of matrices; norms and biases have none (released code: 0.01)", low=0.0
    )
    max_grad_norm: float = setting(1.0, "clip the global L2 norm of the gradient to this; 0 = never (ours)", low=0.0)
    global_batch_size: int = setting(4, "trajectories per optimizer step over all ranks (paper: 4)", low=1)
    micro_batch_size: int = setting(
        4, "trajectories packed into one forward of one rank; changes memory only (ours)", low=1, free=True
    )
    epochs: int = setting(1, "passes over the data (paper: 1)", low=1)
    max_steps: int = setting(
        0, "stop after this many optimizer steps, schedule unchanged; 0 = all epochs (ours)", low=0, free=True
    )
    max_tokens: int = setting(
        8192, "longer trajectories are dropped and listed, never cut; tokens (released code: 8192)", low=2
    )
    seed: int = setting(0, "seed of the batch order and of every random generator (ours)", low=0)
    # machine
    dtype: str = setting(
        "float32",
        "compute type; master weights and reductions are float32 either way (paper: bfloat16)",
        choices=("float32", "bfloat16"),
    )
    loss_backend: str = setting(
        "auto",
        "what computes the loss: our CUDA kernels, PyTorch's operators, or auto, the "
        "kernels where they work; changes rounding only (ours)",
        choices=("auto", "cuda", "torch"),
        free=True,
    )
    # run folder
    checkpoint_every: int = setting(
        100, "optimizer steps between checkpoints; 0 = only at the end (ours)", low=0, free=True
    )
    # watching
    log_every: int = setting(
        20, "optimizer steps between lines of figures on stdout; 0 = none (ours)", low=0, free=True
    )
    eval_data: str = setting(
        "",
        "held-out trajectories in any form that --data takes, or records with gold calls, evaluated during training; "
        "empty = none (ours)",
        free=True,
    )
    eval_every: int = setting(
        0,
        "optimizer steps between evaluations on eval_data; 0 = only before the first and after the last (ours)",
        low=0,
        free=True,
    )
    eval_limit: int = setting(
        100,
        "held-out calls that the model answers, the first N; 0 = all; the loss is over all data (ours)",
        low=0,
        free=True,
    )
    plot: str = setting("on", "draw output/plots/loss.svg at the end (ours)", choices=("on", "off"), free=True)

    def validate(self) -> None:
        """Checks beyond choices and bounds; raises ValueError that begins with the field's name."""
        RunConfig.validate(self)  # super() fails in a dataclass with slots
        check_override(self.override, OVERRIDABLE)
        if self.eval_every and not self.eval_data:
            raise ValueError(f"eval_every: found {self.eval_every} without eval_data, expected a file of held-out data")
