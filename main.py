"""Pretrain XLNet on a text file, one sentence a line, a blank line between documents.

    python main.py
    python main.py --data my.txt --tokenizer bert-base-cased --n_layer 4 --d_model 64 --d_head 16
    python main.py --data ./data.txt --tokenizer bert-base-uncased --seq_len 512 --reuse_len 256 --perm_size 256 \\
      --bi_data True --mask_alpha 6 --mask_beta 1 --num_predict 85 --mem_len 384 --num_step 100

Each line printed is one window: its cost in nats per predicted token. Guessing costs ln(size of the vocabulary),
10.3 for BERT's; knowing how often each word piece occurs costs the unigram entropy, which the first line prints.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data_utils
from xlnet import ACTIVATIONS, XLNet

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the flag, the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes no abbreviated flags."""

    def __init__(self):
        super().__init__(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, least, below=math.inf):
    """Return an argparse type: an int or a float from `least` on and less than `below`."""

    def convert(text):
        try:
            value = kind(text)
            if least <= value < below:
                return value
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        limit = f"of at least {least}" + ("" if below == math.inf else f" and below {below}")
        raise argparse.ArgumentTypeError(f"{text!r} will not do; give {what} {limit}")

    return convert


def true_or_false(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} will not do; give True or False")


def build_parser():
    parser = Parser()

    def flag(group, *names, help, default=None, **kwargs):
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(*names, default=default, help=help.replace("%", "%%") + shown, **kwargs)

    data = parser.add_argument_group("data")
    flag(data, "--data", metavar="FILE", help="UTF-8 text, one sentence a line, blank line between documents "
         "(default: data.txt beside main.py)")
    flag(data, "--tokenizer", metavar="NAME", default="bert-base-uncased",
         help=f"{', '.join(data_utils.TOKENIZERS)}, a vocab.txt or a directory with one")
    flag(data, "--seq_len", type=number(int, 5), metavar="N", default=512, help="tokens in a window")
    flag(data, "--reuse_len", type=number(int, 1), metavar="N", default=256,
         help="tokens, from the window's beginning, that become memory; the next window begins so much later")
    flag(data, "--perm_size", type=number(int, 1), metavar="N", default=256,
         help="tokens permuted together; must divide reuse_len and seq_len - reuse_len")
    flag(data, "--bi_data", type=true_or_false, metavar="BOOL", default=False,
         help="True: half of the batch reads the text backwards; needs an even batch_size")
    flag(data, "--mask_alpha", type=number(int, 1), metavar="N", default=6,
         help="a span of L predicted tokens stands in a context of L * mask_alpha / mask_beta tokens")
    flag(data, "--mask_beta", type=number(int, 1), metavar="N", default=1, help="see mask_alpha; not above it")
    flag(data, "--num_predict", type=number(int, 1), metavar="N", default=85, help="tokens predicted in a window")
    flag(data, "--mem_len", type=number(int, 0), metavar="N", default=384,
         help="tokens of earlier windows kept as memory, 0 = none")

    model = parser.add_argument_group("model")
    flag(model, "--n_layer", type=number(int, 1), metavar="N", default=6, help="layers")
    flag(model, "--n_head", type=number(int, 1), metavar="N", default=4, help="attention heads in a layer")
    flag(model, "--d_head", type=number(int, 1), metavar="N", default=8, help="width of a head")
    flag(model, "--d_model", type=number(int, 2), metavar="N", default=32, help="width of the model, even")
    flag(model, "--d_inner", type=number(int, 1), metavar="N", default=32, help="width inside the feed-forward layer")
    flag(model, "--dropout", type=number(float, 0, below=1), metavar="RATE", default=0.1,
         help="dropout of hidden states and positions, 0 = off")
    flag(model, "--dropatt", type=number(float, 0, below=1), metavar="RATE", default=0.1,
         help="dropout of attention weights, 0 = off")
    flag(model, "--ff_activation", choices=ACTIVATIONS, default="relu",
         help="relu, gelu, or gelu_new, the tanh form that the official code calls gelu")
    flag(model, "--attn_type", choices=("bi", "uni"), default="bi",
         help="bi: XLNet; uni: tokens see only what is to their left")
    flag(model, "--clamp_len", type=number(int, -1), metavar="N", default=-1,
         help="largest distance told apart, tokens; 0 or -1 = no limit")
    flag(model, "--same_length", type=true_or_false, metavar="BOOL", default=False,
         help="True: with attn_type uni, every token sees equally far back")
    flag(model, "--init", choices=("local", "normal"), default="local",
         help="local: each head starts out looking at one distance, -4 to 4; normal: as in the official code")
    flag(model, "--init_std", type=number(float, 0), metavar="STD",
         help="standard deviation of the initial weights (default: 0.57 / sqrt(d_model) with local, 0.02 with normal)")

    optimizer = parser.add_argument_group("optimizer")
    flag(optimizer, "--batch_size", type=number(int, 1), metavar="N",
         help="rows into which the text is cut and which advance together (default: 1, or 2 with --bi_data True)")
    flag(optimizer, "--learning_rate", type=number(float, 0), metavar="LR", default=2e-3, help="peak of the schedule")
    flag(optimizer, "--weight_decay", type=number(float, 0), metavar="RATE", default=0.01,
         help="AdamW's decay, on all weights but biases and LayerNorm, 0 = off")
    flag(optimizer, "--adam_epsilon", type=number(float, 0), metavar="EPS", default=1e-8, help="AdamW's epsilon")
    flag(optimizer, "--warmup_steps", type=number(int, 0), metavar="N", default=0,
         help="updates over which the learning rate rises from 0, 0 = off")
    flag(optimizer, "--decay_method", choices=("constant", "poly", "cos"), default="constant",
         help="after the warm-up: constant, poly (a straight line) or cos down to min_lr_ratio at the last update")
    flag(optimizer, "--min_lr_ratio", type=number(float, 0), metavar="RATIO", default=0.0,
         help="last learning rate as a share of learning_rate")
    flag(optimizer, "--clip", type=number(float, 0), metavar="NORM", default=0.25,
         help="largest norm of the gradient, 0 = off")
    flag(optimizer, "--grad_accum_steps", type=number(int, 1), metavar="N", default=1,
         help="windows whose mean gradient makes one update")

    run = parser.add_argument_group("run")
    flag(run, "--num_step", "--num_epoch", type=number(int, 1), metavar="N",
         help="passes over the text (default: 100, or as many as --train_steps takes)")
    flag(run, "--train_steps", type=number(int, 1), metavar="N", help="stop after so many updates (default: no limit)")
    flag(run, "--seed", type=number(int, 0), metavar="N", default=0,
         help="of all random numbers; the same seed prints the same lines")
    flag(run, "--device", choices=("auto", "cpu", "cuda"), default="auto",
         help="auto: cuda where there is one, else cpu")
    return parser


