"""What the losses add to a training step: `python benchmarks/real_step.py` (needs `pip install transformers`), about two minutes.

Two SegFormer-B0 encoders (random weights; colour, and a second sensor of 4 channels) on 256 x 256 images, features averaged per scale,
SegFormer's decode head, AdamW. The steps take turns. `ours` is the time inside the ops of this package, forward and backward, by torch's
profiler; the rest of what a loss adds is PyTorch differentiating the head twice. docs/performance.md reads the table."""

import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports each start and stop on stderr

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import SegformerConfig, SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

import modreg_fast as mrf

BATCH, SIZE, CLASSES, ROUNDS = 2, 256, 25, 12
SENSORS = {"rgb": 3, "other": 4}


class TwoStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: SegformerModel(SegformerConfig(num_channels=channels)) for name, channels in SENSORS.items()}
        )
        self.head = SegformerDecodeHead(SegformerConfig(num_labels=CLASSES))

    def features(self, images: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """What the head reads: views, so that a gradient at a scale goes through the head alone, not through the later stages."""
        return {
            name: [x.view_as(x) for x in encoder(images[name], output_hidden_states=True).hidden_states]
            for name, encoder in self.encoders.items()
        }

    def logits(self, features: dict[str, list[Tensor]]) -> Tensor:
        fused = [torch.stack(scale).mean(0) for scale in zip(*features.values(), strict=True)]
        return F.interpolate(self.head(fused), size=(SIZE, SIZE), mode="bilinear")


def steps() -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = TwoStream()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = {name: torch.randn(BATCH, channels, SIZE, SIZE) for name, channels in SENSORS.items()}
    target = torch.randint(CLASSES, (BATCH, SIZE, SIZE))
    balance, steer = mrf.FunctionalEntropyLoss(), mrf.AttributionLoss()

    def step(penalty: Callable[[Tensor, Tensor, dict[str, list[Tensor]]], Tensor | float]) -> None:
        optimizer.zero_grad()
        features = model.features(images)
        logits = model.logits(features)
        ce_map = F.cross_entropy(logits, target, reduction="none")
        (ce_map.mean() + penalty(ce_map, logits, features)).backward()
        optimizer.step()

    return {
        "cross entropy alone": lambda: step(lambda ce_map, logits, features: 0.0),
        "+ feature term, four scales": lambda: step(lambda ce_map, logits, features: balance(features)),
        "+ prediction term at the finest scale": lambda: step(
            lambda ce_map, logits, features: balance.prediction_term(ce_map, {m: scales[0] for m, scales in features.items()})
        ),
        "+ attribution at four scales": lambda: step(lambda ce_map, logits, features: 0.1 * steer(logits, features)),
    }


def ours_in(step: Callable[[], None]) -> float:
    """Seconds inside the ops of this package."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    return sum(event.cpu_time_total for event in record.key_averages() if event.key.startswith("modreg_fast::")) * 1e-6


def main() -> None:
    seconds: dict[str, list[float]] = {}
    of_steps = steps()
    for _ in range(ROUNDS + 1):
        for name, step in of_steps.items():
            start = time.perf_counter()
            step()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    base = median(seconds["cross entropy alone"][1:])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n{'':40}      ms   added   ours ms   ours")
    for name, step in of_steps.items():
        value, ours = median(seconds[name][1:]), ours_in(step)
        print(f"{name:40} {value * 1e3:7.0f} {value / base - 1:7.1%} {ours * 1e3:9.2f} {ours / base:6.2%}")


if __name__ == "__main__":
    main()
