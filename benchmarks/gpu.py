"""Run all GPU measurements of this project: tests, speed, memory, idle time and, on request, a short training run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 4
    python benchmarks/gpu.py --no_tests --shapes base --batch_size 8 32 --modes compiled --budget 900
    python benchmarks/gpu.py --device cpu

Without a GPU the same program runs on a tiny model, to show that it works; the figures then mean nothing.

The most important measurements come first: the GPU tests; base in bfloat16 at batches of 8 and 32, this project, then
transformers; the idle share; the attention kernels; the rest; compiled models last. Each prints a line when it is done,
and Markdown tables follow at the end. When --budget is over, the remaining measurements are skipped. If a measurement
fails, the table gives the reason, and the others go on.

A step is the same as in step_time.py: forward, loss, backward, clipping and AdamW, with a full memory and with the same
windows and weights for both models. The GPU is synchronized after each step. Peak memory is the most that PyTorch had
allocated in the timed steps, model and optimizer included. Tokens are those of the windows; memory does not count.
MFU = FLOP of a step / seconds of a step / FLOP/s that the GPU can reach in this mode (dense, as NVIDIA states it). A
multiplication and an addition in a matrix product count as two FLOP. Scores that a fused kernel computes again for the
gradient count once.
Modes:
    bf16      autocast to bfloat16, as main.py --bf16 does
    tf32      float32 with matrix products in TF32, the default of main.py on a GPU
    float32   float32 with matrix products in full precision
    shift     bf16 with --clamp_len 1000000, longer than any distance. The scores are the same, but the position scores
              come from `rel_shift`, the older form. Compare it with bf16. It is measured for this project only
    compiled  bf16 with torch.compile
Attention kernels: PyTorch has several kernels for scaled_dot_product_attention. Not every kernel takes an additive mask
and, for base, queries and keys 344 wide and values 64 wide, with a backward pass. This table forces each kernel in turn
and gives the time and memory of a step of the first shape, batch 8, bf16, or the error. PyTorch writes to stderr why a
kernel refuses.
Idle share = 1 - time in which the GPU works / time of a step, in main.py's own loop with its prefetching. The profiler
measures the time in which the GPU works. A clock times the steps before the profiled ones, because the profiler slows
down the CPU.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import UserError, mistakes_in_one_line

with mistakes_in_one_line("gpu.py"):  # before an import fails
    missing = []
    for package in (
        "torch", "numpy", "safetensors", "tqdm", "filelock", "joblib", "pytorch_pretrained_bert", "transformers",
        "psutil", "pytest",
    ):  # fmt: skip
        if importlib.util.find_spec(package) is None:
            missing.append(package)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; pip install -r requirements-dev.txt")

import numpy as np
import step_time
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import main
from support import corpus, flags, processes

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "base": step_time.SHAPES["base"],
    "small": step_time.SHAPES["small"],
    "tiny": "--n_layer 2 --d_model 16 --n_head 2 --seq_len 64",  # for a CPU
}
DROPOUT = "--dropout 0.1 --dropatt 0.1"  # the paper's
BATCH_SIZES = (8, 32, 1, 128)
MODES = {
    "bf16": "--bf16",
    "tf32": "",
    "float32": "",
    "shift": "--bf16 --clamp_len 1000000",
    "compiled": "--bf16 --compile",
}
PEAK_OF_MODE = {"bf16": "bf16", "tf32": "tf32", "float32": "float32", "shift": "bf16", "compiled": "bf16"}
# TFLOP/s without sparsity, as NVIDIA states them; names as torch.cuda.get_device_name gives them
PEAKS = {
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": {"bf16": 989, "tf32": 495, "float32": 67},  # SXM
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": {"bf16": 835, "tf32": 418, "float32": 60},
    r"NVIDIA H100 PCIe": {"bf16": 756, "tf32": 378, "float32": 51},
    r"NVIDIA A100(-SXM4-40GB|-SXM4-80GB|-PCIE-40GB| 80GB PCIe)": {"bf16": 312, "tf32": 156, "float32": 19.5},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165, "tf32": 83, "float32": 83},
    r"NVIDIA L4": {"bf16": 121, "tf32": 60, "float32": 30},
    r"Tesla T4": {"float32": 8.1},
}
GPU_TESTS = ("tests/test_main.py", "tests/test_xlnet.py")
TESTS_LIMIT, LIMIT, COMPILED_LIMIT = 150, 60, 240  # seconds for the tests, and for each measurement
GRACE = 3  # seconds for a process to end by itself
LEAST_LEFT = 5  # seconds of the budget that a measurement needs to start
WINDOWS = 2  # which the steps repeat; transformers needs a mask for each, and the masks count as memory
WARM_UP = 3  # steps after the memory is full
IDLE_BATCH, IDLE_WARM_UP, IDLE_STEPS = 32, 4, 12
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # of SDPBackend
ALLOWED_KERNELS = {"the choice of PyTorch": KERNELS} | {name: (name,) for name in KERNELS}  # by row of their table
KERNEL_BATCH, KERNEL_STEPS = 8, 5
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in a trace
TRAINING = "--bf16 --ff_activation gelu_new --learning_rate 1e-4 --warmup_steps 200"
POINTS = 4  # evaluations in the training run
OUT_OF_MEMORY = "out of memory"
SKIPPED = "skipped, the budget is over"


class Cell(NamedTuple):
    """One measurement of steps."""

    model: str  # of step_time.MODELS
    shape: str  # of SHAPES
    batch_size: int
    mode: str  # of MODES

    def __str__(self) -> str:
        return f"{self.shape}, batch {self.batch_size}, {self.mode}, {self.model}"


class Steps(NamedTuple):
    """The result of a measurement of steps."""

    seconds: list[float]  # of each step
    tokens: int  # of each step
    flop: int | None  # of each step, None if not counted
    peak_memory: float | None  # MiB; None on a CPU


class Idle(NamedTuple):
    """The seconds of a step in the training loop, and the seconds in which the GPU works."""

    step: float
    busy: float


class Failed(NamedTuple):
    """The reason for a missing result."""

    reason: str


# ---------------------------------------------------------------- the process that measures


def work(connection: Connection) -> None:
    """Run each job that arrives, a function with its arguments, and send back its result or Failed."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the benchmark has ended
            return
        try:
            result = function(*arguments)
        except Exception as error:  # of any kind: the benchmark goes on with the other measurements
            if isinstance(error, (MemoryError, RuntimeError)) and processes.is_out_of_memory(error):
                result = Failed(OUT_OF_MEMORY)
            else:
                traceback.print_exc()
                result = Failed(first_line(error))
        free_memory()
        connection.send(result)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, in a form that does not break a table."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}".replace("|", "/")[:120]


