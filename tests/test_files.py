"""Files that are whole or not there, locks, and logs that resumed runs go on with."""

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from concurrent import futures

import pytest
from conftest import ROOT

from hopscotch_common import files
from hopscotch_common.errors import InputError
from hopscotch_common.resumable import ResumableLog

HOLD = """
import os, sys, time
from pathlib import Path
from hopscotch_common import files
with files.locked(Path(sys.argv[1])):
    if os.fork():  # the child does not hold its parent's lock
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def held(target):
    """Another process's lock on `target`; its process number."""
    command = [sys.executable, "-c", HOLD, str(target)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    target = tmp_path / "out.json"
    with held(target) as process:
        with pytest.raises(InputError, match=rf"out.json: .*process {process} on .* is writing there"):
            files.write_atomic(target, "at once")
        os.kill(process, signal.SIGKILL)
        with files.locked(target):  # its file is still there, its lock is not
            assert names(tmp_path) == [".out.json.lock"]
            files.write_atomic(target, "by the holder itself")
            with pytest.raises(InputError, match="is writing there"), futures.ThreadPoolExecutor() as other:
                other.submit(files.write_atomic, target, "by another").result()
            assert names(tmp_path) == [".out.json.lock", "out.json"]
    assert names(tmp_path) == ["out.json"]


def test_a_lock_of_another_user_is_refused_before_any_work(tmp_path, monkeypatch):
    lock, access = tmp_path / ".out.json.lock", os.access
    lock.write_text("their run")
    files.check_name(tmp_path / "out.json", "--output")
    monkeypatch.setattr(os, "access", lambda path, mode: path != lock and access(path, mode))  # for root, too
    with pytest.raises(InputError, match=r"--output .*: their run holds or left .*\.out\.json\.lock; wait"):
        files.check_name(tmp_path / "out.json", "--output")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    files.write_atomic(path, "first")
    (tmp_path / ".report.json.tmp").write_text("a killed writer's, and a long one")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and names(tmp_path) == ["report.json"]
    (tmp_path / ".report.json.tmp").write_text("a killed writer's, and a long one")
    files.write_atomic(path, "second")
    assert path.read_text() == "second" and names(tmp_path) == ["report.json"]
    (tmp_path / "private").write_text("theirs")
    (tmp_path / ".report.json.tmp").symlink_to("private")  # does not lead the writing elsewhere
    files.write_atomic(path, "third")
    assert path.read_text() == "third" and not path.is_symlink()
    assert (tmp_path / "private").read_text() == "theirs"


def test_a_folder_that_a_killed_run_moved_away_comes_back(tmp_path):
    for successor_is_there in (False, True):
        (tmp_path / ".ckpt.old").mkdir()
        (tmp_path / ".ckpt.old/whole").write_text("first")
        if successor_is_there:
            files.recover_folder(tmp_path / "ckpt")
            assert (tmp_path / "ckpt/whole").read_text() == "first"
        with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "ckpt") as folder:
            (folder / "whole").write_text("half")
            raise RuntimeError
        assert (tmp_path / "ckpt/whole").read_text() == "first" and names(tmp_path) == ["ckpt"]
        with files.atomic_folder(tmp_path / "ckpt") as folder:
            (folder / "whole").write_text("first")


def test_a_former_folder_that_cannot_be_removed_is_no_obstacle(tmp_path, monkeypatch, caplog):
    """Another user's, or open on NFS; then the next replacements must still succeed, at their end."""
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: None)
    for name in ("ckpt", ".ckpt.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whole").touch()
    for number in range(2):
        with files.atomic_folder(tmp_path / "ckpt") as folder:
            (folder / "whole").write_text(str(number))
        assert (tmp_path / "ckpt/whole").read_text() == str(number)
    assert [name.startswith(".ckpt.old.") for name in names(tmp_path)] == [True] * 3 + [False]
    assert caplog.text.count("cannot be removed") == 3


