"""Settings of one PPO run."""

from dataclasses import dataclass

from command_line import setting
from data.formats.table import TRAINING_FORMATS
from data.trained_format import AUTO_FORMAT
from train.optimizer import SCHEDULES
from train.run_config import MAX_GIB, RunConfig
from train.run_history import check_override

# what `--override` may name: settings of the optimisation, never of data, model, format or loss
OVERRIDABLE = (
    "policy_learning_rate",
    "value_learning_rate",
    "schedule",
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "kl_coef",
    "kl_target",
    "kl_horizon",
    "entropy_coef",
    "clip_range",
    "value_clip_range",
)


@dataclass(slots=True)
class PPOConfig(RunConfig):
    """All settings of one PPO run. Defaults: the bundled tiny run; configs/paper.json holds the paper's 7B values.

    Those that SFT and PPO share are in train/run_config.py. Help lines give meaning, unit and source: the paper
    (sections 3.3, 4.1), its released code, or ours.
    """

    # files
    model: str = setting(
        "runs/sft/final", "folder of the SFT model: policy, and by default reference and critic", free=True
    )
    data: str = setting(
        "assets/tiny_data/train.json",
        "trajectories whose turns become prompts: the authors' JSON list, OpenAI JSONL, or records with gold calls",
        free=True,
    )
    output: str = setting(
        "runs/ppo", "folder of this run: config, metrics, samples, checkpoints, final model", free=True
    )
    reference_model: str = setting(
        "", "folder of the frozen reference; empty = model (paper: the SFT model)", free=True
    )
    critic_model: str = setting(
        "",
        "folder the critic starts from, with or without value_head.safetensors; empty = "
        "model (paper: the SFT model; released code: random, by mistake)",
        free=True,
    )
    # prompts
    prompt_format: str = setting(
        AUTO_FORMAT,
        "form of prompts and calls (docs/data_format.md); auto = the one that the model folder was trained in, else tl",
        choices=(AUTO_FORMAT, *TRAINING_FORMATS),
    )
    error_filter: str = setting(
        "structured",
        "drop turns whose gold call is erroneous, by this filter",
        choices=("structured", "substring", "none"),
    )
    prompt_turns: str = setting(
        "first",
        "which kept turns: all, tools (neither finish nor ask_to_user), or the first "
        "or last of each trajectory (paper: 1,194 prompts, rule unpublished)",
        choices=("all", "tools", "first", "last"),
    )
    unparsable_calls: str = setting(
        "error", "an assistant turn whose call does not parse: stop, or leave it out (ours)", choices=("error", "mask")
    )
    max_prompt_tokens: int = setting(
        0,
        "longer prompts are dropped and counted, never cut; tokens; 0 = the context minus "
        "the response (released code: 8192, cut)",
        low=0,
    )
    # rollout
    rollout_batch_size: int = setting(8, "responses per iteration over all ranks (paper: 8)", low=1)
    responses_per_prompt: int = setting(
        1, "responses to each prompt of an iteration; must divide rollout_batch_size (ours)", low=1
    )
    max_response_tokens: int = setting(64, "a response is cut here; tokens (released code: 512)", low=1)
    cache_gib: float = setting(
        0.0,
        "bound of a rank's key/value cache in GiB: fewer responses are sampled at a time, with the same result; 0 = on "
        "CUDA what is free, on the CPU no bound (ours)",
        low=0.0,
        high=MAX_GIB,
        free=True,
    )
    temperature: float = setting(
        1.0, "sampling temperature; 0 = greedy, which leaves PPO nothing to explore (released code: 0)", low=0.0
    )
    # reward and advantages
    kl_coef: float = setting(
        0.3, "beta, factor of the KL to the reference in the reward (paper: not given; released code: 0.4)", low=0.0
    )
    kl_controller: str = setting(
        "fixed",
        "keep kl_coef, or steer it towards kl_target (paper and released code: fixed)",
        choices=("fixed", "adaptive"),
    )
    kl_target: float = setting(1.0, "adaptive: wanted KL per response, nats (ours)", low=1e-6)
    kl_horizon: float = setting(1000.0, "adaptive: responses over which kl_coef reacts (ours)", low=1.0)
    gamma: float = setting(1.0, "discount per token (released code: 1.0)", low=0.0, high=1.0)
    gae_lambda: float = setting(0.95, "GAE parameter (released code: 0.95)", low=0.0, high=1.0)
    whiten_advantages: str = setting(
        "off",
        "zero mean and unit variance over all tokens of the rollout (paper and released code: off)",
        choices=("on", "off"),
    )
    # losses
    clip_range: float = setting(0.2, "clip the ratio to 1 - this .. 1 + this (released code: 0.2)", low=1e-6)
    value_clip_range: float = setting(
        0.2, "clip values to at most this far from those of the rollout (released code: 0.2)", low=1e-6
    )
    entropy_coef: float = setting(0.0, "factor of the entropy bonus (paper and released code: none)", low=0.0)
    ppo_epochs: int = setting(1, "passes over each rollout (released code: 1)", low=1)
    minibatch_size: int = setting(8, "responses per optimizer step over all ranks (released code: 8)", low=1)
    micro_batch_size: int = setting(
        8, "responses packed into one forward of one rank; changes memory only (ours)", low=1, free=True
    )
    critic_only_iterations: int = setting(
        40, "number of first iterations that train the critic alone (ours; paper: none)", low=0
    )
    # optimisation
    policy_learning_rate: float = setting(
        1e-4, "peak learning rate of the policy (paper: 2e-6; released code: 2e-7)", low=0.0
    )
    value_learning_rate: float = setting(
        1e-3, "peak learning rate of the critic (paper: 1e-6; released code: 1e-7)", low=0.0
    )
    schedule: str = setting("cosine", "learning rates after warm-up (released code: cosine)", choices=SCHEDULES)
    warmup_ratio: float = setting(
        0.02, "share of all optimizer steps spent warming up (released code: 100 steps, 0.22)", low=0.0, high=1.0
    )
    weight_decay: float = setting(
        0.0, "AdamW decay of matrices; norms and biases have none (released code: 0)", low=0.0
    )
    max_grad_norm: float = setting(
        1.0, "clip the global L2 norm of each model's gradient to this; 0 = never (released code: 1.0)", low=0.0
    )
    epochs: int = setting(3, "passes over the prompts (paper: 3)", low=1)
    max_steps: int = setting(
        0,
        "stop after this many optimizer steps, rounded up to whole iterations, schedule "
        "unchanged; 0 = all epochs (ours)",
        low=0,
        free=True,
    )
    seed: int = setting(0, "seed of the prompt order, of every response and of the minibatch order (ours)", low=0)
    # machine
    dtype: str = setting(
        "float32",
        "compute type; master weights and reductions are float32 either way (released code: bfloat16)",
        choices=("float32", "bfloat16"),
    )
    loss_backend: str = setting(
        "auto",
        "what computes log-probabilities of tokens: our CUDA kernels, PyTorch's "
        "operators, or auto, the kernels where they work; changes rounding only (ours)",
        choices=("auto", "cuda", "torch"),
        free=True,
    )
    cuda_graphs: str = setting(
        "off",
        "on CUDA, record the steps of decoding and launch each as one: less work of the host; not yet run on a GPU "
        "(ours)",
        choices=("on", "off"),
        free=True,
    )
    # run folder and watching
    checkpoint_every: int = setting(
        50,
        "optimizer steps between checkpoints, rounded up to whole iterations; 0 = only at the end (ours)",
        low=0,
        free=True,
    )
    save_critic: str = setting(
        "off", "write the trained critic to output/critic at the end (ours)", choices=("on", "off"), free=True
    )
    eval_data: str = setting(
        "", "held-out prompts in any form that --data takes, scored during training; empty = none (ours)", free=True
    )
    eval_every: int = setting(
        0,
        "iterations between evaluations on eval_data; 0 = only before the first and after the last (ours)",
        low=0,
        free=True,
    )
    eval_limit: int = setting(0, "use only the first N held-out prompts; 0 = all (ours)", low=0, free=True)
    log_every: int = setting(
        30, "optimizer steps between lines of figures on stdout; 0 = none (ours)", low=0, free=True
    )
    sample_every: int = setting(
        50, "iterations between sample responses on stdout, with their gold call; 0 = none (ours)", low=0, free=True
    )
    print_ledger: str = setting(
        "off",
        "print position, token, mask, log-prob, KL, reward, value, advantage and return of the first response (ours)",
        choices=("on", "off"),
        free=True,
    )
    plot: str = setting("on", "draw output/plots/ppo.svg at the end (ours)", choices=("on", "off"), free=True)

    def prompts_per_iteration(self) -> int:
        """Prompts of a full iteration, over all ranks."""
        return self.rollout_batch_size // self.responses_per_prompt

    def logprob_temperature(self) -> float:
        """Temperature of the log-probabilities: that of the sampling, or 1 where decoding is greedy."""
        return self.temperature or 1.0

    def validate(self) -> None:
        """Checks beyond choices and bounds; raises ValueError that begins with the field's name."""
        RunConfig.validate(self)  # super() fails in a dataclass with slots
        if 0.0 < self.temperature < 1e-3:
            raise ValueError(f"temperature: found {self.temperature}, expected 0 (greedy) or at least 0.001")
        check_override(self.override, OVERRIDABLE)
        if self.minibatch_size > self.rollout_batch_size:
            raise ValueError(
                f"minibatch_size: found {self.minibatch_size}, expected at most rollout_batch_size = "
                f"{self.rollout_batch_size}"
            )
        if self.rollout_batch_size % self.responses_per_prompt:
            raise ValueError(
                f"responses_per_prompt: found {self.responses_per_prompt}, expected a divisor of rollout_batch_size = "
                f"{self.rollout_batch_size}"
            )
        if self.responses_per_prompt > 1 and self.temperature == 0:
            raise ValueError(
                f"responses_per_prompt: found {self.responses_per_prompt} with temperature 0, expected 1: greedy "
                "responses to a prompt are the same"
            )
        if self.kl_horizon < self.rollout_batch_size:
            raise ValueError(
                f"kl_horizon: found {self.kl_horizon}, expected at least rollout_batch_size = {self.rollout_batch_size}"
            )
        if self.eval_every and not self.eval_data:
            raise ValueError(
                f"eval_every: found {self.eval_every} without eval_data, expected a file of held-out prompts"
            )
