"""What makes a small XLNet learn: named variants under one budget, judged on the same held-out targets.

    python benchmarks/corpus.py
    python benchmarks/learning.py --updates 1200 --variants default "init normal" "mem_len 0" --seeds 0 1 2
    python benchmarks/learning.py --minutes 10 --shape 256 --variants default transformers --seeds 0 1 2
    python benchmarks/learning.py --updates 1200 --seeds

A variant differs from `python main.py` in its flags, its batches or its model. The budget is a number of updates, or
minutes of training without judging. Each run appends its curve to the csv when it is over; runs that stand there are
not made again. At the end the program prints a table and draws the curves; without seeds it does only that.

Every variant is judged on the windows, orders and targets that --valid has at default flags, with dropout off. Two
things come from transformers' example run_plm.py: its collator, which puts [MASK] in place of every target and knows
neither memory nor segments, on shuffled chunks of the text; and the XLNetLMHeadModel trained with it, started and
clipped as there. A model trained on these batches is judged without memory and segments, once on the real tokens and
once with [MASK] in place of the targets; the lower loss counts.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main
from data_utils import Loader, Row
from support import corpus
from xlnet import XLNet

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"32": "", "256": "--d_model 256 --d_head 64 --d_inner 1024 --learning_rate 2.5e-4"}
COLUMNS = (
    "text", "shape", "budget", "targets", "variant", "seed", "updates", "seconds", "training_loss", "held_out_loss",
    "machine", "commit",
)  # fmt: skip
# How held-out targets are drawn. Losses on different targets do not compare, and no table mixes them.
# 1: one random generator for all windows, one after the other; 2: each window has its own, as in data_utils.Loader
TARGETS = "2"
POINTS = 10  # of a curve

# ---------------------------------------------------------------- variants of the batches


class OneSegment(Loader):
    """Windows of contiguous text, closed by [SEP] [CLS], without segment ids."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        begin, text_len = window * self.reuse_len, self.seq_len - 2
        ids = np.concatenate([row.ids[begin : begin + text_len], [self.vocab.sep_id, self.vocab.cls_id]])
        inp, rest = ids[: self.reuse_len], ids[self.reuse_len :]
        feature = {
            "input": ids,
            "is_masked": data_utils.mask_window(
                inp, rest, self.vocab, self.num_predict, self.mask_alpha, self.mask_beta, rng, reverse=row.backward
            ),
            "seg_id": np.repeat([0, 2], [self.seq_len - 1, 1]),  # tells `permute` which tokens are [SEP] and [CLS]
        }
        example = data_utils.permute(feature, self.reuse_len, self.perm_size, self.num_predict, rng)
        del example["seg_id"]
        return example


class Collated(Loader):
    """What transformers' collator makes of shuffled chunks of the text, one a batch, for our model.

    A pass takes every chunk once, in a new order each time.
    """

    def __init__(self, text: corpus.Text, vocab: corpus.Vocabulary, **settings: Any):
        super().__init__(text, vocab, **settings)
        self.pass_len = len(text.ids) // self.seq_len
        self.chunks = text.ids[: self.pass_len * self.seq_len].reshape(-1, self.seq_len)
        self.collate = transformers.DataCollatorForPermutationLanguageModeling(bert_tokenizer())

    def collated(self, step: int) -> dict[str, Tensor]:
        """Return the collator's batch of a step, under its own names."""
        epoch, index = divmod(step, self.pass_len)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pass_len)
        chunk = torch.from_numpy(self.chunks[order[index]].astype(np.int64))
        # The collator draws from torch's global generator. Nothing else does while dropout is off.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([self.seed, step]).integers(2**63)))
            return self.collate([{"input_ids": chunk}])

    def batch(self, step: int) -> dict[str, Tensor]:
        collated = self.collated(step)
        is_target = collated["labels"] != -100
        positions = is_target[0].nonzero()  # [n_target, 1]
        return {
            "inp_k": collated["input_ids"].t(),
            "inp_q": is_target.t().float(),
            "perm_mask": collated["perm_mask"].permute(1, 2, 0),
            "target_mapping": positions,
            "target": collated["labels"].t()[positions[:, 0]],
            "target_mask": torch.ones(len(positions), 1),
        }


class CollatedForPeer(Collated):
    """The same batches as transformers' model takes them in run_plm.py: every position has a slot in the query stream.

    target_mapping: [seq_len, seq_len, 1], the collator's own; target_mask: [seq_len, 1], 1 = target
    """

    def batch(self, step: int) -> dict[str, Tensor]:
        collated = self.collated(step)
        labels = collated["labels"].t()
        return {
            "inp_k": collated["input_ids"].t(),
            "perm_mask": collated["perm_mask"].permute(1, 2, 0),
            "target_mapping": collated["target_mapping"].permute(1, 2, 0),
            "target": labels.clamp(min=0),
            "target_mask": (labels != -100).float(),
        }


