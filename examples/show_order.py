"""Print a factorization order over a text, its targets, and who sees whom in either stream.

    python examples/show_order.py --text "the cat sat on the mat" --seed 0

A third of the pieces is predicted, more than in training, so that there is something to look at.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_utils
from support import UserError, corpus, flags, mistakes_in_one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and print the order that they ask for."""
    with mistakes_in_one_line("show_order.py"):
        args = parse(argv)
        try:
            tokenizer = corpus.load_tokenizer(args.tokenizer)
            vocab = corpus.vocabulary(tokenizer)
        except ValueError as error:
            raise UserError(f"--tokenizer {args.tokenizer}: {error}") from None

    pieces = [*tokenizer.tokenize(args.text), tokenizer.special.sep]
    ids = np.array(tokenizer.convert_tokens_to_ids(pieces))
    rank, is_target = draw_order(vocab.word_start[ids], np.random.default_rng(args.seed))
    show(pieces, rank, is_target)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="the cat sat on the mat", help="a sentence (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="as in main.py (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=flags.number(int, 0, 2**63 - 1),
        default=0,
        help="of the order and the targets (default: %(default)s)",
    )
    return parser.parse_args(argv)


def draw_order(word_start: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw targets and an order over pieces, of which the last is a separator.

    word_start: [len] bool
    -> rank: [len] int, -1 = given; is_target: [len] bool
    """
    length = len(word_start)
    is_separator = np.arange(length) == length - 1
    is_masked = data_utils.sample_mask(
        word_start, mask_alpha=2, mask_beta=1, goal_num_predict=max(1, length // 3), rng=rng
    )
    return data_utils.local_perm(is_masked, is_separator, perm_size=length, rng=rng)


def show(pieces: list[str], rank: np.ndarray, is_target: np.ndarray) -> None:
    """Print the order and the targets, then a line for each piece with its place in the order and its masks."""
    order = [i for i in np.argsort(rank) if rank[i] >= 0]
    in_order = ", ".join(pieces[i] for i in order)
    predicted = ", ".join(pieces[i] for i in np.flatnonzero(is_target))
    print(f"order: {in_order}; to be predicted: {predicted}\n")

    query_sees = data_utils.ranks_to_mask(rank, is_target) == 0  # [len, len] bool
    content_sees = query_sees | np.eye(len(pieces), dtype=bool)  # the content stream sees itself
    columns = join(i % 10 for i in range(len(pieces)))
    table = [
        ("", "", "place", "content stream", "query stream: x = sees, . = must not see"),
        ("", "", "", columns, columns),
    ]
    for i, piece in enumerate(pieces):
        place = str(order.index(i) + 1) if i in order else "given"
        query_line = join(mark(query_sees[i])) if is_target[i] else ""  # only a target has a query stream
        table.append((str(i), piece, place, join(mark(content_sees[i])), query_line))
    print_table(table)


def mark(sees: np.ndarray) -> list[str]:
    """Return a mark for each position: x = seen."""
    return np.where(sees, "x", ".").tolist()


def join(cells: Iterable[int | str]) -> str:
    """Return cells in one line."""
    return " ".join(map(str, cells))


def print_table(lines: list[tuple[str, ...]]) -> None:
    """Print lines with their cells in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
