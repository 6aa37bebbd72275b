"""Results on their way out: files that are written whole or not at all, JSON that every reader takes, text for any terminal."""

import codecs
import contextlib
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNS = {"●": "x", "·": ".", "±": "+-", "×": "x", "─": "-", "–": "-", "…": "..."}  # of our tables, for terminals without them


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, in the folder of ``path``. The file takes the place of ``path`` when the block ends, and is gone where the
    block fails or is interrupted: who reads ``path`` finds the old file or the new one."""
    path = _place(path)
    if path.exists() and not path.is_file():  # such as /dev/stdout
        yield path
        return
    part = path.with_name(f".{secrets.token_hex(4)}.part")
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, text: str) -> None:
    """``text`` as the file ``path``, in UTF-8."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def save_figure(figure: "Figure", path: Path, **options: Any) -> None:
    """``figure.savefig``, in the format that the name ends in."""
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], **options)


def writable(path: str | Path) -> None:
    """Raises OSError, with the reason, where :func:`whole` would, and leaves everything as it is: for before the work."""
    place = _place(path)
    if place.is_file() or not place.exists():
        with tempfile.TemporaryFile(dir=place.parent):
            pass


def folder(path: Path) -> None:
    """Makes the folder; raises OSError where no file can be written into it: for before the work."""
    path.mkdir(parents=True, exist_ok=True)
    writable(path / "file")


def _place(path: str | Path) -> Path:
    place = Path(os.path.realpath(path))  # a link stays a link
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {Path(path).parent}")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")
    return place


def to_json(x: Any, indent: int = 2) -> str:
    """As ``json.dumps``; NaN and infinities, which JSON does not have, as null."""
    return json.dumps(plain(x), indent=indent, allow_nan=False) + "\n"


def plain(x: Any) -> Any:
    """``x`` of dicts and lists, with None in place of numbers that are not finite."""
    if isinstance(x, Mapping):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def deliver(command: str, *steps: Callable[[], object]) -> int:
    """All steps, each of which shows or writes a result, also where one fails: 0, or 1 with the reasons on stderr."""
    failed = 0
    for step in steps:
        try:
            step()
        except OSError as error:
            failed = 1
            if isinstance(error, BrokenPipeError):
                silence(sys.stdout)
            else:
                print(f"{command}: {error}", file=sys.stderr)
    return failed


def silence(stream: Any) -> None:
    """After the reader of a pipe has left: or Python complains once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def any_terminal() -> Iterator[None]:
    """In the block, stdout and stderr write what their encoding lacks in other signs, instead of raising UnicodeEncodeError."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="modreg_fast")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def printable(text: str) -> str:
    """``text`` in signs that stdout has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "modreg_fast").decode(encoding)


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler: our signs in ASCII, others as ``\\u6df1``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in found), error.end


codecs.register_error("modreg_fast", _instead)
