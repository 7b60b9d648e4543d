"""Time and memory of one training step: this XLNet beside transformers' XLNetLMHeadModel.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --growth
    python benchmarks/step_time.py --device cuda --shapes base --batch_size 8 32 --bf16 --compile

Both models get the same windows of data.txt, start from the same weights, carry their own memory, and make the same
step: forward, loss, backward, clipping, fused AdamW; --bf16 and --compile apply to both. Their steps alternate, so that
a noisy machine disturbs both alike; the table gives medians with the quartiles around them. Peak memory on a CPU is the
memory that a process with one of the two needs above what it needed before the model was built; on a GPU it is the most
that PyTorch had allocated. FLOP are counted in our step: two for a multiplication and an addition in a matrix product.
"""

import argparse
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from support import corpus
from xlnet import XLNet, order_mask, prediction_loss

MODELS = ("ours", "transformers")
SHAPES = {
    "default": "",
    "small": "--n_layer 6 --d_model 256 --n_head 4 --d_head 64 --d_inner 1024",
    "base": "--n_layer 12 --d_model 768 --n_head 12 --d_head 64 --d_inner 3072",
}
GROWTH = {
    f"seq_len {n}": f"--seq_len {n} --reuse_len {n // 2} --perm_size {n // 2} --num_predict {n // 6}"
    for n in (128, 256, 512, 1024, 2048)
}
GROWTH |= {f"mem_len {n}": f"--mem_len {n}" for n in (0, 384, 1536)}
DROPOUT = "--dropout 0.1 --dropatt 0.1"  # the paper's
MAX_WINDOWS = 8
PEAK_BF16 = {"H100": 989e12, "H200": 989e12}  # FLOP/s without sparsity, as NVIDIA states them


def load_batches(args: argparse.Namespace, device: str) -> tuple[corpus.Vocabulary, list[dict[str, Tensor]]]:
    """Return the vocabulary, and the first windows of data.txt with args.batch_size copies of each.

    The model of default shape that comes with them is small, so peak memory still says what ours needs.
    """
    windows = ("seq_len", "reuse_len", "perm_size", "num_predict")
    argv = ["--device", "cpu"]
    for name in windows:
        argv += [f"--{name}", str(getattr(args, name))]
    run = main.prepare(argv)
    run.loader.members = [0] * args.batch_size
    batches = []
    for step in range(min(MAX_WINDOWS, run.loader.pass_len)):
        batches.append({name: tensor.to(device) for name, tensor in run.loader.batch(step).items()})
    return run.vocab, batches


def build(name: str, vocab: corpus.Vocabulary, args: argparse.Namespace) -> nn.Module:
    """Return the model of that name, with the same weights for both."""
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
    """Return the same window in the layout and under the names of either model."""
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
    """Make one training step at each next(), over the windows again and again; yield its seconds."""
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
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - begin


def warm_up(args: argparse.Namespace) -> int:
    """Return the steps after which the memory is full, and everything is compiled and allocated."""
    return 2 + math.ceil(args.mem_len / args.reuse_len)


def peak_rss() -> float:
    """Return the most memory that this process has had, in MB."""
    if sys.platform == "linux":  # getrusage would count what the parent had when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes


def peak_memory(name: str, args: argparse.Namespace, device: str) -> float:
    """Return the MB by which the peak of this process grows, or the peak of the GPU, over the first steps."""
    vocab, batches = load_batches(args, device)
    before = peak_rss()
    for _ in itertools.islice(train_steps(name, vocab, batches, args), 1 + warm_up(args)):
        pass
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_rss() - before


def count_flop(vocab: corpus.Vocabulary, batches: list[dict[str, Tensor]], args: argparse.Namespace) -> int:
    """Return the FLOP of our step with a full memory."""
    not_compiled = argparse.Namespace(**vars(args) | {"compile": False})
    steps = train_steps("ours", vocab, batches, not_compiled)
    for _ in range(warm_up(args)):
        next(steps)
    with FlopCounterMode(display=False) as counter:
        next(steps)
    return counter.get_total_flops()


def compare(
    args: argparse.Namespace, device: str, n_steps: int
) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Return the seconds of n_steps steps and the peak memory in MB of each model, and the FLOP of our step."""
    torch.compiler.reset()  # the graphs of other sizes count towards a limit, above which nothing is compiled
    # a new process for each model: its peak is its own
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = pool.map(peak_memory, MODELS, [args] * 2, [device] * 2)
        memory = dict(zip(MODELS, peaks, strict=True))
    vocab, batches = load_batches(args, device)
    runs = {name: train_steps(name, vocab, batches, args) for name in MODELS}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for i in tqdm(range(n_steps + warm_up(args)), leave=False, disable=None):
        for name, run in runs.items():
            spent = next(run)
            if i >= warm_up(args):
                seconds[name].append(spent)
    return seconds, memory, count_flop(vocab, batches, args)


def print_row(
    name: str, seconds: dict[str, list[float]], memory: dict[str, float], flop: int, peak_speed: float | None
) -> None:
    """Print the row of one setting; peak_speed: FLOP/s that the machine can reach, if known."""
    quartiles = {model: 1000 * np.percentile(seconds[model], (25, 50, 75)) for model in MODELS}
    times = [f"{middle:.0f} ({low:.0f} to {high:.0f})" for low, middle, high in quartiles.values()]
    ratio = quartiles["transformers"][1] / quartiles["ours"][1]
    speed = flop / quartiles["ours"][1] * 1000
    share = f" ({speed / peak_speed:.0%} of {peak_speed / 1e12:.0f})" if peak_speed else ""
    print(
        f"| {name} | {' | '.join(times)} | {ratio:.2f} | {memory['ours']:.0f} | {memory['transformers']:.0f} | "
        f"{memory['ours'] / memory['transformers']:.2f} | {flop / 1e9:.1f}, {speed / 1e12:.3f}{share} |",
        flush=True,
    )


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, and print a row for each shape and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--growth", action="store_true", help="default shape, growing seq_len and mem_len")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1], help="(default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each model (default: 20)")
    options = parser.parse_args(argv)
    settings = GROWTH if options.growth else {name: SHAPES[name] for name in options.shapes}
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    peak_speed = None
    if options.bf16:
        peak_speed = next((peak for gpu, peak in PEAK_BF16.items() if gpu in machine), None)
    print(
        f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, {options.steps} steps of "
        f"each, {'bfloat16' if options.bf16 else 'float32'}, {'compiled' if options.compile else 'not compiled'}\n"
    )
    print(
        "| one step | ms, this project (quartiles) | ms, transformers | times as fast | peak MB, this project | "
        "transformers | ratio | GFLOP, TFLOP/s |\n|---|---|---|---|---|---|---|---|"
    )
    for (name, flags), batch_size in itertools.product(settings.items(), options.batch_size):
        argv_of_run = [*DROPOUT.split(), *flags.split(), "--batch_size", str(batch_size)]
        if options.bf16:
            argv_of_run.append("--bf16")
        if options.compile:
            argv_of_run.append("--compile")
        args, _, _ = main.read_flags(argv_of_run)
        seconds, memory, flop = compare(args, options.device, options.steps)
        print_row(f"{name}, batch {batch_size}", seconds, memory, flop, peak_speed)


if __name__ == "__main__":
    benchmark()