def free_memory() -> None:
    """Free the GPU memory of models that are no longer used."""
    torch.compiler.reset()  # compiled code keeps models alive, and a process compiles a function only a few times
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after a fault of the GPU every call fails
            torch.cuda.empty_cache()


class Worker:
    """A process that does one job after another.

    Starting a process takes seconds, so jobs share one. If a job hangs or fails, the process ends, because a GPU fault
    spoils all later work of a process; the next job starts a new process. After "out of memory" the process goes on.
    """

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=work, args=(other_end,))
        self.process.start()
        other_end.close()  # so that the death of the process ends the connection

    def do(self, function: Callable, arguments: Sequence, limit: float) -> Any:
        """Return function(*arguments), computed in the process, or Failed; limit: seconds."""
        if self.process is None:
            self.start()
        try:
            self.connection.send((function, arguments))
            if self.connection.poll(limit):
                result = self.connection.recv()
            else:
                result = Failed(f"stopped after {limit:.0f} s")
        except (EOFError, OSError):
            self.process.join(1)
            result = Failed(f"the process died, exit status {self.process.exitcode}")
        if isinstance(result, Failed) and result.reason != OUT_OF_MEMORY:
            self.close()
        return result

    def close(self) -> None:
        """End the process, even if it is busy."""
        if self.process is not None:
            self.connection.close()  # ends a process that waits for a job
            self.process.join(GRACE)
            self.process.kill()
            self.process.join()
        self.process = None


# ---------------------------------------------------------------- measurements in that process


