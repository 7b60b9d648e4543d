"""Several processes: what they compute together, how they stop, die and go on. All on this machine, with gloo."""

import contextlib
import csv
import ctypes
import json
import os
import platform
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import main
from support import UserError, checkpoint, processes
from xlnet import XLNet

ROOT = Path(main.__file__).parent
DATA = str(ROOT / "data.txt")
SMALL = (
    "--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 7 --n_layer 2 --n_head 2 --d_head 4 "
    "--d_model 8 --d_inner 8 --data"
).split() + [DATA]
if torch.cuda.is_available():  # each process would need one of its own
    SMALL += ["--device", "cpu"]
LINE = re.compile(r"^Number of Epoch.* = (\S+)", re.M)


# ---------------------------------------------------------------- speed of a device


class InBfloat16(TorchFunctionMode):
    """Multiply matrices of float32 as a CPU with AMX does it at "medium": with operands rounded to bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_product = func in (torch.Tensor.matmul, torch.Tensor.__matmul__)
        if is_product and args[0].dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            args = [x.bfloat16().float() for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, InBfloat16])
def test_products_on_a_cpu_stay_exact(mode):
    """As near to float64 as float32 is by default, here and on a CPU with AMX; fast where that costs no exactness."""
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double().t()
    torch.set_float32_matmul_precision("highest")
    enough = 5 * (x @ x.t() - exact).abs().max()
    with mode():
        torch.set_float32_matmul_precision("medium")
        is_exact = (x @ x.t() - exact).abs().max() <= enough
        torch.set_float32_matmul_precision("highest")
        processes.set_matmul_precision(torch.device("cpu"))
        assert (x @ x.t() - exact).abs().max() <= enough
        assert torch.get_float32_matmul_precision() == ("medium" if is_exact else "highest")
    assert not (mode is InBfloat16 and is_exact)


def test_products_on_a_gpu_may_use_tf32():
    """Not bfloat16, which "medium" allows there."""
    before = torch.get_float32_matmul_precision()
    processes.set_matmul_precision(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
@pytest.mark.parametrize("largest, option", [(2**25, (-3, 2**25)), (2**25 + 1, (-4, 0))])
def test_glibc_accepts_the_limits(monkeypatch, largest, option):
    """No end of the heap is given back; tensors up to 32 MB, or of any size if a step has larger ones, are kept."""
    answers = []
    mallopt = ctypes.CDLL(None).mallopt
    spy = SimpleNamespace(mallopt=lambda *limit: answers.append((limit, mallopt(*limit))))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: spy)
    processes.keep_freed_memory(largest)
    assert answers == [((-1, -1), 1), (option, 1)]


def test_other_c_libraries_are_left_alone(monkeypatch):
    """musl's has no such limits; on a Mac and on Windows there is nothing to call."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("a library was called"))
    processes.keep_freed_memory(1)


# ---------------------------------------------------------------- starting processes


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def start(context):
    """Return a function that starts main.main(argv), or another target, in n processes; they end with the tests."""
    started = []

    def start(n, argv, folder, target=main.main):
        port = free_port()
        children = [context.Process(target=child, args=(rank, n, port, argv, folder, target)) for rank in range(n)]
        started.extend(children)
        for each in children:
            each.start()
        return children

    yield start
    for each in started:
        each.kill()


