"""Replacing files: old or new, never anything between, and no file left beside."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from alphagrpo_jax.runtime import files
from alphagrpo_jax.runtime.errors import AccessError


def test_replacing_leaves_no_other_file(tmp_path):
    files.replace_text(tmp_path / "a", "one")
    files.replace_text(tmp_path / "a", "zwölf")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == "zwölf".encode()


def test_a_failed_block_leaves_the_old_file_alone(tmp_path):
    files.replace_bytes(tmp_path / "a", b"old")

    def write_half():
        with files.replacing(tmp_path / "a") as file:
            file.write(b"half of the new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_process_that_is_killed_in_between_leaves_the_old_file(tmp_path):
    files.replace_bytes(tmp_path / "a", b"old")
    program = (
        "import os, signal, sys; from alphagrpo_jax.runtime import files\n"
        "with files.replacing(sys.argv[1]) as file:\n"
        "    file.write(b'half of the new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    files.replace_bytes(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_content_and_name_are_synced_in_this_order(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, files.pathlib.Path.replace

    def fsync(descriptor):
        calls.append("sync of folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync")
        real_fsync(descriptor)

    def replace(path, target):
        calls.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files.pathlib.Path, "replace", replace)
    files.replace_text(tmp_path / "a", "x")
    assert calls == ["sync", "rename", "sync of folder"]


def test_a_full_disk_is_explained_and_keeps_the_old_file(tmp_path, monkeypatch):
    files.replace_text(tmp_path / "a", "old")

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(AccessError, match=r"cannot write .*a: No space left on device; free"):
            files.replace_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("name", ["nowhere/a", "file/a", "folder"])
def test_a_place_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(AccessError, match=f"cannot write .*{name}"):
        files.replace_text(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
