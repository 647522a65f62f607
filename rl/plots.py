"""The picture of a PPO run, drawn from its files alone: metrics.jsonl and, where there is one, evaluations.jsonl."""

from pathlib import Path

from rl.reward import CATEGORIES
from train.run_logging import read_metrics

# (title, keys of metrics.jsonl); the categories and the score have panels of their own
PANELS = (
    ("KL to the reference, nats per response", ("ppo/kl_sequence",)),
    ("entropy, nats per token", ("ppo/entropy",)),
    ("explained variance of the critic", ("ppo/explained_variance",)),
    ("policy loss", ("ppo/policy_loss",)),
    ("value loss", ("ppo/value_loss",)),
    ("share of tokens clipped", ("ppo/clip_fraction", "ppo/value_clip_fraction")),
    ("response length, tokens", ("ppo/response_tokens",)),
)
# from the worst reward (dark red) to the best (green), in the order of CATEGORIES
COLORS = ("#67000d", "#a50f15", "#ef3b2c", "#fc9272", "#fdae61", "#fee08b", "#a6d96a", "#1a9850")
N_MEANS = 40  # the bold line: means of about this many stretches of the run


def plot_ppo(output: Path) -> str:
    """Draw OUTPUT/plots/ppo.png; returns a line that says where it is or why there is none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (requirements-optional.txt)"
    rows = read_metrics(output / "metrics.jsonl")
    if not rows:
        return "no plot: metrics.jsonl holds no step"
    try:
        _draw_run(output, rows, pyplot)
    except (KeyError, TypeError, ValueError) as error:
        return f"no plot: the journals of {output} hold lines that no run wrote ({type(error).__name__}: {error})"
    return f"plot: {output / 'plots' / 'ppo.png'}"


def _draw_run(output: Path, rows: list[dict], pyplot) -> None:
    """All panels, into OUTPUT/plots/ppo.png. Raises KeyError, TypeError, ValueError for lines of another shape."""
    # every line of an iteration repeats the figures of its rollout: draw them once, or long iterations would weigh more
    rollouts = list({row["iteration"]: row for row in rows}.values())
    figure, axes = pyplot.subplots(3, 3, figsize=(15, 11), sharex=True)
    score_axis, category_axis, *other_axes = axes.flat
    _draw_means(score_axis, rollouts, "ppo/score")
    _draw_evaluations(score_axis, read_metrics(output / "evaluations.jsonl"))
    score_axis.set_title("reward of a response (before KL)")
    score_axis.legend(fontsize="small")
    _draw_categories(category_axis, rollouts)
    for axis, (title, keys) in zip(other_axes, PANELS, strict=True):
        for key in keys:
            _draw_means(axis, rows if "loss" in key or "clip" in key else rollouts, key)
        axis.set_title(title)
        axis.legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    (output / "plots").mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(output / "plots" / "ppo.png", dpi=110)
    pyplot.close(figure)


def stretch_means(values: list[float], width: int) -> list[float]:
    """Means of consecutive stretches of `width` values; the last may be shorter."""
    stretches = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(stretch) / len(stretch) for stretch in stretches]


def _draw_means(axis, rows: list[dict], key: str) -> None:
    """One metric: each row thin, means over stretches bold, in one colour."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return
    steps, values = map(list, zip(*points, strict=True))
    width = max(1, len(points) // N_MEANS)
    [line] = axis.plot(stretch_means(steps, width), stretch_means(values, width), linewidth=2, label=key)
    axis.plot(steps, values, linewidth=0.7, alpha=0.35, color=line.get_color())


def _draw_evaluations(axis, rows: list[dict]) -> None:
    """Mean reward on held-out prompts with its 95 % interval, as points with bars: greedy and sampled."""
    for name, marker, color in (("greedy", "o", "black"), ("sampled", "s", "tab:orange")):
        points = [
            (row["step"], row[name]["mean_reward"], row[name]["interval_95"])
            for row in rows
            if name in row and row[name]["interval_95"] is not None
        ]
        if points:
            steps, means, intervals = map(list, zip(*points, strict=True))
            below = [mean - low for mean, (low, _) in zip(means, intervals, strict=True)]
            above = [high - mean for mean, (_, high) in zip(means, intervals, strict=True)]
            axis.errorbar(
                steps,
                means,
                yerr=[below, above],
                fmt=marker,
                markersize=4,
                capsize=3,
                color=color,
                label=f"held-out, {name}, 95 % interval",
            )


def _draw_categories(axis, rollouts: list[dict]) -> None:
    """Shares of the reward's categories as stacked areas, averaged over stretches; together they are 1."""
    width = max(1, len(rollouts) // N_MEANS)
    steps = stretch_means([row["step"] for row in rollouts], width)
    shares = [stretch_means([row[f"ppo/share_{category}"] for row in rollouts], width) for category in CATEGORIES]
    axis.stackplot(steps, shares, labels=CATEGORIES, colors=COLORS)
    axis.set_ylim(0, 1)
    axis.set_title("shares of the reward's categories")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize="x-small", loc="lower left", framealpha=0.6)  # as stacked