def place_of(rank, n):
    """Return the environment in which torchrun starts one of n processes on one machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}


def child(rank, n, port, argv, folder, target):
    """Be one of n processes; what it prints goes into folder/<rank>.out and .err."""
    if n > 1:
        os.environ.update(place_of(rank, n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    with open(f"{folder}/{rank}.out", "a") as out, open(f"{folder}/{rank}.err", "a") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            target([*argv, "--output_dir", f"{folder}/run"])


def join(children, timeout=60):
    for each in children:
        each.join(timeout)
    return [each.exitcode for each in children]


def losses(folder):
    return [float(loss) for loss in LINE.findall(Path(folder, "0.out").read_text())]


def read_metrics(folder):
    with open(folder / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("tokens_per_second", "data_wait", "peak_memory"):
            del row[name]
    return rows


@pytest.fixture
def in_place(monkeypatch):
    """Return a function that makes this process one of n, as far as it is told; the others are not there."""
    monkeypatch.setattr(processes, "connected", contextlib.nullcontext)

    def set_place(rank, n):
        for name, value in place_of(rank, n).items():
            monkeypatch.setenv(name, value)

    return set_place


# ---------------------------------------------------------------- what they compute together


def watched(argv):
    """Run main.main; save this process's gradient of every update, and what its model reads in evaluations."""
    step, forward = torch.optim.AdamW.step, XLNet.forward
    gradients, evaluated = [], []

    def step_spy(optimizer):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer)

    def forward_spy(model, inp_k, **others):
        if not model.training:
            evaluated.append(inp_k)
        return forward(model, inp_k, **others)

    torch.optim.AdamW.step, XLNet.forward = step_spy, forward_spy
    main.main(argv)
    torch.save((gradients, evaluated), f"{argv[-1]}/../seen-{processes.rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, members",
    [
        ("--batch_size 2 --rows 2 --train_steps 50", [[0], [1]]),
        ("--batch_size 4 --rows 8 --bi_data True --train_steps 50", [[0, 2], [1, 3]]),
        ("--batch_size 2 --rows 2 --grad_accum_steps 3 --train_steps 17", [[0], [1]]),
    ],
)
def test_two_processes_compute_what_one_does(start, tmp_path, flags, members):
    """50 steps: the same losses, gradients and model; rank 0 alone prints and saves; each evaluates its own rows."""
    valid = tmp_path / "valid.txt"
    valid.write_text("".join(Path(DATA).read_text().splitlines(keepends=True)[:60]))  # two rows
    argv = [*SMALL, "--clip", "0", "--learning_rate", "1e-3", *flags.split()]
    argv += ["--valid", str(valid), "--eval_steps", "20"]
    one, two = start(1, argv, tmp_path / "one", watched), start(2, argv, tmp_path / "two", watched)
    assert join(one) == [0] and join(two) == [0, 0]
    assert len(losses(tmp_path / "one")) >= 50
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (tmp_path / "two" / "1.out").read_text() == "" == (tmp_path / "two" / "1.err").read_text()

    one, two = (re.findall(r"Validation loss = (\S+)", (tmp_path / n / "0.out").read_text()) for n in ("one", "two"))
    assert len(one) == 3 and list(map(float, two)) == pytest.approx(list(map(float, one)), abs=1e-5)
    whole_gradients, whole_batches = torch.load(tmp_path / "one" / "seen-0.pt")
    for rank in range(2):
        gradients, batches = torch.load(tmp_path / "two" / f"seen-{rank}.pt")
        assert len(batches) > 3 * 10
        for batch, whole in zip(batches, whole_batches, strict=True):
            assert torch.equal(batch, whole[:, members[rank]])
        for update, expected in zip(gradients, whole_gradients, strict=True):
            for gradient, same in zip(update, expected, strict=True):
                torch.testing.assert_close(gradient, same, rtol=0, atol=1e-6)

    [name] = [path.name for path in checkpoint.checkpoints(tmp_path / "one" / "run")]
    models = [XLNet.from_pretrained(tmp_path / n / "run" / name).state_dict() for n in ("one", "two")]
    for weight, same in zip(*(model.values() for model in models), strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["loader", "valid_loader"])
def test_each_row_has_its_own_generator_and_place(in_place, name):
    """A process makes the rows that are its share, as the one process makes them that has all."""
    argv = [*SMALL, "--bi_data", "True", "--batch_size", "4", "--rows", "8", "--valid", DATA]
    whole = getattr(main.prepare(argv), name)
    for rank, members in enumerate(([0, 2], [1, 3])):
        in_place(rank, 2)
        part = getattr(main.prepare(argv), name)
        for step in (0, 1, 5):
            batch, share = whole.batch(step), part.batch(step)
            assert all(torch.equal(batch[key][..., members], share[key]) for key in batch)
            assert len(batch["rank"].unique(dim=1)[0]) == 4


