"""Decoding steps as CUDA graphs: the host launches one graph in place of some hundred kernels. NOT YET RUN on a GPU.

A graph repeats the kernels of a step on the addresses that they were recorded with. What a step reads and writes is
therefore in buffers that stay where they are; so must weights and cache. Graphs belong to a RowDecoder, which holds
both: a policy that is gathered again gets new weights, a new decoder and new graphs.

All rows attend in one call, over the slots that the longest needs. A row's bits then have to be independent of the
masked slots beyond its own: PyTorch's memory-efficient kernel, which takes a mask, goes through the keys in order, so
they add zeros. The stage g of benchmarks/gpu_check.py compares the bits.

Shape suffixes: B rows of a forward, S the first of them, which have a row in the cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.decode import DecodeRun

SampleStep = Callable[[Tensor, Tensor | None, list[DecodeRun]], Tensor]  # RowDecoder._sample_step


class StepGraphs:
    """One graph per shape of a step, recorded when the shape comes for the second time. At its first time kernels are
    loaded and the cache may grow, which a recording must not see."""

    @torch.inference_mode()
    def __init__(self, most_rows: int, device: torch.device) -> None:
        self.numbers_4B = torch.zeros(4, most_rows, dtype=torch.long, device=device)
        self.uniforms_B = torch.zeros(most_rows, dtype=torch.float64, device=device)
        self.chosen_2B = torch.zeros(2, most_rows, dtype=torch.float64, device=device)
        self.replays: dict[DecodeRun, Callable[[], None] | None] = {}
        self.storage_slots = 0
        self.pool = None  # memory that all graphs share: what a replay leaves is copied out before the next one

    @torch.inference_mode()
    def load(self, numbers_4B: Tensor, storage_slots: int) -> None:
        """Takes in what the next steps begin with. storage_slots: those of a row of the cache; where they have become
        more, the storage is another one, and the graphs are dropped."""
        self.numbers_4B[:, : numbers_4B.shape[1]] = numbers_4B
        if storage_slots != self.storage_slots:
            self.replays, self.storage_slots = {}, storage_slots

    @torch.inference_mode()
    def step(self, sample_step: SampleStep, uniforms_S: Tensor | None, run: DecodeRun, n_rows: int) -> Tensor:
        """sample_step on the buffers' first n_rows rows, all of the run and those that only fill the shape; returns a
        copy of its result."""
        S = run.n_rows
        uniforms = None
        if uniforms_S is not None:
            uniforms = self.uniforms_B[:S]
            uniforms.copy_(uniforms_S)

        def step() -> None:
            self.chosen_2B[:, :S] = sample_step(self.numbers_4B[:, :n_rows], uniforms, [run])

        if run not in self.replays:
            step()
            self.replays[run] = None
        else:
            if self.replays[run] is None:
                self.replays[run] = self._record(step)
            self.replays[run]()
        return self.chosen_2B[:, :S].clone()

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Records a step, which does not run it; what runs it."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads, such as the one that watches collectives, may go on using the device
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step()
        return graph.replay
