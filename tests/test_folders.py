"""A folder appears whole or not at all, whatever happens and whoever else writes."""

import errno
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from skqlora.persistence.folders import PENDING, read_folder, written_folder

NAMES = ("a", "b")


def write(path, text, overwrite=True):
    with written_folder(path, NAMES, overwrite=overwrite) as folder:
        for name in NAMES:
            (folder / name).write_text(text)


def read(path):
    return [(path / name).read_text() for name in NAMES]


def read_alike(path):
    """Read files that belong together only if they are equal."""
    [text] = set(read(path))
    return text


def test_folder_is_written_and_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "above" / "folder"
    write(path, "old", overwrite=False)
    write(path, "new")
    assert read(path) == ["new", "new"]
    assert os.listdir(path.parent) == ["folder"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "old")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == ["new", "new"]


def test_a_failure_leaves_what_was_there(tmp_path):
    def interrupted():
        with written_folder(tmp_path / "folder", NAMES, overwrite=True) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    write(tmp_path / "folder", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(tmp_path / "folder") == ["old", "old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_what_was_not_written_here_is_never_replaced(tmp_path):
    write(tmp_path / "folder", "old")
    with pytest.raises(FileExistsError, match=r"not empty.*overwrite=True"):
        write(tmp_path / "folder", "new", overwrite=False)
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.tex'"):
        write(tmp_path / "folder", "new")
    with pytest.raises(NotADirectoryError, match="which is a file"):
        write(tmp_path / "folder" / "a", "new")
    assert read(tmp_path / "folder") == ["old", "old"]


def test_a_folder_that_exists_stays_the_same_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    path.chmod(0o2775)
    before = path.stat()
    monkeypatch.chdir(path)
    for text, overwrite in [("old", False), ("new", True)]:
        with written_folder(".", NAMES, overwrite=overwrite) as folder:
            for name in NAMES:
                (folder / name).write_text(text)
            assert os.listdir(tmp_path) == ["folder"]  # nothing may be written above
        assert read(Path()) == [text, text]
        assert sorted(os.listdir()) == ["a", "b"]
    after = path.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "folder", "old")
    write(tmp_path / "folder", "new")
    assert read(tmp_path / "folder") == ["new", "new"]


def test_files_that_are_not_written_again_go(tmp_path):
    write(tmp_path / "folder", "old")
    with written_folder(tmp_path / "folder", NAMES, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path / "folder") == ["a"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("start", ["nothing", "empty", "old"])
def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path, start):
    path = tmp_path / "folder"
    seen = []
    for moment in range(200):
        shutil.rmtree(path, ignore_errors=True)
        if start == "old":
            write(path, "old")
        elif start == "empty":
            path.mkdir()
        child = os.fork()
        if child == 0:
            _die_at(moment, path)
        _, status = os.waitpid(child, 0)
        if start == "old" or read_folder(path, lambda folder: (folder / "a").exists()):
            texts = read_folder(path, read)
            assert texts in (["old", "old"], ["new", "new"])
            seen.append(texts[0])
            write(path, "newer")  # what a kill has left is no obstacle
            assert read(path) == ["newer", "newer"]
            assert not (path / PENDING).exists()
        else:
            seen.append("nothing")
        if not os.WIFSIGNALED(status):
            break
    assert os.WIFEXITED(status)
    assert moment > 5
    assert set(seen) == {"old" if start == "old" else "nothing", "new"}


def _die_at(moment, path):
    """In a child: write, and die at the n-th thing that is done to the disk."""
    count = iter(range(1000))

    def hook(event, args):
        disk = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
        if event in disk and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write(path, "new")
    os._exit(0)


def test_two_at_once_leave_one_of_the_two(tmp_path):
    path, start = tmp_path / "folder", threading.Barrier(2)
    failures = []

    def save(text, overwrite):
        start.wait()
        try:
            write(path, text, overwrite)
        except FileExistsError as error:
            failures.append(error)

    for overwrite in (False, True) * 10:
        failures.clear()
        threads = [threading.Thread(target=save, args=(t, overwrite)) for t in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read(path) in (["one", "one"], ["two", "two"])
        assert len(failures) == (not overwrite)
        assert all("not empty" in str(error) for error in failures)
        assert os.listdir(tmp_path) == ["folder"]
        for name in NAMES:
            (path / name).unlink()
        path.rmdir()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_two_processes_at_once_leave_one_of_the_two(tmp_path):
    path = tmp_path / "folder"
    children = []
    for text in ("one", "two"):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(50):
                    write(path, text)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    first = 0, 0
    while first == (0, 0):
        if path.exists():
            assert read_folder(path, read_alike) in ("one", "two")
        first = os.waitpid(children[0], os.WNOHANG)
    assert first[1] == os.waitpid(children[1], 0)[1] == 0
    assert read(path) in (["one", "one"], ["two", "two"])
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on files' sizes")
def test_what_the_disk_refuses_leaves_what_was_there(tmp_path):
    import resource

    with pytest.raises(OSError, match="'/proc/folder'"):
        write("/proc/folder", "new")
    write(tmp_path / "folder", "old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as of a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old_limit[1]))
    try:
        with pytest.raises(OSError, match=r"too large.*folder"):
            write(tmp_path / "folder", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert read(tmp_path / "folder") == ["old", "old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_folders_within_a_folder_are_moved_too(tmp_path):
    (tmp_path / "folder" / "lost+found").mkdir(parents=True)
    with written_folder(tmp_path / "folder", last="a") as folder:
        (folder / "templates").mkdir()
        (folder / "templates" / "b").write_text("new")
        (folder / "a").write_text("new")
    assert sorted(os.listdir(tmp_path / "folder")) == ["a", "lost+found", "templates"]
    assert (tmp_path / "folder" / "templates" / "b").read_text() == "new"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_folder_can_be_renamed_after_a_kill(tmp_path):
    path = tmp_path / "folder"
    write(path, "old")
    child = os.fork()
    if child == 0:
        _die_at(8, path)
    os.waitpid(child, 0)
    path.rename(tmp_path / "renamed")
    write(tmp_path / "renamed", "new")
    assert read(tmp_path / "renamed") == ["new", "new"]
    left = [p for p in (tmp_path / "renamed").iterdir() if p.is_file() and p.name not in NAMES]
    assert left == []
