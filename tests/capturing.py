"""What the tests of capture share: a model of two encoders, and its inputs."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

SPEC = {"rgb": ["encoders.rgb.*"], "depth": ["encoders.depth.*"]}


class Model(nn.Module):
    """Two encoders of two scales. ``keep``: where forward puts what should be captured, for comparison."""

    def __init__(self, checkpointed: bool = False, reentrant: bool = False) -> None:
        super().__init__()

        def encoder(channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1))

        self.encoders = nn.ModuleDict({"rgb": encoder(3), "depth": encoder(1)})
        self.head = nn.Conv2d(6, 5, 1)
        self.checkpointed, self.reentrant, self.keep, self.runs = checkpointed, reentrant, [], 0

    def encode(self, name, x):
        self.runs += 1
        fine = self.encoders[name][0](x)
        coarse = self.encoders[name][1](fine.tanh())
        self.keep += [fine, coarse]
        return coarse

    def forward(self, x):
        self.keep = []
        coarse = []
        for name in ("rgb", "depth"):
            if self.checkpointed:
                coarse.append(checkpoint(self.encode, name, x[name], use_reentrant=self.reentrant))
            else:
                coarse.append(self.encode(name, x[name]))
        return self.head((coarse[0] + coarse[1]).tanh())


def model_of(**options) -> Model:
    torch.manual_seed(5)
    return Model(**options)


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(11)
    return {m: torch.randn(batch, c, 8, 8, generator=generator) for m, c in (("rgb", 3), ("depth", 1))}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same(features, keep) -> bool:
    flat = [x for row in features.values() for x in row]
    return len(flat) == len(keep) and all(a is b for a, b in zip(flat, keep, strict=True))