def describe_machine(device: str) -> tuple[str, str]:
    """Return the name of the GPU ("" for a CPU), and a line about the machine and the versions."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    if device == "cpu":
        return "", f"a CPU, {torch.get_num_threads()} threads; {versions}"
    name, gigabytes = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9
    return name, f"{name}, {gigabytes:.0f} GB, driver {driver_version()}; CUDA {torch.version.cuda}, {versions}"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def read_flags(cell: Cell) -> argparse.Namespace:
    """Return the flags of main.py for a measurement."""
    argv = [*DROPOUT.split(), *SHAPES[cell.shape].split(), *MODES[cell.mode].split()]
    args, _, _ = main.read_flags([*argv, "--batch_size", str(cell.batch_size)])
    return args


@functools.cache
def load_batches(shape: str, batch_size: int) -> tuple[corpus.Vocabulary, list[dict[str, Tensor]]]:
    """Return the vocabulary and the batches of step_time.py, on the CPU."""
    vocab, batches = step_time.load_batches(read_flags(Cell("ours", shape, batch_size, "float32")), "cpu")
    return vocab, batches[:WINDOWS]


def to_device(batches: list[dict[str, Tensor]], device: str) -> list[dict[str, Tensor]]:
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def measure(cell: Cell, device: str, n_steps: int) -> Steps:
    """Time n_steps training steps of one model, after a warm-up."""
    args = read_flags(cell)
    flop = count_flop(cell, device) if device == "cuda" else None
    vocab, batches = load_batches(cell.shape, cell.batch_size)
    # after load_batches, because main.prepare sets it too
    torch.set_float32_matmul_precision("highest" if cell.mode == "float32" else "high")
    steps = step_time.train_steps(cell.model, vocab, to_device(batches, device), args)
    with torch.compiler.set_stance("force_eager"):  # compile for a full memory only: each length takes a minute
        for _ in range(math.ceil(args.mem_len / args.reuse_len)):
            next(steps)
    for _ in range(WARM_UP):
        next(steps)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [next(steps) for _ in range(n_steps)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return Steps(seconds, args.batch_size * args.seq_len, flop, peak)


def count_flop(cell: Cell, device: str) -> int:
    """Return the FLOP of our step at any batch size, from the counts for one row and for two rows.

    These two counts suffice, because each product is computed once for each row, or once for all rows.
    """
    mode = "shift" if cell.mode == "shift" else "float32"  # all other modes compute the same products
    one = count_flop_of_few(Cell("ours", cell.shape, 1, mode), device)
    two = count_flop_of_few(Cell("ours", cell.shape, 2, mode), device)
    return one + (cell.batch_size - 1) * (two - one)


@functools.cache
def count_flop_of_few(cell: Cell, device: str) -> int:
    """Count the FLOP of our step at a small batch size, and return them."""
    vocab, batches = load_batches(cell.shape, cell.batch_size)
    return step_time.count_flop(vocab, to_device(batches, device), read_flags(cell))


def measure_kernels(allowed: Sequence[str], cell: Cell, device: str, n_steps: int) -> Steps:
    """Do the same as `measure`, but let attention use only the allowed kernels; allowed: names of SDPBackend."""
    with sdpa_kernel([getattr(SDPBackend, name) for name in allowed]):
        return measure(cell, device, n_steps)


def measure_idle(shape: str) -> Idle:
    """Train with the loop of main.py on a GPU in bfloat16; return the time of a step and how long the GPU works."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data, trace = Path(folder, "data.txt"), Path(folder, "trace.json")
        page = (ROOT / "data.txt").read_text(encoding="utf-8")
        data.write_text(f"{page}\n" * 2 * IDLE_BATCH, encoding="utf-8")  # enough windows for one pass
        argv = [*DROPOUT.split(), *SHAPES[shape].split(), "--bf16", "--device", "cuda"]
        argv += ["--data", str(data), "--cache_dir", folder, "--num_step", "1000"]
        argv += ["--batch_size", str(IDLE_BATCH), "--rows", str(IDLE_BATCH)]
        run = main.prepare(argv)
        with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
            make_steps(steps, IDLE_WARM_UP)
            begin = time.perf_counter()
            make_steps(steps, IDLE_STEPS)
            seconds = time.perf_counter() - begin
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                make_steps(steps, IDLE_STEPS)
        profiler.export_chrome_trace(str(trace))
        busy = busy_seconds(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    if busy == 0:
        raise RuntimeError("the profiler saw no work of the GPU")
    return Idle(seconds / IDLE_STEPS, busy / IDLE_STEPS)


def make_steps(steps: Iterable[dict[str, Any]], number: int) -> None:
    """Make `number` training steps, and wait until the GPU has finished them."""
    for _ in range(number):
        next(steps)
    torch.cuda.synchronize()


def busy_seconds(events: list[dict[str, Any]]) -> float:
    """Return the seconds in which a GPU worked, from the events of a trace, which are in microseconds.

    Overlapping work counts once.
    """
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in GPU_WORK)
    busy, until = 0.0, -math.inf
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6


