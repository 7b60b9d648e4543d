"""Several processes: what they compute together, how they stop, die and go on. All on this machine, with gloo."""

import contextlib
import csv
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from xlnet import XLNet

ROOT = Path(main.__file__).parent
DATA = str(ROOT / "data.txt")
SMALL = ("--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 7 --n_layer 2 --n_head 2 --d_head 4 "
         "--d_model 8 --d_inner 8 --data").split() + [DATA]
if torch.cuda.is_available():  # each process would need one of its own
    SMALL += ["--device", "cpu"]
LINE = re.compile(r"^Number of Epoch.* = (\S+)", re.M)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture
def start():
    """Return a function that starts main.main(argv), or another target, in n processes; they end with the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "torch._dynamo"])  # which the first update imports
    started = []

    def start(n, argv, folder, target=main.main):
        port = free_port()
        processes = [context.Process(target=child, args=(rank, n, port, argv, folder, target)) for rank in range(n)]
        started.extend(processes)
        for process in processes:
            process.start()
        return processes

    yield start
    for process in started:
        process.kill()


def child(rank, n, port, argv, folder, target):
    """Be one of n processes, as torchrun would start it; what it prints goes into folder/<rank>.out and .err."""
    if n > 1:
        main.RANK, main.LOCAL_RANK, main.WORLD_SIZE, main.LOCAL_WORLD_SIZE = rank, rank, n, n
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    with open(f"{folder}/{rank}.out", "a") as out, open(f"{folder}/{rank}.err", "a") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            target([*argv, "--output_dir", f"{folder}/run"])


def join(processes, timeout=60):
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def costs(folder):
    return [float(cost) for cost in LINE.findall(Path(folder, "0.out").read_text())]


def watched(argv):
    """Run main.main and save the gradient of every update as this process has it."""
    step, gradients = torch.optim.AdamW.step, []

    def spy(optimizer):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer)

    torch.optim.AdamW.step = spy
    main.main(argv)
    torch.save(gradients, f"{argv[-1]}/../gradients-{main.RANK}.pt")


@pytest.mark.parametrize("flags", [
    "--batch_size 2 --rows 2",
    "--batch_size 4 --rows 8 --bi_data True",
    "--batch_size 2 --rows 2 --grad_accum_steps 3",
])
def test_two_processes_compute_what_one_does(start, tmp_path, flags):
    """50 steps: the same costs, gradients and model; the process of rank 0 alone prints and saves."""
    argv = [*SMALL, "--clip", "0", "--learning_rate", "1e-3", *flags.split(), "--valid", DATA, "--eval_steps", "20",
            "--train_steps", "17" if "accum" in flags else "50"]
    one, two = start(1, argv, tmp_path / "one", watched), start(2, argv, tmp_path / "two", watched)
    assert join(one) == [0] and join(two) == [0, 0]
    assert len(costs(tmp_path / "one")) >= 50
    assert costs(tmp_path / "two") == pytest.approx(costs(tmp_path / "one"), abs=1e-5)
    one, two = (re.findall(r"Validation cost = (\S+)", (tmp_path / n / "0.out").read_text()) for n in ("one", "two"))
    assert len(one) == 3 and list(map(float, two)) == pytest.approx(list(map(float, one)), abs=1e-5)
    assert (tmp_path / "two" / "1.out").read_text() == "" == (tmp_path / "two" / "1.err").read_text()

    expected = torch.load(tmp_path / "one" / "gradients-0.pt")
    for rank in range(2):
        for update, other in zip(torch.load(tmp_path / "two" / f"gradients-{rank}.pt"), expected, strict=True):
            for gradient, same in zip(update, other, strict=True):
                torch.testing.assert_close(gradient, same, rtol=0, atol=1e-6)
    [name] = [path.name for path in main.checkpoints(tmp_path / "one" / "run")]
    models = [XLNet.from_pretrained(tmp_path / n / "run" / name).state_dict() for n in ("one", "two")]
    for weight, same in zip(*(model.values() for model in models)):
        torch.testing.assert_close(weight, same, rtol=0, atol=1e-4)


def test_each_row_has_its_own_generator_and_place():
    """A process makes the rows that are its share, as the one process makes them that has all."""
    flags = main.build_parser().parse_args([*SMALL, "--bi_data", "True", "--batch_size", "4", "--rows", "8"])
    whole = main.Run(main.settle(vars(flags)))
    for rank, members in enumerate(([0, 2], [1, 3])):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
                patch.setattr(main, name, value)
            part = main.Run(main.settle(vars(flags)))
        for step in (0, 1, 5):
            batch, share = whole.load_batch(step), part.load_batch(step)
            assert all(torch.equal(batch[key][..., members], share[key]) for key in batch)
            assert len(batch["perm_mask"].unique(dim=1)[0]) == 4


DROPOUT = ["--dropout", "0.1", "--dropatt", "0.1", "--batch_size", "2"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_all_after_the_same_step(start, tmp_path, signum):
    """Sent to one process; the run goes on to the bit, dropout, memory and an accumulation of each process included."""
    argv = [*SMALL, *DROPOUT, "--rows", "4", "--grad_accum_steps", "4", "--train_steps", "30"]
    assert join(start(2, argv, tmp_path / "unbroken")) == [0, 0]
    processes = start(2, argv, tmp_path / "broken")
    out = tmp_path / "broken" / "0.out"
    while not out.exists() or out.read_text().count("\n") < 8:
        time.sleep(0.01)
    os.kill(processes[1].pid, signum)
    assert join(processes) == [128 + signum] * 2
    assert "stopped after step" in (tmp_path / "broken" / "0.err").read_text()
    assert 7 <= len(costs(tmp_path / "broken")) < 120
    assert join(start(2, ["--resume"], tmp_path / "broken")) == [0, 0]
    assert costs(tmp_path / "broken") == costs(tmp_path / "unbroken")


def test_one_process_killed_ends_the_other_and_the_run_goes_on(start, tmp_path):
    """Within a minute, with one line and status 1; what was saved before is whole."""
    argv = [*SMALL, *DROPOUT, "--rows", "4", "--train_steps", "60", "--save_steps", "5"]
    assert join(start(2, argv, tmp_path / "unbroken")) == [0, 0]
    processes = start(2, argv, tmp_path / "broken")
    while len(main.checkpoints(tmp_path / "broken" / "run")) < 2:
        time.sleep(0.01)
    processes[1].kill()
    assert join(processes) == [1, -signal.SIGKILL]
    [line] = (tmp_path / "broken" / "0.err").read_text().splitlines()
    assert line.startswith("main.py: another process of the run is gone") and "--resume" in line
    assert join(start(2, ["--resume"], tmp_path / "broken")) == [0, 0]
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "unbroken")


def read_metrics(folder):
    with open(folder / "run" / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_second"}
                for row in csv.DictReader(file)]


def test_another_number_of_processes_is_refused(start, tmp_path):
    assert join(start(2, [*SMALL, *DROPOUT, "--train_steps", "3"], tmp_path / "run")) == [0, 0]
    assert join(start(1, ["--resume"], tmp_path / "run")) == [2]
    assert "--resume: the run had 2 processes and now has 1; start as many" in (tmp_path / "run/0.err").read_text()


@pytest.mark.parametrize("flags, words", [
    ("--batch_size 3", ["--batch_size 3", "2 processes", "try 4"]),
    ("--batch_size 2 --bi_data True", ["--batch_size 2", "2 processes", "try 4"]),
    ("--data nowhere.txt", ["--data nowhere.txt"]),
    ("--rows 300", ["--data", "4015 tokens", "--rows"]),
])
def test_a_mistake_gets_one_line(start, tmp_path, flags, words):
    """From the first process of the machine alone, and all have status 2."""
    assert join(start(2, [*SMALL, *flags.split()], tmp_path / "run")) == [2, 2]
    [line] = (tmp_path / "run" / "0.err").read_text().splitlines()
    assert all(word in line for word in words) and (tmp_path / "run" / "1.err").read_text() == ""


def test_each_process_needs_a_gpu(monkeypatch):
    """Every process says so, not the ones alone that find none: the first is the one that is heard."""
    monkeypatch.setattr(main, "LOCAL_WORLD_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(main.UserError, match="--device auto: 1 CUDA devices are too few for 2 processes"):
        main.settle({})
    main.settle({"device": "cpu"})


def test_torchrun(tmp_path):
    """The documented way to start: a line a step, printed once; batch_size is one row a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "main.py"), *SMALL, "--train_steps", "3", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(LINE.findall(done.stdout)) == 3 and len(done.stdout.splitlines()) == 5
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "trainer_state.pt", weights_only=True)
    assert state["flags"]["batch_size"] == 2 == len(state["processes"])
    assert not torch.equal(*(each["torch_rng"] for each in state["processes"]))  # dropout differs from row to row
