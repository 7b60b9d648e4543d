"""Measure the cost of a large text: tokenizing in one process and on all cores, the next start, and memory.

    python benchmarks/large_text.py
    python benchmarks/large_text.py --megabytes 100 1000 --processes 2 --folder large

The program writes a synthetic, seeded text of each size: words of BERT's vocabulary and made-up words, with frequencies
by Zipf's law, in sentences of 5 to 40 words, 20 sentences a document. For each text it runs
`python main.py --train_steps 1` with an empty cache, then some more steps with a full cache. It measures the seconds to
the first step, and the peak memory of the command and its processes together (resident; a memory-mapped page of the
text counts until something else needs its memory).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.corpus import VOCAB_DIR

ROOT = Path(__file__).resolve().parent.parent
KINDS, FREQUENT = 300_000, 15_000  # different words in all, and those from the vocabulary


def write(path: Path, megabytes: int) -> None:
    """Write a text of about `megabytes` million bytes, in parts of 20,000 sentences, or fewer if the text is small."""
    rng = np.random.default_rng(0)
    pieces = (VOCAB_DIR / "bert-base-uncased.txt").read_text(encoding="utf-8").split()
    whole = rng.permutation([piece for piece in pieces if piece.isascii() and piece.isalpha()])[:FREQUENT]
    made_up = ["".join(two) for two in rng.choice(whole, (KINDS - len(whole), 2)).tolist()]
    words = np.concatenate([whole, made_up])
    share = 1 / np.arange(1, KINDS + 1)
    share /= share.sum()
    with (
        open(path, "w", encoding="utf-8", newline="\n") as file,
        tqdm(desc=path.name, total=megabytes, unit="MB", leave=False, disable=None) as progress,
    ):
        while file.tell() < megabytes * 10**6:
            lengths = rng.integers(5, 41, size=min(20_000, 2_000 * megabytes))
            sentences = np.split(words[rng.choice(KINDS, size=lengths.sum(), p=share)], np.cumsum(lengths)[:-1])
            for i, sentence in enumerate(sentences, start=1):
                file.write(" ".join(sentence).capitalize() + (".\n\n" if i % 20 == 0 else ".\n"))
            progress.update(file.tell() / 10**6 - progress.n)


def resident(process: psutil.Process) -> int:
    """Return the resident bytes of a process and its children."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


def run(data: Path, cache: str, steps: int, processes: int) -> tuple[float, float]:
    """Return the seconds to the line of the first step, and the peak memory of all processes together, in MiB."""
    command = [sys.executable, str(ROOT / "main.py"), "--data", str(data), "--cache_dir", cache]
    command += ["--train_steps", str(steps)]
    environment = os.environ | {"LOKY_MAX_CPU_COUNT": str(processes)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0

    def watch() -> None:
        nonlocal peak
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, resident(watched))
            except psutil.NoSuchProcess:  # it has just ended
                pass
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = next(time.perf_counter() - begin for line in process.stdout if line.startswith("Number of Epoch"))
    process.stdout.read()
    watcher.join()
    assert process.wait() == 0
    return seconds, peak / 2**20


def measure(path: Path, processes: int, steps: int, folder: Path) -> None:
    """Measure one text with one number of processes, and print its row."""
    megabytes = path.stat().st_size / 10**6
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first, peak = run(path, cache, 1, processes)
        again, peak_training = run(path, cache, steps, processes)
    speed = f"{megabytes / (first - again):.1f}" if first > again + 1 else ""  # one page is too short to measure
    print(
        f"| {megabytes:.4g} | {processes} | {first:.1f} | {speed} | {peak:.0f} | {again:.1f} | {peak_training:.0f} |",
        flush=True,
    )


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, write the texts, and print a row for each text and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100, 1000], help="(default: 10 100 1000)")
    parser.add_argument(
        "--processes",
        nargs="+",
        type=int,
        default=[1, joblib.cpu_count()],
        help="that tokenize (default: 1, and one a core)",
    )
    parser.add_argument("--steps", type=int, default=200, help="of the second run (default: 200)")
    parser.add_argument("--folder", type=Path, help="where texts are written and kept (default: a temporary folder)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        texts = [ROOT / "data.txt"]
        for megabytes in options.megabytes:
            texts.append(folder / f"{megabytes}.txt")
            if not texts[-1].exists():
                write(texts[-1], megabytes)
        print(
            "| text, MB | processes | first start, s to the first step | MB/s | peak MiB | next start, s | "
            f"peak MiB, {options.steps} steps |\n|---|---|---|---|---|---|---|"
        )
        for path in texts:
            for processes in options.processes:
                measure(path, processes, options.steps, folder)


if __name__ == "__main__":
    benchmark()