def train(minutes: float, shape: str, device: str) -> None:
    """Train from scratch for some minutes, and print a table of the held-out loss, each row when it is measured."""
    argv, text = choose_text()
    argv += [*TRAINING.split(), *SHAPES[shape].split(), "--device", device]
    argv += ["--train_steps", str(flags.MOST_STEPS), "--eval_steps", str(flags.MOST_STEPS)]
    run = main.prepare(argv)
    print(f"\n{shape} from scratch on {text}: `{' '.join(argv)}`\n")
    print("| minutes | updates | tokens a second | training loss | held-out loss |\n|---|---|---|---|---|", flush=True)
    seconds, updates = 0.0, 0  # of training, without evaluation
    with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
        for point in range(1, POINTS + 1):
            losses: list[Tensor] = []  # since the last point
            while not losses or seconds < 60 * minutes * point / POINTS:
                begin = time.perf_counter()
                losses.append(next(steps)["loss"])
                seconds += time.perf_counter() - begin
            updates += len(losses)
            speed = updates * run.args.batch_size * run.args.seq_len / seconds
            training_loss = torch.stack(losses).mean().item()
            held_out_loss = main.evaluate(run.model, run.valid_loader, run.device, run.args.bf16)
            numbers = f"{training_loss:.3f} | {held_out_loss:.3f}"
            print(f"| {seconds / 60:.2f} | {updates:,} | {speed:,.0f} | {numbers} |", flush=True)


def choose_text() -> tuple[list[str], str]:
    """Return flags for the text of corpus.py, or for data.txt if that text is missing, and the name of the text."""
    paths = [Path("corpus", name) for name in ("train.txt", "valid.txt")]
    if all(path.exists() for path in paths):
        return ["--data", str(paths[0]), "--valid", str(paths[1]), "--batch_size", "32"], str(paths[0])
    flags_of_page = ["--data", str(ROOT / "data.txt"), "--valid", "0.2", "--batch_size", "1"]
    return flags_of_page, f"data.txt, a page, because {paths[0]} or {paths[1]} is missing (benchmarks/corpus.py)"


# ---------------------------------------------------------------- the tests


