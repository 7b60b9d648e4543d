"""Time to loss: measure the held-out loss that an XLNet reaches in a given number of minutes on two cores.

    python benchmarks/corpus.py
    python benchmarks/record.py --minutes 10 --seeds 0 1 2
    python benchmarks/record.py --minutes 1 3 10 --entries "--optimizer muon --d_model 64"
    python benchmarks/record.py --minutes 10 --seeds

An entry is a line of main.py's flags: a name in ENTRIES, or flags of your own. It may change model, training and
vocabulary, but not the evaluation: every entry is judged on the windows, orders and targets that --valid has at default
flags, without dropout, and with memory unless it was trained without. Minutes count from the first step to the last;
preparing the text, judging and a short run that measures the speed do not count. The measured speed sets --train_steps,
so that a decay ends in time. A run that is not finished when the minutes are over stops there. Entries are chosen on
corpus/valid.txt. --final also judges them on corpus/test.txt, on which nothing is tuned.

Loss: nats per predicted token. Bits per byte: loss / ln 2 * word pieces of the text / its bytes. It compares
vocabularies roughly: a piece of a finer one sees more pieces of its own word. Text that a vocabulary does not know is
easier to predict; the table gives its share.

Each judgement adds a line to the csv. Runs that the csv already holds are not made again. Without seeds the program
only prints the table.
"""

import argparse
import contextlib
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import learning

import main
from support import UserError, flags, mistakes_in_one_line, warn

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "entry", "flags", "minutes", "seed", "judged_on", "loss", "bits_per_byte", "unknown", "updates", "seconds", "text",
    "machine", "commit", "date",
)  # fmt: skip
FIXED = ("data", "valid", "seed", "train_steps", "num_step", "output_dir", "resume", "init_checkpoint", "eval_only")
KEY = ("flags", "minutes", "seed", "judged_on", "text")  # columns that identify a run


class Entry(NamedTuple):
    """A competitor."""

    flags: str
    why: str


ENTRIES = {
    "default": Entry("", "what python main.py does"),
    "muon-128": Entry(
        "--optimizer muon --decay_method poly --n_layer 4 --d_model 128 --d_inner 512 --num_predict 480 --mem_len 0",
        "Muon, nearly every token a target, a decay to zero; fewer layers and no memory make more updates",
    ),
    "muon-192": Entry(
        "--optimizer muon --decay_method poly --n_layer 4 --d_model 192 --d_inner 768 --num_predict 480 --mem_len 0 "
        "--batch_size 2",
        "for an hour: wider; two windows an update take less time than two updates",
    ),
}


class Score(NamedTuple):
    """The score of a model on a text."""

    loss: float  # nats per predicted token
    bits_per_byte: float
    unknown: float  # share of the text's pieces


def judge(run: main.Run, path: str) -> Score:
    """Return the score of a run's model on a text, with the windows, orders and targets of default flags."""
    argv = ["--tokenizer", run.args.tokenizer, "--valid", path]
    for name in main.SHAPE:
        argv += [f"--{name}", str(getattr(run.args, name))]
    if run.args.mem_len == 0:
        argv += ["--mem_len", "0"]
    judged = main.prepare(argv)
    judged.model.load_state_dict(run.model.state_dict())
    loss = main.evaluate(judged.model, judged.valid_loader, judged.device)
    text = judged.valid_text
    n_bytes = len(" ".join(Path(path).read_text(encoding="utf-8").split()).encode())
    bits_per_byte = loss / math.log(2) * len(text.ids) / n_bytes
    return Score(loss, bits_per_byte, text.counts[judged.vocab.unk_id] / len(text.ids))


def train(argv: Sequence[str], seconds: float) -> tuple[main.Run, int, float]:
    """Train for at most `seconds`; return the run, its updates and its seconds."""
    n_updates = learning.steps_within(lambda: main.prepare([*argv, "--train_steps", str(flags.MOST_STEPS)]), seconds)
    run = main.prepare([*argv, "--train_steps", str(n_updates)])
    begin = time.perf_counter()
    with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
        for metrics in tqdm(steps, total=run.last_step, unit="step", leave=False, disable=None):
            float(metrics["loss"])  # waits for a GPU
            if time.perf_counter() - begin >= seconds:
                break
    if cut := learning.cut_short(run, metrics["step"]):
        warn(f"{' '.join(argv)}: {cut}")
    return run, metrics["step"] // run.args.grad_accum_steps, time.perf_counter() - begin