def test_a_link_in_a_folders_place_is_replaced_again_and_again(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ckpt").symlink_to("elsewhere")
    for number in range(3):
        with files.atomic_folder(tmp_path / "ckpt") as folder:
            (folder / "weights").write_text(str(number))
        assert (tmp_path / "ckpt" / "weights").read_text() == str(number)
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "elsewhere"}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The calls of fsync and rename, in order: each with the name of its file or folder."""
    made = []

    def watch(name, place_of):
        call = getattr(os, name)

        def watched(*arguments):
            made.append(f"{name} {os.path.basename(place_of(arguments[0]))}")
            return call(*arguments)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    watch("replace", str)
    watch("rename", str)
    return made


def test_what_is_written_is_on_the_disk_before_it_counts(tmp_path, calls):
    """Else a power failure leaves an empty file under a whole one's name."""
    files.write_atomic(tmp_path / "a.json", "text")
    assert calls == ["fsync .a.json.tmp", "replace .a.json.tmp", f"fsync {tmp_path.name}"]
    calls.clear()
    with files.atomic_folder(tmp_path / "ckpt") as folder:
        (folder / "weights").write_text("1")
    assert calls == ["fsync weights", "fsync .ckpt.tmp", "rename .ckpt.tmp", f"fsync {tmp_path.name}"]
    calls.clear()
    with log(tmp_path / "log.jsonl") as opened:
        opened.append({"a": 1})
        assert calls == ["fsync log.jsonl", "fsync log.jsonl"]  # of the settings, and of the record


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_a_share_that_cannot_flush_folders_keeps_what_is_written(tmp_path, monkeypatch, number, kind):
    def fsync(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    kept = kind is stat.S_ISDIR and number != errno.EIO
    with contextlib.nullcontext() if kept else pytest.raises(OSError):
        files.write_atomic(tmp_path / "a.json", "text")
    with contextlib.nullcontext() if kept else pytest.raises(OSError):
        with files.atomic_folder(tmp_path / "ckpt") as folder:
            (folder / "weights").write_text("1")
    if kept:
        assert names(tmp_path) == ["a.json", "ckpt"] and names(tmp_path / "ckpt") == ["weights"]


def log(path, **settings) -> ResumableLog:
    return ResumableLog(path, settings, "a test's log", "name another")


def records(path, **settings) -> list[dict]:
    with log(path, **settings) as opened:
        return [record for _, record in opened.records]


def test_a_log_is_made_with_its_first_record_and_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    with log(path, seed=1):
        assert not path.exists()
    assert names(tmp_path) == []
    with log(path, seed=1) as opened:
        opened.append({"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"a": 2')
    assert records(path, seed=1) == [{"a": 1}]
    with log(path, seed=1) as opened:
        opened.append({"a": 3})
    assert records(path, seed=1) == [{"a": 1}, {"a": 3}] and names(tmp_path) == ["log.jsonl"]
    with pytest.raises(InputError, match="seed = 1, now it is 2; repeat that setting, or name another"):
        records(path, seed=2)


def test_a_log_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    path, access = tmp_path / "log.jsonl", os.access
    with log(path, seed=1) as opened:
        opened.append({"a": 1})
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK and access(place, mode))
    with pytest.raises(InputError, match=r"log\.jsonl: no permission to write to it; make it writable"):
        log(path, seed=1)
    assert names(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        '{"question": "What?"}\n{"question": "no line break',
        "text",
        '{"settings": {"a": 1}, "kind": "other"}\n',
    ],
)
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="prompts.jsonl: is not a test's log; move it away, or name another"):
        records(path)
    assert path.read_text() == content and names(tmp_path) == ["prompts.jsonl"]


def test_a_log_that_was_killed_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = json.dumps({"settings": {"seed": 1}, "kind": "a test's log"})
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with log(path, seed=1) as opened:
            opened.append({"a": 1})
        assert records(path, seed=1) == [{"a": 1}]


def test_a_log_torn_in_its_middle_names_the_line(tmp_path):
    path = tmp_path / "log.jsonl"
    with log(path) as opened:
        opened.append({"a": 1})
        opened.append({"a": 2})
    path.write_text(path.read_text().replace('"a": 1}', '"a"'))
    with pytest.raises(InputError, match="log.jsonl, line 2: not JSON"):
        records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1]", "a JSON object is needed, not list"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n' + text)
    with pytest.raises(InputError, match=f"data.jsonl, line 2: .*{message}"):
        list(files.read_jsonl(path))
