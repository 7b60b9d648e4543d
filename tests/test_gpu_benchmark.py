"""benchmarks/gpu.py, which a GPU is needed for, on a CPU: its tables, failures, budget and arithmetic."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import main
from support import UserError, processes

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import gpu
import step_time

ROOT = Path(main.__file__).parent
PROGRAM = str(ROOT / "benchmarks" / "gpu.py")
OURS = gpu.Cell("ours", "tiny", 1, "bf16")


class OneJob:
    """The end of a pipe through which one job arrives."""

    def __init__(self, *job):
        self.jobs, self.result = [job], None

    def recv(self):
        if not self.jobs:
            raise EOFError
        return self.jobs.pop()

    def send(self, result):
        self.result = result


class WorkerHere:
    """Does each job as the process of a Worker does, in this process."""

    def do(self, function, arguments, limit):
        connection = OneJob(function, arguments)
        gpu.work(connection)
        return connection.result

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Make all measurements in this process, in a folder without the text of corpus.py."""
    monkeypatch.setattr(gpu, "Worker", WorkerHere)
    monkeypatch.setattr(gpu, "GPU_TESTS", ())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_ins(here, monkeypatch):
    """Let the benchmark find a GPU, with stand-ins for what it asks of torch.cuda."""
    values = {
        "is_available": True,
        "get_device_name": "NVIDIA L4",
        "get_device_properties": SimpleNamespace(total_memory=24e9),
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 1234 * 2**20,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(gpu, "driver_version", lambda: "1.2")
    monkeypatch.setattr(gpu, "to_device", lambda batches, device: batches)
    gpu.count_flop_of_few.cache_clear()  # of other stand-ins


def tables(out):
    """Return the Markdown tables in a text: lists of rows, without the line below the header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", out, re.M):
        header, line, *rows = [row.split("|")[1:-1] for row in block.splitlines()]
        assert set(line) == {"---"} and all(len(row) == len(header) == len(line) for row in rows)
        found.append([[cell.strip() for cell in row] for row in rows])
    return found


# ---------------------------------------------------------------- the program


@pytest.mark.slow
def test_everything_in_small_on_a_cpu(here, capsys):
    """A heading, a line for each measurement, and the two tables that a CPU can fill."""
    gpu.benchmark(["--device", "cpu", "--minutes", "0.005"])
    out = capsys.readouterr().out
    assert re.match(r"\d{4}-\d\d-\d\d, a CPU, \d+ threads; torch 2.*\n\nGPU tests: left out\n", out)
    lines = re.findall(
        r"^tiny, batch 1, (\w+), (\w+): [\d.]+ \([\d.]+ to [\d.]+\) ms, [\d,]+ tokens a second$", out, re.M
    )
    assert lines == [(mode, model) for mode in ("bf16", "float32") for model in step_time.MODELS]
    steps, training = tables(out)
    assert [row[0] for row in steps] == ["tiny, 1, bf16", "tiny, 1, float32"]
    for _, ours, theirs, ratio, our_speed, their_speed, *of_a_gpu in steps:
        our_ms, their_ms = (float(cell.split()[0]) for cell in (ours, theirs))
        assert float(ratio) == pytest.approx(their_ms / our_ms, abs=0.05)
        assert float(our_speed.replace(",", "")) == pytest.approx(64 / our_ms * 1000, rel=0.02)
        assert float(their_speed.replace(",", "")) == pytest.approx(64 / their_ms * 1000, rel=0.02)
        assert of_a_gpu == ["", "", ""]
    assert len(training) == gpu.POINTS
    updates = [int(row[1]) for row in training]
    assert updates == sorted(set(updates))
    assert all(9 < float(loss) < 12 for row in training for loss in row[3:])
    assert "data.txt, a page, because corpus/train.txt or corpus/valid.txt is missing" in out.replace(os.sep, "/")


@pytest.mark.slow
def test_the_way_on_a_gpu(stand_ins, monkeypatch, capsys):
    """Rehearsed with stand-ins: MFU, peak memory, the idle share and the kernels appear in lines and tables."""
    prepare, profile = main.prepare, torch.profiler.profile

    def prepare_on_cpu(argv):
        return prepare(["cpu" if word == "cuda" else word for word in argv])

    monkeypatch.setattr(main, "prepare", prepare_on_cpu)
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=cpu_only))
    monkeypatch.setattr(gpu, "GPU_WORK", ("cpu_op",))
    monkeypatch.setattr(step_time, "train_steps", lambda *args: itertools.repeat(0.001))
    monkeypatch.setattr(step_time, "count_flop", lambda vocab, batches, args: 60_500_000_000 * args.batch_size)
    gpu.benchmark(["--no_tests", "--shapes", "tiny", "--batch_size", "2", "--modes", "bf16", "--steps", "2"])
    out = capsys.readouterr().out
    assert "NVIDIA L4, 24 GB, driver 1.2; CUDA" in out and "peaks, TFLOP/s: bf16 121, tf32 60, float32 30\n" in out
    share = "100.0%"  # 2 * 60.5 GFLOP in 1 ms, at 121 TFLOP/s
    assert f"tiny, batch 2, bf16, ours: 1.0 (1.0 to 1.0) ms, 128,000 tokens a second, MFU {share}, 1,234 MiB\n" in out
    steps, idle, kernels = tables(out)
    assert kernels == [[name, "1.0 (1.0 to 1.0)", "1,234"] for name in gpu.ALLOWED_KERNELS]
    order = [
        "idle share, tiny: ",
        "attention kernel FLASH_ATTENTION: tiny, batch 8, bf16, ours: 1.0 ",
        "\ntiny, batch 2, ",
    ]
    assert sorted(order, key=out.index) == order
    assert steps[0][3:] == ["1.00", "128,000", "128,000", share, "1,234", "1,234"]
    [[name, step, busy, part]] = idle
    assert name == "tiny, batch 32" and float(step) > 0 and float(busy) > 0 and f"idle share, tiny: {part}\n" in out
    assert float(part[:-1]) == pytest.approx(100 * (1 - float(busy) / float(step)), abs=2)


def test_each_kernel_is_forced(stand_ins, monkeypatch, capsys):
    """On a CPU only MATH takes our widths. The other kernels leave their error; other steps are not forced."""
    q, v, mask = torch.zeros(1, 1, 2, 344), torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, 2, 2)

    def steps_of_attention(*args):
        while True:
            F.scaled_dot_product_attention(q, q, v, attn_mask=mask)
            yield 0.001

    monkeypatch.setattr(gpu, "measure_idle", lambda shape: gpu.Idle(0.02, 0.01))
    monkeypatch.setattr(step_time, "train_steps", steps_of_attention)
    monkeypatch.setattr(step_time, "count_flop", lambda *args: 10**9)
    with pytest.warns(UserWarning, match="same last dimension"):
        gpu.benchmark(["--no_tests", "--shapes", "tiny", "--batch_size", "2", "--modes", "bf16", "--steps", "2"])
    steps, _, kernels = tables(capsys.readouterr().out)
    assert steps[0][1:4] == ["1.0 (1.0 to 1.0)"] * 2 + ["1.00"]
    found = {name: (result, memory) for name, result, memory in kernels}
    assert found.pop("the choice of PyTorch") == found.pop("MATH") == ("1.0 (1.0 to 1.0)", "1,234")
    reasons = {name: reason for name, (reason, memory) in found.items() if memory == ""}
    assert list(reasons) == ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]
    assert re.match(r"RuntimeError: No available kernel\.", reasons["FLASH_ATTENTION"])
    assert all(reason.startswith("RuntimeError: No ") for reason in reasons.values())
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()  # again


def test_scores_that_a_kernel_computes_again_count_once(monkeypatch):
    """Two products of 8 x 8 x 16 forward and four backward, though the fused kernel makes a fifth."""
    args, _, _ = main.read_flags([])

    def steps(*_):
        q = torch.zeros(1, 1, 8, 16, requires_grad=True)
        while True:
            F.scaled_dot_product_attention(q, q, q).sum().backward()
            yield 0.001

    monkeypatch.setattr(step_time, "train_steps", steps)
    assert step_time.count_flop(None, [], args) == 6 * 2 * 8 * 8 * 16


def test_a_step_that_cannot_learn_has_no_time(here, monkeypatch):
    """A gradient of NaN is an error: the time of such steps would look like any other."""
    build = step_time.build

    def broken(*args):
        model = build(*args)
        torch.nn.init.constant_(model.mask_emb, float("nan"))
        return model

    monkeypatch.setattr(step_time, "build", broken)
    with pytest.raises(RuntimeError, match="the norm of the gradient of ours is nan"):
        gpu.measure(OURS, "cpu", 1)


@pytest.mark.slow
def test_shift_is_ours_only(here, capsys):
    """The columns of transformers are empty in its row; its peak FLOP/s are those of bf16."""
    assert gpu.read_flags(OURS._replace(mode="shift")).clamp_len == 1_000_000
    gpu.benchmark(["--device", "cpu", "--modes", "shift"])
    out = capsys.readouterr().out
    [[row]] = tables(out)
    assert row[0] == "tiny, 1, shift" and float(row[1].split()[0]) > 0 and float(row[4].replace(",", "")) > 0
    assert row[2:4] == ["", ""] and row[5:] == [""] * 4 and "transformers:" not in out
    peaks, steps = gpu.find_peaks("NVIDIA L4"), gpu.Steps([0.1], tokens=1, flop=10**12, peak_memory=None)
    assert gpu.columns(OURS._replace(mode="shift"), steps, peaks) == gpu.columns(OURS, steps, peaks)


@pytest.mark.parametrize("mode, precision", [("float32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_the_mode_sets_the_precision(monkeypatch, mode, precision):
    """Only float32 has full precision, whatever main.prepare has set before."""
    seen = []

    def steps_that_look(*args):
        while True:
            seen.append(torch.get_float32_matmul_precision())
            yield 0.001

    monkeypatch.setattr(step_time, "train_steps", steps_that_look)
    monkeypatch.setattr(processes, "set_matmul_precision", lambda device: torch.set_float32_matmul_precision("medium"))
    gpu.load_batches.cache_clear()  # so that main.prepare is called
    before = torch.get_float32_matmul_precision()
    try:
        gpu.measure(OURS._replace(mode=mode), "cpu", 1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {precision}


@pytest.mark.slow
def test_a_failure_leaves_its_reason(here, monkeypatch, capsys):
    """Out of memory and an error stand in the table, the traceback on stderr; the other models are measured."""
    train_steps = step_time.train_steps

    def failing(name, vocab, batches, args):
        if name == "transformers":
            raise torch.OutOfMemoryError("CUDA out of memory") if args.bf16 else ValueError("a | b\nc")
        return train_steps(name, vocab, batches, args)

    monkeypatch.setattr(step_time, "train_steps", failing)
    gpu.benchmark(["--device", "cpu"])
    out, err = capsys.readouterr()
    [[bf16, float32]] = tables(out)
    assert bf16[2:4] == ["out of memory", ""] and float32[2:4] == ["ValueError: a / b", ""]
    assert "tiny, batch 1, bf16, transformers: out of memory\n" in out
    assert float(bf16[1].split()[0]) > 0 and float(float32[1].split()[0]) > 0
    assert err.count("Traceback") == 1 and "ValueError: a | b\nc\n" in err


def test_without_a_budget_all_is_skipped(here, capsys):
    """The tables still come, and say it."""
    gpu.benchmark(["--device", "cpu", "--budget", "0"])
    [rows] = tables(capsys.readouterr().out)
    assert len(rows) == 2 and all(row[1:3] == ["skipped, the budget is over"] * 2 for row in rows)


def test_without_a_budget_all_of_a_gpu_is_skipped(stand_ins, monkeypatch, capsys):
    """The idle share and the attention kernels too."""
    monkeypatch.setattr(gpu, "measure", None)  # what is not skipped fails
    gpu.benchmark(["--budget", "0"])
    steps, idle, kernels = tables(capsys.readouterr().out)
    skipped = "skipped, the budget is over"
    assert len(steps) == 2 * 4 * 5 and all(row[1] == skipped for row in steps)
    assert [row[-1] for row in idle] == [skipped] * 2
    assert kernels == [[name, skipped, ""] for name in gpu.ALLOWED_KERNELS]


def test_the_budget_limits_and_skips(monkeypatch):
    """A measurement gets no more than what is left; with less than LEAST_LEFT none starts."""
    clock, limits = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow:
        def do(self, function, arguments, limit):
            limits.append(limit)
            clock[0] += 49
            return function(*arguments)

    budget = gpu.Budget(100, Slow())
    assert [budget.do(max, [1, 2], 60) for _ in range(3)] == [2, 2, gpu.Failed(gpu.SKIPPED)]
    assert limits == [60, 51]


def test_the_most_important_first():
    """Base in bf16 at 8 and 32 first, ours before transformers; shift and compiled last; nothing twice."""
    options = SimpleNamespace(modes=list(gpu.MODES), shapes=["base", "small"], batch_size=list(gpu.BATCH_SIZES))
    first, rest = gpu.plan(options)
    assert first == [gpu.Cell(model, "base", size, "bf16") for model in step_time.MODELS for size in (8, 32)]
    assert len({*first, *rest}) == len(first) + len(rest) == 2 * 2 * 4 * 4 + 2 * 4
    modes = [cell.mode for cell in rest]
    assert modes[-24:] == ["shift"] * 8 + ["compiled"] * 16 and not {"shift", "compiled"} & {*modes[:-24]}
    assert all(cell.model == "ours" for cell in rest if cell.mode == "shift")


def test_flags_are_checked(monkeypatch):
    """In one line, with the flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--device", "cuda"], ["--batch_size", "0"], ["--steps", "x"], ["--modes", "fp8"], ["--bugdet", "1"]):
        with pytest.raises(UserError, match=words[0]):
            gpu.parse(words)


@pytest.mark.parametrize("absent", [None, "transformers"])
def test_missing_packages_are_named_in_one_line(absent):
    """Before anything else is imported; exit status 2."""
    command = [sys.executable, "-S", PROGRAM]  # without any package
    if absent:
        code = (
            "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
            f"importlib.util.find_spec = lambda name: None if name == {absent!r} else find(name)\n"
            f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    names = absent or "torch, numpy, .*, transformers, psutil, pytest"
    line = f"gpu.py: error: not installed: {names}; pip install -r requirements-dev.txt\n"
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(line, done.stderr)


# ---------------------------------------------------------------- the process that measures


@pytest.mark.slow
def test_a_worker_outlives_its_jobs():
    """Out of memory leaves the process; an error, a hang and a death end it, and the next job has a new one."""
    worker = gpu.Worker()
    try:
        number = worker.do(os.getpid, [], 60)
        assert number != os.getpid()
        assert worker.do(np.zeros, [2**52], 60) == gpu.Failed("out of memory")
        assert worker.do(os.getpid, [], 60) == number
        assert worker.do(int, ["x"], 60).reason.startswith("ValueError: invalid literal")
        other = worker.do(os.getpid, [], 60)
        assert other not in (number, os.getpid())
        assert worker.do(time.sleep, [600], 0.5) == gpu.Failed("stopped after 0 s")
        assert worker.do(os._exit, [3], 60) == gpu.Failed("the process died, exit status 3")
        assert worker.process is None
    finally:
        worker.close()


# ---------------------------------------------------------------- arithmetic


def test_mfu_by_hand():
    """39.56 TFLOP in a median of 0.2 s are 197.8 TFLOP/s, a fifth of 989, for our model and the peak of the mode."""
    peaks = gpu.find_peaks("NVIDIA H100 80GB HBM3")
    steps = gpu.Steps([0.1, 0.2, 0.4], tokens=4096, flop=39_560 * 10**9, peak_memory=2500.4)
    assert gpu.mfu(steps, peaks["bf16"]) == pytest.approx(0.2)
    assert gpu.columns(OURS, steps, peaks) == ("200.0 (150.0 to 300.0)", "20,480", "20.0%", "2,500")
    assert gpu.columns(OURS._replace(mode="compiled"), steps, peaks)[2] == "20.0%"
    assert gpu.columns(OURS._replace(mode="tf32"), steps, peaks)[2] == "40.0%"
    assert gpu.columns(OURS._replace(mode="float32"), steps, peaks)[2] == "295.2%"
    assert gpu.columns(OURS._replace(model="transformers"), steps, peaks)[2] == ""
    assert gpu.columns(OURS, steps, gpu.find_peaks("another"))[2] == ""


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of a GPU
        ("Tesla T4", None),  # has no bfloat16
        ("", None),
    ],
)
def test_peaks_belong_to_whole_names(name, bf16):
    """A GPU that only resembles one in the table has no MFU."""
    assert gpu.find_peaks(name).get("bf16") == bf16


