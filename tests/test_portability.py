"""Windows and Mac, simulated: what only POSIX has is taken away, and what Windows refuses is refused."""

import ast
import builtins
import contextlib
import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
import torch._dynamo  # noqa: F401 (importing it inside `windows` fails: it asks sys.platform)

import main
from support import checkpoint, corpus, report
from xlnet import XLNet

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import checkpoint_cost
import large_text
import learning
import step_time

ROOT = Path(main.__file__).parent
SMALL = (
    "--seq_len 32 --n_layer 1 --n_head 2 --d_model 8 --d_inner 8 --save_steps 1 --save_total_limit 2 --device cpu"
).split()
LACKING = [  # in Windows
    (signal, "SIGHUP"), (signal, "SIGKILL"), (signal, "SIGPIPE"), (os, "sysconf"), (os, "sched_getaffinity"),
    (os, "getuid"), (os, "mkfifo"), (os, "killpg"),
]  # fmt: skip


# ---------------------------------------------------------------- Windows


def in_use():
    """Return the names of the files that this process has open or mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return mapped | {file.path for file in psutil.Process().open_files()}


def refuse_if_in_use(path):
    """Raise PermissionError if this process uses a file, or one in a folder, but for the locks of texts.

    filelock deletes them, and knows how to on Windows; the lock of a run's folder has the name .lock and no suffix.
    """
    path = os.path.realpath(path)
    used = [name for name in in_use() if name == path or name.startswith(path + os.sep)]
    if any(Path(name).suffix != ".lock" for name in used):
        raise PermissionError(errno.EACCES, "The process cannot access the file", path)


@contextlib.contextmanager
def windows():
    """Inside the with block, files are as on Windows, and what it lacks is missing."""
    os_open, fsync, unlink, rename, replace, io_open = os.open, os.fsync, os.unlink, os.rename, os.replace, io.open

    def open_no_folder(path, flags, *args, **kwargs):
        if flags == os.O_RDONLY and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os_open(path, flags, *args, **kwargs)

    def sync_what_is_writable(descriptor):
        [flags] = re.findall(r"flags:\s*(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8"))
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def unlink_unused(path, **kwargs):
        refuse_if_in_use(path)
        unlink(path, **kwargs)

    def rename_unused(source, target):
        refuse_if_in_use(source)
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", source, None, target)
        rename(source, target)

    def replace_unused(source, target):
        refuse_if_in_use(source)
        refuse_if_in_use(target)
        replace(source, target)

    def open_as_cp1252(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **kwargs):
        if "b" not in mode:
            encoding = "cp1252" if encoding in (None, "locale") else encoding
            newline = "\r\n" if newline is None and "r" not in mode else newline
        return io_open(file, mode, buffering, encoding, errors, newline, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in LACKING:
            patch.delattr(owner, name)
        patch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens no folder
        patch.setattr(os, "open", open_no_folder)
        patch.setattr(os, "fsync", sync_what_is_writable)
        patch.setattr(os, "unlink", unlink_unused)
        patch.setattr(os, "remove", unlink_unused)
        patch.setattr(os, "rename", rename_unused)
        patch.setattr(os, "replace", replace_unused)
        patch.setattr(io, "open", open_as_cp1252)
        patch.setattr(builtins, "open", open_as_cp1252)
        yield


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="simulates Windows with what Linux tells of a process")


@on_linux
def test_the_simulation_refuses(tmp_path):
    """Inside `windows` files are refused, or written, as Windows does it: the tests below mean something."""
    path = tmp_path / "file"
    with windows():
        path.write_text("é\n")
        assert path.read_bytes() == b"\xe9\r\n"
        with pytest.raises(PermissionError):
            os.open(tmp_path, os.O_RDONLY)
        with path.open("rb") as file, pytest.raises(OSError):
            os.fsync(file.fileno())
        for use in (path.open("rb"), np.memmap(path)):
            for refused in (path.unlink, lambda: shutil.rmtree(tmp_path), lambda: tmp_path.rename(f"{tmp_path}-2")):
                with pytest.raises(PermissionError):
                    refused()
            with contextlib.suppress(AttributeError):
                use.close()
            del use
        path.unlink()
        assert not hasattr(signal, "SIGHUP")


# ---------------------------------------------------------------- runs


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The words of a command line that begins a run, on a text and in folders that cp1252 cannot name."""
    monkeypatch.setattr(report, "draw_loss", lambda output_dir: None)
    folder = tmp_path / "本"
    folder.mkdir()
    lines = (ROOT / "data.txt").read_text(encoding="utf-8").splitlines()[:17]
    text = "\n".join([*lines, "が ぎ か き café", "That was the end of it, or so she said."]) + "\n"
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    files = {"cache_dir": "cache", "data": "text.txt", "tokenizer": "vocab.txt", "output_dir": "out"}
    return SMALL + [word for flag, name in files.items() for word in (f"--{flag}", str(folder / name))]


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


