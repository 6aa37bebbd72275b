"""audit as sentence, table, JSON, picture and page; the page in a browser."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing import SPEC, Images, Page, Vectors, audit, images, vectors

import modreg_fast as mrf
from modreg_fast.audit import Audit, Estimate, examples


def made(share, scores=None, count=2) -> Audit:
    """By hand: ``share`` modality -> (mean, low, high)."""
    names = tuple(share)
    scores = scores or {names: 0.8, **{(m,): 0.5 - 0.1 * i for i, m in enumerate(names)}}
    information = {m: [Estimate(0.012 * (i + 1), 0.01 * (i + 1), 0.015 * (i + 1))] * count for i, m in enumerate(names)}
    estimates = {m: Estimate(*x) for m, x in share.items()}
    missing = mrf.MissingModalities("mIoU", scores, True)
    return Audit(
        "Net", 31, ["1", "2"][:count], estimates, {m: [x] * count for m, x in estimates.items()}, information, missing, []
    )


def test_verdict():
    clear = made({"depth": (0.09, 0.06, 0.12), "rgb": (0.91, 0.88, 0.94)})
    assert clear.verdict == (
        "rgb carries 91 % [88, 94] of the attribution at the inputs. Losing depth costs most: mIoU 0.8 becomes 0.4. "
        "The scores do not bear this out: losing rgb costs 0.3, losing depth 0.4."
    )
    borne_out = replace(
        clear, missing=mrf.MissingModalities("mIoU", {("depth", "rgb"): 0.8, ("depth",): 0.3, ("rgb",): 0.7}, True)
    )
    assert borne_out.verdict == (
        "rgb carries 91 % [88, 94] of the decision, measured at the inputs. Losing rgb costs most: mIoU 0.8 becomes 0.3."
    )
    even = made({"a": (0.48, 0.43, 0.52), "b": (0.52, 0.48, 0.57)}, {("a", "b"): 0.7, ("a",): 0.8, ("b",): 0.7})
    assert (
        even.verdict
        == "No modality dominates: b carries 52 % [48, 57], a carries 48 % [43, 52] of the decision, measured at the inputs."
    )
    alike = made({"a": (0.48, 0.43, 0.52), "b": (0.52, 0.48, 0.57)}, {("a", "b"): 0.7, ("a",): 0.5, ("b",): 0.5})
    assert alike.verdict.endswith("Losing a or b costs most: mIoU 0.7 becomes 0.5.")
    lower = replace(even, missing=mrf.MissingModalities("RMSE", {("a", "b"): 1.0, ("a",): 3.0, ("b",): 2.0}, False))
    assert lower.verdict.endswith("Losing b costs most: RMSE 1 becomes 3.")


@pytest.mark.parametrize(
    ("costs", "agrees"),
    [
        ((0.4, 0.1), True),
        ((0.4, 0.2), True),
        ((0.071, 0.060), False),  # about the same, where the shares say three times as much
        ((0.1, 0.4), False),
        ((0.0, -0.1), False),  # nothing is lost with what carries most
        ((float("nan"), 0.1), True),
        ((0.1, float("nan")), False),
    ],
)
def test_a_share_is_the_decision_only_where_the_scores_agree(costs, agrees):
    scores = {("rgb", "depth"): 0.8, ("depth",): 0.8 - costs[0], ("rgb",): 0.8 - costs[1]}
    result = made({"rgb": (0.75, 0.7, 0.8), "depth": (0.25, 0.2, 0.3)}, scores)
    assert ("of the decision" in result.verdict) == agrees == (result.disagreement == "")
    assert agrees or "of the attribution at the inputs" in result.verdict
    assert "at the features less their mean" in replace(result, measured_at="features", baseline="mean").verdict


def test_a_share_is_not_the_decision_where_the_scales_disagree():
    scores = {("rgb", "depth"): 0.8, ("depth",): 0.2, ("rgb",): 0.7}
    result = made({"rgb": (0.75, 0.7, 0.8), "depth": (0.25, 0.2, 0.3)}, scores)
    high, low = Estimate(0.75, 0.7, 0.8), Estimate(0.25, 0.2, 0.3)
    other = replace(result, share_by_scale={"rgb": [high, low], "depth": [low, high]})
    assert "of the decision" in result.verdict and "of the decision" not in other.verdict
    assert other.verdict.endswith("The scales disagree: rgb leads at 1, depth leads at 2.")
    nothing = Estimate(*[float("nan")] * 3)  # no valid position at the second scale
    assert replace(result, share_by_scale={"rgb": [high, nothing], "depth": [low, nothing]}).disagreement == ""


def test_table():
    text = made({"rgb": (0.91, 0.88, 0.94), "depth": (0.09, 0.06, 0.12)}).table()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("rgb carries 91 % [88, 94] of the attribution at the inputs.")
    assert (
        "all rgb 91 % [88, 94]" in lines
        and "depth 9 % [6, 12]" in lines
        and "Means over 31 samples, with 95 % intervals." in lines
    )
    assert "2 rgb 91 % [88, 94] 0.012 [0.010, 0.015]" in lines and "depth 9 % [6, 12] 0.024 [0.020, 0.030]" in lines
    assert any(line.startswith("worst: depth, 0.400") for line in lines)
    many = made({f"modality number {i}": (0.1, 0.05, 0.2) for i in range(9)}).table()  # nothing is cut off
    assert "…" not in many and all(f"modality number {i}" in many for i in range(9))


def test_json(tmp_path):
    result = audit(Images(), images(), SPEC, ignore_index=255)
    told = json.loads(result.to_json(tmp_path / "audit.json"))
    assert told == json.loads((tmp_path / "audit.json").read_text())
    assert told["verdict"] == result.verdict and told["share"]["rgb"] == result.share["rgb"]._asdict()
    assert told["information"]["depth"][1]["mean"] == result.information["depth"][1].mean
    assert told["missing"]["scores"][1] == {"given": ["rgb"], "score": result.missing.scores["rgb",]}
    assert told["versions"]["torch"] == torch.__version__


def test_page(tmp_path):
    torch.manual_seed(2)
    result = audit(Images(), images(), SPEC, ignore_index=255)
    text = result.to_html(tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == text
    page = Page(text)
    assert len(page.references) == 4 * 3 and all(x.startswith("data:image/png;base64,") for x in page.references)
    assert "script" not in page.tags and "link" not in page.tags and not re.search(r"url\(|@import|https?://", text)
    words = " ".join(" ".join(page.words).split())
    assert result.carried in words.replace("\u00a0", " ") and result.costs in words and "5 samples" in words
    for m in SPEC:
        mean, _, interval = f"{100 * result.share[m].mean:.0f} %", None, result.share[m]
        assert f"{m} {mean} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" in words


NAN = float("nan")


def test_nan_is_null_in_json_and_said_elsewhere():
    """A scale without a valid position, and a score that is not defined."""
    scores = {("rgb", "depth"): 0.8, ("rgb",): NAN, ("depth",): 0.7}
    nothing = Estimate(NAN, NAN, NAN)
    result = made({"rgb": (0.9, 0.8, 0.95), "depth": (0.1, 0.05, 0.2)}, scores)
    shares = {m: [row[0], nothing] for m, row in result.share_by_scale.items()}
    result = replace(
        result, share_by_scale=shares, information={m: [x, nothing] for m in shares for x in result.information[m][:1]}
    )
    told = json.loads(result.to_json(), parse_constant=lambda constant: pytest.fail(constant))
    assert told["share_by_scale"]["rgb"][1] == {"mean": None, "low": None, "high": None}
    assert told["missing"]["mean"] is None and told["missing"]["worst"] == ["rgb"]
    assert json.loads(json.dumps(result.missing.to_dict(), allow_nan=False))["scores"][1] == {"given": ["rgb"], "score": None}
    assert "Losing depth costs most: mIoU 0.8 becomes nan." in result.verdict
    lines = [" ".join(line.split()) for line in result.table().splitlines()]
    assert "2 rgb n/a n/a" in lines and "worst: rgb, nan" in lines
    page = Page(result.to_html())
    assert "nan%" not in result.to_html() and "n/a" in " ".join(page.words).split()
    assert result.plot().axes


@pytest.mark.parametrize("turn", [dict, lambda x: dict(reversed(x.items()))])
@pytest.mark.parametrize("higher", [True, False])
def test_nan_is_the_worst(turn, higher):
    result = mrf.MissingModalities("F1", turn({("a", "b"): 0.5, ("a",): NAN, ("b",): 0.9}), higher)
    assert result.worst == ("a",)


@pytest.mark.parametrize(
    "names", [("depth[m]", "radar[/dB]"), ("cost $5", "gain $6"), ("_rgb", "__depth"), ("<b>", "深度"), (":dog:", "a\\[b]")]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_shown_as_they_are(names, tmp_path):
    result = made({names[0]: (0.9, 0.8, 0.95), names[1]: (0.1, 0.05, 0.2)})
    table = result.table()
    assert all(table.count(name) >= 5 for name in names)
    figure = result.plot()
    figure.savefig(tmp_path / "plot.svg")
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == list(names)
    ticks = figure.axes[2].get_yticklabels()
    assert [text.get_text() for text in ticks][0] == " + ".join(names) and not any(text.get_parse_math() for text in ticks)
    assert all(name in "".join(Page(result.to_html()).words) for name in names)


def test_results_can_be_kept():
    result = audit(Images(), images(), SPEC, ignore_index=255)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert other.to_json() == result.to_json() and other.missing == result.missing
        assert (other.examples[0].shares == result.examples[0].shares).all()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == json.loads(result.to_json()) == result.to_dict()


def test_files_are_written_whole_or_not_at_all(tmp_path):
    result = made({"rgb": (0.9, 0.8, 0.95), "depth": (0.1, 0.05, 0.2)})
    for write, name in ((result.to_json, "a.json"), (result.to_html, "a.html")):
        (tmp_path / name).write_text("old")
        assert write(tmp_path / name) == (tmp_path / name).read_text(encoding="utf-8")
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
            write(tmp_path / "nowhere" / name)
        with pytest.raises(IsADirectoryError):
            write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_page_escapes_names():
    name = '<script>alert("x")</script>&'
    assert "<script" not in made({name: (0.9, 0.8, 0.95), "b": (0.1, 0.05, 0.2)}).to_html()


@pytest.mark.parametrize("count", [1, 3, 9])
def test_page_and_plot_of_any_number_of_modalities(count, tmp_path):
    share = {f"m{i}": (1 / count, 0.9 / count, 1.1 / count) for i in range(count)}
    result = made(share, None if count == 1 else {tuple(share): 0.5, ("m0",): -0.2, ("m1",): float("nan")})
    blank = np.zeros((4, 4, 4), np.uint8)
    result = replace(result, examples=[examples.Example({m: blank[..., :3] for m in share}, blank)] * 2)
    Page(result.to_html())
    result.plot().savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_plot_without_examples(tmp_path):
    figure = made({"rgb": (0.9, 0.8, 0.95), "depth": (0.1, 0.05, 0.2)}, count=1).plot()
    assert len(figure.axes) == 3 and [round(bar.get_height()) for bar in figure.axes[0].patches] == [90, 10]


@pytest.mark.parametrize("package", ["rich", "jinja2", "matplotlib", "torchmetrics"])
def test_without_an_extra(package, monkeypatch):
    for name in [*(name for name in sys.modules if name.split(".")[0] == package), package, f"{package}.figure"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("modreg_fast.audit.page", "modreg_fast.audit.plot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=rf"[Aa]udit.*: needs the package {package}.*: pip install 'modreg_fast\[audit\]'"
    ):
        result = audit(Vectors(), vectors())
        result.table(), result.to_html(), result.plot()


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """Chromium draws it on a light and a dark screen, on a phone without anything wider than it, and on paper in light colours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    from matplotlib.image import imread

    torch.manual_seed(2)
    audit(Images(), images(), SPEC, ignore_index=255).to_html(tmp_path / "audit.html")

    def draw(*options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *options, f"file://{tmp_path / 'audit.html'}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def picture(scheme, width):
        draw(
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},1600",
            f"--screenshot={tmp_path / 'shot.png'}",
        )
        return (255 * imread(tmp_path / "shot.png")[..., :3]).round().astype(int)

    for scheme, width, page in ((1, 1100, (251, 251, 249)), (0, 1100, (21, 23, 27)), (1, 500, (251, 251, 249))):
        shot = picture(scheme, width)
        assert shot.shape == (1600, width, 3)
        background = (shot == page).all(2)
        assert 0.5 < background.mean() < 0.97 and background[:, :12].all() and background[:, -12:].all()  # margins stay free
        blue = [int(examples.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
        assert (shot == blue).all(2).sum() > 1000  # the bars of the first modality
    draw("--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'audit.pdf'}")
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "audit.pdf").read_bytes())
    assert 1 <= len(pages) <= 2
