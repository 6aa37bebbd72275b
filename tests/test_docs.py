"""The documentation: every public name stands in the site with an example that runs, and the site builds without a warning."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import modreg_fast as mrf

ROOT = Path(__file__).parent.parent
PUBLIC = {f"{module.__name__}.{n}": getattr(module, n) for module in (mrf, mrf.functional) for n in module.__all__}
PUBLIC = {name: thing for name, thing in PUBLIC.items() if callable(thing)}
CALLBACKS = ["lightning.ModalityCallback", "transformers.ModalityCallback", "mmengine.ModalityHook"]


def run_example(name, thing):
    """Of a public name and of its members, as a user would paste it; `import torch` and the names of its module are there."""
    names = {**vars(import_module(thing.__module__)), "torch": torch, "nn": nn, "mrf": mrf}
    found = doctest.DocTestFinder(exclude_empty=True).find(thing, name, module=False, globs=names)
    assert any(test.name == name and test.examples for test in found), f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    for package in ("rich", "torchmetrics") if name.rpartition(".")[2] in ("audit", "Audit") else ():
        pytest.importorskip(package)
    run_example(name, PUBLIC[name])


@pytest.mark.filterwarnings("ignore")  # the trainers' own
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback(name, tmp_path, monkeypatch):
    """As for PUBLIC, which would import the trainers for every test of this file."""
    monkeypatch.chdir(tmp_path)
    module, _, name = name.rpartition(".")
    for package in (module, "matplotlib", "accelerate"):
        pytest.importorskip(package)
    thing = getattr(import_module(f"modreg_fast.integrations.{module}"), name)
    run_example(name, thing)
    assert "Raises:" in str(inspect.getdoc(thing))


def test_pages_that_messages_name_exist():
    """Errors and commands name a page, or a heading of one, as it stands in the repository."""
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "modreg_fast").rglob("*.py"))
    named = set(re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", text))
    assert ("docs/limits.md", "double-differentiation") in named
    for page, anchor in named:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], (page, anchor)


def test_errors_are_documented():
    """Of everything that a user calls with arguments, so not of the types of results."""
    called = [n for n, x in PUBLIC.items() if inspect.isfunction(x) or issubclass(x, nn.Module)]
    assert len(called) >= 14
    for name in called:
        if inspect.signature(PUBLIC[name]).parameters:
            assert "Raises:" in str(inspect.getdoc(PUBLIC[name])), name


def test_site(tmp_path):
    """Builds as `make docs` does, with every public name, and needs no network to be read. Takes about ten seconds; one test, so that
    no second worker builds it again."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "objects.inv").open("rb") as file:
        objects = InventoryFile.load(file, "", os.path.join)
    listed = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    assert not {*PUBLIC, *(f"modreg_fast.integrations.{name}" for name in CALLBACKS)} - listed, (
        "to be added to a page in docs/reference"
    )

    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > 15
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for path, _, anchor in (href.partition("#") for href in re.findall(r'<a\b[^>]*?\bhref="(?![a-z]+:)([^"]*)"', text)):
            target = Path(os.path.normpath(page.parent / unquote(path))) if path else page
            assert target.exists() and (not anchor or unquote(anchor) in anchors.get(target, ())), (page, path, anchor)
    loaded = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//""")
    assert not [page for page, text in pages.items() if loaded.search(text)]
    styles = {style: style.read_text(encoding="utf-8") for style in tmp_path.rglob("*.css")}
    assert not [style for style, text in styles.items() if re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text)]

    functions = pages[tmp_path / "reference" / "functional.html"]
    assert "<math" in functions and "\\frac" not in functions and (tmp_path / "_static" / "STIXTwoMath-Regular.ttf").exists()
    assert 'href="../guides/kernels.html"' in functions  # from a name to the guide that uses it, and back
    assert 'href="../reference/looking.html#modreg_fast.capture"' in pages[tmp_path / "guides" / "segmentation.html"]
