"""Compare how well variants of a small XLNet learn under one budget, judged on the same held-out targets.

    python benchmarks/corpus.py
    python benchmarks/learning.py --updates 1200 --variants default init=normal "learning_rate=2e-3 bf16" --seeds 0 1 2
    python benchmarks/learning.py --minutes 10 --shape 256 --variants default "transformers learning_rate=5e-4" bert
    python benchmarks/learning.py --updates 1200 --variants my_variant.py:MyLoader "my_variant.py:MyXLNet mem_len=0"
    python benchmarks/learning.py --updates 1200 --seeds

A variant is a change to `python main.py`:
    flag=value, or flag for a switch: any flag of main.py, several in one pair of quotes
    one of the names in VARIANTS below
    FILE.py:CLASS: a Loader or an XLNet of your own, as in examples/variant.py
    one of the last two, then flags

The budget is a number of updates, or minutes of training; judging does not count. With minutes, --decay_method poly and
cos need the number of updates in advance: a throwaway run of the variant measures its speed, and the decay ends with
the updates that fit into 97% of the minutes (see `steps_within`). The run stops after these updates, or when the
minutes are over. Each finished run appends its curve to the csv; runs that the csv already holds are not made again. At
the end the program prints a table and draws the curves; without seeds it does only that.

Every variant is judged on the windows, orders and targets that --valid has at default flags, with dropout off. VARIANTS
gives the form of these windows: for example, a model that was trained without segments sees none. If there are two
forms, the lower loss counts. neighbours.py holds the models that are not ours.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.util
import itertools
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from neighbours import (
    Bert,
    Collated,
    CollatedForBert,
    CollatedForPeer,
    FiveGram,
    MaskedTargets,
    Peer,
    Unigram,
    WindowsForBert,
)

import data_utils
import main
from data_utils import Loader, Row
from support import UserError, flags, mistakes_in_one_line
from xlnet import XLNet

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"32": "", "256": "--d_model 256 --d_head 64 --d_inner 1024 --learning_rate 2.5e-4"}
COLUMNS = (
    "text", "shape", "budget", "targets", "variant", "seed", "updates", "seconds", "training_loss", "held_out_loss",
    "machine", "commit",
)  # fmt: skip
# How held-out targets are drawn. Losses on different targets are not comparable, and no table mixes them.
# 1: one random generator for all windows, one after the other; 2: each window has its own, as in data_utils.Loader
TARGETS = "2"
POINTS = 10  # of a curve
NO_END = 10**9  # updates of a run that ends when its minutes are over
CALIBRATION = 0.05  # share of the minutes that may pass while the speed is measured
LEAST_TIMED = 8  # steps
FITS = 0.97  # share of the minutes that planned updates should take

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


class ShuffledWindows(Loader):
    """The windows of a pass in random order: the memory that a window sees comes from other text."""

    def batch(self, step: int) -> dict[str, Tensor]:
        epoch, index = divmod(step, self.pass_len)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pass_len)
        return super().batch(epoch * self.pass_len + int(order[index]))


class WithoutSegments(Loader):
    """The same windows without segment ids."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        del example["seg_id"]
        return example


class MaskedTargetsWithoutSegments(MaskedTargets, WithoutSegments):
    """The same windows with both changes."""


# ---------------------------------------------------------------- judging

# Every model is judged on windows of default flags, whatever its own flags are. It reads them forwards.
FLAGS_OF_JUDGE = "--bi_data False --seq_len 512 --reuse_len 256 --perm_size 256 --num_predict 85".split()


class Judge:
    """Judges weights on held-out windows of default flags, in a model of its own, so that training is unaffected.

    argv: the flags of the run to judge; path: the held-out text
    loader_classes: the forms of the windows; the lowest loss counts
    model_class: of the judge's model, which takes these windows; XLNet also takes the weights of a Peer
    The constructor prepares runs, which sets torch's generator: make the judge before the run.
    """

    def __init__(
        self, argv: list[str], path: str, loader_classes: Sequence[type[Loader]], model_class: type[nn.Module] = XLNet
    ):
        self.run = main.prepare([*argv, *FLAGS_OF_JUDGE], model_class=model_class)
        self.loaders = []
        for loader_class in loader_classes:
            self.loaders.append(main.prepare(["--valid", path], loader_class).valid_loader)

    def held_out_loss(self, trained: nn.Module) -> float:
        """Return the loss of a model, in nats per target."""
        weights = trained.our_weights() if isinstance(trained, Peer) else trained.state_dict()
        self.run.model.load_state_dict(weights)
        return min(
            main.evaluate(self.run.model, loader, self.run.device, self.run.args.bf16) for loader in self.loaders
        )


