"""Functional entropy on a tiny two-stream segmentation network, whose code stays as it is: one more term in the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

import modreg_fast as mrf

CLASSES, UNLABELLED = 3, 255
FEATURES = {m: [f"fine.{m}", f"coarse.{m}"] for m in ("camera", "depth")}  # modality -> modules, one per scale


class TwoStreams(nn.Module):
    """Per modality one convolution at each of two scales; the prediction comes from the sum of the streams."""

    def __init__(self, channels: dict[str, int], width: int = 16) -> None:
        super().__init__()
        self.fine = nn.ModuleDict({m: nn.Conv2d(c, width, 3, padding=1) for m, c in channels.items()})
        self.coarse = nn.ModuleDict({m: nn.Conv2d(width, width, 3, stride=2, padding=1) for m in channels})
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        fine = {m: self.fine[m](image) for m, image in images.items()}
        coarse = [self.coarse[m](F.relu(x)) for m, x in fine.items()]
        fused = F.relu(torch.stack(list(fine.values())).sum(0)) + F.interpolate(torch.stack(coarse).sum(0), scale_factor=2.0)
        scores: Tensor = self.head(fused)
        return scores


def scene(samples: int = 8, size: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """The camera sees both kinds of object, the depth sensor sees them less clearly; a quarter of the pixels has no label."""
    target = torch.randint(CLASSES, (samples, size // 8, size // 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    shown = F.one_hot(target, CLASSES).movedim(3, 1).float()
    camera = shown + 0.5 * torch.randn(samples, 3, size, size)
    depth = target.unsqueeze(1) - 1 + 0.8 * torch.randn(samples, 1, size, size)
    return {"camera": camera - shown.mean(), "depth": depth}, target.masked_fill(torch.rand(target.shape) < 0.25, UNLABELLED)


def train(weight: float, steps: int = 150) -> None:
    torch.manual_seed(0)
    data = [scene() for _ in range(4)]
    model = TwoStreams({m: x.shape[1] for m, x in data[0][0].items()})
    balance = mrf.FunctionalEntropyLoss(feature_weight=weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    print(f"\nfeature_weight={weight:g}")
    with mrf.capture(model, FEATURES) as features:
        for step in range(steps):
            images, target = data[step % len(data)]
            task = F.cross_entropy(model(images), target, ignore_index=UNLABELLED)
            penalty, details = balance(features, mask=target != UNLABELLED, return_details=True)
            optimizer.zero_grad()
            (task + penalty).backward()
            optimizer.step()
            if step in (0, steps - 1):
                information = ", ".join(f"{m} {values[0]:.4f} {values[1]:.4f}" for m, values in details.information.items())
                print(f"  step {step:3d}: cross entropy {task:.3f}, penalty {penalty:.3f}, information per scale: {information}")

    metric = MulticlassJaccardIndex(CLASSES, ignore_index=UNLABELLED)
    print(mrf.evaluate_missing(model, [scene() for _ in range(4)], metric, progress=False).table())


if __name__ == "__main__":
    train(weight=0.0)
    train(weight=1e-3)
