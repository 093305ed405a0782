"""What the machine can do, and what a piece of work asks of it: time, rates, operations, memory."""
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
TURN = 0.1          # seconds that the turn of one side lasts, at least


@contextmanager
def threads(number):
    """torch works with that many threads, or for None with its default number; gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turn(work) -> tuple[Callable, int]:
    """As many calls of `work` in a row as take at least `TURN` seconds, and how many those are. One
    short call after another's work would find its weights and its cache gone from the processor's
    caches, where they are when a model is used."""
    calls = math.ceil(TURN / seconds(work))

    def in_a_row():
        for _ in range(calls):
            work()
    return in_a_row, calls


@cache
def matrix_rate(device, threads) -> float:
    """Operations a second of square float32 products, the best of five at the best of four sizes.
    `threads` is what torch now has."""
    def rate(n):
        a, b = torch.randn(2, n, n, device=device)
        return 2 * n ** 3 / best(lambda: a @ b, device)
    return max(rate(n) for n in (256, 512, 1024, 2048))


@cache
def copy_rate(device, threads, size) -> float:
    """Bytes read and written a second when a buffer is copied, both together being `size` bytes:
    small ones stay in the processor's caches."""
    source = torch.ones(size // 8, device=device)
    target = source.clone()
    return size / best(lambda: target.copy_(source), device)


def best(work, device) -> float:
    """Seconds of the fastest of five calls after one that is not counted."""
    def call():
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    return min([seconds(call) for _ in range(6)][1:])


def floor(pair, device, threads) -> float:
    """Seconds below which the work cannot be done here: operations at the rate of matrix products
    or bytes at that of copies, whichever takes longer.

    Operations are those of products, the fewer of the reference's and ours, since one may compute
    what the other shows to be superfluous.
    """
    return max(min(operations(pair.theirs), operations(pair.ours)) / matrix_rate(device, threads),
               pair.moved / copy_rate(device, threads, pair.moved))


def operations(work) -> int:
    """Multiplications and additions of matrix products, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        work()
    return counter.get_total_flops()


def _attention(query, key, value, *_, out_shape=None, **__):
    return 2 * math.prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def _grouped(a, b, *_, out_shape=None, **__):
    return 2 * math.prod(a) * b[-1]


#: Products that the counter passes over. Attention's backward has four, and a fifth that only
#: spares memory; not counted.
UNKNOWN_TO_TORCH = {aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient,
                    *shapes, **more: 2 * _attention(*shapes, **more), aten._grouped_mm: _grouped}


def peak_bytes(work) -> int:
    """Most bytes of tensors alive at once of those that `work` allocates, as torch.profiler sees
    them: exact and the same each time, in a fresh process, where nothing of an earlier profile is
    left. What libraries take for themselves is not in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        return max(event["args"]["Total Allocated"] for event in events
                   if event.get("name") == "[memory]")


def description(device) -> dict:
    """The machine: its processor, the threads torch takes, versions, and its rate of matrix
    products by number of threads; of a GPU its name and rate."""
    rates = {}
    for number in (1, None):
        with threads(number) as count:
            rates[count] = matrix_rate("cpu", count) / 1e9
    if device == "cuda":
        rates[torch.cuda.get_device_name()] = matrix_rate(device, None) / 1e9
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "GFLOP_per_second": {count: float(f"{rate:.3g}")
                                                             for count, rate in rates.items()},
            "command": "make bench"}
