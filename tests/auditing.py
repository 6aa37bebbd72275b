"""What the tests of audit share: two networks and their data, a reader of pages. They are skipped where its extra is absent."""

from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modreg_fast as mrf
from modreg_fast.audit import Audit

for package in ("jinja2", "rich", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)


class Vectors(nn.Module):
    """A linear classifier over two embeddings; scores are products that NumPy computes as well."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.rgb(x["rgb"]) + self.depth(x["depth"])


class Images(nn.Module):
    """Two encoders of two scales and a head. Something for eval() too."""

    def __init__(self):
        super().__init__()
        self.fine = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3, padding=1), "depth": nn.Conv2d(1, 4, 3, padding=1)})
        self.coarse = nn.ModuleDict({m: nn.Conv2d(4, 6, 2, 2) for m in ("rgb", "depth")})
        self.head, self.norm, self.dropout = nn.Conv2d(10, 5, 1), nn.BatchNorm2d(10), nn.Dropout(0.5)

    def forward(self, x):
        fine = {m: self.fine[m](x[m]) for m in ("rgb", "depth")}
        coarse = {m: self.coarse[m](fine[m].tanh()) for m in fine}
        up = F.interpolate(sum(coarse.values()).tanh(), scale_factor=2)
        return self.head(self.dropout(self.norm(torch.cat([sum(fine.values()).tanh(), up], 1))))


SPEC = {m: [f"fine.{m}", f"coarse.{m}"] for m in ("rgb", "depth")}


def vectors(samples=40, batch=16):
    x = {"rgb": torch.randn(samples, 5), "depth": torch.randn(samples, 4)}
    y = torch.randint(3, (samples,))
    return [({m: v[i : i + batch] for m, v in x.items()}, y[i : i + batch]) for i in range(0, samples, batch)]


def images(samples=6, batch=4, ignore=255):
    x = {"rgb": torch.randn(samples, 3, 8, 8), "depth": torch.randn(samples, 1, 8, 8)}
    y = torch.randint(5, (samples, 8, 8)).masked_fill(torch.rand(samples, 8, 8) < 0.4, ignore)
    y[1] = ignore  # a sample that does not count
    y[2, 2:] = ignore
    y[2, :2, 1::2] = ignore
    return [({m: v[i : i + batch] for m, v in x.items()}, y[i : i + batch]) for i in range(0, samples, batch)]


def audit(*args, **options) -> Audit:
    return mrf.audit(*args, **{"progress": False, **options})


class Page(HTMLParser):
    """What a page refers to, its text, and whether tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
