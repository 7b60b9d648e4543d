"""What makes a small XLNet learn: named variants under one budget, judged on the same held-out targets.

    python benchmarks/corpus.py
    python benchmarks/learning.py --updates 1200 --variants default "init normal" "mem_len 0" --seeds 0 1 2
    python benchmarks/learning.py --minutes 10 --shape 256 --variants default transformers --seeds 0 1 2
    python benchmarks/learning.py --updates 1200 --seeds

A variant is the flags by which it differs from `python main.py`. The budget is a number of updates, or minutes of
training, in which judging does not count. Each run appends its curve to the csv when it is over; runs that stand there
are not made again. At the end a table is printed and a picture of the curves drawn; without seeds that is all.

Everything is judged as --valid is at default flags: the same windows, orders and targets, with dropout off. Two things
are taken from transformers' example run_plm.py: its collator, which has [MASK] in place of every token to predict and
knows neither memory nor segments, on shuffled chunks of the text, and the XLNetLMHeadModel trained with it, started and
clipped as there. What was trained so is judged without memory and segments, once on the tokens themselves, once with
[MASK] in place of the targets; the better of the two counts.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"32": {}, "256": dict(d_model=256, d_head=64, d_inner=1024, learning_rate=2.5e-4)}
COLUMNS = ("text", "shape", "budget", "variant", "seed", "updates", "seconds", "training_cost", "held_out_cost",
           "machine")
POINTS = 10  # of a curve


class Variant(main.Run):
    """A run that can be judged on windows of default flags, whatever its own are."""

    def judge(self, batches):
        """Return the held-out cost of one row of windows; the model reads them forwards."""
        bi_data, self.network.bi_data = self.network.bi_data, False
        cost = self.evaluate({**batch} for batch in batches)
        self.network.bi_data = bi_data
        return cost


class OneSegment(Variant):
    """Windows of contiguous text, and no word of segments to the model."""

    def load_batch(self, step):
        args, rng = self.args, np.random.default_rng([self.args.seed, step])
        window, turn = divmod(step % self.pass_len, len(self.groups))
        [row], begin = self.groups[turn], window * args.reuse_len
        marks = [self.vocab.sep_id, self.vocab.cls_id]
        ids = np.concatenate([row.ids[begin : begin + args.seq_len - 2], marks])
        feature = {
            "input": ids,
            "is_masked": data_utils.mask_window(np.split(ids, [args.reuse_len]), self.vocab, args.num_predict,
                                                args.mask_alpha, args.mask_beta, rng),
            "seg_id": np.repeat([0, 2], [args.seq_len - 1, 1]),
        }
        arrays = data_utils.permute(feature, args.reuse_len, args.perm_size, args.num_predict, rng)
        return {key: torch.from_numpy(array[:, None]) for key, array in arrays.items() if key != "seg_id"}

    def judge(self, batches):
        return super().judge({key: batch[key] for key in batch if key != "seg_id"} for batch in batches)


class Collated(Variant):
    """Our model, trained on what transformers' collator makes of shuffled chunks of the text."""

    def __init__(self, args):
        super().__init__(args)
        with tempfile.TemporaryDirectory() as folder:
            data_utils.save_tokenizer(self.tokenizer, folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.mask_id = tokenizer.mask_token_id
        self.collate = transformers.DataCollatorForPermutationLanguageModeling(tokenizer)
        ids = self.text.ids
        self.chunks = ids[: len(ids) // args.seq_len * args.seq_len].reshape(-1, args.seq_len)

    def collated(self, step):
        """Return the collator's batch of the next chunk; every chunk once, in a new order each time."""
        epoch, index = divmod(step, len(self.chunks))
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.chunks))
        return self.collate([{"input_ids": torch.from_numpy(self.chunks[order[index]].astype(np.int64))}])

    def load_batch(self, step):
        batch = self.collated(step)
        masked = batch["labels"] != -100
        return {
            "inp_k": batch["input_ids"].t(), "inp_q": masked.t().float(),
            "perm_mask": batch["perm_mask"].permute(1, 2, 0),
            "target_mapping": masked.nonzero()[:, 1:], "target": batch["labels"][masked][:, None],
            "target_mask": torch.ones(int(masked.sum()), 1),
        }

    def judge(self, batches):
        as_trained = [{key: batch[key] for key in batch if key != "seg_id"} for batch in batches]
        corrupted = [batch | {"inp_k": batch["inp_k"].masked_fill(batch["inp_q"] > 0, self.mask_id)}
                     for batch in as_trained]
        return min(super().judge(as_trained), super().judge(corrupted))


