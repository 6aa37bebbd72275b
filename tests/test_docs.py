"""The documentation: every public name stands in the site with an example that runs, and the site builds without a warning."""

import doctest
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import modreg_fast as mrf

ROOT = Path(__file__).parent.parent
PUBLIC = {f"{module.__name__}.{n}": getattr(module, n) for module in (mrf, mrf.functional) for n in module.__all__}
PUBLIC = {name: thing for name, thing in PUBLIC.items() if callable(thing)}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    """Of a public name and of its members, as a user would paste it; `import torch` and the names of its module are there."""
    for package in ("rich", "torchmetrics") if name.rpartition(".")[2] in ("audit", "Audit") else ():
        pytest.importorskip(package)
    module = import_module(PUBLIC[name].__module__)
    names = {**vars(module), "torch": torch, "nn": nn, "mrf": mrf}
    found = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[name], name, module=False, globs=names)
    assert any(test.name == name and test.examples for test in found), f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` does. Takes about ten seconds."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        objects = InventoryFile.load(file, "", os.path.join)
    listed = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    assert not set(PUBLIC) - listed, "to be added to a page in docs/reference"


def test_site_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    loaded = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']+""")
    for page in pages:
        assert not loaded.findall(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_site_shows_formulas_and_links(site):
    reference = (site / "reference" / "functional.html").read_text(encoding="utf-8")
    assert "<math" in reference and "\\frac" not in reference
    assert 'href="../guides/kernels.html"' in reference  # from a name to the guide that uses it
    assert 'href="../reference/looking.html#modreg_fast.capture"' in (site / "guides" / "segmentation.html").read_text("utf-8")
    assert (site / "_static" / "STIXTwoMath-Regular.ttf").exists()