def loss_of_counts(model: FiveGram | Unigram, loader: Loader) -> float:
    """Return the loss of a model that reads from left to right, on one pass over a loader's targets, in nats a target.

    A target's context is the four tokens before it in its window; at the window's beginning, in the text before it.
    """
    losses = []
    before: list[np.ndarray | None] = [None] * len(loader.turns)  # [4, bsz], the tokens before the next window
    for step in range(loader.pass_len):
        batch = {name: tensor.numpy() for name, tensor in loader.batch(step).items()}
        turn, window = loader.turn(step), batch["inp_k"]
        ids = window if before[turn] is None else np.concatenate([before[turn], window])
        before[turn] = window[: loader.reuse_len][-4:]
        for i in range(window.shape[1]):
            log_probs = model.log_probs(ids[:, i])[-loader.seq_len :]
            is_filled = batch["target_mask"][:, i] > 0
            losses.append(-log_probs[batch["target_mapping"][is_filled, i]])
    return float(np.concatenate(losses).mean())


# ---------------------------------------------------------------- the variants


class Variant(NamedTuple):
    """How a run differs from `python main.py`, and how it is judged."""

    flags: str = ""  # of main.py
    loader_class: type[Loader] = Loader
    model_class: type[nn.Module] = XLNet
    judged_on: tuple[type[Loader], ...] = (Loader,)
    judged_in: type[nn.Module] = XLNet


CHUNKS = "--mem_len 0 --rows 1"  # no memory, and one chunk a batch
LIKE_THE_COLLATOR = (WithoutSegments, MaskedTargetsWithoutSegments)
COUNTS = {"unigram": Unigram, "five-gram": FiveGram}  # not trained: they have neither seed nor curve
VARIANTS = {
    "default": Variant(),
    # one change each
    "mem_len=0": Variant("--mem_len 0"),
    "one segment": Variant("", OneSegment, judged_on=(WithoutSegments,)),
    "shuffled windows": Variant("", ShuffledWindows, judged_on=(Loader, ShuffledWindows)),
    "[MASK] in the content stream": Variant("", MaskedTargets, judged_on=(Loader, MaskedTargets)),
    # all of these together, in our model
    "collator": Variant(CHUNKS, Collated, judged_on=LIKE_THE_COLLATOR),
    # neighbours; initialization and clipping as in run_plm.py and run_mlm.py
    "transformers": Variant(f"{CHUNKS} --clip 1.0", CollatedForPeer, Peer, LIKE_THE_COLLATOR),
    "bert": Variant(f"{CHUNKS} --clip 1.0", CollatedForBert, Bert, (WindowsForBert,), Bert),
    **dict.fromkeys(COUNTS, Variant()),
}
# The benchmark sets these for all variants; with different values, held-out losses would not be comparable.
NOT_A_VARIANT = {
    "data", "valid", "tokenizer", "cache_dir", "seed", "num_step", "train_steps", "output_dir", "save_steps",
    "save_total_limit", "resume", "init_checkpoint", "eval_steps", "eval_only", "log_steps", "tensorboard",
}  # fmt: skip
OWN_CLASS = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)(@\w+)?(?= |$)")


def find_variant(words: str) -> Variant:
    """Return the variant that words of the command line describe.

    words: a name or FILE.py:CLASS, or flags, or a name or FILE.py:CLASS and then flags
    Raises UserError if they describe none.
    """
    beginning = ""
    variant = Variant()
    if own := OWN_CLASS.match(words):
        beginning = own[0]
        variant = variant_of_class(Path(own["path"]), own["name"])
    elif names := [name for name in VARIANTS if f"{words} ".startswith(f"{name} ")]:
        beginning = max(names, key=len)
        variant = VARIANTS[beginning]
    given = words.removeprefix(beginning).split()
    if given and beginning in COUNTS:
        raise UserError(f"--variants {words!r}: counts take no flags; give {beginning!r}")
    for flag in given:
        check_flag(flag.partition("=")[0], words)
    return variant._replace(flags=" ".join([variant.flags, *(f"--{flag}" for flag in given)]).strip())


