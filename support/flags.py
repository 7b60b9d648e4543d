"""The flags of main.py: their names, types and defaults, how a checkpoint fixes some of them, and their checks."""

import argparse
import importlib.util
import math
import os
import reprlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from support import UserError
from support.corpus import TOKENIZERS

# Flags that may differ from those of the checkpoint. Text and vocabulary are compared by content. The flags that the
# optimizer's state holds cannot be here: `checkpoint.check` requires the saved betas, eps and weight_decay.
MAY_CHANGE = {
    "num_step", "train_steps", "save_steps", "save_total_limit", "eval_steps", "eval_only", "log_steps", "device",
    "data", "tokenizer", "valid", "output_dir", "resume", "tensorboard", "cache_dir",
}  # fmt: skip
LEAST_BLOCK = 8  # fewest tokens that a default perm_size permutes together


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of ending the program; main does that."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; --help lists all flags"
        raise UserError(message)


def parse(
    argv: list[str] | None,
    fixed: dict[str, Any] | None = None,
    source: str = "",
    suggested: dict[str, Any] | None = None,
) -> argparse.Namespace:
    """Return the flags of a command line; flags not given take their default, or the value in `fixed` or `suggested`.

    Defaults that depend on other flags are None; see `fill_defaults`.

    argv: words of the command line; None = those of this program
    fixed: flags that a checkpoint fixes, by name; suggested: its other flags; source: the checkpoint, for messages
    Raises UserError for a wrong flag or value, and for a flag that contradicts a fixed one.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not fixed:
        return args
    if args.num_step is not None or args.train_steps is not None:  # a new end replaces both
        fixed = fixed | {"num_step": None, "train_steps": None}
    parser.set_defaults(**fixed, **(suggested or {}))
    args = parser.parse_args(argv)
    for name, value in fixed.items():
        given = getattr(args, name)
        if given != value and name not in MAY_CHANGE:
            advice = "leave it out"
            if args.resume is not None:
                advice += ", or begin another run from its weights with --init_checkpoint and another --output_dir"
            raise UserError(f"--{name} {given} contradicts {source}, where it is {value}; {advice}")
    return args


def fill_defaults(args: argparse.Namespace, world_size: int) -> None:
    """Set the flags whose defaults depend on other flags, on the environment or on the number of processes."""
    if args.data is None:
        args.data = [str(Path(__file__).resolve().parent.parent / "data.txt")]
    if args.cache_dir is None:
        args.cache_dir = default_cache_dir()
    if args.batch_size is None:
        args.batch_size = batch_divisor(args, world_size)
    if args.num_step is None and args.train_steps is None:
        args.num_step = 100
    if args.seq_len is None:
        args.seq_len = 512
    if args.reuse_len is None:
        args.reuse_len = args.seq_len // 2
    if args.perm_size is None:
        args.perm_size = largest_block(args)
    if args.num_predict is None:
        args.num_predict = max(1, min(args.seq_len // 6, most_targets(args)))
    if args.mem_len is None:
        args.mem_len = 3 * args.seq_len // 4
    if args.d_head is None:
        args.d_head = max(1, args.d_model // args.n_head)
    if args.d_inner is None:
        args.d_inner = args.d_model
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(args)


def default_learning_rate(args: argparse.Namespace) -> float:
    """Return the learning rate that did best in short runs from scratch, or a quarter of it for a checkpoint."""
    if args.optimizer == "muon":  # its updates have the same effect at every width
        rate = 3e-3
    else:
        rate = 4e-3 * (32 / max(32, args.d_model)) ** (4 / 3)
    return float(f"{rate / 4 if args.init_checkpoint else rate:.2g}")


def largest_block(args: argparse.Namespace) -> int:
    """Return the largest perm_size that reuse_len and seq_len allow.

    Raises UserError if that block is so small that most tokens would be predicted from left to right.
    """
    rest_len = args.seq_len - args.reuse_len
    block = math.gcd(args.reuse_len, rest_len)
    if rest_len < 4:  # `check` refuses this
        return block
    if block < min(LEAST_BLOCK, args.reuse_len, rest_len):
        even = args.seq_len + args.seq_len % 2
        raise UserError(
            f"--seq_len {args.seq_len} with --reuse_len {args.reuse_len} leaves blocks of {block} tokens to permute; "
            f"try --seq_len {even} --reuse_len {even // 2}, or give --perm_size"
        )
    return block


def most_targets(args: argparse.Namespace) -> int:
    """Return how many targets fit into a window; the larger half of them lies in the first reuse_len tokens."""
    return min(2 * args.reuse_len, 2 * (args.seq_len - args.reuse_len) + 1)


def default_cache_dir() -> str:
    """Return the folder of tokenized texts: xlnet in $XDG_CACHE_HOME, or in ~/.cache."""
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if parent.startswith("~"):  # a user without a home
        parent = tempfile.gettempdir()
    return os.path.join(parent, "xlnet")


def with_absolute_paths(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags by name, with absolute paths, so that a run can resume from another folder."""
    paths = {
        "data": [os.path.abspath(path) for path in args.data],
        "cache_dir": os.path.abspath(args.cache_dir),
    }
    if args.valid and share(args.valid) is None:
        paths["valid"] = os.path.abspath(args.valid)
    if args.tokenizer not in TOKENIZERS:
        paths["tokenizer"] = os.path.abspath(args.tokenizer)
    return vars(args) | paths


