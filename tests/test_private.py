"""Shared memory belongs to all users: whet enters only its own folders, follows no links, and cleans up after itself alone."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from whet import private
from whet.cluster import folders
from whet.distributed import Workers
from whet.errors import RecipeError
from whet.generate.vllm.transports import Shared
from whet.processes import engine_folder

STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that every user can write, in place of shared memory."""
    out = tmp_path / "shm"
    out.mkdir()
    out.chmod(0o1777)
    monkeypatch.setattr(folders, "shared_memory", lambda: out)
    return out


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o377])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def ended(shared: Path, name: str = "left") -> Path:
    """A folder whose owner process has ended: its lock is free."""
    folder = shared / f"{folders.PREFIX}{name}"
    folder.mkdir()
    (folder / folders.LOCK).touch()
    (folder / "content").write_text("kept?")
    return folder


def pretend_to_be_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)


def test_a_private_folder_has_the_same_mode_under_every_umask(tmp_path: Path, umask: int) -> None:
    made = [private.private_folder(tmp_path, "whet-x-") for _ in range(3)]
    assert [mode(one) for one in made] == [0o700] * 3
    assert len({one.name for one in made}) == 3
    assert mode(engine_folder(tmp_path)) == 0o700


def test_weight_updates_are_written_where_only_this_user_can_go(shared: Path, umask: int) -> None:
    one, other = (folders.PushFolders("attempt", "learner") for _ in range(2))
    assert [mode(each.folder) for each in (one, other)] == [0o700] * 2
    assert one.folder != other.folder
    assert one.folder.parent == shared
    path = one.put(1, iter([("w", torch.ones(2))]))
    assert path.parent == one.folder
    one.close()
    other.close()
    assert list(shared.iterdir()) == []


def test_a_writer_tells_all_workers_the_folder_of_their_machine(shared: Path) -> None:
    writer = folders.WeightWriter(Workers(), "attempt", adapter=False, everywhere=True)
    assert writer.folders is not None
    assert writer.folder == writer.folders.folder
    writer.close()
    assert not writer.folder.exists()


@pytest.mark.parametrize("how", ["lock", "folder", "lock of a foreign folder"])
def test_a_planted_link_empties_and_removes_nothing(shared: Path, tmp_path: Path, how: str) -> None:
    """A sweep once opened the lock for writing, and so emptied the file that a link named."""
    victim = tmp_path / "victim"
    victim.mkdir()
    precious = victim / folders.LOCK
    precious.write_text("precious")
    planted = shared / f"{folders.PREFIX}{secrets.token_hex(4)}"
    if how == "folder":
        planted.symlink_to(victim)
    else:
        planted.mkdir()
        (planted / folders.LOCK).symlink_to(precious)
        if how == "lock of a foreign folder" and os.geteuid() == 0:
            os.chown(planted, STRANGER, -1)
    folders.sweep()
    folders.remove(planted.name.removeprefix(folders.PREFIX).partition("-")[0])
    assert precious.read_text() == "precious"
    assert os.path.lexists(planted)


@pytest.mark.parametrize("special", ["pipe", "folder"])
def test_a_lock_that_is_no_file_neither_stops_a_sweep_nor_makes_it_wait(shared: Path, special: str) -> None:
    planted = shared / f"{folders.PREFIX}planted"
    planted.mkdir()
    (os.mkfifo if special == "pipe" else os.mkdir)(planted / folders.LOCK)
    own = ended(shared)
    folders.sweep()
    assert planted.is_dir()
    assert not own.exists()


def test_a_sweep_does_not_change_a_lock_that_is_held(shared: Path) -> None:
    running = folders.PushFolders("attempt", "learner")
    (running.folder / folders.LOCK).write_text("held")
    folders.sweep()
    assert (running.folder / folders.LOCK).read_text() == "held"
    running.close()


def test_folders_of_other_users_are_left_alone(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, attempt = ended(shared), ended(shared, "attempt-learner-x")
    with monkeypatch.context() as patched:
        pretend_to_be_somebody_else(patched)
        folders.sweep()
        folders.remove("attempt")
    assert (foreign / "content").read_text() == "kept?"
    assert (attempt / "content").read_text() == "kept?"
    folders.remove("attempt")
    assert not attempt.exists()
    folders.sweep()
    assert not foreign.exists()


@needs_root
@pytest.mark.parametrize("what", ["the folder", "the lock"])
def test_root_leaves_the_folders_of_other_users_alone(shared: Path, what: str) -> None:
    foreign, own = ended(shared), ended(shared, "own")
    os.chown(foreign if what == "the folder" else foreign / folders.LOCK, STRANGER, -1)
    folders.sweep()
    if what == "the folder":
        folders.remove("left")
    assert (foreign / "content").read_text() == "kept?"
    assert not own.exists()


def left_by_a_killed_engine(root: Path) -> Path:
    code = (
        "import os, sys; from pathlib import Path; from whet.processes import engine_folder\n"
        "print(engine_folder(Path(sys.argv[1])), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_an_engine_s_folder_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by_a_killed_engine(tmp_path)
    with monkeypatch.context() as patched:
        pretend_to_be_somebody_else(patched)
        engine_folder(tmp_path)
    assert left.is_dir()
    engine_folder(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("end", ["", "x", "1", "1-2", "1-x.0-a", f"{10**30}-1.00-a", "1-1.00-link"])
def test_a_planted_name_or_link_does_not_stop_an_engine(tmp_path: Path, end: str) -> None:
    """A name that is not made as whet makes it once raised ValueError in every engine of every user."""
    root = tmp_path / "root"
    root.mkdir()
    machine = engine_folder(root).name.split("-")[2]
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    planted = root / f"whet-engine-{machine}-{end}"
    if end.endswith("link"):
        planted.symlink_to(victim)
    else:
        planted.mkdir()
    assert engine_folder(root).is_dir()
    assert os.path.lexists(planted)
    assert (victim / "file").exists()


def test_weights_are_not_written_into_a_folder_that_is_a_link_or_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = private.private_folder(tmp_path, "engine-")
    assert Shared(str(own)).folder == own
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(RecipeError, match=r"generator.transfer: .*link"):
        Shared(str(tmp_path / "link"))
    pretend_to_be_somebody_else(monkeypatch)
    with pytest.raises(
        RecipeError, match=rf"belongs to .*{own.lstat().st_uid}.*start the engine as the user of the run"
    ):
        Shared(str(own))


def test_an_opened_file_keeps_its_content_and_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "in").symlink_to(tmp_path)

    def open_(folder: Path, name: str) -> Callable[[], None]:
        def work() -> None:
            with private.opened(folder, name) as file:
                assert os.read(file, 100) == b"content"

        return work

    open_(tmp_path, "file")()
    for folder, name in ((tmp_path, "link"), (tmp_path / "in", "file"), (tmp_path, "absent")):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory|No such file"):
            open_(folder, name)()
    pretend_to_be_somebody_else(monkeypatch)
    with pytest.raises(PermissionError, match="belongs to"):
        open_(tmp_path, "file")()
    assert (tmp_path / "file").read_text() == "content"


@needs_root
def test_an_own_file_in_a_foreign_folder_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "file").write_text("content")
    os.chown(folder, STRANGER, -1)
    with pytest.raises(PermissionError, match=rf"foreign: belongs to user {STRANGER}"), private.opened(folder, "file"):
        pass
