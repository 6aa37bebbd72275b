"""The site that ``make docs`` builds with Sphinx from these pages and the docstrings, without a network.

The pages are written for a reader of the repository: plain Markdown whose links name files. What the site adds is done here: pages of
the repository's root, links between both, names that link to the reference and back, formulas as MathML."""

import os
import re
import sys
from html import escape
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import MockFinder
from sphinx.util import inspect, logging

import modreg_fast

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FONT = (
    Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
)  # browsers need one with a table for mathematics
ROOT_PAGES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changes": "CHANGELOG.md"}  # page -> its text

project = "modreg_fast"
version = release = modreg_fast.__version__
html_title = f"modreg_fast {version}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_static"]

html_theme = "furo"
html_static_path = ["_static", str(FONT)]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4  # the anchors that repository pages use
myst_dmath_allow_space = False
myst_dmath_allow_digits = False

maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "extra_repr"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = ">>> "
pygments_style, pygments_dark_style = "friendly", "github-dark"

# Trainers whose callbacks the reference describes: the same pages whether they are installed or not. (autodoc_mock_imports takes its
# mocks back, and the base classes are imported after that.)
sys.meta_path.insert(0, MockFinder(["lightning", "mmengine", "transformers"]))
CALLBACKS = {
    f"modreg_fast.integrations.{name}"
    for name in ("lightning.ModalityCallback", "transformers.ModalityCallback", "mmengine.ModalityHook")
}

# How pages write a public name -> where the reference has it.
NAMES = {
    f"{prefix}{name}": f"{module.__name__}.{name}"
    for module, prefixes in ((modreg_fast, ("", "mrf.")), (modreg_fast.functional, ("", "functional.", "mrf.functional.")))
    for name in module.__all__
    if callable(getattr(module, name))
    for prefix in prefixes
} | {name: name for name in CALLBACKS}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_KNOWN = "|".join(map(re.escape, sorted(NAMES, key=len, reverse=True)))
CODE = re.compile(rf"(?<![`\[}}])`({_KNOWN})((?:\.\w+)*)(?:\([^`]*\))?`(?![`\]])")
VERBATIM = re.compile(r"(```.*?```|^#.*?$)", re.DOTALL | re.MULTILINE)  # code, and headings: their anchors are their text


def page_text(app: Sphinx, page: str, source: list[str]) -> None:
    """Markdown of the repository -> of the site."""
    file = ROOT / ROOT_PAGES[page] if page in ROOT_PAGES else Path(app.env.doc2path(page))
    text = source[0]
    if page in ROOT_PAGES:
        app.env.note_dependency(str(file))
        text = file.read_text(encoding="utf-8") + "\n" + text
    here = (DOCS / page).parent

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve()
        for name, root_file in ROOT_PAGES.items():
            if target == ROOT / root_file:
                target = DOCS / f"{name}.md"
        return os.path.relpath(target, here) + (match[2] or "")

    def code(match: re.Match[str]) -> str:
        return f"{{py:obj}}`{match[0][1:-1]} <{NAMES[match[1]]}{match[2]}>`"

    parts = VERBATIM.split(text)
    parts[::2] = [CODE.sub(code, LINK.sub(link, re.sub(r"\$`(.+?)`\$", r"$\1$", part))) for part in parts[::2]]
    source[0] = "".join(parts)


def used_in(app: Sphinx, what: str, name: str, object: object, options: object, lines: list[str]) -> None:
    """Below a name, the guides that use it."""
    if what not in ("class", "function") or not name.startswith("modreg_fast."):
        return
    short = name.removeprefix("modreg_fast.")
    use = re.compile(rf"\b({re.escape(name)}|mrf\.{re.escape(short)})\b")
    guides = [p for p in sorted((DOCS / "guides").glob("*.md")) if use.search(p.read_text(encoding="utf-8"))]
    if guides:
        lines += ["", "**Guides:** " + ", ".join(f":doc:`/guides/{p.stem}`" for p in guides), ""]


def signature_of_callback(app: Sphinx, what: str, name: str, thing: type, *_: object) -> tuple[str, str] | None:
    """Its own; Sphinx finds that of the mocked base class first."""
    if name not in CALLBACKS:
        return None
    signature = inspect.signature(thing.__init__, bound_method=True)
    return inspect.stringify_signature(signature, show_return_annotation=False, unqualified_typehints=True), ""


def mathml(self: object, node: nodes.Element, block: bool) -> None:
    formula = node.astext()
    try:
        text = tex2mathml(formula, as_block=block)
        # What docutils leaves to the browser: bars as high as a letter, and a thin space around log, exp and the like.
        text = re.sub(r"<mo[^>]*>([‖|])</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', text)
        text = re.sub(r'&ApplyFunction;</mo>(?!\s*<mo stretchy="false">\()', r'\g<0><mspace width="0.17em"></mspace>', text)
        text = re.sub(r"(</m(?:i|sub|subsup)>\s*)(?=<mi>(?:log|exp|sin|cos)</mi>)", r'\1<mspace width="0.17em"></mspace>', text)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        text = f"<code>{escape(formula)}</code>"
    self.body.append(f'<div class="formula">{text}</div>' if block else text)  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", page_text)
    app.connect("autodoc-process-docstring", used_in, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature_of_callback)
    inline, block = (lambda self, node, block=block: mathml(self, node, block) for block in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