def batch_divisor(args: argparse.Namespace, world_size: int) -> int:
    """Return the number that must divide batch_size: one row per process, or with bi_data one in each direction."""
    return 2 * world_size if args.bi_data else world_size


def check(args: argparse.Namespace, world_size: int) -> None:
    """Raise UserError for flags that do not go together."""
    rest_len = args.seq_len - args.reuse_len
    if rest_len < 4:
        raise UserError(
            f"--reuse_len {args.reuse_len} leaves no room for two segments, two [SEP] and a [CLS] in "
            f"--seq_len {args.seq_len}; give at most {args.seq_len - 4}"
        )
    if args.reuse_len % args.perm_size or rest_len % args.perm_size:
        raise UserError(
            f"--perm_size {args.perm_size} must divide --reuse_len {args.reuse_len} and "
            f"--seq_len - --reuse_len = {rest_len}; try {nearest_divisors(args.perm_size, args.reuse_len, rest_len)}"
        )
    if args.num_predict > most_targets(args):
        raise UserError(
            f"--num_predict {args.num_predict} does not fit into --seq_len {args.seq_len} with "
            f"--reuse_len {args.reuse_len}; give at most {most_targets(args)}"
        )
    if args.mask_beta > args.mask_alpha:
        raise UserError(
            f"--mask_beta {args.mask_beta} is above --mask_alpha {args.mask_alpha}; give at most {args.mask_alpha}"
        )
    if args.d_model % 2:
        raise UserError(
            f"--d_model {args.d_model} is odd, and half of the position features are sines; try {args.d_model + 1}"
        )
    divisor = batch_divisor(args, world_size)
    if args.batch_size % divisor and args.resume is not None:
        shares = args.batch_size // batch_divisor(args, 1)
        able = [str(n) for n in range(1, shares + 1) if shares % n == 0]
        raise UserError(
            f"--resume: the run has {shares} rows a step in each direction, which {world_size} processes cannot share "
            f"evenly; start {' or '.join(able)}"
        )
    if args.batch_size % divisor:
        shared = f" on {world_size} processes" if world_size > 1 else ""
        raise UserError(
            f"--batch_size {args.batch_size} must be a multiple of {divisor}, for --bi_data {args.bi_data}{shared}; "
            f"try {math.ceil(args.batch_size / divisor) * divisor}"
        )
    if args.rows is not None and args.rows % args.batch_size:
        raise UserError(
            f"--rows {args.rows} is no multiple of --batch_size {args.batch_size}; "
            f"try {max(1, args.rows // args.batch_size) * args.batch_size}"
        )
    if args.learning_rate * args.weight_decay > 1:
        raise UserError(
            f"--weight_decay {args.weight_decay} times --learning_rate {args.learning_rate} is above 1: updates would "
            f"turn the weights round; give at most {1 / args.learning_rate:g}"
        )
    if args.min_lr_ratio > 1:
        raise UserError(f"--min_lr_ratio {args.min_lr_ratio} is a share of --learning_rate; give at most 1")
    if args.output_dir and args.n_head * args.d_head != args.d_model:
        remedy = f"--d_head {args.d_model // args.n_head}"
        if args.d_model % args.n_head:
            remedy = f"--n_head {nearest_divisors(args.n_head, args.d_model, args.d_model)} without --d_head"
        raise UserError(
            f"--n_head {args.n_head} times --d_head {args.d_head} is not --d_model {args.d_model}, which a Hugging "
            f"Face XLNet needs; leave out --output_dir, or try {remedy}"
        )
    if args.save_steps and not args.output_dir:
        raise UserError(f"--save_steps {args.save_steps} needs --output_dir; give a folder")
    if args.tensorboard and not args.output_dir:
        raise UserError("--tensorboard needs --output_dir; give a folder")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed; pip install tensorboard")
    if args.eval_steps and not args.valid:
        raise UserError(f"--eval_steps {args.eval_steps} needs --valid; give a validation text")
    if args.valid and share(args.valid) is None and not os.path.exists(args.valid):
        raise UserError(
            f"--valid {args.valid}: No such file; give a text file, or a share between 0 and 1 such as 0.01"
        )
    if args.eval_only and not (args.valid and (args.init_checkpoint or args.resume is not None)):
        raise UserError("--eval_only needs --valid, and --init_checkpoint or --resume; give a text and a model")


