"""Folders that appear whole or not at all: they are written next to their place and moved there.

This module knows nothing of what is written.
"""

import ctypes
import errno
import glob
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # as in Linux's <fcntl.h> and <linux/fs.h>


@contextmanager
def written_folder(
    path: str | os.PathLike, replaceable: Sequence[str] | None = None
) -> Iterator[Path]:
    """Give a new folder to write to, which is moved to `path` at the end.

    A kill at any moment leaves at `path` what was there before or what was written, and perhaps a
    hidden folder ``.NAME.*.tmp`` next to it. Where the system cannot exchange two folders (outside
    Linux, on some network disks), this holds except for the moment between two renames, when the
    old folder is at ``.NAME.*.old.tmp``.

    Parameters
    ----------
    path : str or path
        The place of the folder. Missing folders above it are made.
    replaceable : sequence of str, optional
        The names of the files that a folder at `path` may hold and lose. It must hold the first of
        them, as the sign of who wrote it. By default, a folder at `path` must be empty.

    Yields
    ------
    folder : Path

    Raises
    ------
    OSError
        If something else is at `path` (FileExistsError, NotADirectoryError), or the folder cannot
        be written. What is at `path` stays as it is.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    _check_replaceable(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir()
        yield folder
        for file in (*folder.rglob("*"), folder):
            _flush(file)
        _move(folder, target, replaceable)
        _flush(target.parent)
    except OSError as error:
        # The error of a full disk names no file, and that of a refusal names the hidden folder.
        if error.errno is not None and str(error.filename or folder).startswith(str(folder)):
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what was written, or what was replaced


def find_aside(path: str | os.PathLike) -> Path | None:
    """Find where a kill between two renames left the folder of `path`, if it is missing now."""
    target = Path(os.path.realpath(path))
    if target.exists():
        return None
    return next(target.parent.glob(f".{glob.escape(target.name)}.*.old.tmp"), None)


def _move(folder: Path, target: Path, replaceable: Sequence[str] | None) -> None:
    try:
        os.rename(folder, target)  # onto nothing, or onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _check_replaceable(target, replaceable)  # another process may have been faster
        _exchange(folder, target)


def _exchange(folder: Path, target: Path) -> None:
    """Swap two folders at once where the system can, otherwise by three renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and not libc.renameat2(
            AT_FDCWD, os.fsencode(folder), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE
        ):
            return
    aside = folder.with_suffix(".old.tmp")
    os.rename(target, aside)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, folder)


def _check_replaceable(target: Path, replaceable: Sequence[str] | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(
            f"Got path={str(target)!r}, which is a file. Wanted: a folder, or a path where nothing "
            "is yet."
        )
    entries = sorted(target.iterdir())
    if not entries:
        return
    if replaceable is None:
        raise FileExistsError(
            f"Got path={str(target)!r}, a folder that is not empty. Wanted: a path where nothing "
            "is yet, or an empty folder. `save` replaces an earlier one with overwrite=True."
        )
    foreign = [e.name for e in entries if e.name not in replaceable or not e.is_file()]
    missing = not (target / replaceable[0]).is_file()
    if foreign or missing:
        what = f"holds no {replaceable[0]!r}" if missing else f"holds {foreign[0]!r}"
        raise FileExistsError(
            f"Got path={str(target)!r} with overwrite=True, but it {what}, so it is not just "
            "what `save` wrote. Wanted: a folder of a saved classifier alone. Move what is there "
            "away, or save elsewhere."
        )


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
