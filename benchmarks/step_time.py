"""Measure time and memory of one training step, for this XLNet and transformers' XLNetLMHeadModel.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --growth --dropout 0
    python benchmarks/step_time.py --device cuda --shapes base --batch_size 8 32 --bf16 --compile

Both models get the same windows of data.txt, start from the same weights, carry their own memory, and make the same
step: forward, loss, backward, clipping, fused AdamW. --dropout, --bf16 and --compile apply to both, and so do the
settings of main.py for speed (`set_matmul_precision` and `keep_freed_memory`). Each model has its own process. Their
steps alternate, so that a noisy machine disturbs both alike; the table gives medians and quartiles. Peak memory on a
CPU is the growth of the process's peak since before the model was built; on a GPU it is the most that PyTorch had
allocated. FLOP are counted in our step: two for a multiplication and an addition in a matrix product.
MFU = FLOP / seconds of our step / FLOP/s of a product of two large matrices, which is measured first. gpu.py gives the
MFU relative to the FLOP/s that NVIDIA states.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from support import corpus, flags, processes
from xlnet import XLNet, order_mask, prediction_loss

MODELS = ("ours", "transformers")
SHAPES = {
    "default": "",
    "small": "--n_layer 6 --d_model 256 --n_head 4 --d_head 64 --d_inner 1024",
    "base": "--n_layer 12 --d_model 768 --n_head 12 --d_head 64 --d_inner 3072",
}
GROWTH = {
    f"seq_len {n}": f"--seq_len {n} --reuse_len {n // 2} --perm_size {n // 2} --num_predict {n // 6}"
    for n in (512, 1024, 2048, 4096)
}
GROWTH |= {f"mem_len {n}": f"--mem_len {n}" for n in (0, 384, 1536)}
MAX_WINDOWS = 8


def load_batches(args: argparse.Namespace, device: str) -> tuple[corpus.Vocabulary, list[dict[str, Tensor]]]:
    """Return the vocabulary, and the first windows of two copies of data.txt, with args.batch_size copies of each.

    main.prepare also builds a model of default shape, which is too small to distort the peak memory.
    """
    windows = ("seq_len", "reuse_len", "perm_size", "num_predict")
    argv = ["--device", "cpu", "--data", *args.data, *args.data]  # one copy is too short for windows of 4,096 tokens
    for name in windows:
        argv += [f"--{name}", str(getattr(args, name))]
    run = main.prepare(argv)
    run.loader.members = [0] * args.batch_size
    batches = []
    for step in range(min(MAX_WINDOWS, run.loader.pass_len)):
        batches.append({name: tensor.to(device) for name, tensor in run.loader.batch(step).items()})
    return run.vocab, batches


def build(name: str, vocab: corpus.Vocabulary, args: argparse.Namespace) -> nn.Module:
    """Return the model of that name; both models have the same weights."""
    torch.manual_seed(0)
    ours = main.make_model(args, vocab, None, XLNet)
    if name == "ours":
        return ours
    config = transformers.XLNetConfig(
        vocab_size=vocab.size,
        n_layer=args.n_layer,
        d_model=args.d_model,
        n_head=args.n_head,
        d_inner=args.d_inner,
        dropout=args.dropout,
        ff_activation=args.ff_activation,
        mem_len=args.mem_len,
        reuse_len=args.reuse_len,
    )
    theirs = transformers.XLNetLMHeadModel(config)
    weights = {}
    for key, value in ours.state_dict().items():
        weights[key if key.startswith("lm_loss") else f"transformer.{key}"] = value
    theirs.load_state_dict(weights)
    return theirs.train()


def inputs_for(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch in the named model's layout and under its names."""
    if name == "ours":
        return {key: value for key, value in batch.items() if key not in ("target", "target_mask")}
    positions = batch["target_mapping"].t()  # [bsz, num_predict]
    one_hot = F.one_hot(positions.clamp(min=0), batch["inp_k"].size(0)) * (positions >= 0)[:, :, None]
    return {
        "input_ids": batch["inp_k"].t(),
        "token_type_ids": batch["seg_id"].t(),
        "target_mapping": one_hot.float(),
        "perm_mask": order_mask(batch["rank"], batch["inp_q"]).float(),
    }


def train_steps(
    name: str, vocab: corpus.Vocabulary, batches: list[dict[str, Tensor]], args: argparse.Namespace
) -> Iterator[float]:
    """Make one training step at each next(), cycling through the windows; yield its seconds."""
    device = batches[0]["inp_k"].device
    model = build(name, vocab, args).to(device)
    if args.compile:
        model.compile(dynamic=False)
    optimizer = main.make_optimizer(model, args)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    prepared = [(inputs_for(name, batch), batch["target"], batch["target_mask"]) for batch in batches]
    mems = None
    for inputs, target, target_mask in itertools.cycle(prepared):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            if name == "ours":
                logits, mems = model(**inputs, mems=mems)
            else:
                output = model(**inputs, mems=mems, use_mems=args.mem_len > 0)
                logits, mems = output.logits.transpose(0, 1), output.mems
        prediction_loss(logits, target, target_mask).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if not norm.isfinite():  # do not time a step that cannot learn
            raise RuntimeError(f"the norm of the gradient of {name} is {norm.item()}")
        yield seconds


def warm_up(args: argparse.Namespace) -> int:
    """Return the number of steps after which the memory is full, and everything is compiled and allocated."""
    return 2 + math.ceil(args.mem_len / args.reuse_len)


