"""What binds the native CPU kernels: `python benchmarks/what_binds.py`, about a minute on an idle machine.

The raw kernels on `(2, 64, 512, 512)` float32, two modalities, past the cache and in it, with gradients in fresh and in used memory, on
one thread and on all, beside a copy and a sum of memory of that size. docs/performance.md reads the table."""

import ctypes
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import modreg_fast  # noqa: F401  registers the kernels

BATCH, CHANNELS, PIXELS, MODALITIES = 2, 64, 512 * 512, 2
CACHED_PIXELS = 256, 512  # the difference of their times is free of the cost of a call
ROUNDS = 15
kernels = torch.ops.modreg_fast_native


def features(batch: int, pixels: int) -> list[Tensor]:
    return [torch.randn(batch, CHANNELS, pixels) for _ in range(MODALITIES)]


def softmax_fisher(x: list[Tensor], backward: bool) -> None:
    problem = (x, [], None, [0.0] * MODALITIES, 1, None, False, 1e-8, 1)
    batch = x[0].shape[0]
    if backward:
        counts = torch.full((1, batch), x[0].shape[2])
        kernels.softmax_fisher_backward(torch.ones(MODALITIES, 1, batch), counts, *problem)
    else:
        kernels.softmax_fisher_forward(*problem)


def gradient_statistics(g: list[Tensor], e: list[Tensor], f: list[Tensor], backward: bool) -> None:
    problem = (g, e, f, [], 1e-8, False, 1)
    if backward:
        ones = torch.ones(MODALITIES, g[0].shape[0])
        kernels.gradient_statistics_backward(ones, ones, [], [], ones, *problem)
    else:
        kernels.gradient_statistics_forward(*problem)


def keep_memory(keep: bool) -> None:
    """Whether glibc keeps freed memory for the next tensors, or hands it back, so that they get fresh pages."""
    libc = ctypes.CDLL(None)
    most_mappings, trim_threshold = -4, -1
    libc.mallopt(most_mappings, 0 if keep else 2**16)
    libc.mallopt(trim_threshold, 2**31 - 1 if keep else 2**17)
    if not keep:
        libc.malloc_trim(0)


def medians(calls: dict[str, Callable[[], object]], repeat: int = 1) -> dict[str, float]:
    """Seconds, the calls taking turns; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            used = name.endswith("used memory")
            keep_memory(used)
            if used:
                call()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    threads = torch.get_num_threads()
    x, e = features(BATCH, PIXELS), features(BATCH, PIXELS)
    f = [torch.rand(BATCH, PIXELS) + 0.1 for _ in range(MODALITIES)]
    source, target = torch.ones(2**27), torch.zeros(2**27)
    read = sum(t.nbytes for t in x)  # of softmax_fisher; gradient_statistics reads twice as much
    moved = {
        "copy of 512 MiB": 2 * source.nbytes,
        "sum of 512 MiB": source.nbytes,
        "softmax_fisher forward": read,
        "softmax_fisher backward, used memory": 2 * read,
        "softmax_fisher backward, fresh memory": 2 * read,
        "gradient_statistics forward": 2 * read,
        "gradient_statistics backward, used memory": 4 * read,
        "gradient_statistics backward, fresh memory": 4 * read,
    }
    print(f"{torch.backends.cpu.get_cpu_capability()}, kernels: {kernels.cpu_instruction_set()}, {threads} threads")
    for count in (1, threads):
        torch.set_num_threads(count)
        seconds = medians(
            {
                "copy of 512 MiB": lambda: target.copy_(source),
                "sum of 512 MiB": lambda: source.sum(),
                "softmax_fisher forward": lambda: softmax_fisher(x, False),
                "softmax_fisher backward, used memory": lambda: softmax_fisher(x, True),
                "softmax_fisher backward, fresh memory": lambda: softmax_fisher(x, True),
                "gradient_statistics forward": lambda: gradient_statistics(x, e, f, False),
                "gradient_statistics backward, used memory": lambda: gradient_statistics(x, e, f, True),
                "gradient_statistics backward, fresh memory": lambda: gradient_statistics(x, e, f, True),
            }
        )
        copy = moved["copy of 512 MiB"] / seconds["copy of 512 MiB"]
        print(f"\n{count} thread{'s' if count > 1 else ''}, past the cache".ljust(52), "    ms   GB/s  of copy")
        for name, value in seconds.items():
            speed = moved[name] / value
            print(f"  {name:48} {value * 1e3:8.1f} {speed / 1e9:6.1f} {speed / copy:7.0%}")

    torch.set_num_threads(1)
    small, large = (_cached_calls(pixels) for pixels in CACHED_PIXELS)
    seconds = medians(
        {f"{name} {size}": calls[name] for name in small for size, calls in (("-", small), ("+", large))}, repeat=200
    )
    scale = BATCH * PIXELS / (CACHED_PIXELS[1] - CACHED_PIXELS[0]) / threads
    print(f"\nin the cache, without the cost of a call: ms for as much work as above on {threads} threads")
    for name in small:
        print(f"  {name:48} {(seconds[f'{name} +'] - seconds[f'{name} -']) * scale * 1e3:8.1f}")


def _cached_calls(pixels: int) -> dict[str, Callable[[], object]]:
    x, e = features(1, pixels), features(1, pixels)
    f = [torch.rand(1, pixels) + 0.1 for _ in range(MODALITIES)]
    return {
        "softmax_fisher forward": lambda: softmax_fisher(x, False),
        "softmax_fisher backward": lambda: softmax_fisher(x, True),
        "gradient_statistics forward": lambda: gradient_statistics(x, e, f, False),
        "gradient_statistics backward": lambda: gradient_statistics(x, e, f, True),
    }


if __name__ == "__main__":
    main()
