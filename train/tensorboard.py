"""TensorBoard, for those who ask for it (`--tensorboard on`): the keys of metrics.jsonl under the same names."""

from pathlib import Path

from command_line import ConfigError


def check_tensorboard(setting: str) -> None:
    """Raise ConfigError, before anything is trained, if `setting` is on and the package is not installed."""
    if setting == "on":
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise ConfigError(
                "--tensorboard: found on, expected off, because the package tensorboard is not installed "
                "(requirements-optional.txt)"
            ) from None


class TensorBoard:
    """The event file of one start of a run, in OUTPUT/tensorboard. State: the open file."""

    def __init__(self, output: Path, step: int) -> None:
        """step: optimizer steps done. What an earlier start wrote about later steps is hidden: each shows once."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, line: dict[str, float]) -> None:
        """The numbers of a line of a journal, at its step."""
        for key, value in line.items():
            if key != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """Flush what is waiting; no more lines."""
        self.writer.close()
