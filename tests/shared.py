"""What one process of a test session makes and the others read: compiled kernels, what several ranks computed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock  # torch brings it


def once(key: str, make: Callable[[], bytes]) -> bytes:
    """What ``make`` gives, called by the first process of the session that asks for this key. Outside of a session, by everyone."""
    folder = os.environ.get("MODREG_FAST_TESTS_SHARED")
    if folder is None:
        return make()
    file = Path(folder, hashlib.sha256(key.encode()).hexdigest())
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_bytes(make())
    return file.read_bytes()
