"""Runs that are stopped, killed, damaged and resumed, and what transformers makes of their checkpoints."""

import contextlib
import csv
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import main
from support import UserError, checkpoint, corpus, report
from support.checkpoint import checkpoints, damaged_file
from xlnet import XLNet

ROOT = Path(main.__file__).parent
SMALL = (
    "--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 6 --n_layer 2 --n_head 2 --d_head 4 "
    "--d_model 8 --d_inner 8 --dropout 0.1 --dropatt 0.1"
).split()
PASS_LEN = 18  # windows of `text`


def slow(*values):
    """Return parameters of a test that `-m "not slow"` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a text of 18 windows, a validation text, and a vocabulary of their words."""
    folder = tmp_path_factory.mktemp("text")
    lines = (ROOT / "data.txt").read_text().splitlines()
    words = re.findall(r"\w+|[^\w\s]", "\n".join(lines).lower())
    (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *sorted(set(words))]))
    (folder / "text.txt").write_text("\n".join(lines[:17]) + "\nThat was the end of it, or so she said.\n")
    (folder / "valid.txt").write_text("\n".join(lines[100:112]) + "\n")
    return folder


@pytest.fixture(scope="module")
def new(text):
    """The words of a command line that begins a run on `text`."""
    return [*SMALL, "--data", str(text / "text.txt"), "--tokenizer", str(text / "vocab.txt")]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing loss.png takes longer than these runs."""
    monkeypatch.setattr(report, "draw_loss", lambda output_dir: None)


def run(capsys, *words):
    """Run main.main; return its metrics, and the cost lines that it printed."""
    capsys.readouterr()
    metrics = main.main([str(word) for word in words])
    return metrics, re.findall(r"^(?:Number of Epoch|Validation).*", capsys.readouterr().out, re.M)


def weights(folder):
    return XLNet.from_pretrained(folder).state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(folder):
    """Return the rows of metrics.csv, but for what no two runs share: speed and memory."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        for name in ("tokens_per_second", "data_wait", "peak_memory"):
            del row[name]
    return table


def stop_after(k, *words):
    """Send SIGTERM while step k is made, k > 1: the run saves checkpoint-k and stops."""
    run = main.prepare([str(word) for word in words])
    with (
        contextlib.closing(main.make_reporter(run)) as reporter,
        contextlib.closing(main.train(run, reporter)) as steps,
    ):
        with pytest.raises(main.Stopped):
            for metrics in steps:
                assert metrics["step"] < k
                if metrics["step"] == k - 1:
                    signal.raise_signal(signal.SIGTERM)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "k, steps, words",
    [
        (7, 36, ""),
        slow(18, 36, ""),
        slow(25, 36, "--bi_data True --batch_size 2"),
        (18, 36, "--bi_data True"),
        (7, 36, "--grad_accum_steps 4"),
        slow(18, 36, "--grad_accum_steps 4 --bi_data True"),
        (2, 30, "--rows 3"),  # the third row has no memory yet
        slow(25, 32, "--rows 4 --bi_data True"),
        (7, 36, "--optimizer muon"),
        slow(9, 36, "--mem_len 0 --warmup_steps 5 --decay_method cos --eval_steps 4 --valid {text}/valid.txt"),
    ],
)
def test_k_steps_and_the_rest_are_all_steps(tmp_path, capsys, new, text, k, steps, words):
    """Stopped after k steps, inside a pass, at its end, in an accumulation, a run goes on to the last bit."""
    command = [*new, *words.format(text=text).split(), "--num_step", 2]
    metrics, unbroken = run(capsys, *command, "--output_dir", tmp_path / "unbroken")
    stop_after(k, *command, "--output_dir", tmp_path / "broken")
    metrics_of_the_rest, rest = run(capsys, "--resume", "--output_dir", tmp_path / "broken")

    assert metrics_of_the_rest["mean_loss"] == metrics["mean_loss"]
    assert len(rows(tmp_path / "unbroken")) == steps  # two passes
    assert rest == unbroken[-len(rest) :] and sum("Number" in line for line in rest) == steps - k
    assert rows(tmp_path / "broken") == rows(tmp_path / "unbroken")
    one, other = checkpoints(tmp_path / "unbroken")[0], checkpoints(tmp_path / "broken")[0]
    assert one.name == other.name and equal(weights(one), weights(other))
    moments, same_moments = checkpoint.load(one).optimizer["state"], checkpoint.load(other).optimizer["state"]
    assert len(moments) > 0 and all(equal(moments[i], same_moments[i]) for i in moments)


@pytest.mark.slow
def test_a_longer_run_is_a_short_one_and_its_rest(tmp_path, capsys, new):
    """--num_step and --train_steps may grow when a run resumes; an end inside an accumulation loses nothing."""
    accumulate = ["--grad_accum_steps", 4]
    _, unbroken = run(capsys, *new, "--num_step", 3, *accumulate)
    resume = ["--resume", "--output_dir", tmp_path / "broken"]
    _, first = run(capsys, *new, "--num_step", 1, *accumulate, "--output_dir", tmp_path / "broken")
    _, second = run(capsys, *resume, "--num_step", 2)
    _, third = run(capsys, *resume, "--num_step", 3)
    assert first + second + third == unbroken
    _, updates = run(capsys, *new, "--train_steps", 3, *accumulate, "--output_dir", tmp_path / "updates")
    _, more = run(capsys, "--resume", "--output_dir", tmp_path / "updates", "--train_steps", 5)
    assert updates + more == unbroken[:20]