class Attempt(NamedTuple):
    """One run of an entry."""

    entry: str  # its name, "" if it has none
    flags: str
    minutes: float
    seed: int

    def folder(self, save: Path) -> Path:
        """Return the folder for the weights."""
        return save / f"{learning.slug(self.entry or self.flags)}-{self.minutes:g}-{self.seed}"


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def make_rows(attempt: Attempt, text: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """Train an entry and judge it on each text; return its rows for the csv; text: name of the texts there."""
    argv = ["--data", options.data, "--seed", str(attempt.seed), *attempt.flags.split()]
    run, n_updates, seconds = train(argv, 60 * attempt.minutes)
    if options.save:
        learning.save_weights(run, attempt.folder(options.save))
    rows = []
    for path in options.judged_on:
        score = judge(run, path)
        row = {
            "entry": attempt.entry,
            "flags": attempt.flags,
            "minutes": f"{attempt.minutes:g}",
            "seed": str(attempt.seed),
            "judged_on": Path(path).name,
            "loss": f"{score.loss:.4f}",
            "bits_per_byte": f"{score.bits_per_byte:.4f}",
            "unknown": f"{score.unknown:.5f}",
            "updates": str(n_updates),
            "seconds": f"{seconds:.1f}",
            "text": text,
            "machine": learning.machine_of(run),
            "commit": learning.commit(),
            "date": str(datetime.date.today()),
        }
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print a line for each entry and budget: the mean over its seeds and their spread."""
    print(
        "| entry | minutes | judged on | loss | standard deviation | bits per byte | unknown | updates | seeds | "
        "flags | why |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    groups: dict[tuple[str, str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["entry"], row["minutes"], row["judged_on"], row["flags"]), []).append(row)
    by_minutes_and_bits = sorted(groups.items(), key=lambda item: (float(item[0][1]), mean(item[1], "bits_per_byte")))
    for (entry, minutes, judged_on, entry_flags), runs in by_minutes_and_bits:
        spread = f"{statistics.stdev(float(run['loss']) for run in runs):.3f}" if len(runs) > 1 else ""
        why = ENTRIES[entry].why if entry in ENTRIES else ""
        print(
            f"| {entry} | {minutes} | {judged_on} | {mean(runs, 'loss'):.3f} | {spread} | "
            f"{mean(runs, 'bits_per_byte'):.3f} | {mean(runs, 'unknown'):.2%} | {mean(runs, 'updates'):,.0f} | "
            f"{len(runs)} | `{entry_flags}` | {why} |"
        )


def mean(rows: Sequence[dict[str, str]], column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; raise UserError for a mistake in one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", nargs="+", type=flags.number(float, 0.01, 1e5), metavar="N", default=[10], help="(default: 10)"
    )
    parser.add_argument(
        "--entries",
        nargs="+",
        metavar="ENTRY",
        default=list(ENTRIES),
        help=f"names or flags of main.py (default: {', '.join(ENTRIES)})",
    )
    parser.add_argument("--seeds", nargs="*", type=int, metavar="N", default=[0], help="(default: 0)")
    parser.add_argument("--final", action="store_true", help="judge on --test too")
    parser.add_argument("--data", default="corpus/train.txt", help="(default: %(default)s)")
    parser.add_argument("--valid", default="corpus/valid.txt", help="(default: %(default)s)")
    parser.add_argument("--test", default="corpus/test.txt", help="(default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder for the weights of each run")
    parser.add_argument("--csv", type=Path, default=RESULTS / "record.csv", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    learning.check_texts(data=options.data, valid=options.valid, test=options.test)
    options.judged_on = [options.valid, options.test] if options.final else [options.valid]
    for words in options.entries:
        check_entry(words)
    return options


def check_entry(words: str) -> None:
    """Raise UserError if an entry is neither a name nor flags of main.py, or if it changes a flag in FIXED."""
    if words not in ENTRIES and not words.startswith("-"):
        raise UserError(f"--entries {words!r} is no name of an entry; give flags, or one of {', '.join(ENTRIES)}")
    given, defaults = vars(flags.parse(find_entry(words).split())), vars(flags.parse([]))
    for name in FIXED:
        if given[name] != defaults[name]:
            raise UserError(f"--entries {words!r}: --{name} is set by record.py; leave it out")
    main.read_flags(find_entry(words).split())  # checks the values


def find_entry(words: str) -> str:
    """Return the flags of an entry given by its name or by its flags."""
    return ENTRIES[words].flags if words in ENTRIES else words


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Make the runs that the csv lacks, and print its table."""
    options = read_options(argv)
    text = learning.text_of(options)
    rows = learning.read(options.csv, COLUMNS)
    made = {key_of(row) for row in rows}
    missing = []
    for minutes, seed, words in itertools.product(options.minutes, options.seeds, options.entries):
        attempt = Attempt(words if words in ENTRIES else "", find_entry(words), minutes, seed)
        if (attempt.flags, f"{minutes:g}", str(seed), Path(options.judged_on[-1]).name, text) not in made:
            missing.append(attempt)
    if options.save:
        learning.check_folders(options.save, [attempt.folder(options.save) for attempt in missing])
    for attempt in missing:
        new = [row for row in make_rows(attempt, text, options) if key_of(row) not in made]
        learning.append(options.csv, new, COLUMNS)
        rows += new
    print_table([row for row in rows if row["text"] == text])


if __name__ == "__main__":
    with mistakes_in_one_line("record.py"):
        benchmark()