def run_tests(files: Sequence[str | Path], limit: float) -> str:
    """Run the tests with "gpu" in their names; return the last line of pytest, or its last 60 if a test failed."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-k", "gpu", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", *map(str, files)]  # without pytest-xdist, which may be missing
    threads = str(min(8, os.cpu_count() or 1))  # tests compare a GPU with a CPU; with one thread this takes long
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return f"{last_lines(error.stdout or b'')}\nstopped after {limit:.0f} s"
    written = last_lines(done.stdout + done.stderr)
    if done.returncode == 0:
        return written.splitlines()[-1].strip("= ")
    return f"{written}\nexit status {done.returncode}"


def last_lines(written: bytes) -> str:
    return "\n".join(written.decode(errors="replace").strip().splitlines()[-60:])


# ---------------------------------------------------------------- output


def find_peaks(gpu: str) -> dict[str, float]:
    """Return the FLOP/s that a GPU can reach, keyed by the values of PEAK_OF_MODE; {} if unknown."""
    for pattern, peaks in PEAKS.items():
        if re.fullmatch(pattern, gpu):
            return {numbers: 1e12 * peak for numbers, peak in peaks.items()}
    return {}


def mfu(steps: Steps, peak: float) -> float:
    """Return the share of `peak` FLOP/s that the median step reaches."""
    return steps.flop / float(np.median(steps.seconds)) / peak


def columns(cell: Cell, result: Steps | Failed, peaks: dict[str, float]) -> tuple[str, str, str, str]:
    """Return milliseconds with quartiles, tokens a second, MFU and peak MiB, as text; "" where there is none."""
    if isinstance(result, Failed):
        return result.reason, "", "", ""
    low, middle, high = 1000 * np.percentile(result.seconds, (25, 50, 75))
    peak = peaks.get(PEAK_OF_MODE[cell.mode])
    # FLOP are those of our step
    share = f"{mfu(result, peak):.1%}" if cell.model == "ours" and result.flop and peak else ""
    memory = "" if result.peak_memory is None else f"{result.peak_memory:,.0f}"
    return f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{1000 * result.tokens / middle:,.0f}", share, memory


def describe(cell: Cell, result: Steps | Failed, peaks: dict[str, float]) -> str:
    """Return the line about a finished measurement."""
    milliseconds, speed, share, memory = columns(cell, result, peaks)
    if isinstance(result, Failed):
        return f"{cell}: {milliseconds}"
    line = f"{cell}: {milliseconds} ms, {speed} tokens a second"
    if share:
        line += f", MFU {share}"
    return f"{line}, {memory} MiB" if memory else line


def print_steps(results: dict[Cell, Steps | Failed], peaks: dict[str, float]) -> None:
    """Print the table of steps, a row for both models; the columns of a model that is not measured stay empty."""
    print(
        "\n| shape, batch, mode | ms a step, this project (quartiles) | ms, transformers | times as fast | "
        "tokens a second, this project | transformers | MFU, this project | peak MiB, this project | transformers |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for cell in results:
        if cell.model != "ours":
            continue
        beside = cell._replace(model="transformers")
        ours, theirs = results[cell], results.get(beside)
        ratio = their_ms = their_speed = their_memory = ""
        if isinstance(ours, Steps) and isinstance(theirs, Steps):
            ratio = f"{np.median(theirs.seconds) / np.median(ours.seconds):.2f}"
        if theirs is not None:
            their_ms, their_speed, _, their_memory = columns(beside, theirs, peaks)
        our_ms, our_speed, share, our_memory = columns(cell, ours, peaks)
        print(
            f"| {cell.shape}, {cell.batch_size}, {cell.mode} | {our_ms} | {their_ms} | {ratio} | {our_speed} | "
            f"{their_speed} | {share} | {our_memory} | {their_memory} |"
        )


def idle_columns(result: Idle | Failed) -> tuple[str, str, str]:
    """Return the milliseconds of a step, the milliseconds in which the GPU works, and the idle share, as text."""
    if isinstance(result, Failed):
        return "", "", result.reason
    return f"{1000 * result.step:.1f}", f"{1000 * result.busy:.1f}", f"{1 - result.busy / result.step:.1%}"


def print_idle(results: dict[str, Idle | Failed]) -> None:
    """Print the table of idle shares."""
    print("\n| main.py's loop, bf16 | ms a step | ms in which the GPU works | idle |\n|---|---|---|---|")
    for shape, result in results.items():
        print(f"| {shape}, batch {IDLE_BATCH} | {' | '.join(idle_columns(result))} |")


def print_kernels(cell: Cell, results: dict[str, Steps | Failed]) -> None:
    """Print the table of attention kernels, all measured on the steps of one cell."""
    print(f"\n| attention kernel; {cell} | ms a step (quartiles) | peak MiB |\n|---|---|---|")
    for name, result in results.items():
        milliseconds, _, _, memory = columns(cell, result, {})
        print(f"| {name} | {milliseconds} | {memory} |")


# ---------------------------------------------------------------- the command


def plan(options: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """Return the measurements of steps in their order: the most important ones, and the rest."""
    first, rest = [], []
    for mode in options.modes:
        for shape in options.shapes:
            for model in ("ours",) if mode == "shift" else step_time.MODELS:
                for batch_size in options.batch_size:
                    is_first = (mode, shape) == ("bf16", "base") and batch_size in (8, 32)
                    (first if is_first else rest).append(Cell(model, shape, batch_size, mode))
    return first, rest


class Budget:
    """The seconds left for measurements; passes each measurement to the worker, or skips it if the time is over."""

    def __init__(self, seconds: float, worker: Worker):
        self.end, self.worker = time.perf_counter() + seconds, worker

    def left(self) -> float:
        return self.end - time.perf_counter()

    def do(self, function: Callable, arguments: Sequence, limit: float) -> Any:
        """Return function(*arguments), or Failed; limit: seconds."""
        if self.left() < LEAST_LEFT:
            return Failed(SKIPPED)
        return self.worker.do(function, arguments, min(limit, self.left()))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--budget",
        type=flags.number(float, 0, 1e6),
        default=340,
        metavar="SECONDS",
        help="for all but --minutes (default: 340, with the start of the program six minutes)",
    )
    parser.add_argument(
        "--minutes",
        type=flags.number(float, 0, 1e4),
        metavar="N",
        help="after that, train base from scratch for so long (default: do not)",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="(default: base small; on a CPU: tiny)")
    parser.add_argument(
        "--batch_size",
        nargs="+",
        type=flags.ROWS,
        metavar="N",
        help=f"(default: {' '.join(map(str, BATCH_SIZES))}; on a CPU: 1)",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help=f"(default: {' '.join(MODES)}; on a CPU: bf16 float32)"
    )
    parser.add_argument("--steps", type=flags.STEPS, metavar="N", help="steps timed (default: 20; on a CPU: 3)")
    parser.add_argument("--no_tests", action="store_true", help="leave the GPU tests out")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; give auto or cpu")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device == "cuda"
    options.shapes = options.shapes or (["base", "small"] if on_gpu else ["tiny"])
    options.batch_size = options.batch_size or (list(BATCH_SIZES) if on_gpu else [1])
    options.modes = options.modes or (list(MODES) if on_gpu else ["bf16", "float32"])
    options.steps = options.steps or (20 if on_gpu else 3)
    return options


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Run the measurements that the flags ask for, and print lines and tables."""
    options = parse(argv)
    with contextlib.closing(Worker()) as worker:
        measure_all(options, worker)