def check_memory(args: argparse.Namespace, n_token: int, world_size: int) -> None:
    """Raise UserError if the weights alone or the attention scores alone are larger than the machine's memory.

    n_token: size of the vocabulary
    Both estimates are too low, so that no run that fits is refused: the weights leave out the biases, and the scores
    leave out memory.
    """
    memory = memory_of_machine()
    per_layer = 5 * args.n_head * args.d_head + 2 * args.d_inner
    n_weights = args.d_model * (n_token + args.n_layer * per_layer)
    if 4 * n_weights > memory:
        raise UserError(
            f"--n_layer {args.n_layer} --n_head {args.n_head} --d_head {args.d_head} --d_model {args.d_model} "
            f"--d_inner {args.d_inner} and {n_token:,} word pieces make {4 * n_weights / 1e9:,.0f} GB of weights, and "
            f"this machine has "
            f"{memory / 1e9:,.0f} GB; give a smaller shape"
        )
    # The backward pass keeps the scores of every head in each layer but the last, which has no content stream. The 1
    # counts the mask of the content stream. Two bytes each: a run may use bfloat16.
    n_scores = args.batch_size // world_size * args.seq_len**2 * (1 + (args.n_layer - 1) * args.n_head)
    if 2 * n_scores > memory:
        raise UserError(
            f"--seq_len {args.seq_len} --batch_size {args.batch_size} make {2 * n_scores / 1e9:,.0f} GB of attention "
            f"scores, and this machine has {memory / 1e9:,.0f} GB; give a smaller --seq_len or --batch_size"
        )


def largest_tensor(args: argparse.Namespace, n_token: int, world_size: int) -> int:
    """Return the bytes of the largest tensor of a training step in float32: a gradient, logits or attention scores."""
    rows = args.batch_size // world_size
    embedding = n_token * args.d_model
    logits = rows * args.num_predict * n_token
    scores = rows * args.n_head * (args.seq_len - args.reuse_len) * (args.seq_len + args.mem_len)
    return 4 * max(embedding, logits, scores)


def memory_of_machine() -> float:
    """Return the memory of this machine in bytes, or infinity if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


def nearest_divisors(near: int, first: int, second: int) -> str:
    """Return the common divisors of both numbers nearest to `near`, below and above it, as in "128 or 256"."""
    common = math.gcd(first, second)
    up_to_root = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    divisors = sorted({*up_to_root, *(common // n for n in up_to_root)})
    below = [n for n in divisors if n < near]
    above = [n for n in divisors if n > near]
    return " or ".join(str(n) for n in below[-1:] + above[:1])


def share(valid: str) -> float | None:
    """Return the share of the text that --valid asks for, or None if it names a file."""
    try:
        value = float(valid)
    except ValueError:
        return None
    return value if 0 < value < 1 and not os.path.exists(valid) else None


# ---------------------------------------------------------------- types of values


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """Return a function from text to an int or a float from `least` to `most`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # nan too
            given = reprlib.repr(text)  # shortened: it may have hundreds of digits
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{given} will not do; give {wanted} of at least {least} and at most {most}"
            )
        return value

    return convert