def test_work_at_the_same_time_counts_once():
    """Of 0 to 10, 5 to 8, 9 to 15 and 20 to 21 microseconds: 16; what is no work of the GPU does not count."""
    spans = [("kernel", 20, 1), ("kernel", 0, 10), ("gpu_memcpy", 5, 3), ("gpu_memset", 9, 6), ("cuda_runtime", 0, 99)]
    events = [{"cat": cat, "ts": begin, "dur": length} for cat, begin, length in spans]
    assert gpu.busy_seconds([*events, {"ph": "M", "name": "process_name"}]) == pytest.approx(16e-6)
    assert gpu.idle_columns(gpu.Idle(step=0.02, busy=0.015)) == ("20.0", "15.0", "25.0%")


def test_flop_grow_by_the_same_number_with_each_row():
    """Those of four rows follow from one row and two, in the usual form and in that of `rel_shift`."""
    gpu.count_flop_of_few.cache_clear()
    counts = {}
    for mode, same_products in (("bf16", "float32"), ("shift", "shift")):
        four = OURS._replace(batch_size=4, mode=mode)
        counts[mode] = gpu.count_flop(four, "cpu")
        assert counts[mode] == gpu.count_flop_of_few(four._replace(mode=same_products), "cpu") > 10**7
    assert counts["bf16"] != counts["shift"]