class Transformers(Collated):
    """transformers' model in place of ours, started as XLNetConfig has it, and called as run_plm.py does."""

    def __init__(self, args):
        super().__init__(args)
        config = transformers.XLNetConfig(
            vocab_size=self.vocab.size, d_model=args.d_model, n_layer=args.n_layer, n_head=args.n_head,
            d_inner=args.d_inner, ff_activation=args.ff_activation, dropout=args.dropout)
        torch.manual_seed(args.seed)
        self.ours = self.model
        self.model = self.network = transformers.XLNetLMHeadModel(config).to(self.device).train()
        groups = main.parameter_groups(self.model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, eps=args.adam_epsilon, fused=True)

    def load_batch(self, step):
        return self.to_device(self.collated(step))

    def forward(self, batch, mems):
        if "labels" not in batch:  # judged
            return super().forward(batch, mems)
        return self.network(**batch, use_mems=False).loss, None, None

    def judge(self, batches):
        """Judge the same weights in our model, which gives the same numbers sooner."""
        self.network = self.ours
        self.ours.load_state_dict({name.removeprefix("transformer."): w for name, w in self.model.state_dict().items()})
        cost = super().judge(batches)
        self.network = self.model
        return cost


CHUNKS = {"mem_len": 0, "rows": 1}  # in their own order, and without a past
PEER = CHUNKS | {"init": "normal", "clip": 1.0}  # as run_plm.py has it
VARIANTS = {  # name: class, flags
    "default": (Variant, {}),
    "init normal": (Variant, {"init": "normal"}),
    "init_std 0.04": (Variant, {"init_std": 0.04}),
    "init_std 0.2": (Variant, {"init_std": 0.2}),
    "warmup_steps 200": (Variant, {"warmup_steps": 200}),
    "decay_method cos": (Variant, {"decay_method": "cos"}),
    "clip 1": (Variant, {"clip": 1.0}),
    "dropout 0.1": (Variant, {"dropout": 0.1, "dropatt": 0.1}),
    "bi_data": (Variant, {"bi_data": True}),
    "batch_size 2": (Variant, {"batch_size": 2}),
    "mem_len 0": (Variant, {"mem_len": 0}),
    "one segment": (OneSegment, {}),
    "num_predict 42": (Variant, {"num_predict": 42}),
    "num_predict 128": (Variant, {"num_predict": 128}),
    "rows 1": (Variant, {"rows": 1}),
    "rows 4": (Variant, {"rows": 4}),
    "rows 16": (Variant, {"rows": 16}),
    "rows 64": (Variant, {"rows": 64}),
    "collator": (Collated, CHUNKS),
    "transformers": (Transformers, PEER),
}
for rate in ("1.25e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3"):
    VARIANTS[f"learning_rate {rate}"] = Variant, {"learning_rate": float(rate)}
    VARIANTS[f"transformers {rate}"] = Transformers, PEER | {"learning_rate": float(rate)}


def judged_batches(run, path):
    """Return the windows of a held-out text as --valid has them at default flags, in one row."""
    flags = main.settle({"valid": path})
    text = main.load_text("valid", [path], flags, run.tokenizer, run.vocab)
    [rows] = main.cut_rows("valid", [path], text, 1, flags)
    batches = data_utils.create_batches(rows, run.vocab, [np.random.default_rng(0)], **main.sizes(flags))
    return [run.to_device(batch) for batch in batches]


def train(task):
    """Train one variant with one seed; return the rows of its curve."""
    options, name, seed = task
    kind, flags = VARIANTS[name]
    run = kind(main.settle({
        "data": [options.data], "seed": seed, "train_steps": options.updates or 10**9, "bf16": options.bf16 or None,
        **SHAPES[options.shape], **flags}))
    batches = judged_batches(run, options.valid)
    machine = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rows, costs, seconds, done = [], [], 0.0, 0.0
    while done < 1:
        begin = time.perf_counter()
        costs.append(run.train_step()["cost"].item())
        seconds += time.perf_counter() - begin
        done = run.step / options.updates if options.updates else seconds / (60 * options.minutes)
        if done * POINTS >= len(rows) + 1:
            rows.append(dict(zip(COLUMNS, (
                Path(options.data).name, options.shape, budget(options), name, seed, run.step, f"{seconds:.1f}",
                f"{statistics.fmean(costs):.4f}", f"{run.judge(batches):.4f}", machine))))
            costs.clear()
            with PROGRESS:
                PROGRESS.value += 1
    return rows


