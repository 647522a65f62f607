"""What SFT and PPO watch a run with: its journals, the bar, TensorBoard. Nothing here changes what is learned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tqdm import tqdm

from data.json_records import JsonLinesFile
from train.distributed import World
from train.run_config import RunConfig
from train.tensorboard import TensorBoard


class RunWatch:
    """The run's open files and its bar, on rank 0; on other ranks there are none. Leaving the context closes them."""

    def __init__(self, config: RunConfig, world: World, journals: Sequence[str], *, step: int, last_step: int) -> None:
        """journals: names of files in the run folder, metrics.jsonl among them. step: those done before."""
        self.world, self.last_step, output = world, last_step, Path(config.output)
        self.files = {name: JsonLinesFile(output / name) for name in journals} if world.is_main else {}
        is_on = config.tensorboard == "on" and world.is_main
        self.tensorboard = TensorBoard(output, step) if is_on else None
        self.recent: list[dict] = []  # lines of metrics.jsonl since the last line of figures on stdout
        # disable=None: no bar when stderr is not a terminal, so that logs and error lines stay clean
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=None if world.is_main else True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for file in (*self.files.values(), *filter(None, [self.tensorboard])):
            file.close()

    def sync(self) -> None:
        """Force the journals to disk: called before a checkpoint claims their steps."""
        for file in self.files.values():
            file.sync()

    def write_steps(self, lines: Sequence[dict[str, float]]) -> None:
        """Write the lines of metrics.jsonl of some steps and move the bar; on rank 0."""
        for line in lines:
            self.files["metrics.jsonl"].write(line)
            if self.tensorboard is not None:
                self.tensorboard.write(line)
        self.recent += lines
        self.bar.update(len(lines))
