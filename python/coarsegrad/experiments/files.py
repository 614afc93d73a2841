"""What every experiment needs of files: errors meant for the user, and writing that a kill cannot spoil."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class ExperimentError(Exception):
    """A condition that the user can mend; commands print its message without a traceback."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file beside `path` and moves it there if the block ends well.

    Whatever happens in between, `path` holds either all of the old content or all of the new.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