def budget(options):
    return f"{options.updates} updates" if options.updates else f"{options.minutes:g} minutes"


def start_worker(progress, threads):
    global PROGRESS
    PROGRESS = progress
    torch.set_num_threads(threads)


def read(path):
    """Return the rows of the csv; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, rows):
    """Append a whole curve in one write."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def make_runs(options, tasks):
    """Make the runs, options.jobs at a time, and append each to the csv when it is over."""
    context = multiprocessing.get_context("spawn")
    progress = context.Value("i", 0)
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    with ProcessPoolExecutor(options.jobs, context, start_worker, (progress, threads)) as pool, tqdm(
        total=len(tasks) * POINTS, unit="point", disable=None
    ) as bar:
        waiting = {pool.submit(train, task) for task in tasks}
        while waiting:
            over, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(progress.value - bar.n)
            for future in over:
                append(options.csv, future.result())


def curves(options):
    """Return {variant: [curve of each seed]} of the csv, of the text, shape and budget of the options."""
    rows = [row for row in read(options.csv) if row["variant"] in options.variants and row["shape"] == options.shape
            and row["budget"] == budget(options) and row["text"] == Path(options.data).name]
    found = {}
    for (variant, _), curve in itertools.groupby(rows, lambda row: (row["variant"], row["seed"])):
        found.setdefault(variant, []).append(list(curve))
    return {name: found[name] for name in options.variants if name in found}


def spread(values):
    return f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""


def print_table(found):
    print("| variant | seeds | updates | held out, mean | standard deviation | to the first variant | training |\n"
          "|---|---|---|---|---|---|---|")
    first = None
    for name, runs in found.items():
        ends = [float(run[-1]["held_out_cost"]) for run in runs]
        mean = statistics.fmean(ends)
        first = mean if first is None else first
        updates = statistics.fmean(int(run[-1]["updates"]) for run in runs)
        training = statistics.fmean(float(run[-1]["training_cost"]) for run in runs)
        print(f"| {name} | {len(runs)} | {updates:,.0f} | {mean:.3f} | {spread(ends)} | {mean - first:+.3f} | "
              f"{training:.3f} |")


def draw(options, found):
    """Draw the mean curve of every variant, training and held out, in a band from the lowest to the highest seed."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, column, title in zip(both, ("training_cost", "held_out_cost"), ("training", "held out")):
        for name, runs in found.items():
            costs = np.array([[float(row[column]) for row in run] for run in runs])
            unit, scale = ("updates", 1) if options.updates else ("seconds", 60)
            at = np.mean([[float(row[unit]) / scale for row in run] for run in runs], axis=0)
            [line] = axes.plot(at, costs.mean(axis=0), label=name)
            axes.fill_between(at, costs.min(axis=0), costs.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="updates" if options.updates else "minutes of training")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("nats per predicted token")
    both[1].legend(fontsize="small")
    figure.savefig(options.png, dpi=110)


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--updates", type=int, help="budget of a run")
    size.add_argument("--minutes", type=float, help="budget of a run, instead")
    parser.add_argument("--data", default="corpus/train.txt", help="(default: %(default)s)")
    parser.add_argument("--valid", default="corpus/valid.txt", help="held-out text (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="32", help="width of the model (default: 32)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", default=list(VARIANTS),
                        help=f"(default: all) {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="(default: 0)")
    parser.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores (default: 1)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "learning.csv", help="(default: %(default)s)")
    parser.add_argument("--png", type=Path, default=RESULTS / "learning.png", help="(default: %(default)s)")
    options = parser.parse_args()
    for path in [path for path in (options.data, options.valid) if not Path(path).exists()]:
        parser.error(f"{path} is not there; run python benchmarks/corpus.py, or give --data and --valid")
    key = ("text", "shape", "budget", "variant", "seed")
    there = {tuple(row[name] for name in key) for row in read(options.csv)}
    tasks = [(options, name, seed) for seed, name in itertools.product(options.seeds, options.variants)
             if (Path(options.data).name, options.shape, budget(options), name, str(seed)) not in there]
    make_runs(options, tasks)
    found = curves(options)
    print_table(found)
    draw(options, found)


if __name__ == "__main__":
    benchmark()
