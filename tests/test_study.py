"""The study: splits without leaks, trainings that a kill does not cost, numbers against scipy and torchmetrics."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.classification import MulticlassJaccardIndex

import modreg_fast as mrf
from benchmarks.study import runs
from benchmarks.study.__main__ import main
from benchmarks.study.analyse import Interval, Study, differences, split
from benchmarks.study.baselines import mmpareto, ogm_ge, pareto
from benchmarks.study.data import DATA, GAPS, LARGE, PARTS, Data
from benchmarks.study.methods import METHODS
from benchmarks.study.models import FUSIONS, Fusion, Network
from benchmarks.study.runs import COLUMNS, Run
from benchmarks.study.step import Step
from benchmarks.study.train import drop_modalities, forward, full, metric, missing, train
from modreg_fast.demo.data import IGNORE

ALL = {**DATA, **GAPS}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [0, 3])
def test_parts_share_neither_group_nor_sample(name: str, seed: int) -> None:
    parts = ALL[name](seed).parts
    assert tuple(parts) == PARTS
    groups = [set(part.groups.tolist()) for part in parts.values()]
    assert all(groups) and sum(map(len, groups)) == len(set().union(*groups))
    # Nor is a sample there twice: all modalities together, because among the digits some views of two images coincide.
    rows = [{x.numpy().tobytes() for x in torch.cat([x.flatten(1) for x in part.inputs.values()], 1)} for part in parts.values()]
    assert sum(map(len, rows)) == len(set().union(*rows))


@pytest.mark.parametrize("name", ALL)
def test_only_the_training_part_sets_the_scale(name: str) -> None:
    data = ALL[name](1)
    for x in data.parts["train"].inputs.values():
        channels = x.movedim(1, 0).flatten(1)
        assert channels.mean(1).abs().max() < 1e-3
        # a channel may be constant, as one of the views of the digits nearly is
        assert ((channels.std(1) - 1).abs() < 0.01).float().mean() > 0.9
    for part in data.parts.values():
        known = part.target[part.target != IGNORE]
        assert 0 <= known.min() and known.max() < data.classes
        assert all(len(x) == len(part.target) == len(part.groups) for x in part.inputs.values())


def test_no_pixel_of_a_block_is_near_a_block_of_another_part() -> None:
    from tensorly.datasets import load_indian_pines

    width = load_indian_pines()["tensor"].shape[1]
    for seed in range(2):
        shift = torch.randint(16, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        owner = np.full((width, width), -1)
        for i, part in enumerate(DATA["indian pines"](seed).parts.values()):
            for group in part.groups.tolist():
                y, x = group // (width - shift[1]) + shift[0], group % (width - shift[1]) + shift[1]
                assert (owner[max(y - 2, 0) : y + 18, max(x - 2, 0) : x + 18] == -1).all()
                owner[y : y + 16, x : x + 16] = i
        assert {0, 1, 2} <= set(owner.flat)


def test_each_third_of_the_home_tasks_holds_all_activities_of_one_person() -> None:
    parts = DATA["home tasks"](0).parts
    for part in parts.values():
        assert len(part.groups.unique()) == 1 and len(part.target.unique()) == 7
    orders = {tuple(int(DATA["home tasks"](seed).parts[part].groups[0]) for part in PARTS) for seed in range(6)}
    assert len(orders) == 6


def test_a_seed_draws_its_own_split() -> None:
    for name in DATA:
        first, second = (set(DATA[name](seed).parts["test"].groups.tolist()) for seed in (0, 1))
        images = [DATA[name](seed).parts["test"].target for seed in (0, 1)]
        assert first != second or not torch.equal(*images), name


def test_dropout_leaves_every_sample_something() -> None:
    inputs = {m: torch.ones(4000, 2, 3) for m in "abc"}
    dropped = torch.stack(list(drop_modalities(inputs, 0.4, torch.Generator().manual_seed(0)).values()))
    kept = dropped[..., 0, 0]
    assert torch.equal(dropped, kept[..., None, None].expand_as(dropped))
    assert kept.any(0).all()
    lost = 0.4 - 0.4**3  # all three are kept where all would be lost
    assert (1 - kept.mean(1) - lost).abs().max() < 0.03
    assert drop_modalities(inputs, 0.0, torch.Generator()) == inputs


@lru_cache
def _small() -> Data:
    return DATA["home tasks"](0)


@lru_cache
def _trained(method: str, weight: float, fusion: Fusion) -> torch.Tensor:
    """The weights after a few steps."""
    model = train(_small(), fusion, METHODS[method], weight, seed=1, steps=3)
    own = model.heads is not None and fusion != "predictions"
    return torch.cat(
        [p.detach().flatten() for name, p in model.named_parameters() if not own or not name.startswith("heads.heads.")]
    )


def _is_penalty(method: str) -> bool:
    settings = METHODS[method]
    return settings.dropout == 0.0 and not settings.adaptive and settings.backward is None


@pytest.mark.parametrize("method", [m for m in METHODS if _is_penalty(m)])
def test_at_weight_zero_a_method_is_joint_training(method: str) -> None:
    """So all see the same start and the same batches. Gat's draws its noise from torch's generator, which nothing else uses."""
    fusion = METHODS[method].fusions[0]
    torch.testing.assert_close(_trained(method, 0.0, fusion), _trained("joint", 0.0, fusion), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "joint"])
def test_a_method_changes_the_network(method: str) -> None:
    fusion = METHODS[method].fusions[0]
    weights = _trained(method, METHODS[method].weights[-1], fusion)
    assert weights.isfinite().all() and (weights - _trained("joint", 0.0, fusion)).abs().max() > 1e-5


def _batch(own: bool, fusion: Fusion = "concatenation") -> tuple[Step, torch.Tensor]:
    """A step of a new network, and its task loss."""
    data = _small()
    torch.manual_seed(0)
    inputs = {m: x[:8] for m, x in data.parts["train"].inputs.items()}
    model = Network({m: x.shape[1] for m, x in inputs.items()}, data.classes, fusion, spatial=False, own=own)
    return forward(model, inputs, data.parts["train"].target[:8], mrf.QualityTarget(list(inputs), data.classes))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("method", ["each alone", "own heads"])
def test_each_alone_is_the_cross_entropy_of_each_modality(method: str, fusion: Fusion) -> None:
    step, _ = _batch(METHODS[method].own is not None, fusion)
    losses = []
    for m, x in step.features.items():
        if step.model.heads is None:
            given = {n: step.inputs[n] if n == m else torch.zeros_like(step.inputs[n]) for n in step.inputs}
            scores = step.model(given)
        else:
            scores = step.model.heads.heads[m](x)
        losses.append(torch.nn.functional.cross_entropy(scores, step.target))
    penalty = METHODS[method].penalty
    assert penalty is not None
    torch.testing.assert_close(penalty(step), torch.stack(losses).mean())


def test_a_head_of_its_own_speaks_for_a_modality_whose_others_are_lost() -> None:
    step, _ = _batch(own=True)
    model = step.model.eval()
    assert torch.equal(model(step.inputs), model.joint(model.encode(step.inputs)))
    assert model.heads is not None
    own = model.heads.heads["audio"](model.encoders["audio"](step.inputs["audio"]))
    torch.testing.assert_close(model({"audio": step.inputs["audio"]}), own.log_softmax(1))


def test_ogm_ge_slows_the_encoder_that_knows_more_and_adds_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    step, task = _batch(own=False)
    names = list(step.inputs)
    encoders = dict(step.model.encoders.items())
    plain = {}
    for encoder in encoders.values():
        mine = list(encoder.parameters())
        plain |= dict(zip(mine, torch.autograd.grad(task, mine, retain_graph=True), strict=True))
    skill = {}
    for m in names:
        given = {n: x if n == m else torch.zeros_like(x) for n, x in step.inputs.items()}
        skill[m] = float(step.model(given).softmax(1)[range(8), step.target].sum().detach())
    strong, weak = sorted(names, key=lambda m: -skill[m])
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 2.0))
    ogm_ge(step, task, 0.3)
    factors = {strong: 1 - np.tanh(0.3 * skill[strong] / skill[weak]), weak: 1.0}
    for m, encoder in encoders.items():
        for p in encoder.parameters():
            assert p.grad is not None
            expected = factors[m] * plain[p] + 2 * plain[p].std() if p.dim() > 1 else plain[p]
            torch.testing.assert_close(p.grad, expected)


def test_pareto_is_the_shortest_mixture_where_gradients_disagree() -> None:
    generator = np.random.default_rng(0)
    disagreed = 0
    for _ in range(40):
        g, u = generator.normal(size=(2, 3)) * generator.uniform(0.1, 3, (2, 1))
        found = torch.cat(pareto([torch.tensor(g[:1]), torch.tensor(g[1:])], [torch.tensor(u[:1]), torch.tensor(u[1:])])).numpy()
        if g @ u >= 0:
            np.testing.assert_allclose(found, 1.5 * (g + u))
            continue
        disagreed += 1
        shares = np.linspace(0, 1, 100001)[:, None]
        mixtures = shares * g + (1 - shares) * u
        shortest = 2 * mixtures[np.argmin((mixtures**2).sum(1))]
        long = max(np.linalg.norm(g + u), np.linalg.norm(shortest))
        np.testing.assert_allclose(found, 1.5 * long * shortest / np.linalg.norm(shortest), rtol=1e-3, atol=1e-3)
        assert found @ g > 0 and found @ u > 0  # a step that both losses gain from
    assert disagreed > 10


def test_mmpareto_follows_the_sum_of_the_losses_in_the_heads() -> None:
    step, task = _batch(own=True)
    own = torch.stack([torch.nn.functional.cross_entropy(x, step.target) for x in step.alone().values()]).sum()
    heads = {name: p for name, p in step.model.named_parameters() if not name.startswith("encoders.")}
    expected = torch.autograd.grad(task + 0.3 * own, list(heads.values()), retain_graph=True)
    followed = []
    for encoder in step.model.encoders.values():
        mine = list(encoder.parameters())
        joint, alone = (torch.autograd.grad(x, mine, retain_graph=True) for x in (task, 0.3 * own))
        followed += zip(mine, pareto(joint, alone), strict=True)
    mmpareto(step, task, 0.3)
    for p, grad in zip(heads.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    for p, grad in followed:
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("name", LARGE)
def test_the_large_networks_have_ten_times_the_parameters(name: str) -> None:
    large, small = LARGE[name](0), DATA[name.removesuffix(", large")](0)
    for fusion in FUSIONS:
        counts = []
        for data in (large, small):
            channels = {m: x.shape[1] for m, x in data.parts["train"].inputs.items()}
            model = Network(channels, data.classes, fusion, data.spatial, width=data.setup.width)
            counts.append(sum(p.numel() for p in model.parameters()))
        assert counts[0] >= 10 * counts[1]


def test_early_stopping_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    data = LARGE["digits, large"](0)
    data = data._replace(setup=data.setup._replace(width=4, steps=40, look=1, patience=3))
    seen = []

    def look(model: Network, data: Data, part: str) -> float:
        score = [3.0, 5.0, 4.0, 5.0, 1.0, 9.0][len(seen)]  # three looks without a better one than the second
        seen.append((part, {name: x.clone() for name, x in model.state_dict().items()}))
        return score

    monkeypatch.setattr("benchmarks.study.train.full", look)
    model = train(data, "concatenation", METHODS["joint"], 0.0, seed=0)
    assert len(seen) == 5 and {part for part, _ in seen} == {"validation"}
    torch.testing.assert_close(dict(model.state_dict()), seen[1][1])
    assert full(model, data, "test") == pytest.approx(missing(model, data, "test").full)


def test_mean_iou_is_that_of_torchmetrics() -> None:
    data = DATA["indian pines"](0)
    target = data.parts["test"].target
    scores = torch.randn(len(target), data.classes, *target.shape[1:], generator=torch.Generator().manual_seed(0))
    scores = scores.scatter_add(1, torch.where(target == IGNORE, 0, target)[:, None], torch.full((len(target), 1, 16, 16), 1.5))
    pixels = [torch.bincount(data.parts[part].target.flatten(), minlength=256)[: data.classes] for part in ("train", "test")]
    scored = (pixels[0] >= 10) & (pixels[1] >= 10)
    expected = MulticlassJaccardIndex(data.classes, average="none", ignore_index=IGNORE)(scores, target)[scored].mean()
    assert float(metric(data, "test")(scores, target)) == pytest.approx(100 * float(expected), rel=1e-5)


# What is recorded


def _row(run: Run, **columns: float | str) -> dict[str, str]:
    row = {**dict.fromkeys(COLUMNS, "50"), **run._asdict(), "alone": "audio=40 accelerometer=30", **columns}
    return {name: str(x) for name, x in row.items()}


def test_rows_are_what_the_network_scores(tmp_path: Path) -> None:
    run = Run("home tasks", "concatenation", "each alone", 1.0, 2)
    row = runs.finish(tmp_path / "runs.csv", [run], workers=1, steps=5)[run]
    model = train(DATA["home tasks"](2), "concatenation", METHODS["each alone"], 1.0, 2, steps=5)
    result = missing(model, DATA["home tasks"](2), "test")
    assert float(row["full"]) == pytest.approx(result.full, rel=1e-3)
    assert float(row["worst"]) == pytest.approx(min(result.scores.values()), rel=1e-3)
    assert split(row["alone"])["audio"] == pytest.approx(result.scores["audio",], rel=1e-3)
    assert set(row) == set(COLUMNS) and all(row.values())


STUDY = """
import sys
from pathlib import Path
from benchmarks.study import runs
if __name__ == "__main__":
    grid = [runs.Run("home tasks", "concatenation", "joint", 0.0, seed) for seed in range(10)]
    runs.finish(Path(sys.argv[1]), grid, workers=1, steps=40)
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    script, path = tmp_path / "study.py", tmp_path / "runs.csv"
    script.write_text(STUDY)
    command = [sys.executable, script, path]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while not path.exists() or path.read_text().count("\n") < 4:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
    _ended(process.pid)
    kept = path.read_text()
    kept = kept[: kept.rfind("\n") + 1]
    assert 3 <= len(runs.read(path)) < 10
    path.write_text(kept + "home tasks,concatenation,joint,0,9,50,")  # and killed in the middle of a line

    subprocess.run(command, env=environment, check=True)
    text = path.read_text()
    assert text.startswith(kept)  # nothing was redone
    assert text.count("\n") == 11 and len(runs.read(path)) == 10  # nor lost, nor written twice
    undisturbed = runs.perform(Run("home tasks", "concatenation", "joint", 0.0, 9), steps=40)
    assert all(
        float(row["full"]) == pytest.approx(undisturbed["full"], rel=1e-3)
        for run, row in runs.read(path).items()
        if run.seed == 9
    )