def check_flags(args):
    """Raise UserError for flags that do not go together."""
    if args.reuse_len >= args.seq_len - 3:
        raise UserError(
            f"--reuse_len {args.reuse_len} leaves no room for two segments, two [SEP] and a [CLS] in "
            f"--seq_len {args.seq_len}; give at most {args.seq_len - 4}"
        )
    other_len = args.seq_len - args.reuse_len
    common = math.gcd(args.reuse_len, other_len)
    if common % args.perm_size:
        divisors = [n for n in range(1, common + 1) if common % n == 0]
        near = [n for n in divisors if n < args.perm_size][-1:] + [n for n in divisors if n > args.perm_size][:1]
        raise UserError(
            f"--perm_size {args.perm_size} must divide --reuse_len {args.reuse_len} and "
            f"--seq_len - --reuse_len = {other_len}; try {' or '.join(map(str, near))}"
        )
    # the larger half is predicted in the first part, see create_data
    largest = min(2 * args.reuse_len, 2 * other_len + 1)
    if args.num_predict > largest:
        raise UserError(
            f"--num_predict {args.num_predict} does not fit into --seq_len {args.seq_len} "
            f"with --reuse_len {args.reuse_len}; give at most {largest}"
        )
    if args.mask_beta > args.mask_alpha:
        raise UserError(f"--mask_beta {args.mask_beta} is above --mask_alpha {args.mask_alpha}; give at most that")
    if args.d_model % 2:
        raise UserError(f"--d_model {args.d_model} is odd, half of the position features are sines; "
                         f"try {args.d_model + 1}")
    if args.bi_data and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size} is odd, but with --bi_data True half of it reads backwards; "
                         f"try {args.batch_size + 1}")
    if args.min_lr_ratio > 1:
        raise UserError(f"--min_lr_ratio {args.min_lr_ratio} is a share of --learning_rate; give at most 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; give auto or cpu")


def get_lr(step, args, total_steps):
    """Return the learning rate of an update, counted from 0, of total_steps.

    Source: official model_utils.get_train_op, with the decay's last value at the last update.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, total_steps - 1 - args.warmup_steps)  # 0 to 1
    left = {"constant": 1, "poly": 1 - done, "cos": (1 + math.cos(math.pi * done)) / 2}[args.decay_method]
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * left)


def lm_loss(logits, target, target_mask):
    """Return the mean cost of the real targets, in nats: empty slots weigh nothing.

    logits: [num_predict, bsz, n_token]; target, target_mask: [num_predict, bsz]
    Source: the paper, section 2.3; official two_stream_loss.
    """
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    weight = target_mask.flatten()
    return (nll * weight).sum() / weight.sum().clamp(min=1)


def parameter_groups(model, weight_decay):
    """Return AdamW's groups: biases, the three attention biases and LayerNorm are not decayed. Source: official."""
    no_decay = {name for name, _ in model.named_parameters() if "bias" in name or "layer_norm" in name}
    return [
        {"params": [p for name, p in model.named_parameters() if name not in no_decay], "weight_decay": weight_decay},
        {"params": [p for name, p in model.named_parameters() if name in no_decay], "weight_decay": 0.0},
    ]