@on_linux
def test_a_run_on_windows(tmp_path, capsys, monkeypatch, words):
    """Training, saving, pruning, resuming, going back and stopping do not need POSIX, and nothing is said on stderr.

    No file is deleted or moved while this process has it open or mapped; `windows` would refuse it.
    """
    folder = tmp_path / "本" / "out"
    with windows():
        main.main([*words, "--train_steps", "4"])
        assert names(folder) == ["checkpoint-4", "checkpoint-3"]
        main.main(["--output_dir", str(folder), "--resume", "--train_steps", "6"])
        assert names(folder) == ["checkpoint-6", "checkpoint-5"] and capsys.readouterr().err == ""
        main.main(["--resume", str(folder / "checkpoint-5"), "--train_steps", "7"])
        assert names(folder) == ["checkpoint-7", "checkpoint-6"] and names(folder / "abandoned-1") == ["checkpoint-6"]
        [line] = capsys.readouterr().err.splitlines()
        assert "--resume goes on from step 5" in line

        end_step = report.Reporter.end_step

        def signal_in_step_9(reporter, metrics, wait):
            if metrics["step"] == 8:
                signal.raise_signal(signal.SIGTERM)
            return end_step(reporter, metrics, wait)

        monkeypatch.setattr(report.Reporter, "end_step", signal_in_step_9)
        with pytest.raises(SystemExit) as stop:
            main.main(["--output_dir", str(folder), "--resume", "--train_steps", "12"])
        assert stop.value.code == 128 + signal.SIGTERM and names(folder)[0] == "checkpoint-9"


@on_linux
def test_a_run_goes_on_on_another_system(tmp_path, capsys, words):
    """A checkpoint of Windows is whole on Linux: sha256sum reads its checksums, and --resume goes on from it."""
    folder = tmp_path / "本" / "out"
    with windows():
        main.main([*words, "--train_steps", "2"])
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder / "checkpoint-2", capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.count(": OK") == 5, done
    assert b"\r" not in (folder / "checkpoint-2" / "SHA256SUMS").read_bytes()  # old versions of sha256sum refuse it
    main.main(["--output_dir", str(folder), "--resume", "--train_steps", "3"])
    assert names(folder) == ["checkpoint-3", "checkpoint-2"] and capsys.readouterr().err == ""


@on_linux
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_does_not_keep_its_file(tmp_path, weights):
    """The weights of from_pretrained are copies: nothing holds the file of a checkpoint that may be pruned."""
    XLNet(n_token=100, n_layer=1, d_model=8, d_head=2).save_pretrained(tmp_path)
    if weights == "pytorch_model.bin":
        torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / weights)
        (tmp_path / "model.safetensors").unlink()
    model = XLNet.from_pretrained(tmp_path)
    with windows():
        shutil.rmtree(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    """Files are synced, and folders where that works; a file system that syncs no folder is no error."""
    synced = []

    def sync_files_only(descriptor):
        if os.path.sameopenfile(descriptor, of_folder):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def record(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    fsync = os.fsync
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", record)
    checkpoint.sync(tmp_path / "file")
    checkpoint.sync(tmp_path)
    expected = [tmp_path / "file"] if os.name == "nt" else [tmp_path / "file", tmp_path]
    assert synced == [path.stat().st_ino for path in expected]
    if os.name != "nt":
        of_folder = os.open(tmp_path, os.O_RDONLY)
        monkeypatch.setattr(os, "fsync", sync_files_only)
        checkpoint.sync(tmp_path)
        os.close(of_folder)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a right of their own on Windows")
def test_two_spellings_of_a_folder(tmp_path, capsys, monkeypatch, words):
    """On a Mac OUT is the folder out, and realpath does not say so: the run goes on, and its vocabulary is kept.

    A symbolic link stands for the other spelling.
    """
    folder = tmp_path / "本" / "out"
    main.main([*words, "--train_steps", "2"])
    (tmp_path / "本" / "OUT").symlink_to(folder)
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    other = tmp_path / "本" / "OUT" / "checkpoint-2"
    main.main(["--output_dir", str(folder), "--resume", str(other), "--tokenizer", str(other), "--train_steps", "5"])
    assert names(folder) == ["checkpoint-5", "checkpoint-4", "checkpoint-2"] and capsys.readouterr().err == ""


# ---------------------------------------------------------------- the cache


TOKENIZER = corpus.load_tokenizer("bert-base-uncased")
VOCAB = corpus.vocabulary(TOKENIZER)


def load(folder):
    return corpus.load_text("data", [str(ROOT / "data.txt")], str(folder / "cache"), TOKENIZER, VOCAB)


def damage(folder, name):
    [path] = folder.glob(f"cache/*/{name}")
    path.write_bytes(path.read_bytes()[:-8])


@on_linux
@pytest.mark.parametrize("name", ["about.json", "ids", "begins", "documents"])
def test_a_damaged_cache_is_renewed_on_windows(tmp_path, capsys, name):
    """Looking at a damaged folder leaves nothing of it mapped, so it can be deleted and written again."""
    with windows():
        ids = load(tmp_path).ids.tolist()
        damage(tmp_path, name)
        assert load(tmp_path).ids.tolist() == ids
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.glob("cache/*/ids"))) == 1


