"""Times on a GPU: medians of replays of a graph, over several sets of inputs so that the cache does not keep them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


class Replay:
    """A graph of ``calls``, and the times of its replays in microseconds of one call."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.calls = calls  # which hold the inputs
        self.times: list[float] = []

    def run(self, replays: int, warm: int = 2) -> None:
        """Replays ``warm`` times without and ``replays`` times with the clock."""
        for _ in range(warm):
            self.graph.replay()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(replays):
            start.record()
            self.graph.replay()
            stop.record()
            stop.synchronize()
            self.times.append(start.elapsed_time(stop) * 1000 / len(self.calls))

    def median(self) -> float:
        return statistics.median(self.times)


def replay_time(calls: Sequence[Callable[[], object]], replays: int = 25) -> float:
    """Microseconds of one call: the median of ``replays`` replays."""
    replay = Replay(calls)
    replay.run(replays)
    return replay.median()


def in_turn(replays: dict[str, Replay], rounds: int = 5, each: int = 6) -> dict[str, float]:
    """Medians of all, taken in turn, so that what the card's power and heat do to one, they do to all."""
    for _ in range(rounds):
        for replay in replays.values():
            replay.run(each)
    return {name: replay.median() for name, replay in replays.items()}


def copy_rate(gigabytes: float = 2.0) -> float:
    """Bytes read and written by a copy on the device, in TB/s."""
    source = torch.randint(-100, 100, (int(gigabytes * 1e9),), device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    time = replay_time([lambda: target.copy_(source)], replays=10)
    return 2 * source.numel() / time / 1e6


def product_rate(size: int = 8192) -> float:
    """TFLOP/s of torch's bfloat16 product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / replay_time([lambda: a @ b], replays=15) / 1e6
