"""Placeholder while the native kernels are written."""


def status() -> tuple[bool, str]:
    return False, "the native extension is not built"
