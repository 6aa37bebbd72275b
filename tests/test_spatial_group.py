"""spatial_group=: ranks that hold rows of the same maps compute what one process does on the whole maps, also where samples are split
over ranks as well."""

from datetime import timedelta
from typing import NamedTuple

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import BACKENDS
from torch import nn

import modreg_fast as mrf

RANKS, SAMPLES, ROWS = 4, 4, 8  # rows of the coarse maps; the fine ones have twice as many


class Part(NamedTuple):
    """What a rank holds, and the ranks that hold the rest of these samples, and other samples of these rows."""

    samples: slice
    rows: slice
    spatial: tuple[int, ...]
    process: tuple[int, ...]


def split_rows(*edges):
    ranks = tuple(range(len(edges) - 1))
    return [Part(slice(0, SAMPLES), slice(edges[r], edges[r + 1]), ranks, (r,)) for r in ranks]


SPLITS = {
    "one": split_rows(0, 8),
    "two": split_rows(0, 6, 8),
    "four": split_rows(0, 4, 5, 7, 8),
    "samples_and_rows": [
        Part(slice(0, 3), slice(0, 5), (0, 1), (0, 2)),
        Part(slice(0, 3), slice(5, 8), (0, 1), (1, 3)),
        Part(slice(3, 4), slice(0, 5), (2, 3), (0, 2)),
        Part(slice(3, 4), slice(5, 8), (2, 3), (1, 3)),
    ],
}
CASES = ["no_mask", "uneven", "rank_without_valid_pixels", "nothing_valid"]
KINDS = ["inverse", "log", "pixel", "sample", "l1", "l2", "cross_entropy"]