def check_flag(name: str, words: str) -> None:
    """Raise UserError if main.py has no flag of that name, or a variant must not set it; words: the whole variant."""
    if name in NOT_A_VARIANT:
        raise UserError(f"--variants {words!r}: {name} is the same for all variants; leave it out")
    if name not in vars(flags.parse([])):
        raise UserError(
            f"--variants {words!r}: {name!r} is no flag of main.py; give flag=value, FILE.py:CLASS, or one of "
            f"{', '.join(VARIANTS)}"
        )


def variant_of_class(path: Path, name: str) -> Variant:
    """Return the variant of a class in a Python file: a Loader, or an XLNet, which is judged in its own class."""
    given = f"--variants {path}:{name}"
    if not path.is_file():
        raise UserError(f"{given}: there is no file {path}; give FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(f"variant_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Loader):
        return Variant(loader_class=found)
    if isinstance(found, type) and issubclass(found, XLNet):
        return Variant(model_class=found, judged_in=found)
    raise UserError(f"{given} is no class; give one derived from data_utils.Loader or xlnet.XLNet")


def name_in_csv(words: str) -> str:
    """Return the name of a variant in csv and table: its words, and for FILE.py:CLASS a digest of the file.

    The digest keeps the curves of an older version of the file apart from those of the new version.
    """
    words = " ".join(words.split())
    own = OWN_CLASS.match(words)
    if own is None or not Path(own["path"]).is_file():
        return words
    digest = hashlib.sha256(Path(own["path"]).read_bytes()).hexdigest()[:8]
    return f"{own['path']}:{own['name']}@{digest}{words[own.end() :]}"


def check_variant(words: str, options: argparse.Namespace) -> None:
    """Raise UserError if words describe no variant, or if its flags do not fit together."""
    variant = find_variant(words)
    try:
        main.read_flags([*common_flags(options, "0"), *variant.flags.split()])
    except UserError as error:
        raise UserError(f"--variants {words!r}: {error}") from None


def prepare(variant: Variant, argv: list[str], valid: str) -> tuple[main.Run, Judge]:
    """Return the run of a variant and its judge.

    argv: the flags that all variants share; valid: the held-out text
    """
    argv = [*argv, *variant.flags.split()]
    judge = Judge(argv, valid, variant.judged_on, variant.judged_in)
    return main.prepare(argv, variant.loader_class, variant.model_class), judge


# ---------------------------------------------------------------- runs


class Task(NamedTuple):
    """One run of the benchmark."""

    options: argparse.Namespace
    variant: str  # as name_in_csv returns it
    seed: str  # "" for counts, which have none


def common_flags(options: argparse.Namespace, seed: str) -> list[str]:
    """Return the flags that all variants of a benchmark share, except the number of updates."""
    return ["--data", options.data, "--seed", seed, *SHAPES[options.shape].split()]


def count(task: Task) -> list[dict[str, str]]:
    """Count the tokens or five-grams of the text; return the only row for the csv."""
    options = task.options
    run = main.prepare(["--data", options.data, "--valid", options.valid])
    begin = time.perf_counter()
    model = COUNTS[task.variant](run.text.ids, run.vocab.size)
    seconds = time.perf_counter() - begin
    loss = loss_of_counts(model, run.valid_loader)
    machine = f"{cpu_name()}, 1 threads"  # numpy counts on one
    with PROGRESS:
        PROGRESS.value += POINTS
    return [row_of(task, updates="0", seconds=f"{seconds:.1f}", held_out_loss=f"{loss:.4f}", machine=machine)]


def train(task: Task) -> list[dict[str, str]]:
    """Train one variant with one seed, or count; return the rows of the curve, and save the weights on request."""
    if task.variant in COUNTS:
        return count(task)
    options, variant = task.options, find_variant(task.variant)
    argv = [*common_flags(options, task.seed), "--train_steps"]
    limit = 60 * options.minutes if options.minutes else math.inf  # seconds
    updates = options.updates or planned_updates(variant, argv, limit)
    run, judge = prepare(variant, [*argv, str(updates)], options.valid)
    curve = train_and_judge(task, run, judge, limit)
    if options.save:
        save_weights(run, weights_folder(options.save, task))
    return curve