# ---------------------------------------------------------------- the GPU tests and the text


@pytest.mark.slow
def test_marked_tests_are_run(tmp_path):
    """Those with "gpu" in their names; failures and hangs are told."""
    file = tmp_path / "test_stand_in.py"
    file.write_text("def test_a_gpu(): pass\ndef test_other(): assert False\n")
    assert re.match(r"1 passed, 1 deselected in ", gpu.run_tests([file], 60))
    file.write_text("def test_a_gpu(): assert 3 == 4\n")
    told = gpu.run_tests([file], 60)
    assert "assert 3 == 4" in told and "1 failed" in told and told.endswith("\nexit status 1")
    file.write_text("import time\ndef test_a_gpu(): pass\ndef test_b_gpu(): time.sleep(60)\n")
    told = gpu.run_tests([file], 4)
    assert told.endswith("\nstopped after 4 s")


def test_every_test_of_a_gpu_is_found():
    """Each test that is skipped without a GPU has "gpu" in its name, and its file is in GPU_TESTS."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        skipped = re.findall(r'reason=["]needs a GPU"\)\n(?:@.*\n)*def (\w+)', text)
        assert len(skipped) == len(re.findall(r'reason=["]needs a GPU', text))
        assert all("gpu" in name for name in skipped)
        if skipped:
            found.add(f"tests/{path.name}")
    assert found == set(gpu.GPU_TESTS)


def test_the_text_of_corpus_is_preferred(monkeypatch, tmp_path):
    """Where both files are, at a batch of 32."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("train.txt", "valid.txt"):
        assert "data.txt, a page" in gpu.choose_text()[1]
        (tmp_path / "corpus" / name).write_text("a\n")
    argv, text = gpu.choose_text()
    assert text == str(Path("corpus", "train.txt")) and argv[1] == text and argv[-2:] == ["--batch_size", "32"]
