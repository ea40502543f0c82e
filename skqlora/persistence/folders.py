"""Folders whose files are replaced all at once: a reader finds the old ones or the new ones.

A folder that does not exist yet appears whole, by one rename. One that exists stays the same
folder, with its mode and owner, since it may be a mount point, the current folder of a process, or
in a folder where nothing may be written. Its new files come whole too, by one rename of a folder
within it, and count from then on. They are copied to their places afterwards.

This module knows nothing of what is written.
"""

import errno
import glob
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PENDING = ".skqlora-new"  # the folder within a folder whose files count instead of its own
TEMPORARY = ".skqlora-{}.tmp"  # what nobody reads
# A look at a folder can miss that its files were replaced, since file systems note times in steps
# of milliseconds and give a removed file's number to the next one. So a failure must come again.
N_FAILURES = 3
SECONDS_BETWEEN = 0.01


@contextmanager
def written_folder(
    path: str | os.PathLike,
    names: Sequence[str] = (),
    *,
    overwrite: bool = False,
    last: str = "",
) -> Iterator[Path]:
    """Give a new folder to write files to, which are moved to `path` at the end.

    With `names`, `read_folder` finds at `path` what was there before or what was written, even
    after a kill at any moment. Without them, a kill can leave a part of the files in a folder that
    was empty. A hidden folder may be left: ``.skqlora-*.tmp`` within it, or ``.NAME.*.tmp`` next
    to it.

    Parameters
    ----------
    path : str or path
        The place of the folder. Missing folders above it are made.
    names : sequence of str, optional
        The names of the files that are written, for a folder that is read by `read_folder`. The
        first of them is the sign of who wrote it.
    overwrite : bool, default=False
        Whether a folder at `path` may hold such files, and lose them. Otherwise it must be empty.
    last : str, optional
        The name of the file that comes last into a folder that exists, so that programs that only
        look for this file find the others too. By default it is the sign.

    Yields
    ------
    folder : Path

    Raises
    ------
    OSError
        If something else is at `path` (FileExistsError, NotADirectoryError), or the folder cannot
        be written. What is at `path` stays as it is.
    """
    if not os.fspath(path):
        raise ValueError("Got path=''. Wanted: a folder; the current one is '.'.")
    target = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    last = last or (names or [""])[0]
    _check_place(target, names, overwrite)
    is_new = not target.exists()
    if is_new:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    else:
        folder = _temporary(target)
    try:
        folder.mkdir()
        yield folder
        for file in (*folder.rglob("*"), folder):
            _flush(file)
        if not is_new or not _moved_to_nothing(folder, target):
            with _alone(target):
                _finish(target, names, last)
                _check_place(target, names, overwrite)  # another process may have been faster
                if names:
                    os.rename(folder, target / PENDING)
                    _flush(target)
                    with suppress(OSError):  # the new files count, and the next call tries again
                        _finish(target, names, last)
                else:  # an empty folder, which has nothing to lose
                    for file in _in_order(folder, last):
                        os.rename(file, target / file.name)
                    _flush(target)
        _flush(target.parent)
    except OSError as error:
        # The error of a full disk names no file, and that of a refusal names the hidden folder.
        if error.errno is not None and str(error.filename or folder).startswith(str(folder)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_folder(path: str | os.PathLike, read: Callable[[Path], T]) -> T:
    """Read the files of a folder that `written_folder` writes, all of them old or all new.

    Parameters
    ----------
    path : str or path
    read : callable
        A function of the folder that holds the files, which is `path` or a folder within it. It
        raises an exception if the files do not belong together.

    Returns
    -------
    result : object
        What `read` returns.
    """
    path = Path(path)
    n_failures = 0
    while True:
        before = _state(path)
        pending = path / PENDING
        try:
            return read(pending if pending.is_dir() else path)
        except Exception:  # the files may have been replaced in the meantime
            n_failures = n_failures + 1 if _state(path) == before else 0
            if n_failures == N_FAILURES:
                raise
            time.sleep(SECONDS_BETWEEN)


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Describe which files are there, of the folder itself and of the one within it."""
    states: list[tuple[str, int, int]] = []
    for folder in (path / PENDING, path):
        files: list[Path] = []
        with suppress(OSError):
            files = sorted(folder.iterdir())
        for file in files:
            with suppress(OSError):  # it has just been moved
                stat = file.stat()
                states.append((str(file), stat.st_ino, stat.st_mtime_ns))
    return states


def find_temporary(target: Path) -> Iterator[Path]:
    """Find what kills have left next to a folder that did not exist yet, and nobody reads."""
    return target.parent.glob(f".{glob.escape(target.name)}.*.tmp")


def _temporary(target: Path) -> Path:
    return target / TEMPORARY.format(uuid.uuid4().hex)


def _in_order(folder: Path, last: str) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name))


def _moved_to_nothing(folder: Path, target: Path) -> bool:
    """Move a folder to where nothing is; return False if a folder is there by now."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _finish(target: Path, names: Sequence[str], last: str) -> None:
    """Copy the files that count to their places, and remove their folder; the lock is held."""
    for left in target.glob(TEMPORARY.format("*")):
        if left.is_file():  # a kill has left it; folders may belong to others who write now
            with suppress(OSError):
                left.unlink()
    pending = target / PENDING
    if not pending.is_dir():
        return
    new = _in_order(pending, last)
    for file in new:
        temporary = _temporary(target)
        try:
            os.link(file, temporary)
        except OSError:  # not every file system has links
            shutil.copyfile(file, temporary)
            _flush(temporary)
        os.replace(temporary, target / file.name)
        with suppress(OSError):  # replacing a file by a link to itself does nothing
            temporary.unlink()
    for name in set(names) - {file.name for file in new}:
        (target / name).unlink(missing_ok=True)
    _flush(target)
    aside = _temporary(target)
    os.rename(pending, aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let writers to one folder on this machine wait for each other, if locks can be had."""
    from filelock import FileLock  # its import makes loggers

    name = hashlib.sha256(os.fsencode(target)).hexdigest()[:32]
    lock = FileLock(Path(tempfile.gettempdir()) / f"skqlora-folder-{name}.lock")
    with suppress(OSError):  # the file is another user's, or there is no folder to write to
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_place(target: Path, names: Sequence[str], overwrite: bool) -> None:
    """Refuse a place where something is that may not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(
            f"Got path={str(target)!r}, which is a file. Wanted: a folder, or a path where nothing "
            "is yet."
        )
    entries = sorted(entry for entry in target.iterdir() if not _is_ignored(entry.name))
    if not entries:
        return
    if not overwrite:
        raise FileExistsError(
            f"Got path={str(target)!r}, a folder that is not empty: it holds {entries[0].name!r}. "
            "Wanted: a path where nothing is yet, or an empty folder. `save` replaces an earlier "
            "one with overwrite=True."
        )
    files = [entry.name for entry in entries if entry.is_file()]
    folders = [entry.name for entry in entries if not entry.is_file()]
    foreign = [*(set(files) - set(names)), *(set(folders) - {PENDING})]
    missing = not any((place / names[0]).is_file() for place in (target, target / PENDING))
    if foreign or missing:
        what = f"holds no {names[0]!r}" if missing else f"holds {min(foreign)!r}"
        raise FileExistsError(
            f"Got path={str(target)!r} with overwrite=True, but it {what}, so it is not just "
            "what `save` wrote. Wanted: a folder of a saved estimator alone. Move what is there "
            "away, or save elsewhere."
        )


def _is_ignored(name: str) -> bool:
    return fnmatch(name, TEMPORARY.format("*")) or name == "lost+found"  # of a volume


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
