import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from updp_tf.errors import OutputError
from updp_tf.run_dir import sha256_of, write_atomically


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_complete_and_only_at_the_end(tmp_path):
    target = tmp_path / "plan.json"
    with write_atomically(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "half"
    assert left_in(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "arrays.npz", "plain"])
def test_the_temporary_name_keeps_the_whole_ending(tmp_path, name):
    with write_atomically(tmp_path / name) as temporary:
        assert temporary.name.endswith(name)
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"x")


def test_numpy_writes_where_it_is_told(tmp_path):
    # np.savez appends .npz to names that lack it, and would write beside the temporary file
    with write_atomically(tmp_path / "arrays.npz") as temporary:
        np.savez(temporary, a=np.arange(3))
    assert left_in(tmp_path) == ["arrays.npz"]


def test_an_existing_file_is_refused_before_anything_is_computed(tmp_path):
    target = tmp_path / "m.keras"
    target.write_text("old")
    entered = False
    with pytest.raises(OutputError, match=r"m.keras' exists already: .* force=True \(--force\)"):
        with write_atomically(target):
            entered = True
    assert not entered
    assert target.read_text() == "old"
    with write_atomically(target, force=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert left_in(tmp_path) == ["m.keras"]


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "m.keras"
    with pytest.raises(OutputError, match="exists already"), write_atomically(target) as temporary:
        temporary.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    assert left_in(tmp_path) == ["m.keras"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "other", "elsewhere")])
def test_foreign_errors_pass_through_and_nothing_is_left(tmp_path, error):
    target = tmp_path / "m.keras"
    target.write_text("old")
    with pytest.raises(type(error)) as caught, write_atomically(target, force=True) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert target.read_text() == "old"
    assert left_in(tmp_path) == ["m.keras"]


def test_errors_of_ours_pass_through_untouched(tmp_path):
    with pytest.raises(OutputError, match="^inner$"), write_atomically(tmp_path / "a"):
        raise OutputError("inner")


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="the writer left no file"), write_atomically(tmp_path / "a"):
        pass
    with pytest.raises(OutputError, match="the writer left no file"), write_atomically(tmp_path / "a") as temporary:
        np.savez(temporary, a=np.arange(3))  # appends .npz
    assert left_in(tmp_path) == []


def test_folders(tmp_path):
    with (
        pytest.raises(OutputError, match="the folder '.*nowhere' does not exist"),
        write_atomically(tmp_path / "nowhere" / "a"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="it is a folder"), write_atomically(tmp_path / "folder", force=True):
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="Permission denied"), write_atomically(tmp_path / "a") as temporary:
        temporary.write_text("x")


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("x")
    with write_atomically(tmp_path / "ours") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# --- a full disk: real ones, in a process of their own ---------------------------------------------------------------

# each writer fails in a way of its own: zipfile while closing, HDF5 (in the last) once more over the first error
WRITERS = {
    "plain": "temporary.write_bytes(bytes(1_000_000))",
    "numpy": "import numpy; numpy.savez(temporary, a=numpy.zeros(200_000))",
    "h5py": "import h5py, numpy\n    with h5py.File(temporary, 'w') as file: file['a'] = numpy.zeros(200_000)",
    "zipfile": "import zipfile\n    with zipfile.ZipFile(temporary, 'w') as file: file.writestr('a', bytes(10**6))",
    "wrapped": "try: temporary.write_bytes(bytes(10**6))\n    except OSError as e: raise RuntimeError('flush') from e",
}
SCRIPT = """
import resource, sys
from pathlib import Path
from updp_tf.errors import OutputError
from updp_tf.run_dir import write_atomically
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
  with write_atomically(Path(sys.argv[1]), force=True) as temporary:
    {writer}
except OutputError as error:
  print(error)
else:
  print("written")
"""


def write_in_process(path: Path, writer: str, *, limit: int, launcher=()) -> str:
    command = [*launcher, sys.executable, "-c", SCRIPT.format(writer=WRITERS[writer]), str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_quota_leaves_the_old_file_and_nothing_else(tmp_path, writer):
    target = tmp_path / f"old-{writer}.npz"
    target.write_text("old")
    assert "written" in write_in_process(target, writer, limit=10**7)
    target.write_text("old")
    message = write_in_process(target, writer, limit=50_000)
    assert f"Cannot write '{target}': the disk or its quota is full" in message
    assert target.read_text() == "old"
    assert left_in(tmp_path) == [target.name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root; the quota tests above cover the same path")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk, writer):
    target = small_disk / "old.npz"
    target.write_text("old")
    message = write_in_process(target, writer, limit=0)
    assert f"Cannot write '{target}': the disk or its quota is full, 0.3 MB are free" in message
    assert target.read_text() == "old"
    assert left_in(small_disk) == ["old.npz"]


# --- sums ------------------------------------------------------------------------------------------------------------


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_zip_files_written_this_way_open(tmp_path):
    with write_atomically(tmp_path / "a.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("a", "text")
    assert zipfile.ZipFile(tmp_path / "a.zip").read("a") == b"text"
