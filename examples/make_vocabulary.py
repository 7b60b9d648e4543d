"""Train a vocabulary on your own text, for main.py --tokenizer.

    pip install sentencepiece
    python examples/make_vocabulary.py my.txt --output_dir vocabulary --size 8000
    python main.py --data my.txt --tokenizer vocabulary

Capitals and accents are kept, because in most languages they tell words apart: without accents the Japanese ga is ka,
and German schon and schön are one word. The released XLNet models keep capitals and strip accents; --keep_accents False
does the same. A WordPiece vocabulary like that of BERT needs `pip install tokenizers` and --kind wordpiece.
"""

import argparse
import io
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import UserError, corpus, flags, mistakes_in_one_line

# Ids 0 to 2 are <unk>, <s> and </s>. These follow in the order of the released models; pieces of the second list can
# occur in a text. Source: official README, spm_train.
CONTROL_SYMBOLS = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
USER_DEFINED_SYMBOLS = ["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"]
CHARACTER_COVERAGE = 0.99995  # share of the text whose characters become pieces; rarer characters are unknown
BERT_SYMBOLS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PART = 4096  # characters; a longer line is sampled and trained on in parts
BYTES_A_MINUTE = 20_000_000  # of text on which SentencePiece trains, on one core
REPORT = 1_000_000  # characters of the sample on which the finished vocabulary is tested
SKIPPED = re.compile("[\0▅]")  # SentencePiece drops a line with one of these characters
OTHER_FILES = ("tokenizer.json", "tokenizer_config.json")  # they change how a vocabulary beside them works


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and make the vocabulary that they ask for."""
    with mistakes_in_one_line("make_vocabulary.py"):
        make_vocabulary(parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "text", nargs="+", type=flags.not_empty, metavar="FILE", help="UTF-8 text, one sentence a line, as in main.py"
    )
    parser.add_argument(
        "--output_dir", required=True, type=flags.not_empty, metavar="DIR", help="folder for the vocabulary"
    )
    parser.add_argument(
        "--size",
        type=flags.number(int, 20, 2**20),
        metavar="N",
        default=8000,
        help="pieces in the vocabulary; 32000 are usual for hundreds of MB (default: %(default)s)",
    )
    parser.add_argument(
        "--kind",
        choices=["sentencepiece", "wordpiece"],
        default="sentencepiece",
        help="sentencepiece: as XLNet has it, for all languages; wordpiece: as BERT has it, for languages with spaces "
        "between words (default: %(default)s)",
    )
    parser.add_argument(
        "--keep_accents",
        type=flags.true_or_false,
        metavar="BOOL",
        help="False: strip accents, as the released XLNet models do (default: True; with --kind wordpiece accents are "
        "kept where capitals are)",
    )
    parser.add_argument(
        "--lower_case",
        type=flags.true_or_false,
        metavar="BOOL",
        default=False,
        help="True: make capitals small (default: %(default)s)",
    )
    parser.add_argument(
        "--sample_mb",
        type=flags.number(float, 0.001, 1e6),
        metavar="N",
        default=100.0,
        help="MB of text to train on; of a larger text, lines are drawn at random from all files. 100 MB took "
        "SentencePiece 5 minutes on one core and 2.1 GB of memory (default: %(default)g)",
    )
    return parser.parse_args(argv)


def make_vocabulary(args: argparse.Namespace) -> None:
    """Train a vocabulary, write it into its folder, and print how well it fits the text.

    Raises UserError for a wrong flag, a file that cannot be used, or a missing package.
    """
    if args.kind == "wordpiece" and args.keep_accents is not None and args.keep_accents == args.lower_case:
        raise UserError(
            f"--keep_accents {args.keep_accents} does not go with --kind wordpiece --lower_case {args.lower_case}: "
            f"BERT's tokenizer strips accents where it makes capitals small; leave --keep_accents out"
        )
    require_package("sentencepiece" if args.kind == "sentencepiece" else "tokenizers", args.kind)
    folder = open_folder(args.output_dir)
    n_bytes = sum(size_of(path) for path in args.text)
    lines = sample(args.text, n_bytes, int(args.sample_mb * 1e6))
    announce(args, sum(len(line.encode()) for line in lines), n_bytes)
    if args.kind == "sentencepiece":
        train_sentence_piece(lines, folder, args)
    else:
        train_word_piece(lines, folder, args)
    print(fit(corpus.load_tokenizer(folder), lines))
    words = ["python", "main.py", "--data", *args.text, "--tokenizer", args.output_dir]
    print("use it:", command_line(words, sys.platform))


def command_line(words: Sequence[str], platform: str) -> str:
    """Return words as a command to paste, with the quotes of that platform: Windows' cmd knows no single ones."""
    return subprocess.list2cmdline(words) if platform == "win32" else shlex.join(words)


