"""Time and memory of one training step: this XLNet beside transformers' XLNetLMHeadModel.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --growth
    python benchmarks/step_time.py --device cuda --shapes base --batch_size 8 32 --bf16 --compile

Both get the same windows of data.txt, start from the same weights, carry their own memory, and make the same step:
forward, loss, backward, clipping, fused AdamW; --bf16 and --compile apply to both. Their steps alternate, so that a
noisy machine disturbs both alike; the table gives medians with the quartiles around them. Peak memory is, on a CPU,
what a process with one of the two needs above what it needed before the model was built, on a GPU what PyTorch had
allocated at most. FLOP are counted in our step, two for a multiplication and an addition in a product of matrices.
"""

import argparse
import itertools
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main
from xlnet import XLNet

MODELS = ("ours", "transformers")
SHAPES = {
    "default": {},
    "small": dict(n_layer=6, d_model=256, n_head=4, d_head=64, d_inner=1024),
    "base": dict(n_layer=12, d_model=768, n_head=12, d_head=64, d_inner=3072),
}
GROWTH = [dict(seq_len=n, reuse_len=n // 2, perm_size=n // 2, num_predict=n // 6) for n in (128, 256, 512, 1024, 2048)]
GROWTH += [dict(mem_len=n) for n in (0, 384, 1536)]
PEAK_BF16 = {"H100": 989e12, "H200": 989e12}  # FLOP/s without sparsity, as NVIDIA states them


def load_batches(args, device):
    """Return the windows of a pass over data.txt, or of its first ones, every member of a batch from the beginning."""
    run = main.Run(main.settle({"seq_len": args.seq_len, "reuse_len": args.reuse_len, "perm_size": args.perm_size,
                                "num_predict": args.num_predict, "device": "cpu"}))
    batches = []
    for window in range(min(8, run.pass_len)):
        rows, rngs = run.groups[0] * args.batch_size, [np.random.default_rng(window)] * args.batch_size
        batch = data_utils.create_batch(rows, window, run.vocab, rngs, **main.sizes(run.args))
        batches.append({key: tensor.to(device) for key, tensor in batch.items()})
    return run.vocab.size, batches


def build(name, n_token, args):
    """Return the model of that name, with the same weights for both."""
    torch.manual_seed(0)
    shape = {key: getattr(args, key) for key in ("n_layer", "d_model", "n_head", "d_inner", "dropout", "ff_activation",
                                                 "mem_len", "reuse_len")}
    ours = XLNet(n_token, d_head=args.d_head, dropatt=args.dropatt, **shape)
    if name == "ours":
        return ours
    theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=n_token, **shape))
    theirs.load_state_dict(
        {key if key.startswith("lm_loss") else f"transformer.{key}": value for key, value in ours.state_dict().items()})
    return theirs.train()


def inputs_for(name, batch):
    """Return the same window in the layout and under the names of either model."""
    given = {key: value for key, value in batch.items() if key not in ("target", "target_mask")}
    if name == "ours":
        return given
    rank, positions = batch["perm_mask"].t(), batch["target_mapping"].t()
    one_hot = F.one_hot(positions.clamp(min=0), rank.size(1)) * (positions >= 0)[:, :, None]
    return {
        "input_ids": batch["inp_k"].t(), "token_type_ids": batch["seg_id"].t(), "target_mapping": one_hot.float(),
        "perm_mask": (rank[:, None] > (rank - batch["inp_q"].t())[:, :, None]).float(),  # as data_utils.perm_mask
    }


