"""Imports in a third less time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Without garbage collection while torch, transformers and Ray are imported, and without it for them later.

    Their objects, a million of them, live as long as the process; the collector would go through them again and again,
    while they are imported and when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