def unigram_entropy(ids):
    """Return the cost, in nats per token, of knowing how often every token occurs and nothing else."""
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(share * np.log(share)).sum())


def load_data(args):
    """Return the Vocabulary, the ids and the rows of args.data; raise UserError if that fails."""
    try:
        tokenizer = data_utils.load_tokenizer(args.tokenizer)
        vocab = data_utils.vocabulary(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {args.tokenizer}: {error}") from None
    try:
        ids, cuts = data_utils.read_text(args.data, tokenizer, vocab.eod_id)
    except OSError as error:
        raise UserError(f"--data {args.data}: {error.strerror}; give a text file") from None
    except ValueError as error:
        raise UserError(f"--data {args.data}: {error}") from None
    rows = data_utils.n_rows(args.batch_size, args.bi_data)
    if len(ids) < rows * args.seq_len:
        raise UserError(
            f"--data {args.data} has {len(ids)} tokens and needs {rows * args.seq_len}, a window of --seq_len "
            f"{args.seq_len} for each row of the batch; give more text, or a smaller --seq_len or --batch_size"
        )
    return vocab, ids, data_utils.batchify(ids, cuts, args.batch_size, args.bi_data)


def train(args):
    """Train as the flags say, print a line for each window, and return the final metrics."""
    vocab, ids, rows = load_data(args)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    model = XLNet(
        vocab.size, args.n_layer, args.n_head, args.d_head, args.d_inner, args.d_model, args.dropout, args.dropatt,
        args.attn_type, args.bi_data, args.clamp_len, args.same_length, args.reuse_len, args.mem_len,
        args.ff_activation, args.init, args.init_std,
    ).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), eps=args.adam_epsilon)

    pass_windows = data_utils.n_windows(len(rows[0].ids), args.seq_len, args.reuse_len)
    total_windows = min(
        (args.num_step or math.inf) * pass_windows, (args.train_steps or math.inf) * args.grad_accum_steps
    )
    total_steps = math.ceil(total_windows / args.grad_accum_steps)
    entropy = unigram_entropy(ids)
    print(
        f"XLNet of {sum(p.numel() for p in model.parameters()):,} parameters on {device}; {Path(args.data).name}: "
        f"{len(ids):,} tokens, unigram entropy {entropy:.3f}; {pass_windows} windows a pass, {total_steps:,} updates",
        flush=True,
    )

    with tqdm(total=total_windows, unit="window", leave=False, disable=None) as progress:
        for window in range(total_windows):
            epoch, window_of_pass = divmod(window, pass_windows)
            if window_of_pass == 0:  # a new pass: the text begins again, with nothing before it
                batches = data_utils.create_batches(
                    rows, vocab, args.seq_len, args.reuse_len, args.perm_size, args.num_predict,
                    args.mask_alpha, args.mask_beta, rng,
                )
                mems, costs = None, []
            batch = {key: tensor.to(device) for key, tensor in next(batches).items()}
            target, target_mask = batch.pop("target"), batch.pop("target_mask")

            logits, mems = model(**batch, mems=mems)
            loss = lm_loss(logits, target, target_mask)
            costs.append(loss.item())
            with progress.external_write_mode():
                print(f"Number of Epoch: {epoch + 1:04d} in {len(costs):04d} Step cost = {costs[-1]:.6f}", flush=True)
            if not math.isfinite(costs[-1]):
                sys.exit("main.py: the cost is not a finite number any more; try a smaller --learning_rate or --clip")

            (loss / args.grad_accum_steps).backward()
            step, in_step = divmod(window, args.grad_accum_steps)
            if in_step + 1 == args.grad_accum_steps or window + 1 == total_windows:
                for group in optimizer.param_groups:
                    group["lr"] = get_lr(step, args, total_steps)
                if args.clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
            progress.update()

    mean_cost = sum(costs) / len(costs)
    print(f"Mean cost of pass {epoch + 1}: {mean_cost:.3f}; of guessing by word frequency: {entropy:.3f}, "
          f"of guessing blindly: {math.log(vocab.size):.3f}")
    return {"epoch": epoch + 1, "step": total_steps, "cost": costs[-1], "mean_cost": mean_cost,
            "unigram_entropy": entropy}


def parse_args(parser, argv=None):
    """Return the flags of a command line, with the defaults that depend on other flags."""
    args = parser.parse_args(argv)
    args.data = args.data or str(HERE / "data.txt")
    args.batch_size = args.batch_size or (2 if args.bi_data else 1)
    if args.num_step is None and args.train_steps is None:
        args.num_step = 100
    return args


def main(argv=None):
    """Run the command line argv, sys.argv by default, and return the final metrics as a dict.

    step: updates made; epoch: passes begun; cost, mean_cost: of the last window and of the last pass, nats per
    predicted token; unigram_entropy: of the text, nats per token
    """
    parser = build_parser()
    args = parse_args(parser, argv)
    try:
        check_flags(args)
        return train(args)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped by Ctrl-C; nothing was saved\n")
    except BrokenPipeError:  # python main.py | head: the reader has gone, and nobody wants to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)


if __name__ == "__main__":
    main()