def test_a_finished_run_has_nothing_to_do(tmp_path, capsys, new):
    """Resumed at its end, it makes no step, and reports the mean of its last pass again."""
    metrics, _ = run(capsys, *new, "--train_steps", 4, "--output_dir", tmp_path / "out")
    again, lines = run(capsys, "--resume", "--output_dir", tmp_path / "out")
    assert lines == [] and "loss" not in again and again["mean_loss"] == metrics["mean_loss"]
    assert len(rows(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "k, words, shapes",
    [
        (7, "", [(2, 24, 1, 8)]),
        (18, "", [None]),  # a new pass begins without memory
        (2, "--rows 3", [(2, 16, 1, 8), (2, 16, 1, 8), None]),
        (5, "--rows 6 --batch_size 2", [(2, 24, 2, 8), (2, 24, 2, 8), (2, 16, 2, 8)]),
        (7, "--mem_len 0", [None]),
    ],
)
def test_a_checkpoint_holds_the_memory_of_every_row(tmp_path, new, k, words, shapes):
    """Of each turn of rows: [n_layer, mlen, batch_size, d_model], or None before its first step in a pass."""
    stop_after(k, *new, *words.split(), "--output_dir", tmp_path)
    state = checkpoint.load(tmp_path / f"checkpoint-{k}")
    assert state.step == k
    assert [None if memory is None else tuple(memory.shape) for memory in state.memory] == shapes


def test_a_new_pass_begins_a_new_mean(tmp_path, new):
    """The sum of the losses in a checkpoint is that of its pass alone."""
    stop_after(20, *new, "--output_dir", tmp_path)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert checkpoint.load(tmp_path / "checkpoint-20").pass_loss == losses[18] + losses[19]
    assert checkpoint.load(tmp_path / "checkpoint-18").pass_loss == pytest.approx(sum(losses[:18]))


def test_rows_of_all_processes_are_joined_in_their_order():
    """Each process has some places of a turn, here of a forward and a backward half; the memory has all, by place."""
    whole = torch.arange(6.0).expand(2, 3, 6)[..., None]  # [n_layer, mlen, batch_size, d_model]
    parts = [{"members": members, "memory": [None, whole[:, :, members]]} for members in ([0, 3], [1, 4], [2, 5])]
    assert torch.equal(checkpoint.join_rows(parts, turn=1), whole)
    assert checkpoint.join_rows(parts, turn=0) is None


def test_a_run_goes_on_elsewhere(tmp_path, capsys, new, text, monkeypatch):
    """From another working directory, and with its folder moved: the checkpoint holds absolute paths."""
    monkeypatch.chdir(text)
    words = [*SMALL, "--data", "text.txt", "--tokenizer", "vocab.txt", "--valid", "valid.txt"]
    run(capsys, *words, "--train_steps", 2, "--output_dir", tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run(capsys, "--resume", "moved/checkpoint-2", "--train_steps", 3)
    assert [path.name for path in checkpoints(tmp_path / "moved")] == ["checkpoint-3", "checkpoint-2"]
    run(capsys, "--resume", "--output_dir", "moved", "--train_steps", 4)
    run(capsys, "--resume", "moved/checkpoint-3", "--output_dir", "other", "--train_steps", 4)
    assert equal(weights("moved/checkpoint-4"), weights("other/checkpoint-4"))
    assert not (tmp_path / "old").exists()


def test_a_named_checkpoint_and_the_limit(tmp_path, capsys, new):
    """--resume NAME goes on from that one, in its folder; the newest save_total_limit are kept, 0 keeps all."""
    words = ["--train_steps", 10, "--save_steps", 2, "--save_total_limit", 0, "--output_dir", tmp_path / "run"]
    run(capsys, *new, *words)
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == [f"checkpoint-{step}" for step in (10, 8, 6, 4, 2)]
    run(capsys, "--resume", tmp_path / "run" / "checkpoint-4", "--save_total_limit", 2)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10", "checkpoint-8"]
    assert len(rows(tmp_path / "run")) == 10


# ---------------------------------------------------------------- going back


def steps_of(folder):
    """Return the steps in metrics.csv."""
    return [int(row["step"]) for row in rows(folder)]


def names(folder):
    """Return the names of the checkpoints in a folder, the newest first."""
    return [path.name for path in checkpoints(folder)]


def test_a_run_that_goes_back(tmp_path, capsys, twelve_steps):
    """--resume out/checkpoint-4 begins a new line: it alone is pruned, logged and resumed; the old one is kept."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    words = ["--train_steps", 7, "--save_steps", 1, "--save_total_limit", 2]
    run(capsys, "--resume", folder / "checkpoint-4", *words)
    assert names(folder) == ["checkpoint-7", "checkpoint-6"] and steps_of(folder) == list(range(1, 8))
    _, lines = run(capsys, "--resume", "--output_dir", folder, "--train_steps", 8)
    assert len(lines) == 1 and names(folder)[0] == "checkpoint-8" and steps_of(folder) == list(range(1, 9))

    old = folder / "abandoned-1"
    assert names(old) == ["checkpoint-12", "checkpoint-8"] and steps_of(old) == list(range(1, 13))
    run(capsys, "--resume", old, "--num_step", 1)
    assert names(old)[0] == "checkpoint-18" and rows(old) == rows(twelve_steps / "unbroken")
    assert equal(weights(old / "checkpoint-18"), weights(twelve_steps / "unbroken" / "checkpoint-18"))


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it."""


@pytest.mark.parametrize(
    "owner, name, nth, goes_on_from",
    [
        (Path, "rename", 1, 12),  # nothing has moved
        (Path, "rename", 2, 12),  # checkpoint-8 has
        (report, "open_metrics", 1, 4),  # both have
        (os, "replace", 1, 4),  # metrics.tmp is written
        (Path, "rename", 3, 4),  # checkpoint-5 is whole and has its temporary name
    ],
)
def test_killed_while_going_back(tmp_path, capsys, monkeypatch, twelve_steps, owner, name, nth, goes_on_from):
    """At each dangerous moment --resume then goes on with one line or the other, with its own log, to the bit."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    original, calls = getattr(owner, name), itertools.count(1)

    def kill_at_nth(*args):
        if next(calls) == nth:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill_at_nth)
        main.main(["--resume", str(folder / "checkpoint-4"), "--save_steps", "1", "--num_step", "1"])
    _, lines = run(capsys, "--resume", "--output_dir", folder, "--num_step", 1)
    assert len(lines) == 18 - goes_on_from
    assert rows(folder) == rows(twelve_steps / "unbroken")
    assert equal(weights(folder / "checkpoint-18"), weights(twelve_steps / "unbroken" / "checkpoint-18"))
    assert not list(folder.glob(".checkpoint-*"))


def test_a_folder_of_a_run_is_resumed(tmp_path, capsys, twelve_steps):
    """--resume out is --output_dir out --resume."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    run(capsys, "--resume", folder, "--train_steps", 13)
    assert names(folder)[0] == "checkpoint-13" and steps_of(folder) == list(range(1, 14))


def test_a_run_goes_on_in_a_new_folder(tmp_path, capsys, twelve_steps):
    """Where another run saved nothing, its log is not mixed with that of the run that goes on there."""
    (tmp_path / "new").mkdir()
    shutil.copy(twelve_steps / "out" / "metrics.csv", tmp_path / "new")
    words = ["--output_dir", tmp_path / "new", "--train_steps", 9]
    run(capsys, "--resume", twelve_steps / "out" / "checkpoint-8", *words)
    assert steps_of(tmp_path / "new") == [9] and names(tmp_path / "new") == ["checkpoint-9"]
    assert names(twelve_steps / "out") == ["checkpoint-12", "checkpoint-8", "checkpoint-4"]


def test_a_linked_checkpoint_is_pruned_as_a_link(tmp_path, capsys, twelve_steps):
    """What a symbolic link points to is not this run's to delete."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    (folder / "checkpoint-4").rename(tmp_path / "elsewhere")
    (folder / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    run(capsys, "--resume", folder, "--train_steps", 13)
    assert names(folder) == ["checkpoint-13", "checkpoint-12", "checkpoint-8"]
    assert damaged_file(tmp_path / "elsewhere") is None


def test_a_vocabulary_that_is_gone_is_in_the_checkpoint(tmp_path, capsys, new, text):
    """The run goes on with its copy, and keeps the folder of the copy while it reads from there."""
    shutil.copy(text / "vocab.txt", tmp_path / "vocab.txt")
    words = [*new, "--tokenizer", tmp_path / "vocab.txt", "--save_steps", 1, "--save_total_limit", 1]
    run(capsys, *words, "--train_steps", 2, "--output_dir", tmp_path / "out")
    (tmp_path / "vocab.txt").unlink()
    run(capsys, "--resume", tmp_path / "out", "--train_steps", 5)
    assert names(tmp_path / "out") == ["checkpoint-5", "checkpoint-2"]
    run(capsys, "--resume", tmp_path / "out", "--train_steps", 6)
    assert names(tmp_path / "out") == ["checkpoint-6", "checkpoint-5"] and steps_of(tmp_path / "out")[-1] == 6


def test_two_runs_do_not_share_a_folder(tmp_path, capsys, twelve_steps):
    """A folder is locked while a process trains there; the second gets one line; a killed one leaves no lock."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    program = (
        "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(timeout=0); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit) as stop:
            main.main(["--resume", str(folder)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "another process trains there" in err
        other.kill()
    run(capsys, "--resume", folder, "--train_steps", 13)
    assert names(folder)[0] == "checkpoint-13"
    refused = subprocess.run(command, input=b"", capture_output=True)
    assert b"Timeout" in refused.stderr


# ---------------------------------------------------------------- killed and damaged


def child(argv):
    sys.modules["matplotlib.figure"] = None  # a picture at every step would take most of the time
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        torch.set_num_threads(1)
        main.main(argv)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, context, new):
    """SIGKILL at any moment, a save at every step: each time the run goes on, or back, and its log is that of one run.

    KILLS=50 in the environment kills more often.
    """
    kills = int(os.environ.get("KILLS", 8))
    passes = 2 + kills // 4
    folder, unbroken = str(tmp_path / "killed"), str(tmp_path / "unbroken")
    argv = [*new, "--save_steps", "1", "--num_step", str(passes)]

    def start(*argv):
        process = context.Process(target=child, args=(argv,))
        process.start()
        return process

    start(*argv, "--output_dir", unbroken).join()
    chance = random.Random(0)
    for _ in range(kills):
        have = checkpoints(folder)[:1]
        if have and chance.random() < 0.4:  # goes back
            process = start("--resume", str(checkpoints(folder)[-1]))
        else:
            process = start("--output_dir", folder, "--resume") if have else start(*argv, "--output_dir", folder)
        while checkpoints(folder)[:1] == have and process.is_alive():
            time.sleep(0.001)  # at least one step forward, or back, each time
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.join()
        assert damaged_file(checkpoints(folder)[0]) is None
    start("--output_dir", folder, "--resume").join()
    assert len(rows(folder)) == PASS_LEN * passes and rows(folder) == rows(unbroken)
    assert equal(weights(checkpoints(folder)[0]), weights(checkpoints(unbroken)[0]))


@pytest.fixture(scope="module")
def twelve_steps(tmp_path_factory, new):
    """The folder of a run with checkpoint-4, -8 and -12, to be copied before it is harmed."""
    folder = tmp_path_factory.mktemp("twelve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_loss", lambda output_dir: None)
        main.main([*new, "--train_steps", "12", "--save_steps", "4", "--output_dir", str(folder / "out")])
        main.main([*new, "--num_step", "1", "--output_dir", str(folder / "unbroken")])
    return folder


def harm(path, kind):
    """Damage a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt", "vocab.txt", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["truncated", "bit flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, twelve_steps, file, kind):
    """The one before it is used; the damaged one is set aside, so its step gets a whole one when it comes again."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    harm(folder / "checkpoint-12" / file, kind)
    words = ["--num_step", "1", "--save_steps", "12", "--save_total_limit", "0"]
    main.main(["--resume", "--output_dir", str(folder), *words])
    warning, move = capsys.readouterr().err.splitlines()
    assert "checkpoint-12 is damaged: " in warning and (file in warning or file == "SHA256SUMS")
    assert "goes on from step 8" in move and (folder / "abandoned-1" / "checkpoint-12").is_dir()
    assert rows(folder) == rows(twelve_steps / "unbroken")
    assert damaged_file(folder / "checkpoint-12") is None
    assert equal(weights(folder / "checkpoint-18"), weights(twelve_steps / "unbroken" / "checkpoint-18"))


def test_damage_is_told(tmp_path, capsys, twelve_steps):
    """Every damaged checkpoint has a line; with no whole one left, status 2."""
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    for step in (4, 8, 12):
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main.main(["--output_dir", str(folder), "--resume"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 4
    for step, line in zip((12, 8, 4), lines, strict=False):
        assert f"checkpoint-{step} is damaged: config.json is not as it was written" in line
    assert "no whole checkpoint" in lines[3]


def test_resuming_before_the_first_checkpoint(tmp_path):
    """A run killed so early begins again in the same folder, as the message says."""
    out = str(tmp_path / "out")
    main.checkpoint.open_output_dir(out, None)
    with pytest.raises(UserError, match=r"out has no checkpoint yet; leave --resume out to begin a run there"):
        main.prepare(["--output_dir", out, "--resume"])
    assert main.prepare(["--output_dir", out]).first_step == 0


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt"])
def test_sums_without_a_needed_file_are_damaged(tmp_path, twelve_steps, name):
    """SHA256SUMS must name the weights and the state, so that a checkpoint cut short is not taken for whole."""
    folder = shutil.copytree(twelve_steps / "out" / "checkpoint-12", tmp_path / "checkpoint-12")
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))
    assert damaged_file(folder) == "SHA256SUMS"


@pytest.mark.parametrize("name", ["../checkpoint-8/vocab.txt", "/etc/hostname", "..", ""])
def test_sums_are_of_files_in_their_folder(tmp_path, twelve_steps, name):
    """SHA256SUMS that names another file is damaged, whatever that file holds."""
    folder = shutil.copytree(twelve_steps / "out" / "checkpoint-12", tmp_path / "checkpoint-12")
    shutil.copytree(folder, tmp_path / "checkpoint-8")
    with open(folder / "SHA256SUMS", "a") as file:
        file.write(f"{checkpoint.sha256(folder / 'vocab.txt')}  {name}\n")
    assert damaged_file(folder) == "SHA256SUMS"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch, new, twelve_steps):
    """One line, status 1, no new checkpoint, the earlier ones kept; the way out in this line works."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(
            main, "make_optimizer", lambda model, args: torch.optim.AdamW(model.parameters(), eps=0.0, fused=True)
        )
        main.main([*new, "--save_steps", "1", "--output_dir", str(tmp_path / "none")])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "--init_checkpoint" in err
    assert checkpoints(tmp_path / "none") == []

    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    resumed = main.prepare(["--resume", str(folder)])
    with torch.no_grad():
        resumed.model.mask_emb[0, 0, 3] = torch.inf
    with pytest.raises(checkpoint.SaveError, match="left mask_emb infinite or not a number, so step 12 is not saved"):
        checkpoint.save(folder, resumed.state, resumed.model, resumed.tokenizer, {}, 1)
    assert names(folder) == ["checkpoint-12", "checkpoint-8", "checkpoint-4"]
    way_out = [
        "--init_checkpoint",
        folder / "checkpoint-12",
        "--adam_epsilon",
        "1e-6",
        "--output_dir",
        tmp_path / "new",
    ]
    data = new[new.index("--seq_len") : new.index("--n_layer")] + new[new.index("--data") :][:2]
    run(capsys, *way_out, *data, "--train_steps", 1)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sums_are_read_by_sha256sum(twelve_steps):
    """`sha256sum --check SHA256SUMS` in a checkpoint checks every other file."""
    folder = twelve_steps / "out" / "checkpoint-12"
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(list(folder.iterdir())) - 1


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """The newest first, by number; other names, and those not yet whole, are none."""
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
        ".checkpoint-11",
        "checkpoint-x",
        "checkpoint-7.bak",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert checkpoints(tmp_path / "none") == []


def test_a_checkpoint_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch, new, capsys):
    """All files are whole and synced before the rename, and the folder above after it."""
    events = []
    sync, rename = checkpoint.sync, Path.rename

    def record_sync(path):
        events.append(path.name)
        sync(path)

    def record_rename(path, target):
        assert sorted(events) == sorted([path.name, *(file.name for file in path.iterdir())])
        assert damaged_file(path) is None
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "sync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    leftover = tmp_path / "out" / ".checkpoint-7"  # of a process that was killed
    leftover.mkdir(parents=True)
    (leftover / "junk").write_text("")
    run(capsys, *new, "--train_steps", 1, "--output_dir", tmp_path / "out")
    assert events[-2:] == ["renamed", "out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", "metrics.csv", ".lock"}


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt"])
def test_a_full_disk_costs_nothing_but_the_rest(tmp_path, capsys, twelve_steps, file):
    """A file may not grow to its size: one line, status 1, no half-written folder, and the older ones are whole."""
    resource = pytest.importorskip("resource")
    folder = shutil.copytree(twelve_steps / "out", tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    size = (folder / "checkpoint-12" / file).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as stop:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            main.main(["--resume", "--output_dir", str(folder), "--train_steps", "14"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1
    assert "checkpoint-14 cannot be saved" in err and "earlier checkpoints are whole" in err
    assert {path.name for path in folder.iterdir()} == names
    assert all(damaged_file(path) is None for path in checkpoints(folder))


# ---------------------------------------------------------------- what is not loaded


def replace_state(folder, values, **more):
    """Write another trainer_state.pt into a checkpoint, with its checksum."""
    path = folder / "trainer_state.pt"
    torch.save(values, path, **more)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(re.sub(r"\w+(?=  trainer_state.pt)", digest, sums))
    assert damaged_file(folder) is None


def test_a_pickle_with_code_is_refused(tmp_path, capsys, twelve_steps):
    """trainer_state.pt is loaded as tensors and plain values, or not at all."""
    folder = shutil.copytree(twelve_steps / "out" / "checkpoint-12", tmp_path / "checkpoint-12")

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was_here",)

    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    replace_state(folder, state | {"pass_loss": Code()}, pickle_module=pickle)
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(folder)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "may run code" in err and err.count("\n") == 1
    assert not (tmp_path / "was_here").exists()


def test_a_checkpoint_of_an_earlier_version(tmp_path, capsys, twelve_steps):
    """Its state is refused in a line that names the way out, and this way works: its weights begin a new run."""
    folder = shutil.copytree(twelve_steps / "out" / "checkpoint-12", tmp_path / "checkpoint-12")
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    state["pass_cost"] = state.pop("pass_loss")
    state["processes"] = [own | {"mems": state["memory"]} for own in state["processes"]]
    del state["memory"]
    replace_state(folder, state)
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(folder)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "--resume: another version of this project wrote" in err
    way_out = re.search(r"--init_checkpoint \S+", err)[0]
    data = [
        "--data",
        state["flags"]["data"][0],
        "--seq_len",
        32,
        "--reuse_len",
        16,
        "--perm_size",
        8,
        "--num_predict",
        6,
    ]
    run(capsys, *way_out.split(), *data, "--learning_rate", 0, "--train_steps", 1, "--output_dir", tmp_path / "out")
    assert equal(weights(folder), weights(tmp_path / "out" / "checkpoint-1"))


def put(values, path, value):
    """Set the entry of nested dicts and lists at a path of keys."""
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


@pytest.mark.parametrize(
    "path, value",
    [
        (["step"], 12.0),
        (["step"], -1),
        (["pass_loss"], "3"),
        (["memory"], {}),
        (["memory", 0], None),
        (["memory", 0], torch.zeros(2, 24, 1, 9)),
        (["memory", 0], torch.zeros(2, 24, 1, 8, dtype=torch.int64)),
        (["optimizer", "state", 3], "x"),
        (["optimizer", "state", 3], {"step": torch.tensor(12.0)}),
        (["optimizer", "state", 3, "exp_avg"], torch.zeros(2)),
        (["optimizer", "state", 3, "step"], 12),
        (["optimizer", "param_groups"], []),
        (["optimizer", "param_groups"], None),
        (["optimizer", "param_groups", 0, "params"], [0]),
        (["optimizer", "param_groups", 0, "betas"], (0.5, 0.5)),
        (["processes", 0], {}),
        (["processes", 0], []),
        (["processes", 0, "gradients"], []),
        (["processes", 0, "gradients", 0], torch.zeros(1)),
        (["processes", 0, "torch_rng"], torch.zeros(3, dtype=torch.uint8)),
        (["processes", 0, "device"], 1),
        (["processes", 0, "device_rng"], 1),
        (["processes"], []),
        (["flags", "seed"], 1.5),
        (["flags", "rows"], 1.5),
        (["flags", "data"], 3),
        (["flags", "bf16"], None),
        (["flags", 3], None),
        (["text"], None),
    ],
)
def test_an_entry_that_does_not_fit_is_named(tmp_path, capsys, twelve_steps, path, value):
    """A state with a valid checksum and an entry of another type or shape: one line with the entry, status 2."""
    folder = shutil.copytree(twelve_steps / "out" / "checkpoint-12", tmp_path / "checkpoint-12")
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    put(state, path, value)
    replace_state(folder, state)
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(folder), "--num_step", "1"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    named = "".join(f"[{key!r}]" for key in path)
    assert any(each in err for each in (f"at {named}", f"at {named[: named.rindex('[')]};", f"argument --{path[-1]}:"))


def entries(values, path=()):
    """Yield the path of every entry in nested dicts and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield [*path, key]
        yield from entries(value, (*path, key))


def change_a_type(folder, chance):
    """Give a random entry of a checkpoint's state another type, or take it away, with a valid checksum."""
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    path = chance.choice(list(entries(state)))
    values = state
    for key in path[:-1]:
        values = values[key]
    others = ["x", 1.5, 7, True, [], {}, [1], {"x": 1}, torch.zeros(3, 7), torch.zeros(5, dtype=torch.int64)]
    values[path[-1]] = chance.choice([each for each in others if type(each) is not type(values[path[-1]])])
    if (
        chance.random() < 0.2 and path[0] != "flags"
    ):  # a flag that is missing is newer than the run, and has its default
        del values[path[-1]]
    torch.save(state, folder / "trainer_state.pt")
    sums = (folder / "SHA256SUMS").read_text()
    digest = checkpoint.sha256(folder / "trainer_state.pt")
    (folder / "SHA256SUMS").write_text(re.sub(r"\w+(?=  trainer_state.pt)", digest, sums))
    return path


def damage(folder, chance):
    """Damage a random file of a run's folder; return what was done, for a message."""
    kind = chance.choice(["truncate", "flip", "delete", "replace", "swap", "type"])
    whole = [path for path in checkpoints(folder) if damaged_file(path) is None]
    if kind == "type" and whole:
        return kind, whole[0].name, change_a_type(whole[0], chance)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    newest = [path for path in files if path.parent == checkpoints(folder)[0]]
    file, other = chance.choice(newest or files), chance.choice(files)
    content = bytearray(file.read_bytes())
    if kind == "truncate":
        file.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif kind == "flip" and content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "delete":
        file.unlink()
    elif kind == "replace":
        file.write_bytes(chance.randbytes(chance.randrange(2000)))
    else:
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return kind, file, other


@pytest.mark.slow
def test_damage_at_random(tmp_path, capsys, twelve_steps):
    """After one to three faults a run resumes to the bit from a whole checkpoint, or ends with one line, status 2.

    Every line on stderr is ours, so there is no traceback. FAULTS=500 in the environment tries more.
    """
    words = ["--train_steps", "13", "--save_total_limit", "0"]
    unbroken = shutil.copytree(twelve_steps / "out", tmp_path / "unbroken")
    main.main(["--resume", str(unbroken), *words])
    ends = {0: 0, 2: 0}
    for seed in range(int(os.environ.get("FAULTS", 40))):
        chance = random.Random(seed)
        folder = shutil.copytree(twelve_steps / "out", tmp_path / f"out{seed}")
        done = [damage(folder, chance) for _ in range(chance.choice([1, 1, 2, 3]))]
        capsys.readouterr()
        status = 0
        try:
            main.main(["--resume", "--output_dir", str(folder), *words])
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}") from error
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("main.py: ") for line in lines), (seed, done)
        assert sum("error" in line for line in lines) == (status == 2), (seed, done)
        ends[status] += 1
        if status == 0:
            assert equal(weights(folder / "checkpoint-13"), weights(unbroken / "checkpoint-13")), (seed, done)
            state, other = checkpoint.load(folder / "checkpoint-13"), checkpoint.load(unbroken / "checkpoint-13")
            assert state.pass_loss == other.pass_loss and torch.equal(state.memory[0], other.memory[0]), (seed, done)
            moments, others = state.optimizer["state"], other.optimizer["state"]
            assert all(equal(moments[i], others[i]) for i in others), (seed, done)
        shutil.rmtree(folder)
    print(ends)
    assert all(ends.values())


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, text, twelve_steps):
    """A folder with a run, and with texts and vocabularies that do not fit it."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "run").symlink_to(twelve_steps / "out")
    shutil.copytree(twelve_steps / "out", folder / "second")
    (folder / "other.txt").write_text("three words here\n" * 40)
    (folder / "mixed").mkdir()
    pieces = (text / "vocab.txt").read_text().splitlines()
    pieces[100], pieces[101] = pieces[101], pieces[100]
    (folder / "mixed" / "vocab.txt").write_text("\n".join(pieces))
    return folder


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--resume", ["--resume", "--output_dir"]),
        (f"--output_dir {'x' * 300} --resume", ["does not exist"]),  # no system has so long a name
        (f"--resume {'x' * 300}", ["does not exist"]),
        (f"--init_checkpoint {'x' * 300}", ["is no folder here"]),
        ("--output_dir {tmp}/none --resume", ["--output_dir {tmp}/none does not exist", "leave --resume out"]),
        ("--resume {tmp}/run/checkpoint-3", ["--resume {tmp}/run/checkpoint-3 does not exist", "of a run or of"]),
        ("--resume {tmp}", ["--resume {tmp} is not a checkpoint and holds none", "of a run"]),
        (
            "--resume {tmp}/run/checkpoint-12 --output_dir {tmp}/second",
            ["--output_dir {tmp}/second holds another run than --resume {tmp}/run/checkpoint-12", "new folder"],
        ),
        ("--output_dir {tmp}/run", ["--output_dir", "holds a run already", "--resume"]),
        ("--output_dir {tmp}/run --resume --d_model 64", ["--d_model 64", "checkpoint-12", "where it is 8"]),
        ("--output_dir {tmp}/run --resume --seed 3", ["--seed 3", "where it is 0"]),
        ("--output_dir {tmp}/run --resume --train_steps 1", ["at step 12", "end at step 1;", "larger"]),
        ("--output_dir {tmp}/run --resume --data {tmp}/other.txt", ["--data", "the text has changed"]),
        ("--output_dir {tmp}/run --resume --tokenizer bert-base-cased", ["--tokenizer", "28996", "{size}"]),
        ("--output_dir {tmp}/run --resume --tokenizer {tmp}/mixed", ["--tokenizer", "the vocabulary has changed"]),
        ("--init_checkpoint {tmp}", ["--init_checkpoint", "config.json"]),
        ("--init_checkpoint {tmp}/run/checkpoint-12 --d_model 16", ["--d_model 16", "where it is 8"]),
        ("--init_checkpoint {tmp}/run/checkpoint-12 --tokenizer bert-base-cased", ["28996", "{size}"]),
    ],
)
def test_a_mistake_gets_one_line(capsys, text, mistakes, words, expected):
    """Exit status 2, nothing on stdout, one line that names the flag, the value and the remedy; the run is unharmed."""
    size = len((text / "vocab.txt").read_text().split())
    with pytest.raises(SystemExit) as stop:
        main.main(words.format(tmp=mistakes).split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    for word in expected:
        assert word.format(tmp=mistakes, size=size) in err
    assert len(rows(mistakes / "run")) == 12


def test_a_folder_with_a_tokenizers_name_is_not_that_tokenizer(tmp_path, capsys, text, monkeypatch):
    """The name of a bundled tokenizer stays a name in a checkpoint."""
    (tmp_path / "bert-base-uncased").mkdir()
    monkeypatch.chdir(tmp_path)
    run(capsys, *SMALL, "--data", text / "text.txt", "--train_steps", 1, "--output_dir", "out")
    assert checkpoint.load(tmp_path / "out" / "checkpoint-1").flags["tokenizer"] == "bert-base-uncased"
    run(capsys, "--resume", "--output_dir", "out", "--train_steps", 2)


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def default_shape(tmp_path_factory):
    """The checkpoint of a few steps at the default shape and vocabulary."""
    folder = tmp_path_factory.mktemp("default")
    words = "--seq_len 64 --reuse_len 32 --perm_size 32 --num_predict 10 --mem_len 48 --train_steps 5".split()
    main.main([*words, "--output_dir", str(folder)])
    return checkpoints(folder)[0]


def test_transformers_loads_a_checkpoint(default_shape):
    """No missing and no unexpected key, logits within 1e-5 of ours with memory; AutoModel leaves out the head alone."""
    theirs, keys = transformers.XLNetLMHeadModel.from_pretrained(default_shape, output_loading_info=True)
    assert not any(keys.values())
    _, keys = transformers.AutoModel.from_pretrained(default_shape, output_loading_info=True)
    assert keys.pop("unexpected_keys") == {"lm_loss.bias"} and not any(keys.values())
    ours = XLNet.from_pretrained(default_shape).eval()
    torch.manual_seed(0)
    ids, seg_id = torch.randint(30522, (20, 2)), torch.randint(2, (20, 2))
    perm_mask = (torch.rand(20, 20, 2) < 0.4).float()
    positions = torch.tensor([[3, 4], [7, 9], [12, 11]])
    memory = [torch.randn(9, 2, 32) for _ in range(6)]
    logits, new_memory = ours(ids, seg_id, None, memory, perm_mask, positions, torch.ones(20, 2))
    output = theirs(
        input_ids=ids.t(),
        token_type_ids=seg_id.t(),
        mems=memory,
        perm_mask=perm_mask.permute(2, 0, 1),
        target_mapping=torch.nn.functional.one_hot(positions.t(), 20).float(),
        use_mems=True,
    )
    torch.testing.assert_close(output.logits.transpose(0, 1), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(list(output.mems), new_memory, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert-base-uncased", slow("bert-base-cased")])
def test_transformers_tokenizes_the_same(tmp_path, name):
    """The same ids for all sentences of data.txt and some with capitals, accents, marks and Han."""
    tokenizer = corpus.load_tokenizer(name)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlnet"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sentences = (ROOT / "data.txt").read_text().split("\n")
    sentences += ["Ça va, NaÏve Über-Straße?", "3.14% of $5 -- (no)!", "上海 and 東京", "don't  stop\tnow"]
    assert len(sentences) > 200
    for sentence in sentences:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(sentence))
        assert theirs(sentence, add_special_tokens=False)["input_ids"] == ids, sentence
    assert theirs.sep_token_id == corpus.vocabulary(tokenizer).sep_id


@pytest.mark.parametrize("head", ["XLNetLMHeadModel", slow("XLNetModel"), slow("XLNetForSequenceClassification")])
def test_ours_loads_what_transformers_wrote(tmp_path, head):
    """Logits within 1e-5 of XLNetLMHeadModel's; null entries of the config come from the flags."""
    torch.manual_seed(1)
    config = transformers.XLNetConfig(
        vocab_size=30522,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=24,
        mem_len=None,
        reuse_len=None,
        ff_activation="gelu",
    )
    theirs = getattr(transformers, head)(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = XLNet.from_pretrained(tmp_path / "theirs", mem_len=0).eval()
    ids = torch.randint(30522, (12, 2))
    if head == "XLNetLMHeadModel":
        torch.testing.assert_close(ours(ids)[0], theirs(ids.t()).logits.transpose(0, 1), rtol=0, atol=1e-5)
    else:
        body = getattr(theirs, "transformer", theirs)
        hidden = body(ids.t()).last_hidden_state.transpose(0, 1)
        torch.testing.assert_close(ours.hidden(ids)[0], hidden, rtol=0, atol=1e-5)
    words = ["--init_checkpoint", str(tmp_path / "theirs"), "--output_dir", str(tmp_path / "out")]
    main.main([*words, "--train_steps", "1"])
    saved = json.loads((tmp_path / "out" / "checkpoint-1" / "config.json").read_text())
    assert (saved["d_model"], saved["n_layer"], saved["d_head"], saved["ff_activation"]) == (16, 2, 8, "gelu")
    assert (saved["mem_len"], saved["reuse_len"]) == (384, 256)


def test_a_run_starts_from_an_earlier_one(tmp_path, capsys, default_shape):
    """--init_checkpoint takes weights, shape, dropout, vocabulary and the lengths of a window, and nothing else."""
    words = [
        "--init_checkpoint",
        default_shape,
        "--learning_rate",
        0,
        "--train_steps",
        1,
        "--output_dir",
        tmp_path / "out",
    ]
    metrics, _ = run(capsys, *words)
    assert metrics["step"] == 1
    assert equal(weights(default_shape), weights(tmp_path / "out" / "checkpoint-1"))
    flags = checkpoint.load(tmp_path / "out" / "checkpoint-1").flags
    assert flags["tokenizer"] == str(default_shape)
    assert (flags["d_model"], flags["seq_len"], flags["seed"]) == (32, 64, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "bert"}, "not that of an XLNet"),
        ({"untie_r": False}, "untie_r"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"ff_activation": "silu"}, "ff_activation 'silu' must be one of relu"),
        ({"d_inner": 7}, "is missing, or not"),
    ],
)
def test_from_pretrained_names_what_does_not_fit(tmp_path, change, words):
    """A configuration that is not supported is a ValueError with the entry."""
    XLNet(30, n_layer=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        XLNet.from_pretrained(tmp_path)


def test_save_and_load_round_trip(tmp_path):
    """Every weight, and every argument of the constructor."""
    torch.manual_seed(2)
    model = XLNet(30, 1, 2, 4, 12, 8, 0.2, 0.3, "uni", True, 9, True, 5, 6, "gelu_new")
    model.save_pretrained(tmp_path)
    again = XLNet.from_pretrained(tmp_path)
    assert equal(model.state_dict(), again.state_dict()) and again.config == model.config
    assert XLNet.from_pretrained(tmp_path, mem_len=3).mem_len == 3
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_head": None}))  # null means d_model / n_head
    assert equal(model.state_dict(), XLNet.from_pretrained(tmp_path).state_dict())
