"""Files and folders appear whole or not at all; errors are one line."""

import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import (
    check_new,
    check_writable,
    expanded,
    has_lock,
    lock_folder,
    new_folder,
    save_tensors,
    temporary_folder,
    unlock_folder,
    whole_file,
)
from mlx_snapgen.lora.files import save_lora
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system of Linux")
def test_a_folder_that_takes_no_files_is_refused():
    """Before anything is computed, also for those who have all permissions."""
    with pytest.raises(UserError, match=r"(cannot|no permission to) write into /proc"):
        check_writable(Path("/proc/none"))
    check_writable(Path("new/folder"))
    assert not [*Path().iterdir()]


def permissions(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_file_takes_the_place_of_another_at_the_end(empty_folder):
    path = empty_folder / "a.txt"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir() == ["a.txt"]


def test_a_failure_keeps_the_old_file(empty_folder):
    path = empty_folder / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir() == ["a.txt"]


def test_a_name_that_is_taken_is_kept(empty_folder):
    path = empty_folder / "a.txt"
    with pytest.raises(FileExistsError), whole_file(path, replace=False) as partial:
        partial.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert os.listdir() == ["a.txt"]


def test_a_file_in_the_way_of_the_folder_is_no_taken_name(empty_folder):
    (empty_folder / "a").write_text("a file")
    with (
        pytest.raises(NotADirectoryError),
        whole_file(empty_folder / "a" / "b.txt", replace=False),
    ):
        raise AssertionError("nothing to write to")
    with (
        pytest.raises(UserError, match="a file, not a folder"),
        new_folder(empty_folder / "a" / "b"),
    ):
        raise AssertionError("nothing to write to")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_the_umask_lets_them(umask, empty_folder):
    before = os.umask(umask)
    try:
        with whole_file(empty_folder / "new" / "a.txt") as partial:
            partial.write_text("a")
        with new_folder(empty_folder / "b") as partial:
            (partial / "c.txt").write_text("c")
    finally:
        os.umask(before)
    assert permissions("new/a.txt") == permissions("b/c.txt") == 0o666 & ~umask
    assert permissions("b") == permissions("new") == 0o777 & ~umask


def test_a_folder_that_fails_leaves_nothing(empty_folder):
    with pytest.raises(UserError, match="No space left"), new_folder(empty_folder / "a") as partial:
        (partial / "b.txt").write_text("b")
        raise OSError(28, "No space left on device")
    assert os.listdir() == []


def test_only_an_empty_folder_is_filled(empty_folder):
    (empty_folder / "a").mkdir()
    with new_folder(empty_folder / "a") as partial:
        (partial / "b.txt").write_text("b")
    with pytest.raises(UserError, match="exists already"), new_folder(empty_folder / "a"):
        raise AssertionError("nothing to write to")
    assert os.listdir("a") == ["b.txt"]
    assert os.listdir() == ["a"]


def test_what_a_killed_process_left_is_deleted_by_the_next(empty_folder):
    code = (
        "import os, pathlib, signal\n"
        "from mlx_snapgen.files import new_folder\n"
        "with new_folder(pathlib.Path(os.sys.argv[1])) as partial:\n"
        "    (partial / 'b.txt').write_text('b')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(empty_folder / "a")], cwd=ROOT, check=False)
    (left,) = os.listdir()
    assert left.startswith(".snapgen-")
    with whole_file(empty_folder / "c.txt") as partial:
        partial.write_text("c")
        assert left not in os.listdir()
    assert os.listdir() == ["c.txt"]


def test_what_belongs_to_others_stays(empty_folder, monkeypatch):
    """In a folder that all may write to: what others left, and where their links lead."""
    (empty_folder / ".snapgen-left").mkdir()
    (empty_folder / "a").mkdir()
    (empty_folder / ".snapgen-link").symlink_to("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: -1)
        with temporary_folder(empty_folder):
            assert {".snapgen-left", ".snapgen-link"} < set(os.listdir())
    with temporary_folder(empty_folder):
        pass
    assert sorted(os.listdir()) == [".snapgen-link", "a"]


def test_what_another_process_is_writing_stays(empty_folder):
    with new_folder(empty_folder / "a") as partial:
        (partial / "b.txt").write_text("b")
        with whole_file(empty_folder / "c.txt") as other:
            other.write_text("c")
        assert (partial / "b.txt").read_text() == "b"
    assert sorted(os.listdir()) == ["a", "c.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(disk, components):
    folder = disk("100k")
    tiny.add_random_lora(network := tiny.make_components().transformer, rank=64)
    for write in (
        lambda: save_pretrained(folder / "model", components),
        lambda: save_lora(folder / "style.safetensors", network, name="style"),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert re.fullmatch(r"cannot write \S+: No space left on device", str(error.value))
        assert os.listdir(folder) == []


def test_only_errors_of_writing_are_put_down_to_the_disk(empty_folder):
    source = empty_folder / "a.safetensors"
    save_tensors(source, {"a": mx.zeros(1000)})
    lazy = mx.load(str(source))
    os.truncate(source, 500)
    with pytest.raises(RuntimeError, match="read"):
        save_tensors(empty_folder / "b.safetensors", lazy)
    with pytest.raises(OSError, match="No such file"):
        save_tensors(empty_folder / "none" / "a.safetensors", {"a": mx.zeros(2)})


LOCK = """import sys, pathlib, mlx_snapgen.files as files
print(files.lock_folder(pathlib.Path(sys.argv[1]), shared=sys.argv[2] == "shared"))
"""


def locked_by_another(folder, how):
    """Whether another process gets the lock."""
    command = [sys.executable, "-c", LOCK, str(folder), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_folder_that_is_deleted_before_the_lock_is_not_locked(
    empty_folder, monkeypatch, is_made_again
):
    def flock(*_):
        empty_folder.rename(empty_folder.with_name("deleted"))
        if is_made_again:
            empty_folder.mkdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FileNotFoundError):
        lock_folder(empty_folder)
    assert not has_lock(empty_folder)


def test_a_lock_is_held_until_it_is_given_back(empty_folder):
    assert lock_folder(empty_folder) and has_lock(empty_folder)
    assert not lock_folder(empty_folder)
    assert not locked_by_another(empty_folder, "shared")
    unlock_folder(empty_folder)
    unlock_folder(empty_folder)
    assert lock_folder(empty_folder, shared=True)
    assert locked_by_another(empty_folder, "shared")
    assert not locked_by_another(empty_folder, "alone")
    unlock_folder(empty_folder)
    assert locked_by_another(empty_folder, "alone")
    assert os.listdir(empty_folder) == []


def test_a_place_that_cannot_be_written_is_found_before_the_work(empty_folder):
    (empty_folder / "file").write_text("a file")
    check_new(empty_folder / "new" / "deep")
    for wrong in (empty_folder / "file" / "a", empty_folder / "file" / "a" / "b"):
        with pytest.raises(UserError, match="file is a file, not a folder"):
            check_new(wrong)


def test_an_unknown_home_is_a_name():
    assert expanded("~no-such-user/a") == Path("~no-such-user/a")
    assert expanded("~/a") == Path.home() / "a"


def test_an_error_after_a_bar_has_a_line_of_its_own():
    code = (
        "from tqdm import tqdm\n"
        "from mlx_snapgen.errors import UserError, run_command\n"
        "def main():\n"
        "    bar = tqdm(range(3))\n"
        "    for _ in bar:\n"
        "        raise UserError('wrong')\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.split("\n")[-2] == "error: wrong"