@on_linux
def test_a_damaged_cache_that_is_in_use(tmp_path, capsys, monkeypatch):
    """A text that is mapped cannot be renewed on Windows: one line, and it is tokenized once, into another folder.

    The other folder too can only be deleted when nobody uses it any more.
    """
    tokenize, calls = corpus.tokenize, []
    with windows():
        text = load(tmp_path)
        damage(tmp_path, "about.json")
        monkeypatch.setattr(corpus, "tokenize", lambda *args: (calls.append(1), tokenize(*args)))
        again = load(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert "--cache_dir" in line and "the text will be tokenized at every start" in line
    assert len(calls) == 1 and again.ids.tolist() == text.ids.tolist()


def watched_worker(worker_id):
    """Be a worker on Windows, where getppid never changes."""
    parent = os.getppid()
    os.getppid = lambda: parent
    corpus.end_with(parent)
    worker_id.value = os.getpid()
    time.sleep(600)


def start_worker(worker_id):
    multiprocessing.get_context("spawn").Process(target=watched_worker, args=(worker_id,)).start()
    time.sleep(600)


@pytest.mark.slow
def test_workers_end_with_their_parent_on_windows(tmp_path):
    """A worker that was given a handle of its parent, as loky does it on Windows, ends when the parent is killed."""
    context = multiprocessing.get_context("spawn")
    worker_id = context.Value("q", 0)
    parent = context.Process(target=start_worker, args=(worker_id,))
    parent.start()
    while worker_id.value == 0:
        assert parent.is_alive()
        time.sleep(0.05)
    worker = psutil.Process(worker_id.value)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- text files and benchmarks


def test_text_files_name_their_encoding():
    """Every module and program of the project says which encoding a text file has: systems have other defaults."""
    missing = []
    for pattern in ("*.py", "support/*.py", "examples/*.py", "benchmarks/*.py", "docs/*.py"):
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in [k.arg for k in node.keywords]:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert missing == []


def opens_text(call):
    """Return whether a call opens a text file: open(path), path.open(), path.read_text() or path.write_text(text)."""
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not is_binary(call.args[1:2])
    if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) in ("corpus", "os"):
        return False
    return call.func.attr in ("read_text", "write_text") or (call.func.attr == "open" and not is_binary(call.args[:1]))


def is_binary(mode):
    return any(isinstance(each, ast.Constant) and "b" in each.value for each in mode)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_clone_has_the_same_bytes(tmp_path):
    """Git for Windows leaves line ends alone, so a vocabulary and the page of text have the same digests there."""
    names = [".gitattributes", "data.txt", "vocab"]
    git = ["git", "-c", "core.autocrlf=true", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name in names:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    subprocess.run([*git, "add", *names], check=True, capture_output=True)
    subprocess.run([*git, "checkout-index", "--all", "--prefix=clone/"], check=True)
    for name in ("data.txt", "vocab/bert-base-uncased.txt"):
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes()


@on_linux
def test_benchmarks_without_posix(tmp_path, monkeypatch, capsys):
    """They count cores, keep a csv and delete the folder of a run without what only Linux has."""
    with windows():
        with pytest.raises(SystemExit) as stop:
            large_text.benchmark(["--help"])
        assert stop.value.code == 0 and "one a core" in capsys.readouterr().out
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with checkpoint_cost.temporary_folder() as folder:
            checkpoint.open_output_dir(folder, None)
        row = dict.fromkeys(learning.COLUMNS, "本")
        learning.append(tmp_path / "learning.csv", [row])
        assert learning.read(tmp_path / "learning.csv") == [row]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_peak_memory_is_in_megabytes(monkeypatch, platform):
    """On every system, with what each offers: VmHWM, ru_maxrss in bytes, or the peak working set."""
    resident = psutil.Process().memory_info().rss
    if platform != sys.platform:
        module = pytest.importorskip("resource")
        usage = type("Usage", (), {"ru_maxrss": resident})
        counters = type("Counters", (), {"peak_wset": resident})
        monkeypatch.setattr(module, "getrusage", lambda who: usage)
        monkeypatch.setattr(psutil.Process, "memory_info", lambda process: counters)
        monkeypatch.setattr(sys, "platform", platform)
    assert 0.9 * resident <= step_time.peak_rss() * 2**20 <= 10 * resident