def peak_rss() -> float:
    """Return the peak memory of this process, in MiB."""
    if sys.platform == "linux":  # getrusage would count what the parent had when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes


STARTED: list[Iterator[float]] = []  # the steps of this process, which trains one model


def start(name: str, args: argparse.Namespace, device: str) -> float:
    """Build a model in this process and make the steps of the warm-up.

    -> MiB: on a CPU the growth of the peak of this process meanwhile, on a GPU the peak of the GPU
    """
    vocab, batches = load_batches(args, device)
    processes.set_matmul_precision(torch.device(device))
    if device == "cpu":
        processes.keep_freed_memory(flags.largest_tensor(args, vocab.size, world_size=1))
        if sys.platform == "linux":
            import resource  # Windows lacks it

            # With a limit PyTorch raises an error. Without one the system would kill some process.
            free = psutil.virtual_memory().available
            resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    before = peak_rss()
    STARTED[:] = [train_steps(name, vocab, batches, args)]
    for _ in range(1 + warm_up(args)):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_rss() - before


def step() -> float:
    """Make the next step of the model of this process; return its seconds."""
    return next(STARTED[0])


def count_flop(vocab: corpus.Vocabulary, batches: list[dict[str, Tensor]], args: argparse.Namespace) -> int:
    """Return the FLOP of our step with a full memory."""
    not_compiled = argparse.Namespace(**vars(args) | {"compile": False})
    steps = train_steps("ours", vocab, batches, not_compiled)
    for _ in range(warm_up(args)):
        next(steps)
    # The counter would count the scores of a fused kernel again in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(steps)
    return counter.get_total_flops()


def product_speed(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of a product of two matrices of size x size numbers, the best of ten."""
    x = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        x @ x
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def compare(
    args: argparse.Namespace, device: str, n_steps: int
) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Return the seconds of n_steps steps and the peak memory in MiB of each model, and the FLOP of our step.

    If transformers' model does not fit into memory, it has no steps.
    """
    memory, seconds = {}, {name: [] for name in MODELS}
    with contextlib.ExitStack() as stack:
        pools = {}
        for name in MODELS:  # each in a process of its own, as when it trains alone
            pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            try:
                memory[name] = pool.submit(start, name, args, device).result()
                pools[name] = pool
            except (MemoryError, RuntimeError) as error:
                if name == "ours" or not processes.is_out_of_memory(error):
                    raise
        for _ in tqdm(range(n_steps), leave=False, disable=None):
            for name, pool in pools.items():
                seconds[name].append(pool.submit(step).result())
    vocab, batches = load_batches(args, device)
    return seconds, memory, count_flop(vocab, batches, args)


def print_row(name: str, seconds: dict[str, list[float]], memory: dict[str, float], flop: int, peak: float) -> None:
    """Print the row of one setting; peak: FLOP/s of a large product."""
    ours = np.percentile(seconds["ours"], (25, 50, 75))
    their_time, ratio, their_memory, share = "out of memory", "", "", ""
    if seconds["transformers"]:
        theirs = np.percentile(seconds["transformers"], (25, 50, 75))
        their_time, ratio = milliseconds(theirs), f"{theirs[1] / ours[1]:.2f}"
        their_memory, share = f"{memory['transformers']:.0f}", f"{memory['ours'] / memory['transformers']:.2f}"
    speed = flop / ours[1]
    print(
        f"| {name} | {milliseconds(ours)} | {their_time} | {ratio} | {memory['ours']:.0f} | {their_memory} | {share} | "
        f"{flop / 1e9:.1f} | {speed / 1e12:.3f} | {speed / peak:.0%} |",
        flush=True,
    )


def milliseconds(quartiles: np.ndarray) -> str:
    """Return a median and its quartiles in milliseconds, as text; quartiles: seconds."""
    low, middle, high = 1000 * quartiles
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, and print a row for each shape and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--growth", action="store_true", help="default shape, growing seq_len and mem_len")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1], help="(default: 1)")
    parser.add_argument(
        "--dropout",
        nargs="+",
        type=float,
        default=[0, 0.1],
        metavar="RATE",
        help="of hidden states and attention weights (default: 0, as in main.py, and 0.1, as in the paper)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each model (default: 20)")
    options = parser.parse_args(argv)
    settings = GROWTH if options.growth else {name: SHAPES[name] for name in options.shapes}
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    processes.set_matmul_precision(torch.device(options.device))
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    peak = product_speed(options.device, dtype, 8192 if options.device == "cuda" else 2048)
    print(
        f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, {options.steps} steps of "
        f"each, {'bfloat16' if options.bf16 else 'float32'}, {'compiled' if options.compile else 'not compiled'}, "
        f"a large product: {peak / 1e12:.2f} TFLOP/s\n"
    )
    print(
        "| one step | ms, this project (quartiles) | ms, transformers | times as fast | peak MiB, this project | "
        "transformers | ratio | GFLOP | TFLOP/s | MFU |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for rate, (name, words), batch_size in itertools.product(options.dropout, settings.items(), options.batch_size):
        argv_of_run = [*words.split(), "--dropout", str(rate), "--dropatt", str(rate), "--batch_size", str(batch_size)]
        if options.bf16:
            argv_of_run.append("--bf16")
        if options.compile:
            argv_of_run.append("--compile")
        args, _, _ = main.read_flags(argv_of_run)
        seconds, memory, flop = compare(args, options.device, options.steps)
        print_row(f"{name}, batch {batch_size}, dropout {rate:g}", seconds, memory, flop, peak)


if __name__ == "__main__":
    benchmark()
