"""Times on a GPU: medians of replays of a graph, over several sets of inputs so that the cache does not keep them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def replay_time(calls: Sequence[Callable[[], object]], replays: int = 25, warm: int = 3) -> float:
    """Microseconds of one call: the median over ``replays`` of a graph of all ``calls``, divided by their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(warm):
        graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    graph.reset()
    return statistics.median(times) * 1000 / len(calls)


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