class Head(nn.Module):
    """Scores of the fine maps, from each pixel of both scales."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(6, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, features):
        fine, coarse = (torch.cat(x, 1).tanh() for x in zip(*features.values(), strict=True))
        return self.fine(fine) + F.interpolate(self.coarse(coarse), scale_factor=2)


def batch_of(case):
    """Head, features, labels, mask and present of all samples."""
    generator = torch.Generator().manual_seed(23)
    features = {
        m: [torch.randn(SAMPLES, c, h, w, generator=generator).double() for c, h, w in ((3, 2 * ROWS, 6), (4, ROWS, 3))]
        for m in "ab"
    }
    labels, mask = torch.randint(3, (2, SAMPLES, 2 * ROWS, 6), generator=generator)
    mask, present = mask > 0, torch.ones(SAMPLES, 2, dtype=torch.bool)
    present[0, 1] = False
    if case == "rank_without_valid_pixels":
        mask[:, : 2 * 6] = False
        mask[2] = False
    if case == "nothing_valid":
        mask[:] = False
    torch.manual_seed(3)
    return Head().double(), features, labels, None if case == "no_mask" else mask, present


def outcome(kind, batch, samples=slice(None), rows=slice(None), **options):
    """Value, details, and gradients of the features and of the head, from some samples and rows."""
    head, features, labels, mask, present = batch
    fine = slice(None) if rows.start is None else slice(2 * rows.start, 2 * rows.stop)
    features = {
        m: [x[samples, :, r].clone().requires_grad_() for x, r in zip(scales, (fine, rows), strict=True)]
        for m, scales in features.items()
    }
    labels, mask, present = labels[samples, fine], None if mask is None else mask[samples, fine], present[samples]
    scores = head(features)
    if kind in ("inverse", "log"):
        balance = mrf.FunctionalEntropyLoss(1.0, objective=kind, scale_weights=[1.0, 0.5], **options)
        value, details = balance(features, mask=mask, present=present, return_details=True)
    elif kind in ("pixel", "sample"):
        balance = mrf.FunctionalEntropyLoss(prediction_weight=1.0, **options)
        values = F.cross_entropy(scores, labels, reduction="none")
        inputs = {m: scales[1] for m, scales in features.items()}
        value, details = balance.prediction_term(values, inputs, mask=mask, granularity=kind, return_details=True)
    elif kind == "cross_entropy":
        criterion = mrf.ModalityCrossEntropy(0.7, information_weight=1e-2, label_smoothing=0.1, **options)
        own = {m: scales[0] for m, scales in features.items()}
        target = labels if mask is None else labels.where(mask, -100)
        value, found = criterion(own, target, joint=scores, present=present, return_details=True)
        details = found.cross_entropy, {"joint": found.joint}, found.information
    else:
        steer = mrf.AttributionLoss({"a": 1, "b": 3}, kind, **options)
        index = labels if kind == "l1" else None
        value, details = steer(scores, features, index=index, mask=mask, present=present, return_details=True)
    leaves = [x for scales in features.values() for x in scales]
    found = torch.autograd.grad(value, [*leaves, *head.parameters()], allow_unused=True, materialize_grads=True)
    return value.detach(), [x for part in details for x in part.values()], found[: len(leaves)], found[len(leaves) :]


def work(rank, store, results, backends):
    torch.set_num_threads(1)
    store = dist.FileStore(store, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    members = {ranks for parts in SPLITS.values() for part in parts for ranks in (part.spatial, part.process)}
    groups = {ranks: dist.new_group(list(ranks)) for ranks in sorted(members)}
    found = {}
    for split, parts in SPLITS.items():
        if rank >= len(parts):
            continue
        part = parts[rank]
        for case in CASES:
            for kind in KINDS:
                for backend in backends:
                    options = {"spatial_group": groups[part.spatial], "process_group": groups[part.process], "backend": backend}
                    found[split, case, kind, backend] = outcome(kind, batch_of(case), part.samples, part.rows, **options)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


ranks = helpers.ranks(work, RANKS, BACKENDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_parts_equal_the_whole(ranks, backend, split, case, kind):
    """What DDP makes of the gradients of the ranks, their mean, is the gradient of one process."""
    value, details, features, head = outcome(kind, batch_of(case), backend=backend)
    parts = SPLITS[split]
    found = [ranks[r][split, case, kind, backend] for r in range(len(parts))]
    assert value.isfinite() and all(g.isfinite().all() for g in features)
    if case == "nothing_valid":
        assert value == 0 and not any(g.any() for g in features)
    else:
        assert value != 0 and all(g.abs().sum() > 0 for g in (features if kind in ("inverse", "l1") else features[1::2]))
    for part, (other, other_details, gradients, _) in zip(parts, found, strict=True):
        assert other.item() == pytest.approx(value.item(), rel=1e-6)
        for a, b in zip(other_details, details, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)
        fine = slice(2 * part.rows.start, 2 * part.rows.stop)
        expected = [g[part.samples, :, r] for g, r in zip(features, (fine, part.rows) * 2, strict=True)]
        size = float(torch.cat([g.flatten() for g in features]).norm())
        helpers.assert_close([g / len(parts) for g in gradients], expected, 1e-6, floor=size)
    mean = [sum(gradients) / len(parts) for gradients in zip(*(x[3] for x in found), strict=True)]
    helpers.assert_close(mean, head, 1e-6)


@pytest.mark.parametrize("kind", ["inverse", "pixel", "sample", "l1", "cross_entropy"])
def test_the_comparison_has_power(ranks, backend, kind):
    """Rows taken for samples of their own give something else."""
    value = outcome(kind, batch_of("uneven"), backend=backend)[0].item()
    alone = [outcome(kind, batch_of("uneven"), part.samples, part.rows, backend=backend)[0].item() for part in SPLITS["two"]]
    assert sum(alone) / 2 != pytest.approx(value, rel=1e-3)
    assert ranks[0]["two", "uneven", kind, backend][0].item() == pytest.approx(value, rel=1e-6)


def test_what_is_no_part_of_a_map(tmp_path):
    """Embeddings without pixels cannot be split by rows: refused, before any rank waits for another."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        x = torch.randn(2, 4, requires_grad=True)
        scores = x.unsqueeze(2) * torch.randn(2, 4, 5)
        message = r"a part of a map, \(B, C, \*spatial\), with spatial_group, got shape \(2, 4\)"
        with pytest.raises(ValueError, match=rf"AttributionLoss: features\['a'\]\[0\] must be {message}"):
            mrf.AttributionLoss(spatial_group=group)(scores, {"a": x})
        with pytest.raises(ValueError, match=rf"prediction_term: inputs\['a'\] must be {message}"):
            mrf.FunctionalEntropyLoss(spatial_group=group).prediction_term(scores.square().sum(1), {"a": x})
    finally:
        dist.destroy_process_group()