def not_empty(text: str) -> str:
    """Return the name of a file, folder or tokenizer; an empty name comes from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("'' will not do; give a name, or leave the flag out")
    try:
        text.encode()
    except UnicodeEncodeError:  # a checkpoint could not hold it
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; rename it") from None
    return text


def true_or_false(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} will not do; give True or False")


# The largest values are far above any use. No arithmetic on them overflows.
MOST_TOKENS = 2**20  # the mask of a window this long has a trillion entries
MOST_ROWS = 2**16  # cutting a text into this many rows takes a second
MOST_LAYERS = 1000
MOST_WIDTH = 2**16  # four times the widest language models
MOST_STEPS = 10**9  # months at a hundred per second; a product of two fits into 64 bits
TOKENS = number(int, 1, MOST_TOKENS)
ROWS = number(int, 1, MOST_ROWS)
WIDTH = number(int, 1, MOST_WIDTH)
STEPS = number(int, 1, MOST_STEPS)
REAL = number(float, 0, 1e6)  # float32 holds the sixth power
RATE = number(float, 0, 0.999)  # a dropout of 1 leaves nothing

# ---------------------------------------------------------------- the flags


def build_parser() -> Parser:
    """Return the parser of all flags, in the groups of --help."""
    parser = Parser(
        prog="main.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_optimizer_flags(parser.add_argument_group("optimizer"))
    add_run_flags(parser.add_argument_group("run"))
    return parser


DESCRIPTION = """\
Pretrain XLNet on a text file, one sentence a line, a blank line between documents.

    python main.py
    python main.py --data my.txt --valid held_out.txt --output_dir out --n_layer 4 --d_model 64 --d_head 16
    python main.py --output_dir out --resume
    torchrun --nproc_per_node 2 main.py --data books/*.txt --batch_size 8
    python main.py --data ./data.txt --tokenizer bert-base-uncased --seq_len 512 --reuse_len 256 --perm_size 256 \\
      --bi_data True --mask_alpha 6 --mask_beta 1 --num_predict 85 --mem_len 384 --num_step 100

Each line printed is one step: the loss on one batch of windows, in nats per predicted token. Guessing uniformly gives
ln(size of the vocabulary), 10.3 for BERT's; guessing by word frequency gives the unigram entropy, which the first line
prints.
"""


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        type=not_empty,
        metavar="FILE",
        help="UTF-8 text, a sentence a line, a blank line between documents; several files are several documents "
        "(default: data.txt beside main.py)",
    )
    group.add_argument(
        "--cache_dir",
        type=not_empty,
        metavar="DIR",
        help="folder that caches the token ids of a text (default: xlnet in $XDG_CACHE_HOME, or in ~/.cache)",
    )
    group.add_argument(
        "--tokenizer",
        type=not_empty,
        metavar="NAME",
        default="bert-base-uncased",
        help=f"{', '.join(TOKENIZERS)}, a vocab.txt, a SentencePiece .model, or a directory with one of them "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seq_len",
        type=number(int, 5, MOST_TOKENS),
        metavar="N",
        help="tokens in a window (default: 512; with --init_checkpoint that of a checkpoint of this project)",
    )
    group.add_argument(
        "--reuse_len",
        type=TOKENS,
        metavar="N",
        help="first tokens of a window, which become memory; the next window begins after them (default: half of "
        "seq_len, 256)",
    )
    group.add_argument(
        "--perm_size",
        type=TOKENS,
        metavar="N",
        help="tokens permuted together; must divide reuse_len and seq_len - reuse_len (default: the largest that does, "
        "256)",
    )
    group.add_argument(
        "--bi_data",
        type=true_or_false,
        metavar="BOOL",
        default=False,
        help="True: half of the batch reads the text backwards; needs an even batch_size (default: %(default)s)",
    )
    group.add_argument(
        "--mask_alpha",
        type=TOKENS,
        metavar="N",
        default=6,
        help="around a span of L predicted tokens lie L * mask_alpha / mask_beta context tokens (default: %(default)s)",
    )
    group.add_argument(
        "--mask_beta",
        type=TOKENS,
        metavar="N",
        default=1,
        help="see mask_alpha; not above it (default: %(default)s)",
    )
    group.add_argument(
        "--num_predict",
        type=TOKENS,
        metavar="N",
        help="tokens predicted in a window (default: a sixth of seq_len, 85)",
    )
    group.add_argument(
        "--mem_len",
        type=number(int, 0, MOST_TOKENS),
        metavar="N",
        help="tokens of earlier windows kept as memory, 0 = none (default: three quarters of seq_len, 384)",
    )


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--n_layer", type=number(int, 1, MOST_LAYERS), metavar="N", default=6, help="layers (default: %(default)s)"
    )
    group.add_argument(
        "--n_head",
        type=WIDTH,
        metavar="N",
        default=4,
        help="attention heads in a layer (default: %(default)s)",
    )
    group.add_argument(
        "--d_head", type=WIDTH, metavar="N", help="width of a head (default: d_model / n_head, rounded down, 8)"
    )
    group.add_argument(
        "--d_model",
        type=number(int, 2, MOST_WIDTH),
        metavar="N",
        default=32,
        help="width of the model, even (default: %(default)s)",
    )
    group.add_argument(
        "--d_inner",
        type=WIDTH,
        metavar="N",
        help="width inside the feed-forward layer (default: d_model, 32)",
    )
    group.add_argument(
        "--dropout",
        type=RATE,
        metavar="N",
        default=0.0,
        help="dropout of hidden states and positions, 0 = off; small models underfit first (default: %(default)s)",
    )
    group.add_argument(
        "--dropatt",
        type=RATE,
        metavar="N",
        default=0.0,
        help="dropout of attention weights, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--ff_activation",
        choices=("relu", "gelu", "gelu_new"),
        default="relu",
        help="activation of the feed-forward layer; gelu_new is the tanh form, the official code's gelu "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--attn_type",
        choices=("bi", "uni"),
        default="bi",
        help="bi: XLNet; uni: tokens see only tokens to their left (default: %(default)s)",
    )
    group.add_argument(
        "--clamp_len",
        type=number(int, -1, MOST_TOKENS),
        metavar="N",
        default=-1,
        help="distances above N tokens are treated as N; 0 or -1 = no limit (default: %(default)s)",
    )
    group.add_argument(
        "--same_length",
        type=true_or_false,
        metavar="BOOL",
        default=False,
        help="True: with attn_type uni, every token sees equally far back (default: %(default)s)",
    )
    group.add_argument(
        "--init",
        choices=("local", "normal"),
        default="local",
        help="initial weights; local: each head prefers one distance, 1 to 4 tokens left or right; normal: as the "
        "official code (default: %(default)s)",
    )
    group.add_argument(
        "--init_std",
        type=REAL,
        metavar="N",
        help="standard deviation of the initial weights (default: 0.5 / sqrt(d_model) with local, 0.02 with normal)",
    )


def add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        type=ROWS,
        metavar="N",
        help="rows of text in a step, divided evenly between the processes of torchrun (default: one for each process, "
        "two with --bi_data True)",
    )
    group.add_argument(
        "--rows",
        type=ROWS,
        metavar="N",
        help="rows the text is cut into, a multiple of batch_size; they take turns, and each has its own memory "
        "(default: batch_size for a page, up to 16 times that for a longer text, with at least 32 windows in a row)",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: orthogonal updates of all matrices but embeddings, adamw for the rest; a lower loss after as many "
        "updates, in 4%% more time at width 32 and 15%% at 128 (default: %(default)s)",
    )
    group.add_argument(
        "--learning_rate",
        type=REAL,
        metavar="N",
        help="peak of the schedule (default: by width, 0.004 up to 32, 0.00025 at 256; 0.003 with muon; a quarter of "
        "these with --init_checkpoint)",
    )
    group.add_argument(
        "--weight_decay",
        type=REAL,
        metavar="N",
        default=0.01,
        help="decay of all weights but biases and LayerNorm, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--adam_epsilon",
        type=number(float, 1e-15, 1e6),  # with 0, the update is 0 / 0 where a squared gradient underflows
        metavar="N",
        default=1e-8,
        help="AdamW's epsilon (default: %(default)s)",
    )
    group.add_argument(
        "--warmup_steps",
        type=number(int, 0, MOST_STEPS),
        metavar="N",
        default=0,
        help="updates over which the learning rate rises to its peak, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--decay_method",
        choices=("constant", "poly", "cos"),
        default="constant",
        help="after the warm-up: constant, poly (a straight line) or cos down to min_lr_ratio (default: %(default)s)",
    )
    group.add_argument(
        "--min_lr_ratio",
        type=REAL,
        metavar="N",
        default=0.0,
        help="learning rate of the last update as a share of learning_rate (default: %(default)s)",
    )
    group.add_argument(
        "--clip",
        type=REAL,
        metavar="N",
        default=0.25,
        help="largest norm of the gradient, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--grad_accum_steps",
        type=STEPS,
        metavar="N",
        default=1,
        help="steps whose mean gradient makes one update (default: %(default)s)",
    )


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num_step",
        "--num_epoch",
        type=STEPS,
        metavar="N",
        help="epochs: how often every window is read (default: 100, or as many as --train_steps needs)",
    )
    group.add_argument(
        "--train_steps",
        type=STEPS,
        metavar="N",
        help="stop after N updates (default: no limit)",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        metavar="N",
        default=0,
        help="of all random numbers; on a CPU the same seed prints the same lines (default: %(default)s)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps", "xpu"),
        default="auto",
        help="auto: an accelerator where there is one (cuda; mps: a Mac's; xpu: Intel's), else cpu (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--bf16",
        action="store_true",
        help="multiply matrices in bfloat16; weights, optimizer and loss stay float32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model: minutes at the start; meant for GPUs, not measured on one",
    )
    group.add_argument(
        "--output_dir",
        type=not_empty,
        metavar="DIR",
        help="folder for checkpoints, metrics.csv and loss.png (default: nothing is saved)",
    )
    group.add_argument(
        "--save_steps",
        type=STEPS,
        metavar="N",
        help="steps between checkpoints; the last step is saved too (default: an epoch, at most 1000)",
    )
    group.add_argument(
        "--save_total_limit",
        type=number(int, 0, MOST_STEPS),
        metavar="N",
        default=3,
        help="keep the N newest checkpoints, 0 = all (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue a run with its flags: the run in --output_dir, or DIR, the folder of a run or a checkpoint",
    )
    group.add_argument(
        "--init_checkpoint",
        type=not_empty,
        metavar="MODEL",
        help="start from a model, with its vocabulary, shape and dropout: a checkpoint, the folder of a run (then its "
        "newest checkpoint), any Hugging Face XLNet, or a name at the hub, such as xlnet/xlnet-base-cased",
    )
    group.add_argument(
        "--valid",
        type=not_empty,
        metavar="FILE_OR_SHARE",
        help="validation text: a file, or a share such as 0.01, which holds out the last documents of --data (blank "
        "lines end documents); targets are the same at every evaluation and with every batch_size (default: none)",
    )
    group.add_argument(
        "--eval_steps",
        type=STEPS,
        metavar="N",
        help="steps between evaluations on --valid (default: an epoch, but at most 1000 steps, or five times those of "
        "an evaluation if that is more)",
    )
    group.add_argument(
        "--eval_only",
        action="store_true",
        help="evaluate the model of --init_checkpoint or --resume on --valid, and do nothing else",
    )
    group.add_argument(
        "--log_steps",
        type=STEPS,
        metavar="N",
        default=1,
        help="print a line for every N steps, with their mean loss (default: %(default)s)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write TensorBoard event files into --output_dir",
    )
