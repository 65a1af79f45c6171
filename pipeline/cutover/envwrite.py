"""Replacing a ``.env`` file: a dated copy first, then the whole new file in one rename."""

import errno
import fcntl
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import RefusedError
from pipeline.failpoints import failpoint

# linux/fs.h on 64 bits: _IOR('f', 1, long), and the flags of chattr +i and +a.
_GET_FLAGS = 0x80086601
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
_HINTS = {
    errno.EACCES: "run this as the owner of the file and of its folder",
    errno.EPERM: "run this as the owner of the file, and take chattr +i off it",
    errno.EROFS: "the file system is mounted read-only: run this where the file can be written",
    errno.ENOSPC: "make room there and run this again",
    errno.EDQUOT: "make room there and run this again",
    errno.EBUSY: "it is mounted there by itself, as into a container: run this where the file really is",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvEdit:
    """What is to become of one file. The bytes hold secrets and are never shown.

    ``path`` is the file itself, ``shown`` what the operator named, which may be a link to it. ``changes``
    are for people and hold no value.
    """

    path: Path
    shown: Path
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)
    changes: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Return whether there is anything to write."""
        return self.before != self.after


def real_path(path: Path) -> Path:
    """Return the file behind all links: a rename over a link would cut it off. Raises RefusedError."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "its links go round"
        raise RefusedError(f"{path} cannot be read: {reason}", "name a file with --env-file") from error


def copy_path(path: Path, stamp: str, word: str = "cutover") -> Path:
    """Return where the dated copy goes: ``.env.before-cutover-20261123T061500Z``, beside the file itself."""
    real = real_path(path)
    return real.with_name(f"{real.name}.before-{word}-{stamp}")


def check_editable(path: Path) -> None:
    """Check that the file can be replaced by a rename and keep its owner. Writes nothing. Raises RefusedError."""
    real = real_path(path)
    try:
        info = real.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RefusedError(f"{path} is not a file", "name a file with --env-file")
        if info.st_nlink > 1:
            hint = "the other names would keep the old text: make links of them (ln -s)"
            raise RefusedError(f"{path} has {info.st_nlink} names (hard links)", hint)
        if real in _mounted_files():
            raise _refusal(path, OSError(errno.EBUSY, os.strerror(errno.EBUSY)))
        if not os.access(real, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise _refusal(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))
        for place in (real, real.parent):
            if _flags(place) & (_IMMUTABLE | _APPEND_ONLY):
                raise RefusedError(f"{place} is protected (chattr +i or +a)", f"chattr -ia {place}")
        _check_folder(path, real.parent)
        _check_owner(path, info)
    except OSError as error:
        raise _refusal(path, error) from error


def _check_folder(path: Path, folder: Path) -> None:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise _refusal(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        hint = "the new file is made beside the old one: run this as the folder's owner"
        raise RefusedError(f"{path} cannot be replaced: its folder {folder} is not writable", hint)


def _check_owner(path: Path, info: os.stat_result) -> None:
    if os.geteuid() == 0:
        return
    if info.st_uid != os.geteuid():
        raise RefusedError(f"{path} belongs to another user, and would change hands", "run this as its owner")
    if info.st_gid not in {os.getegid(), *os.getgroups()}:
        hint = "run this as a member of that group, or give the file another one (chgrp)"
        raise RefusedError(f"{path} belongs to a group that this user is not in, and would leave it", hint)


def _mounted_files() -> frozenset[Path]:
    """Return every place where something is mounted, as far as this system tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    points = (fields[4] for fields in (line.split(" ") for line in lines) if len(fields) > 4)
    return frozenset(Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)) for point in points)


def _flags(place: Path) -> int:
    """Return the flags that chattr sets, 0 where this file system has none."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        answer = fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8))
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    flags: int = struct.unpack("I", answer[:4])[0]
    return flags


def apply_edit(edit: EnvEdit, copy: Path | None) -> None:
    """Write the dated copy once (None: no copy), then put the new file in the old one's place.

    A crash leaves the old file or the new one, whole; the next call cleans up and goes on. A file that is
    as wanted already stays as it is. Raises RefusedError, with the file untouched, where it is neither as
    it was nor as it shall be, or where the system does not let it be replaced.
    """
    try:
        _spare(edit.path).unlink(missing_ok=True)
        if edit.path.read_bytes() != edit.after:
            check_editable(edit.shown)
            _check_unchanged(edit)
            if copy is not None:
                _keep_copy(edit, copy)
            _write_spare(edit.path, edit.after)
            failpoint("in_env_edit")
            _check_unchanged(edit)
            _spare(edit.path).replace(edit.path)
            failpoint("after_env_edit")
        _sync_folder(edit.path.parent)
    except OSError as error:
        raise _refusal(edit.shown, error) from error
    finally:
        _remove_spare(edit.path)


def _remove_spare(path: Path) -> None:
    try:
        _spare(path).unlink(missing_ok=True)
    except OSError:
        return  # What kept the edit from being made may keep this too; the next call tries again.


def _check_unchanged(edit: EnvEdit) -> None:
    if edit.path.read_bytes() != edit.before:
        raise RefusedError(
            f"{edit.shown} was edited since this was planned", "look at what was changed, and run the same command"
        )


def _keep_copy(edit: EnvEdit, copy: Path) -> None:
    if copy.exists():
        if copy.read_bytes() != edit.before:
            hint = "look at both; move the copy away if the file is right"
            raise RefusedError(f"{edit.shown} was edited since its copy {copy} was made", hint)
        return
    _write_spare(edit.path, edit.before)
    _spare(edit.path).replace(copy)
    _sync_folder(copy.parent)


def _spare(path: Path) -> Path:
    """Return where the new file is made: one name for each file, so that a killed run's is found again."""
    return path.with_name(f".{path.name}.pipeline-edit")


def _write_spare(path: Path, data: bytes) -> None:
    """Write a new file with the mode, owner and attributes of ``path``; nobody else can read it before that."""
    _spare(path).unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    info = path.stat()
    with os.fdopen(os.open(_spare(path), flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        made = os.fstat(file.fileno())
        if (made.st_uid, made.st_gid) != (info.st_uid, info.st_gid):
            os.fchown(file.fileno(), info.st_uid, info.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(info.st_mode))
        _copy_attributes(path, file.fileno())
        os.fsync(file.fileno())


def _copy_attributes(path: Path, descriptor: int) -> None:
    """Keep extended attributes, access lists among them; the kernel's own labels only where it lets us."""
    if not hasattr(os, "listxattr"):
        return
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        try:
            os.setxattr(descriptor, name, os.getxattr(path, name))
        except OSError:
            if name.startswith(("user.", "system.posix_acl")):
                raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(path: Path, error: OSError) -> RefusedError:
    reason = error.strerror or type(error).__name__
    hint = _HINTS.get(error.errno or 0, "the file was not changed; run this again when that is mended")
    return RefusedError(f"{path} cannot be replaced: {reason}", hint)