@functools.cache
def bert_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Return transformers' tokenizer with the vocabulary of default flags."""
    with tempfile.TemporaryDirectory() as folder:
        corpus.load_tokenizer("bert-base-uncased").save(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- variants of the model


class Peer(nn.Module):
    """transformers' XLNetLMHeadModel, started as XLNetConfig has it, with the signature of our model.

    It takes the batches of CollatedForPeer and keeps no memory, as in run_plm.py.
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_inner: int,
        ff_activation: str,
        dropout: float,
        **others: Any,  # of our model; XLNetConfig keeps its defaults
    ):
        super().__init__()
        config = transformers.XLNetConfig(
            vocab_size=n_token,
            n_layer=n_layer,
            n_head=n_head,
            d_model=d_model,
            d_inner=d_inner,
            ff_activation=ff_activation,
            dropout=dropout,
        )
        self.peer = transformers.XLNetLMHeadModel(config)

    def forward(
        self, inp_k: Tensor, perm_mask: Tensor, target_mapping: Tensor, mems: list[None] | None = None
    ) -> tuple[Tensor, list[None]]:
        """Return the logits of all positions, [len, bsz, n_token], and the memory of no layer; see XLNet.forward.

        target_mapping: [num_predict, len, bsz], one-hot along len
        """
        output = self.peer(
            input_ids=inp_k.t(),
            perm_mask=perm_mask.permute(2, 0, 1),
            target_mapping=target_mapping.permute(2, 0, 1),
            use_mems=False,
        )
        return output.logits.transpose(0, 1), [None] * self.peer.config.n_layer


def our_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an XLNet or a Peer under our names."""
    return {name.removeprefix("peer.").removeprefix("transformer."): w for name, w in model.state_dict().items()}


# ---------------------------------------------------------------- judging


class WithoutSegments(Loader):
    """The batches of default flags without segment ids."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        del example["seg_id"]
        return example


class MaskedTargets(WithoutSegments):
    """The same with [MASK] in place of the targets."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        example["inp_k"] = np.where(example["inp_q"] > 0, bert_tokenizer().mask_token_id, example["inp_k"])
        return example


class Judge:
    """Judges weights in a model of ours, which reads forwards, on held-out windows of default flags.

    Training notices nothing of it. Weights that a Peer has learnt give the same numbers in our model, and sooner.

    argv: the flags of the run to judge; path: the held-out text
    loader_classes: how the windows look; the lowest loss of them counts
    Makes runs and so sets torch's generator: make the judge before the run.
    """

    def __init__(self, argv: list[str], path: str, loader_classes: Sequence[type[Loader]]):
        self.run = main.prepare([*argv, "--bi_data", "False"])
        self.loaders = []
        for loader_class in loader_classes:
            self.loaders.append(main.prepare(["--valid", path], loader_class).valid_loader)

    def held_out_loss(self, trained: nn.Module) -> float:
        """Return the loss of an XLNet or a Peer, in nats per target."""
        self.run.model.load_state_dict(our_weights(trained))
        return min(
            main.evaluate(self.run.model, loader, self.run.device, self.run.args.bf16) for loader in self.loaders
        )


# ---------------------------------------------------------------- the variants


class Variant(NamedTuple):
    """How a run differs from `python main.py`."""

    flags: str = ""
    loader_class: type[Loader] = Loader
    model_class: type[nn.Module] = XLNet
    judged_on: tuple[type[Loader], ...] = (Loader,)


CHUNKS = "--mem_len 0 --rows 1"  # in their own order, and without a past
PEER = f"{CHUNKS} --init normal --clip 1.0"  # as run_plm.py has it
LIKE_THE_COLLATOR = (WithoutSegments, MaskedTargets)
VARIANTS = {
    "default": Variant(),
    "init normal": Variant("--init normal"),
    "init_std 0.04": Variant("--init_std 0.04"),
    "init_std 0.2": Variant("--init_std 0.2"),
    "warmup_steps 200": Variant("--warmup_steps 200"),
    "decay_method cos": Variant("--decay_method cos"),
    "clip 1": Variant("--clip 1"),
    "dropout 0.1": Variant("--dropout 0.1 --dropatt 0.1"),
    "bi_data": Variant("--bi_data True"),
    "batch_size 2": Variant("--batch_size 2"),
    "mem_len 0": Variant("--mem_len 0"),
    "one segment": Variant("", OneSegment, judged_on=(WithoutSegments,)),
    "num_predict 42": Variant("--num_predict 42"),
    "num_predict 128": Variant("--num_predict 128"),
    "rows 1": Variant("--rows 1"),
    "rows 4": Variant("--rows 4"),
    "rows 16": Variant("--rows 16"),
    "rows 64": Variant("--rows 64"),
    "collator": Variant(CHUNKS, Collated, judged_on=LIKE_THE_COLLATOR),
    "transformers": Variant(PEER, CollatedForPeer, Peer, LIKE_THE_COLLATOR),
}
for rate in ("1.25e-4", "2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3"):
    VARIANTS[f"learning_rate {rate}"] = Variant(f"--learning_rate {rate}")
    VARIANTS[f"transformers {rate}"] = Variant(
        f"{PEER} --learning_rate {rate}", CollatedForPeer, Peer, LIKE_THE_COLLATOR
    )


def prepare(variant: Variant, argv: list[str], valid: str) -> tuple[main.Run, Judge]:
    """Return the run of a variant and its judge.

    argv: flags of all variants; valid: the held-out text
    """
    argv = [*argv, *variant.flags.split()]
    judge = Judge(argv, valid, variant.judged_on)
    return main.prepare(argv, variant.loader_class, variant.model_class), judge


# ---------------------------------------------------------------- runs


class Task(NamedTuple):
    """One run of the benchmark."""

    options: argparse.Namespace
    variant: str
    seed: int


def train(task: Task) -> list[dict[str, str]]:
    """Train one variant with one seed; return the rows of its curve."""
    options = task.options
    argv = ["--data", options.data, "--seed", str(task.seed), "--train_steps", str(options.updates or 10**9)]
    argv += SHAPES[options.shape].split()
    if options.bf16:
        argv.append("--bf16")
    run, judge = prepare(VARIANTS[task.variant], argv, options.valid)
    machine = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"

    curve: list[dict[str, str]] = []
    losses: list[float] = []  # of the steps since the last point
    seconds = done = 0.0  # done: share of the budget
    with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
        while done < 1:
            begin = time.perf_counter()
            metrics = next(steps)
            losses.append(float(metrics["loss"]))
            seconds += time.perf_counter() - begin
            done = metrics["step"] / options.updates if options.updates else seconds / (60 * options.minutes)
            if done * POINTS >= len(curve) + 1:
                point = {
                    "text": text_of(options),
                    "shape": options.shape,
                    "budget": budget(options),
                    "targets": TARGETS,
                    "variant": task.variant,
                    "seed": str(task.seed),
                    "updates": str(metrics["step"]),
                    "seconds": f"{seconds:.1f}",
                    "training_loss": f"{statistics.fmean(losses):.4f}",
                    "held_out_loss": f"{judge.held_out_loss(run.model):.4f}",
                    "machine": machine,
                    "commit": commit(),
                }
                curve.append(point)
                losses.clear()
                with PROGRESS:
                    PROGRESS.value += 1
    return curve


def text_of(options: argparse.Namespace) -> str:
    """Return how the csv names a text: its file's name, and a digest of what is trained on and of what is held out."""
    content = Path(options.data).read_bytes() + Path(options.valid).read_bytes()
    return f"{Path(options.data).name} {hashlib.sha256(content).hexdigest()[:8]}"


@functools.cache
def commit() -> str:
    """Return the name of this project's commit, with a mark if files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def budget(options: argparse.Namespace) -> str:
    return f"{options.updates} updates" if options.updates else f"{options.minutes:g} minutes"


def start_worker(progress: Any, threads: int) -> None:
    global PROGRESS  # points of all curves, counted by all workers
    PROGRESS = progress
    torch.set_num_threads(threads)


def make_runs(options: argparse.Namespace, tasks: list[Task]) -> None:
    """Make the runs, options.jobs at a time, and append each to the csv when it is over."""
    context = multiprocessing.get_context("spawn")
    progress = context.Value("i", 0)
    threads = max(1, joblib.cpu_count() // options.jobs)
    with (
        ProcessPoolExecutor(options.jobs, context, start_worker, (progress, threads)) as pool,
        tqdm(total=len(tasks) * POINTS, unit="point", disable=None) as bar,
    ):
        waiting = {pool.submit(train, task) for task in tasks}
        while waiting:
            over, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(progress.value - bar.n)
            for future in over:
                append(options.csv, future.result())


# ---------------------------------------------------------------- the csv, the table, the picture


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of the csv, none if it does not exist; raise ValueError if it has other columns."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has not the columns {','.join(COLUMNS)}; give another file")
        return list(reader)


def append(path: Path, curve: list[dict[str, str]]) -> None:
    """Append a whole curve in one write."""
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(curve)


def find_curves(options: argparse.Namespace) -> dict[str, list[list[dict[str, str]]]]:
    """Return the curves in the csv by variant, one for each seed: those of the options' text, shape and budget.

    Curves with other targets are left out, with a line on stderr.
    """
    wanted = {"text": text_of(options), "shape": options.shape, "budget": budget(options)}
    curves: dict[str, list[list[dict[str, str]]]] = {name: [] for name in options.variants}
    left_out = 0
    for (variant, _, targets), rows in itertools.groupby(
        read(options.csv), lambda row: (row["variant"], row["seed"], row["targets"])
    ):
        curve = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
        if not curve or variant not in curves:
            continue
        if targets == TARGETS:
            curves[variant].append(curve)
        else:
            left_out += 1
    if left_out:
        print(f"learning.py: left out {left_out} curves that were judged on other targets", file=sys.stderr)
    return {name: found for name, found in curves.items() if found}


def print_table(curves: dict[str, list[list[dict[str, str]]]]) -> None:
    """Print a line for each variant: its last point, mean and spread over the seeds."""
    print(
        "| variant | seeds | updates | held out, mean | standard deviation | to the first variant | training |\n"
        "|---|---|---|---|---|---|---|"
    )
    first = None
    for name, runs in curves.items():
        ends = [float(run[-1]["held_out_loss"]) for run in runs]
        mean = statistics.fmean(ends)
        first = mean if first is None else first
        spread = f"{statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
        updates = statistics.fmean(int(run[-1]["updates"]) for run in runs)
        training = statistics.fmean(float(run[-1]["training_loss"]) for run in runs)
        print(
            f"| {name} | {len(runs)} | {updates:,.0f} | {mean:.3f} | {spread} | {mean - first:+.3f} | {training:.3f} |"
        )


def draw(options: argparse.Namespace, curves: dict[str, list[list[dict[str, str]]]]) -> None:
    """Draw the mean curve of every variant, training and held out, in a band from the lowest to the highest seed."""
    unit, scale, label = ("updates", 1, "updates") if options.updates else ("seconds", 60, "minutes of training")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, column, title in zip(both, ("training_loss", "held_out_loss"), ("training", "held out"), strict=True):
        for name, runs in curves.items():
            losses = np.array([[float(row[column]) for row in run] for run in runs])  # [seeds, POINTS]
            at = np.mean([[float(row[unit]) / scale for row in run] for run in runs], axis=0)
            [line] = axes.plot(at, losses.mean(axis=0), label=name)
            low, high = losses.min(axis=0), losses.max(axis=0)
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel=label)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("loss, nats per predicted token")
    if curves:
        both[1].legend(fontsize="small")
    figure.savefig(options.png, dpi=110)


# ---------------------------------------------------------------- the command


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, make the runs that the csv lacks, and show what it then holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--updates", type=int, help="budget of a run")
    size.add_argument("--minutes", type=float, help="budget of a run, instead")
    parser.add_argument("--data", default="corpus/train.txt", help="(default: %(default)s)")
    parser.add_argument("--valid", default="corpus/valid.txt", help="held-out text (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="32", help="width of the model (default: 32)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        default=list(VARIANTS),
        help=f"(default: all) {', '.join(VARIANTS)}",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="(default: 0)")
    parser.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores (default: 1)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "learning.csv", help="(default: %(default)s)")
    parser.add_argument("--png", type=Path, default=RESULTS / "learning.png", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    for path in (options.data, options.valid):
        if not Path(path).exists():
            parser.error(f"{path} does not exist; run python benchmarks/corpus.py, or give --data and --valid")
    try:
        rows = read(options.csv)
    except ValueError as error:
        parser.error(f"--csv {error}")

    key = ("text", "shape", "budget", "targets", "variant", "seed")
    made = {tuple(row[name] for name in key): row["commit"] for row in rows}
    tasks, commits = [], []
    for seed, name in itertools.product(options.seeds, options.variants):
        run = (text_of(options), options.shape, budget(options), TARGETS, name, str(seed))
        if run in made:
            commits.append(made[run] or "not named")
        else:
            tasks.append(Task(options, name, seed))
    for name, count in Counter(commits).items():
        print(f"learning.py: {count} curves are in {options.csv} already, of commit {name}", file=sys.stderr)
    make_runs(options, tasks)
    curves = find_curves(options)
    print_table(curves)
    draw(options, curves)


if __name__ == "__main__":
    benchmark()