@pytest.mark.slow
def test_a_process_has_its_own_dropout_and_by_default_one_row(start, tmp_path):
    """batch_size is one row a process; random states differ from process to process; the lines are printed once."""
    assert join(start(2, [*SMALL, "--train_steps", "3"], tmp_path / "run")) == [0, 0]
    out = (tmp_path / "run" / "0.out").read_text()
    assert len(LINE.findall(out)) == 3 and len(out.splitlines()) == 6
    assert (tmp_path / "run" / "1.out").read_text() == ""
    state = checkpoint.load(tmp_path / "run" / "run" / "checkpoint-3")
    assert state.flags["batch_size"] == 2 == len(state.processes)
    assert not torch.equal(*(each["torch_rng"] for each in state.processes))


# ---------------------------------------------------------------- how they stop, die and go on

RUN = [*SMALL, *"--dropout 0.1 --dropatt 0.1 --bi_data True --batch_size 8 --rows 16 --train_steps 20".split()]
RUN += ["--grad_accum_steps", "4", "--save_steps", "5"]  # in the middle of accumulations


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The folder of a run of 80 steps with two processes."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert join(start(2, RUN, folder)) == [0, 0]
    assert len(losses(folder)) == 80
    return folder


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process of Windows at once")
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_all_after_the_same_step(start, unbroken, tmp_path, signum):
    """Sent to one process; the run goes on to the bit, dropout, memory and an accumulation of each process included."""
    folder = tmp_path / "broken"
    children = start(2, RUN, folder)
    out = folder / "0.out"
    while not out.exists() or out.read_text().count("\n") < 8:
        time.sleep(0.01)
    os.kill(children[1].pid, signum)
    assert join(children) == [128 + signum] * 2
    stopped_after = re.search(r"stopped after step (\d+)", (folder / "0.err").read_text()).group(1)
    assert 7 <= len(losses(folder)) == int(stopped_after) < 80
    assert join(start(2, ["--resume"], folder)) == [0, 0]
    assert losses(folder) == losses(unbroken)
    assert read_metrics(folder) == read_metrics(unbroken)


