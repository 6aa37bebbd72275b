"""The page of an audit: one HTML file with its style and pictures inside."""

import base64
from math import isfinite
from pathlib import Path

import jinja2

import modreg_fast
from modreg_fast.audit.examples import Image, colour, png, ramp
from modreg_fast.audit.result import Audit, Estimate, number, percent


def html(audit: Audit) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": percent, "number": number, "image": _image}
    modalities = list(audit.share)
    scores = [x for x in audit.missing.scores.values() if isfinite(x)]
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        audit=audit,
        colours={m: colour(i) for i, m in enumerate(modalities)},
        rows=_rows(audit),
        digits=lambda x: f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}",
        longest=max(scores) if scores and min(scores) >= 0 < max(scores) else None,
        isfinite=isfinite,
        ramp=ramp(),
        version=modreg_fast.__version__,
    )


def _rows(audit: Audit) -> list[dict[str, object]]:
    """A group per scale, the first for all together; bars in percent of the track."""
    top = 1.02 * max((x.high for row in audit.information.values() for x in row if isfinite(x.high)), default=0.0) or 1.0
    groups: list[dict[str, object]] = []
    if len(audit.scales) > 1:
        groups.append({"name": "All scales", "cells": [(m, x, _bar(x), None, None) for m, x in audit.share.items()]})
    for s, name in enumerate(audit.scales):
        cells = []
        for m, row in audit.share_by_scale.items():
            information = audit.information[m][s]
            cells.append((m, row[s], _bar(row[s]), information, _bar(information, top)))
        groups.append({"name": f"Scale {name}" if len(audit.scales) > 1 else name.capitalize(), "cells": cells})
    if audit.share_at_inputs:
        groups.append({"name": "Inputs", "cells": [(m, x, _bar(x), None, None) for m, x in audit.share_at_inputs.items()]})
    return groups


def _bar(x: Estimate, top: float = 1.0) -> str:
    """Width of the bar, and place of the interval; no bar where nothing counted."""
    if not isfinite(x.mean):
        return "--to:0;--low:0;--wide:0"
    return f"--to:{100 * x.mean / top:.2f}%;--low:{100 * x.low / top:.2f}%;--wide:{100 * (x.high - x.low) / top:.2f}%"


def _image(image: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