def announce(args: argparse.Namespace, n_used: int, n_bytes: int) -> None:
    """Print how many pieces are trained on how much text; SentencePiece prints nothing until it is done."""
    line = f"training {args.size:,} pieces on {n_used:,} of {n_bytes:,} bytes of text"
    minutes = n_used / BYTES_A_MINUTE
    if args.kind == "sentencepiece" and minutes > 1:
        line += f": {minutes:.0f} minutes or so on one core"
    print(line, flush=True)


def require_package(package: str, kind: str) -> None:
    """Raise UserError if an optional package is missing."""
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"--kind {kind} needs a package that is not here; pip install {package}") from None


def open_folder(output_dir: str) -> Path:
    """Make the folder of a vocabulary; raise UserError if it already holds one or cannot be written to."""
    folder = Path(output_dir)
    for name in (corpus.SentencePiece.saved_name, corpus.WordPiece.saved_name, *OTHER_FILES):
        if (folder / name).exists():
            raise UserError(f"--output_dir {output_dir} holds a vocabulary already ({name}); give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {output_dir} cannot be written to; give another folder")
    return folder


# ---------------------------------------------------------------- from files to a sample


def size_of(path: str) -> int:
    """Return the size of a text file in bytes; raise UserError if it is no file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give a text file")
    return os.path.getsize(path)


def sample(paths: Sequence[str], n_bytes: int, limit: int) -> list[str]:
    """Return the lines of files in order: all of them, or a random sample if the files exceed the limit.

    Each line has the same chance, and the same files give the same lines. A line longer than PART counts as several.

    n_bytes: size of all files together; limit: largest size of the result in bytes, without line ends
    Raises UserError if a file cannot be read, is not UTF-8, or none holds text.
    """
    rng = random.Random(0)
    share = min(1.0, limit / max(1, n_bytes))
    lines = []
    room = limit
    with tqdm(desc="reading", total=n_bytes, unit="B", unit_scale=True, delay=1, leave=False, disable=None) as progress:
        for path in paths:
            for line in read_lines(path, progress):
                size = len(line.encode())
                if line.strip() and size <= room and rng.random() < share:
                    lines.append(line)
                    room -= size
    if not lines:
        raise UserError(f"{', '.join(paths)}: no line of text in the sample; give more text, or a larger --sample_mb")
    return lines


def read_lines(path: str, progress: tqdm) -> Iterator[str]:
    """Yield the lines of a file, lines longer than PART in parts; never hold more than a chunk of the file.

    Raises UserError if the file cannot be read or is not UTF-8.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            while chunk := corpus.read_characters(file, corpus.CHUNK):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    yield from parts(line)
                *complete, rest = parts(rest)
                yield from complete
                progress.update(len(chunk.encode()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a text file") from None
    except ValueError as error:  # not UTF-8
        raise UserError(str(error)) from None
    yield rest


def parts(line: str) -> list[str]:
    """Return a line in parts of at most PART characters, split after a space where possible."""
    result = []
    start = 0
    while len(line) - start > PART:
        end = line.rfind(" ", start, start + PART) + 1 or start + PART
        result.append(line[start:end])
        start = end
    return [*result, line[start:]]


# ---------------------------------------------------------------- training


class Treatment(corpus.SentencePiece):
    """The text treatment of a SentencePiece tokenizer whose model is not yet trained."""

    def __init__(self, keep_accents: bool, lower_case: bool):
        self.config = {"do_lower_case": lower_case, "keep_accents": keep_accents}

    def training_lines(self, lines: Sequence[str]) -> Iterator[str]:
        """Yield lines as the tokenizer will see them, without characters that make SentencePiece drop a line."""
        for line in lines:
            text = self.normalize(SKIPPED.sub(" ", line))
            if text:
                yield text


def train_sentence_piece(lines: Sequence[str], folder: Path, args: argparse.Namespace) -> None:
    """Write spiece.model, and the tokenizer_config.json that says how text is treated.

    Raises UserError if --size does not fit the text.
    """
    import sentencepiece

    treatment = Treatment(keep_accents=args.keep_accents is not False, lower_case=args.lower_case)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=treatment.training_lines(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=args.size,
            character_coverage=CHARACTER_COVERAGE,
            control_symbols=CONTROL_SYMBOLS,
            user_defined_symbols=USER_DEFINED_SYMBOLS,
            max_sentence_length=2**30,  # bytes; a longer sentence would be dropped
            num_threads=16,  # the pieces depend on it, so it is the same on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        mistake = wrong_size(args.size, str(error))
        if mistake is None:
            raise
        raise mistake from None
    corpus.write_json(folder / "tokenizer_config.json", treatment.config)
    (folder / treatment.saved_name).write_bytes(model.getvalue())


def wrong_size(size: int, message: str) -> UserError | None:
    """Return the error for the user if SentencePiece's message is about the size, otherwise None."""
    if most := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return UserError(f"--size {size} is too large for this text; give at most {most[1]}, or more text")
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"--size {size} is too small for this text: each special piece and each character is a piece; "
            f"give at least {least[1]}"
        )
    return None


def train_word_piece(lines: Sequence[str], folder: Path, args: argparse.Namespace) -> None:
    """Write vocab.txt; it has fewer pieces than --size if the text does not yield more."""
    import tokenizers

    trainer = tokenizers.BertWordPieceTokenizer(lowercase=args.lower_case, strip_accents=args.lower_case)
    trainer.train_from_iterator(
        lines,
        vocab_size=args.size,
        special_tokens=BERT_SYMBOLS,
        limit_alphabet=args.size // 4,  # a character may become two pieces, one of them with ##
        initial_alphabet=[] if args.lower_case else ["A"],  # a vocab.txt without any capital is taken for lower-case
        show_progress=sys.stderr.isatty(),
    )
    ids = trainer.get_vocab()
    pieces = sorted(ids, key=ids.get)
    content = "".join(f"{piece}\n" for piece in pieces)
    (folder / corpus.WordPiece.saved_name).write_text(content, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------- the report


def fit(tokenizer: corpus.Tokenizer, lines: Sequence[str]) -> str:
    """Return a line about a vocabulary: its size, and how it cuts lines taken evenly from the sample."""
    step = max(1, sum(map(len, lines)) // REPORT)
    n_pieces = n_unknown = n_words = 0
    for line in lines[::step]:
        ids = tokenizer.encode(line)
        n_pieces += len(ids)
        n_unknown += ids.count(tokenizer.vocab[tokenizer.special.unk])
        n_words += len(line.split())
    return (
        f"{tokenizer.vocab_file}: {len(tokenizer.vocab):,} pieces; on this text {n_unknown / n_pieces:.2%} of the "
        f"pieces are unknown, and a word has {n_pieces / n_words:.2f} pieces"
    )


if __name__ == "__main__":
    main()