def train_and_judge(task: Task, run: main.Run, judge: Judge, limit: float) -> list[dict[str, str]]:
    """Train to the end of a run, or for `limit` seconds; return the curve, POINTS rows if there are enough steps.

    The seconds are those of training; judging does not count.
    """
    curve: list[dict[str, str]] = []
    losses: list[float] = []  # of the steps since the last point
    seconds = done = 0.0  # done: share of the budget
    with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
        while done < 1:
            begin = time.perf_counter()
            metrics = next(steps)
            losses.append(float(metrics["loss"]))
            seconds += time.perf_counter() - begin
            done = max(metrics["step"] / run.last_step, seconds / limit)
            if done * POINTS >= len(curve) + 1:
                point = row_of(
                    task,
                    updates=str(metrics["step"] // run.args.grad_accum_steps),
                    seconds=f"{seconds:.1f}",
                    training_loss=f"{statistics.fmean(losses):.4f}",
                    held_out_loss=f"{judge.held_out_loss(run.model):.4f}",
                    machine=machine_of(run),
                )
                curve.append(point)
                losses.clear()
                with PROGRESS:
                    PROGRESS.value += 1
    if cut := cut_short(run, metrics["step"]):
        tell(f"{task.variant}, seed {task.seed}: {cut}")
    return curve


def cut_short(run: main.Run, step: int) -> str:
    """Return a warning if a run ended at a step before its learning rate had decayed, else ""."""
    if run.args.decay_method == "constant" or step == run.last_step:
        return ""
    return f"the minutes were over at step {step} of {run.last_step}, before the learning rate had decayed"


def planned_updates(variant: Variant, argv: list[str], seconds: float) -> int:
    """Return the updates of a run with a time budget: those that fit if its learning rate decays, otherwise NO_END."""
    argv = [*argv, str(NO_END), *variant.flags.split()]
    if main.read_flags(argv)[0].decay_method == "constant":
        return NO_END
    return steps_within(lambda: main.prepare(argv, variant.loader_class, variant.model_class), seconds)


def steps_within(make_run: Callable[[], main.Run], seconds: float) -> int:
    """Return how many updates of a run fit into 97% of `seconds`, at the speed of a throwaway run.

    The throwaway run takes 5% of `seconds`, or longer if LEAST_TIMED steps are not timed by then. Timing begins when
    the memory of each row is full, because steps with less memory are faster.

    make_run: makes the throwaway run, with far more updates than fit; each call must make a new run
    """
    run = make_run()
    steps_until_full = len(run.loader.turns) * math.ceil(run.args.mem_len / run.args.reuse_len)
    untimed = max(LEAST_TIMED, min(steps_until_full, run.loader.pass_len))
    durations: list[float] = []
    begin = last = time.perf_counter()
    with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
        for metrics in steps:
            float(metrics["loss"])  # waits for a GPU
            now = time.perf_counter()
            if metrics["step"] > untimed:
                durations.append(now - last)
            last = now
            if len(durations) >= LEAST_TIMED and now - begin >= CALIBRATION * seconds:
                break
    fitting = FITS * seconds / statistics.fmean(durations)
    return max(1, int(fitting) // run.args.grad_accum_steps)


def slug(words: str) -> str:
    """Return words as the name of a file: "[MASK] in the content stream" is MASK-in-the-content-stream."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-")


def weights_folder(save: Path, task: Task) -> Path:
    """Return the folder for the weights of a task."""
    return save / f"{slug(task.variant)}-{task.seed}"


def save_weights(run: main.Run, folder: Path) -> None:
    """Write the model and its vocabulary as in a checkpoint, without the training state."""
    folder.mkdir(parents=True)
    config = run.vocab.hugging_face_config() | {name: vars(run.args)[name] for name in main.LENGTHS}
    run.model.save_pretrained(folder, **config)
    run.tokenizer.save(folder)


def row_of(task: Task, **measured: str) -> dict[str, str]:
    """Return a row of the csv; columns that were not measured are empty."""
    named = {
        "text": text_of(task.options),
        "shape": task.options.shape,
        "budget": budget(task.options),
        "targets": TARGETS,
        "variant": task.variant,
        "seed": task.seed,
        "commit": commit(),
    }
    return dict.fromkeys(COLUMNS, "") | named | measured


def text_of(options: argparse.Namespace) -> str:
    """Return the name of a text in the csv: its file name, and a digest of the training text and the held-out text."""
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


def machine_of(run: main.Run) -> str:
    """Return a run's machine for the csv: the name of the GPU, or that of the CPU and the number of threads."""
    if run.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the name that the system gives the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux, where platform.processor() is empty
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def budget(options: argparse.Namespace) -> str:
    return f"{options.updates} updates" if options.updates else f"{options.minutes:g} minutes"


def start_worker(progress: Any, threads: int) -> None:
    global PROGRESS  # points of all curves, counted by all workers
    PROGRESS = progress
    torch.set_num_threads(threads)


def threads_of_worker(jobs: int) -> int:
    """Return the threads of each of `jobs` runs: a share of OMP_NUM_THREADS, or of the cores that the process may use.

    PyTorch heeds the variable; joblib knows the limits of a container.
    """
    return max(1, min(torch.get_num_threads(), joblib.cpu_count()) // jobs)


def make_runs(options: argparse.Namespace, tasks: list[Task]) -> None:
    """Make the runs, options.jobs at a time, and append each finished run to the csv.

    A run that fails because of its flags or its loss gets a line on stderr instead.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.Value("i", 0)
    with (
        ProcessPoolExecutor(options.jobs, context, start_worker, (progress, threads_of_worker(options.jobs))) as pool,
        tqdm(total=len(tasks) * POINTS, unit="point", disable=None) as bar,
    ):
        task_of = {pool.submit(train, task): task for task in tasks}
        waiting = set(task_of)
        while waiting:
            over, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(progress.value - bar.n)
            for future in over:
                try:
                    append(options.csv, future.result())
                except (UserError, main.NotFinite) as error:
                    tell(f"{task_of[future].variant}, seed {task_of[future].seed}: {error}")


# ---------------------------------------------------------------- the csv, the table, the picture


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Return the rows of a csv, none if it does not exist; raise UserError if it has other columns."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise UserError(f"--csv {path} has not the columns {','.join(columns)}; give another file")
        return list(reader)


def append(path: Path, rows: list[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows to a csv, a whole curve in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def find_curves(options: argparse.Namespace) -> dict[str, list[list[dict[str, str]]]]:
    """Return the curves of the options' text, shape and budget in the csv, by variant, one for each seed.

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
        tell(f"left out {left_out} curves that were judged on other targets")
    return {name: found for name, found in curves.items() if found}


def print_table(curves: dict[str, list[list[dict[str, str]]]]) -> None:
    """Print a line for each variant: its last point, mean and spread over the seeds. Counts have no training loss."""
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
        training = ""
        if name not in COUNTS:
            training = f"{statistics.fmean(float(run[-1]['training_loss']) for run in runs):.3f}"
        print(f"| {name} | {len(runs)} | {updates:,.0f} | {mean:.3f} | {spread} | {mean - first:+.3f} | {training} |")


def draw(options: argparse.Namespace, curves: dict[str, list[list[dict[str, str]]]]) -> None:
    """Draw the held-out losses: the mean curve of every variant, and its last point with the range over the seeds.

    Counts have no curve.
    """
    unit, scale, label = ("updates", 1, "updates") if options.updates else ("seconds", 60, "minutes of training")
    figure = Figure(figsize=(13, 1.5 + 0.6 * max(5, len(curves))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for place, (name, runs) in enumerate(curves.items()):
        losses = np.array([[float(row["held_out_loss"]) for row in run] for run in runs])  # [seeds, POINTS]
        colour = f"C{place % 10}"
        if name not in COUNTS:
            at = np.mean([[float(row[unit]) / scale for row in run] for run in runs], axis=0)
            left.plot(at, losses.mean(axis=0), color=colour)
        last = losses[:, -1]
        right.plot([last.min(), last.max()], [place, place], color=colour, linewidth=2)
        right.plot(last.mean(), place, color=colour, marker="o")
        right.annotate(f"{last.mean():.3f}", (last.mean(), place), (0, -13), textcoords="offset points", ha="center")
        right.text(0.02, place - 0.28, name, transform=right.get_yaxis_transform(), color=colour, fontsize="small")
    left.set(xlabel=label, ylabel="held-out loss, nats per predicted token")
    right.set(xlabel="at the end: mean, lowest and highest seed", ylim=(len(curves) - 0.4, -0.6), yticks=[])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    options.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.png, dpi=110)


# ---------------------------------------------------------------- the command


def tell(line: str) -> None:
    print(f"learning.py: {line}", file=sys.stderr)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags, with variants by their names in the csv; raise UserError for a mistake in a flag."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--updates", type=flags.number(int, 1, NO_END), metavar="N", help="budget of a run")
    size.add_argument("--minutes", type=flags.number(float, 0.001, 1e6), metavar="N", help="budget of a run, instead")
    parser.add_argument("--data", default="corpus/train.txt", help="(default: %(default)s)")
    parser.add_argument("--valid", default="corpus/valid.txt", help="held-out text (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="32", help="width of the model (default: 32)")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        default=list(VARIANTS),
        help=f"see above (default: all that have a name: {', '.join(VARIANTS)})",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], metavar="N", help="(default: 0)")
    parser.add_argument(
        "--jobs",
        type=flags.number(int, 1, 1000),
        metavar="N",
        default=1,
        help="runs at once, which share the threads, those of OMP_NUM_THREADS or all (default: 1)",
    )
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="folder for the final weights of each run that is made"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "learning.csv", help="(default: %(default)s)")
    parser.add_argument("--png", type=Path, default=RESULTS / "learning.png", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    check_texts(data=options.data, valid=options.valid)
    options.seeds = list(dict.fromkeys(options.seeds))
    options.variants = list(dict.fromkeys(name_in_csv(words) for words in options.variants))
    for words in options.variants:
        check_variant(words, options)
    return options


def check_texts(**paths: str) -> None:
    """Raise UserError if a text does not exist; paths: keyed by the names of their flags."""
    for flag, path in paths.items():
        if not Path(path).exists():
            raise UserError(f"--{flag} {path} does not exist; run python benchmarks/corpus.py, or give another text")


def plan(options: argparse.Namespace) -> list[Task]:
    """Return the runs that the csv lacks; list these runs on stderr, and the others with their commits."""
    key = ("text", "shape", "budget", "targets", "variant", "seed")
    commit_of = {tuple(row[name] for name in key): row["commit"] or "not named" for row in read(options.csv)}
    text = text_of(options)
    missing: list[Task] = []
    found: dict[str, list[Task]] = {}  # the runs of each commit
    for seed, variant in itertools.product(options.seeds, options.variants):
        if variant in COUNTS and seed != options.seeds[0]:
            continue
        task = Task(options, variant, "" if variant in COUNTS else str(seed))
        run = (text, options.shape, budget(options), TARGETS, task.variant, task.seed)
        if run in commit_of:
            found.setdefault(commit_of[run], []).append(task)
        else:
            missing.append(task)
    for name, of_commit in found.items():
        tell(f"{len(of_commit)} curves are in {options.csv} already, of commit {name}: {list_runs(of_commit)}")
    if missing:
        tell(f"{len(missing)} runs to make: {list_runs(missing)}")
    return missing


def list_runs(tasks: Sequence[Task]) -> str:
    """Return variants with their seeds, as in "default (0, 1), bi_data=True (0), five-gram"."""
    seeds: dict[str, list[str]] = {}
    for task in tasks:
        seeds.setdefault(task.variant, []).append(task.seed)
    return ", ".join(f"{variant} ({', '.join(numbers)})".removesuffix(" ()") for variant, numbers in seeds.items())


def check_folders(save: Path, folders: Sequence[Path]) -> None:
    """Raise UserError if the weights of a run would overwrite others; save: the folder of --save."""
    for folder in folders:
        if folder.exists():
            raise UserError(f"--save {save}: {folder} exists; give another folder")


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, make the runs that the csv lacks, and show the curves."""
    options = read_options(argv)
    tasks = plan(options)
    if options.save:
        check_folders(options.save, [weights_folder(options.save, task) for task in tasks])
    make_runs(options, tasks)
    curves = find_curves(options)
    print_table(curves)
    draw(options, curves)


if __name__ == "__main__":
    with mistakes_in_one_line("learning.py"):
        benchmark()