def measure_all(options: argparse.Namespace, worker: Worker) -> None:
    """Print a heading, a line for each measurement, and the tables."""
    budget = Budget(options.budget, worker)
    on_gpu = options.device == "cuda"
    machine = worker.do(describe_machine, [options.device], LIMIT)
    gpu, line = machine if isinstance(machine, tuple) else ("", machine.reason)
    peaks = find_peaks(gpu)
    print(f"{datetime.date.today()}, {line}")
    if on_gpu:
        print(f"peaks, TFLOP/s: {', '.join(f'{name} {peak / 1e12:g}' for name, peak in peaks.items()) or 'unknown'}")
    print(flush=True)
    if not on_gpu or options.no_tests:
        print("GPU tests: left out")
    elif budget.left() < LEAST_LEFT:
        print(f"GPU tests: {SKIPPED}")
    else:
        print(f"GPU tests: {run_tests(GPU_TESTS, min(TESTS_LIMIT, budget.left()))}", flush=True)

    results: dict[Cell, Steps | Failed] = {}

    def measure_steps(cells: list[Cell]) -> None:
        for cell in cells:
            limit = COMPILED_LIMIT if cell.mode == "compiled" else LIMIT
            results[cell] = budget.do(measure, [cell, options.device, options.steps], limit)
            print(describe(cell, results[cell], peaks), flush=True)

    first, rest = plan(options)
    measure_steps(first)
    idle: dict[str, Idle | Failed] = {}
    kernels: dict[str, Steps | Failed] = {}
    kernel_cell = Cell("ours", options.shapes[0], KERNEL_BATCH, "bf16")
    if on_gpu:
        for shape in options.shapes:
            idle[shape] = budget.do(measure_idle, [shape], LIMIT)
            print(f"idle share, {shape}: {idle_columns(idle[shape])[-1]}", flush=True)
        for name, allowed in ALLOWED_KERNELS.items():
            arguments = [allowed, kernel_cell, options.device, KERNEL_STEPS]
            kernels[name] = budget.do(measure_kernels, arguments, LIMIT)
            print(f"attention kernel {name}: {describe(kernel_cell, kernels[name], peaks)}", flush=True)
    measure_steps(rest)
    print_steps(results, peaks)
    if on_gpu:
        print_idle(idle)
        print_kernels(kernel_cell, kernels)
    sys.stdout.flush()
    if options.minutes is not None:
        shape = "base" if on_gpu else "tiny"
        trained = worker.do(train, [options.minutes, shape, options.device], 60 * options.minutes + 300)
        if isinstance(trained, Failed):
            print(f"\ntraining: {trained.reason}", flush=True)


if __name__ == "__main__":
    with mistakes_in_one_line("gpu.py"):
        benchmark()