@pytest.mark.slow
def test_one_process_killed_ends_the_other_and_the_run_goes_on(start, unbroken, tmp_path):
    """Within a minute, with one line and status 1; what was saved before is whole."""
    folder = tmp_path / "broken"
    children = start(2, RUN, folder)
    while len(checkpoint.checkpoints(folder / "run")) < 2:
        time.sleep(0.01)
    children[1].kill()
    [first, second] = join(children)
    assert first == 1 and second != 0
    [line] = (folder / "0.err").read_text().splitlines()
    assert line.startswith("main.py: another process of the run is gone") and "--resume" in line
    assert join(start(2, ["--resume"], folder)) == [0, 0]
    assert read_metrics(folder) == read_metrics(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--batch_size 4 --rows 8 --train_steps 60",
        "--batch_size 8 --rows 8 --bi_data True --train_steps 60",
        "--batch_size 4 --rows 8 --train_steps 15 --grad_accum_steps 4",
        "--batch_size 8 --rows 16 --bi_data True --train_steps 12 --grad_accum_steps 5",
    ],
)
def test_another_number_of_processes_goes_on(start, tmp_path, words):
    """2, killed within a pass and an accumulation, then 1, then 4, then 2: losses and weights of an unbroken run."""
    argv = [*SMALL, *words.split(), "--save_steps", "1", "--learning_rate", "1e-3"]
    assert join(start(2, argv, tmp_path / "unbroken")) == [0, 0]
    folder = tmp_path / "broken"
    for n, until in (2, 14), (1, 27), (4, 42):
        children = start(n, argv if until == 14 else ["--resume"], folder)
        while not (folder / "run" / f"checkpoint-{until}").exists():
            assert any(child.is_alive() for child in children)
            time.sleep(0.005)
        for child in children:
            child.kill()
        join(children)
    assert join(start(2, ["--resume"], folder)) == [0, 0]
    assert (folder / "0.err").read_text() == ""
    whole, broken = (read_metrics(each) for each in (tmp_path / "unbroken", folder))
    assert [row["step"] for row in broken] == [str(step) for step in range(1, 61)]
    assert [float(row["loss"]) for row in broken] == pytest.approx([float(row["loss"]) for row in whole], abs=1e-5)
    folders = tmp_path / "unbroken", folder
    weights, same = (XLNet.from_pretrained(each / "run" / "checkpoint-60").state_dict() for each in folders)
    for name in weights:
        torch.testing.assert_close(weights[name], same[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_rows_that_cannot_be_shared_are_a_mistake(unbroken, in_place, capsys):
    """One line and status 2, with the numbers of processes that can go on."""
    in_place(0, 3)
    with pytest.raises(SystemExit) as end:
        main.main(["--output_dir", str(unbroken / "run"), "--resume"])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--resume: the run has 4 rows a step in each direction, which 3 processes cannot share" in line
    assert line.endswith("start 1 or 2 or 4")


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_the_loss_on_a_text_does_not_depend_on_batch_or_processes(start, tmp_path, n):
    """The windows of an evaluation are those of the text; a process without a row of its own waits."""
    valid = tmp_path / "valid.txt"
    valid.write_text("".join(Path(DATA).read_text().splitlines(keepends=True)[:60]))  # two rows
    seen = []
    for batch_size in (4, 8):
        folder = tmp_path / str(batch_size)
        argv = [*SMALL, "--batch_size", str(batch_size), "--learning_rate", "0", "--train_steps", "1"]
        assert join(start(n, [*argv, "--valid", str(valid)], folder)) == [0] * n
        seen += re.findall(r"Validation loss = (\S+)", (folder / "0.out").read_text())
    one = main.main([*SMALL, "--learning_rate", "0", "--train_steps", "1", "--valid", str(valid)])
    assert len(seen) == 2 and list(map(float, seen)) == pytest.approx([one["validation_loss"]] * 2, abs=1e-5)


# ---------------------------------------------------------------- processes that differ


def apart(argv):
    """Run main.main; the words behind `process_1` and before --output_dir are for that process alone."""
    begin, end = argv.index("process_1"), len(argv) - 2
    own = argv[begin + 1 : end] if processes.rank() == 1 else []
    main.main(argv[:begin] + own + argv[end:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "own, line",
    [
        ("--seed 4", "process 1 has --seed 4 and process 0 has 0; start all processes with the same flags"),
        ("--data {other}", "process 1 has a text of digest"),
        ("--valid nowhere.txt", "process 1 alone: --valid nowhere.txt: No such file; give a text file"),
    ],
)
def test_a_process_that_differs_ends_all(start, tmp_path, own, line):
    """With status 2, before the first step, and one line from the first process of the machine."""
    other = tmp_path / "other.txt"
    other.write_text(Path(DATA).read_text() + "One sentence more.\n")
    words = [*SMALL, "--rows", "2", "--train_steps", "2", "process_1", *own.format(other=other).split()]
    assert join(start(2, words, tmp_path / "run", apart)) == [2, 2]
    [printed] = (tmp_path / "run" / "0.err").read_text().splitlines()
    assert printed.startswith(f"main.py: error: {line}")
    assert (tmp_path / "run" / "0.out").read_text() == "" == (tmp_path / "run" / "1.err").read_text()


# ---------------------------------------------------------------- mistakes, devices, places


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch_size 3", ["--batch_size 3", "2 processes", "try 4"]),
        ("--batch_size 2 --bi_data True", ["--batch_size 2", "2 processes", "try 4"]),
        ("--data nowhere.txt", ["--data nowhere.txt"]),
        ("--rows 300", ["--data", "4015 tokens", "--rows"]),
    ],
)
def test_a_mistake_gets_one_line(in_place, capsys, flags, words):
    """From the first process of the machine alone, and all have status 2."""
    for rank in range(2):
        in_place(rank, 2)
        with pytest.raises(SystemExit) as end:
            main.main([*SMALL, *flags.split()])
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 - rank and all(word in line for word in words for line in lines)


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "1"}, "RANK is 1 in the environment and WORLD_SIZE 1; start with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, and environment variable RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "environment variable MASTER_ADDR expected, but not set; start with"),
    ],
)
def test_a_place_that_cannot_be_is_a_mistake(monkeypatch, capsys, variables, words):
    """One line and status 2, instead of a silent process or a wait for others."""
    for name in (*place_of(0, 1), "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main.main([*SMALL, "--train_steps", "1"])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and words in line


def test_a_process_that_never_comes_is_waited_for_some_minutes(monkeypatch, capsys):
    """Then the others end with one line and status 2; without torchrun nobody else would end them."""
    monkeypatch.setattr(processes, "MEETING", 0.2)
    for name, value in (place_of(0, 2) | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main.main([*SMALL, "--train_steps", "1"])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "process 0 of WORLD_SIZE 2 has waited" in line and "start all of them" in line


def test_torchrun_repeats_a_mistake(monkeypatch, tmp_path, capsys):
    """The message is in the file that torchrun reads; without torchrun there is none."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        main.main(["--seq_len", "3"])
    told = json.loads((tmp_path / "error.json").read_text())
    assert f"main.py: {told['message']}\n" == capsys.readouterr().err and "--seq_len" in told["message"]
    assert abs(told["timestamp"] - time.time()) < 60


@pytest.fixture
def accelerators(monkeypatch):
    """Return a function that lets PyTorch find n accelerators of a type, as far as it is asked; none are there."""
    chosen = []

    def find(kind, n):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: n)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        return chosen

    return find


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_each_process_needs_a_device(in_place, accelerators, kind):
    """Every process says so, not the ones alone that find none: the first is the one that is heard."""
    accelerators(kind, 1)
    for rank in range(2):
        in_place(rank, 2)
        for name in ("auto", kind):
            with pytest.raises(UserError, match=f"--device {name}: 1 {kind} devices are too few for 2 processes"):
                processes.choose_device(name)
        assert processes.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_each_process_has_its_own_device(in_place, accelerators, kind):
    """The one of its place on the machine."""
    chosen = accelerators(kind, 2)
    for rank in range(2):
        in_place(rank, 2)
        assert processes.choose_device("auto") == processes.choose_device(kind) == torch.device(kind, rank)
    assert chosen == [0, 0, 1, 1]


def test_a_device_that_is_not_there(accelerators):
    """auto takes what there is; another name gets one line with what there is."""
    accelerators("cuda", 0)
    assert processes.choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device mps: PyTorch finds only a cpu here; give auto"):
        processes.choose_device("mps")
    accelerators("mps", 1)
    assert processes.choose_device("auto") == torch.device("mps", 0)
    with pytest.raises(UserError, match="--device cuda: PyTorch finds mps here; give auto"):
        processes.choose_device("cuda")


def test_what_a_device_can_do_is_asked(monkeypatch):
    """Without bfloat16 a line says so. AdamW is fused only where it skips an update that is not finite."""
    processes.check_bf16(torch.device("cpu"))

    def fail(*args, **others):
        raise RuntimeError("no such type here")

    monkeypatch.setattr(torch, "autocast", fail)
    with pytest.raises(UserError, match="--bf16: cpu does not do it .no such type here.; leave it out"):
        processes.check_bf16(torch.device("cpu"))

    device = SimpleNamespace(type="another")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    assert processes.fused_adamw_skips(device)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: setattr(self, "found_inf", None) or step(self))
    assert not processes.fused_adamw_skips(device)
    monkeypatch.setattr(torch.optim, "AdamW", fail)
    assert not processes.fused_adamw_skips(device)


def test_the_place_of_a_process_is_read_when_asked(in_place, monkeypatch):
    """Without torchrun there is one process, which sums and gathers its own values."""
    for name in place_of(0, 1):
        monkeypatch.delenv(name, raising=False)
    places = processes.rank, processes.local_rank, processes.world_size, processes.local_world_size
    assert [place() for place in places] == [0, 0, 1, 1]
    assert processes.gather("value") == ["value"] == processes.all_gather("value")
    assert processes.sum_over_processes(torch.tensor(3.0)) == 3
    in_place(2, 5)
    assert [place() for place in places] == [2, 2, 5, 5]
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "10")
    assert [place() for place in places] == [7, 2, 10, 5]