def _ended(session: int) -> None:
    """Waits until no process of the session is left."""
    for _ in range(200):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("a killed study left workers behind")


# What is said of it


def test_paired_intervals_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for n in (2, 5, 9):
        x, y = generator.normal(50, 5, (2, n))
        expected = scipy.stats.ttest_rel(x, y).confidence_interval(0.95)
        found = differences(x.tolist(), y.tolist())
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((expected.low, expected.high))
        assert found.clear == (expected.low > 0 or expected.high < 0)
    assert differences([3.0], [1.0]) == Interval(2.0, float("inf"))
    with pytest.raises(ValueError):
        differences([1.0, 2.0], [1.0])


def _study(scores: dict[tuple[str, float, int], dict[str, float]]) -> Study:
    rows = {}
    for (method, weight, seed), columns in scores.items():
        run = Run("home tasks", "concatenation", method, weight, seed)
        rows[run] = _row(run, **columns)
    return Study(rows)


def test_the_weight_is_chosen_on_the_validation_part_of_its_seed() -> None:
    def validation(full: float, mean: float, test: float = 0.0) -> dict[str, float]:
        return {"validation full": full, "validation mean": mean, "mean": test}

    study = _study(
        {
            ("joint", 0.0, 0): validation(60, 40),
            ("joint", 0.0, 1): validation(60, 40),
            ("feature, log", 1e-3, 0): validation(60, 42, test=1),
            ("feature, log", 1e-2, 0): validation(59.1, 45, test=2),
            ("feature, log", 1e-1, 0): validation(58.9, 50, test=99),  # costs more than a point
            ("feature, log", 1e-3, 1): validation(50, 45, test=4),
            ("feature, log", 1e-2, 1): validation(55, 41, test=8),  # all cost more: the least costly
            ("feature, log", 1e-1, 1): validation(40, 50, test=99),
        }
    )
    assert study.scores("home tasks", "feature, log", "mean", ["concatenation"]) == [2, 8]
    assert study.weights("home tasks", "concatenation", "feature, log") == {1e-2: 2}
    assert study.scores("home tasks", "feature, log", "mean", ["concatenation"], weight=1e-3) == [1, 4]


def test_the_grid_holds_every_training_once() -> None:
    grid = runs.grid(5)
    assert len(grid) == len(set(grid))
    for name in DATA:
        for method, settings in METHODS.items():
            found = {(run.fusion, run.weight, run.seed) for run in grid if (run.data, run.method) == (name, method)}
            assert len(found) == len(settings.fusions) * len(settings.weights) * 5
    assert sum(run.method.startswith(runs.ALONE) for run in grid) == 5 * (2 + 2 + 6 + 2)


@pytest.mark.slow
def test_quick_study_writes_the_page(tmp_path: Path) -> None:
    main(["--quick", "--output", str(tmp_path)])
    page = (tmp_path / "study.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) >= 4
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "nan" not in page.lower().replace("dominan", "")
    before = (tmp_path / "study" / "runs.csv").read_bytes()
    main(["--quick", "--output", str(tmp_path)])  # everything is there
    assert (tmp_path / "study" / "runs.csv").read_bytes() == before and (tmp_path / "study.md").read_text() == page