def train_steps(name, n_token, batches, args):
    """Make one training step at each next(), over the windows again and again; yield its seconds."""
    device = batches[0]["inp_k"].device
    model = build(name, n_token, args).to(device)
    if args.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(main.parameter_groups(model, args.weight_decay), lr=1e-4, fused=True)
    prepared = [(inputs_for(name, batch), batch["target"], batch["target_mask"]) for batch in batches]
    mems = None
    for inputs, target, target_mask in itertools.cycle(prepared):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(args.bf16)):
            if name == "ours":
                logits, mems = model(**inputs, mems=mems)
            else:
                output = model(**inputs, mems=mems, use_mems=args.mem_len > 0)
                logits, mems = output.logits.transpose(0, 1), output.mems
        main.lm_loss(logits, target, target_mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - begin


def warm_up(args):
    """Return the steps after which the memory is full, and everything is compiled and allocated."""
    return 2 + -(-args.mem_len // args.reuse_len)


def peak_rss():
    """Return the most memory that this process has had, in MB (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 2**10


def peak_memory(name, args, device):
    """Return the MB by which the peak of this process grows, or the peak of the GPU, over the first steps."""
    n_token, batches = load_batches(args, device)
    before = peak_rss()
    list(itertools.islice(train_steps(name, n_token, batches, args), 1 + warm_up(args)))
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_rss() - before


def compare(args, device, steps):
    """Return the seconds of `steps` steps and the peak memory in MB, each {name: value}, and FLOP of our step."""
    # a new process for each model: its peak is its own
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = dict(zip(MODELS, pool.map(peak_memory, MODELS, [args] * 2, [device] * 2)))
    n_token, batches = load_batches(args, device)
    runs = {name: train_steps(name, n_token, batches, args) for name in MODELS}
    seconds = {name: [] for name in MODELS}
    for i in tqdm(range(steps + warm_up(args)), leave=False, disable=None):
        for name, run in runs.items():
            spent = next(run)
            if i >= warm_up(args):
                seconds[name].append(spent)
    counted = train_steps("ours", n_token, batches, argparse.Namespace(**{**vars(args), "compile": None}))
    for _ in range(warm_up(args)):
        next(counted)
    with FlopCounterMode(display=False) as counter:
        next(counted)
    return seconds, memory, counter.get_total_flops()


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    parser.add_argument("--growth", action="store_true", help="default shape, growing seq_len and mem_len")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1], help="(default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each model (default: 20)")
    options = parser.parse_args()
    settings = GROWTH if options.growth else [SHAPES[shape] for shape in options.shapes]
    names = [", ".join(f"{key} {value}" for key, value in each.items() if key in ("seq_len", "mem_len"))
             for each in GROWTH] if options.growth else options.shapes
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, {options.steps} steps of "
          f"each, {'bfloat16' if options.bf16 else 'float32'}, {'compiled' if options.compile else 'not compiled'}\n")
    print("| one step | ms, this project (quartiles) | ms, transformers | times as fast | peak MB, this project | "
          "transformers | ratio | GFLOP, TFLOP/s |\n|---|---|---|---|---|---|---|---|")
    for name, setting, batch_size in ((*pair, size) for pair in zip(names, settings) for size in options.batch_size):
        args = main.settle({"dropout": 0.1, "dropatt": 0.1, **setting})  # the paper's
        args.batch_size, args.bf16, args.compile = batch_size, options.bf16, options.compile
        seconds, memory, flop = compare(args, options.device, options.steps)
        quartiles = {model: 1000 * np.percentile(seconds[model], (25, 50, 75)) for model in MODELS}
        times = [f"{q[1]:.0f} ({q[0]:.0f} to {q[2]:.0f})" for q in quartiles.values()]
        speed = flop / quartiles["ours"][1] * 1000
        peak = next((peak for gpu, peak in PEAK_BF16.items() if options.bf16 and gpu in machine), None)
        share = f" ({speed / peak:.0%} of {peak / 1e12:.0f})" if peak else ""
        print(f"| {name}, batch {batch_size} | {' | '.join(times)} | "
              f"{quartiles['transformers'][1] / quartiles['ours'][1]:.2f} | {memory['ours']:.0f} | "
              f"{memory['transformers']:.0f} | {memory['ours'] / memory['transformers']:.2f} | "
              f"{flop / 1e9:.1f}, {speed / 1e12:.3f}{share} |", flush=True)


if __name__ == "__main__":
    benchmark()
