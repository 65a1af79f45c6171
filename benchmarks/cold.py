"""A server's files out of the operating system's page cache, without the rights of root."""

import os
from pathlib import Path

CAN_DROP = hasattr(os, "posix_fadvise")


def drop_cached(folder: Path) -> None:
    """Drop what the page cache holds of every file below a folder, whose server is stopped.

    Only clean pages go, so each file is synced first. A disk's own cache, and that of the host of a
    virtual machine, stay as they are.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
