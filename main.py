"""Pretrain XLNet on a text file, one sentence a line, a blank line between documents.

    python main.py
    python main.py --data my.txt --valid held_out.txt --output_dir out --n_layer 4 --d_model 64 --d_head 16
    python main.py --output_dir out --resume
    torchrun --nproc_per_node 2 main.py --data books/*.txt --batch_size 8
    python main.py --data ./data.txt --tokenizer bert-base-uncased --seq_len 512 --reuse_len 256 --perm_size 256 \\
      --bi_data True --mask_alpha 6 --mask_beta 1 --num_predict 85 --mem_len 384 --num_step 100

Each line printed is one step, a window of the text: its cost in nats per predicted token. Guessing costs ln(size of
the vocabulary), 10.3 for BERT's; knowing how often each word piece occurs costs the unigram entropy, which the first
line prints.
"""

import argparse
import contextlib
import csv
import datetime
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data_utils
import xlnet

MAY_CHANGE = {  # when a run goes on; text and vocabulary are compared by content
    "num_step", "train_steps", "save_steps", "save_total_limit", "eval_steps", "device", "data", "tokenizer", "valid",
    "output_dir", "resume", "tensorboard", "cache_dir",
}
SHAPE = ("n_layer", "n_head", "d_head", "d_model", "d_inner", "ff_activation", "attn_type", "clamp_len", "same_length")
MAX_TURNS, TURN_WINDOWS = 16, 32  # default of --rows: at most so many groups, of at least so many windows a row
UNKNOWN = 0.05  # share of unknown pieces that calls for another vocabulary
METRICS = ("pass", "step", "cost", "learning_rate", "gradient_norm", "tokens_per_second", "validation_cost")

# Which process of a run this is, and of how many, in all and on this machine: as torchrun says, alone without it.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the flag, the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose result has only flags given; `defaults` has them all."""

    def __init__(self):
        super().__init__(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                         argument_default=argparse.SUPPRESS, allow_abbrev=False)
        self.defaults = {}

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def exit(self, status=0, message=None):
        super().exit(status, None if LOCAL_RANK else message)

    def flags(self, title):
        """Return a function that adds a flag to a new group: name or names, default, help, and add_argument's own."""
        group = self.add_argument_group(title)

        def flag(names, default, help, **kwargs):
            self.defaults[names.split()[0]] = default
            shown = "" if default is None else f" (default: {default})"
            group.add_argument(*(f"--{name}" for name in names.split()), help=help + shown, **kwargs)

        return flag


def number(kind, least, below=math.inf):
    """Return add_argument's type and metavar for an int or a float from `least` on and less than `below`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) < below:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        limit = f"of at least {least}" + ("" if below == math.inf else f" and below {below}")
        raise argparse.ArgumentTypeError(f"{text!r} will not do; give {what} {limit}")

    return {"type": convert, "metavar": "N"}


def true_or_false(text):
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} will not do; give True or False")
    return text.lower() in ("true", "yes", "1")


def build_parser():
    parser = Parser()
    positive, natural, real, rate = number(int, 1), number(int, 0), number(float, 0), number(float, 0, below=1)
    boolean, file, folder = {"type": true_or_false, "metavar": "BOOL"}, {"metavar": "FILE"}, {"metavar": "DIR"}

    flag = parser.flags("data")
    flag("data", None, "UTF-8 text, a sentence a line, a blank line between documents; several files are several "
         "documents (default: data.txt beside main)", nargs="+", **file)
    flag("cache_dir", None, "where a text is kept as word pieces once it has been tokenized (default: xlnet in "
         "$XDG_CACHE_HOME, or in ~/.cache)", **folder)
    flag("tokenizer", "bert-base-uncased", f"{', '.join(data_utils.TOKENIZERS)}, a vocab.txt, a SentencePiece .model, "
         "or a directory with one of them", metavar="NAME")
    flag("seq_len", 512, "tokens in a window", **number(int, 5))
    flag("reuse_len", 256, "tokens at a window's beginning that become memory; the next window begins after them",
         **positive)
    flag("perm_size", 256, "tokens permuted together; must divide reuse_len and seq_len - reuse_len", **positive)
    flag("bi_data", False, "True: half of the batch reads the text backwards; needs an even batch_size", **boolean)
    flag("mask_alpha", 6, "L predicted tokens in a row stand among L * mask_alpha / mask_beta others", **positive)
    flag("mask_beta", 1, "see mask_alpha; not above it", **positive)
    flag("num_predict", 85, "tokens predicted in a window", **positive)
    flag("mem_len", 384, "tokens of earlier windows kept as memory, 0 = none", **natural)

    flag = parser.flags("model")
    flag("n_layer", 6, "layers", **positive)
    flag("n_head", 4, "attention heads in a layer", **positive)
    flag("d_head", 8, "width of a head", **positive)
    flag("d_model", 32, "width of the model, even", **number(int, 2))
    flag("d_inner", 32, "width inside the feed-forward layer", **positive)
    flag("dropout", 0.0, "dropout of hidden states and positions, 0 = off: small models underfit first", **rate)
    flag("dropatt", 0.0, "dropout of attention weights, 0 = off", **rate)
    flag("ff_activation", "relu", "gelu_new: the tanh form, the official code's gelu", choices=xlnet.ACTIVATIONS)
    flag("attn_type", "bi", "bi: XLNet; uni: tokens see only what is to their left", choices=("bi", "uni"))
    flag("clamp_len", -1, "largest distance told apart, tokens; 0 or -1 = no limit", **number(int, -1))
    flag("same_length", False, "True: with attn_type uni, every token sees equally far back", **boolean)
    flag("init", "local", "local: each head starts out looking at one distance, -4 to 4; normal: as the official code",
         choices=("local", "normal"))
    flag("init_std", None, "standard deviation of the initial weights (default: 0.5 / sqrt(d_model) with local, 0.02 "
         "with normal)", **real)

    flag = parser.flags("optimizer")
    flag("batch_size", None, "rows of text that advance together, shared out evenly to the processes of torchrun "
         "(default: one a process, or two with --bi_data True)", **positive)
    flag("rows", None, "rows the text is cut into, a multiple of batch_size; batch_size of them take a step in turn, "
         f"each with its own memory (default: batch_size on a page; on a longer text up to {MAX_TURNS} times that, as "
         f"long as every row has {TURN_WINDOWS} windows)", **positive)
    flag("learning_rate", 4e-3, "peak of the schedule", **real)
    flag("weight_decay", 0.01, "AdamW's decay, on all weights but biases and LayerNorm, 0 = off", **real)
    flag("adam_epsilon", 1e-8, "AdamW's epsilon", **real)
    flag("warmup_steps", 0, "updates over which the learning rate rises from 0, 0 = off", **natural)
    flag("decay_method", "constant", "after the warm-up: constant, poly (a straight line) or cos down to min_lr_ratio",
         choices=("constant", "poly", "cos"))
    flag("min_lr_ratio", 0.0, "learning rate of the last update as a share of learning_rate", **real)
    flag("clip", 0.25, "largest norm of the gradient, 0 = off", **real)
    flag("grad_accum_steps", 1, "steps whose mean gradient makes one update", **positive)

    flag = parser.flags("run")
    flag("num_step num_epoch", None, "passes over the text (default: 100, or all that --train_steps takes)", **positive)
    flag("train_steps", None, "stop after so many updates (default: no limit)", **positive)
    flag("seed", 0, "of all random numbers; the same seed prints the same lines", **natural)
    flag("device", "auto", "auto: cuda where there is one, else cpu", choices=("auto", "cpu", "cuda"))
    flag("bf16", None, "multiply matrices in bfloat16; weights, optimizer and cost stay float32", action="store_true")
    flag("compile", None, "torch.compile the model: minutes at the start; meant for GPUs", action="store_true")
    flag("output_dir", None, "folder for checkpoints, metrics.csv and loss.png (default: nothing is saved)", **folder)
    flag("save_steps", None, "steps between checkpoints; there is one at the end too (default: a pass)", **positive)
    flag("save_total_limit", 3, "checkpoints kept, the newest ones, 0 = all", **natural)
    flag("resume", None, "go on with the newest whole checkpoint of --output_dir, or one named, and its flags",
         nargs="?", const="", **folder)
    flag("init_checkpoint", None, "start from weights and shape of a checkpoint or of any Hugging Face XLNet", **folder)
    flag("valid", None, "held-out text, judged on the same targets every time (default: none)", **file)
    flag("eval_steps", None, "steps between evaluations on --valid (default: a pass)", **positive)
    flag("tensorboard", None, "write TensorBoard event files into --output_dir", action="store_true")
    return parser


def settle(given, state=None):
    """Return all flags as a Namespace: those given, under them what a run or a checkpoint fixes, and the defaults.

    given: dict of the flags on the command line; state: of the checkpoint with which a run goes on, or None
    Raises UserError for flags that contradict what is fixed, or that do not go together.
    """
    fixed, source = {}, given.get("init_checkpoint")
    if state:
        fixed, source = dict(state["flags"]), state["checkpoint"]
        if {"num_step", "train_steps"} & set(given):  # one of them replaces both
            fixed["num_step"] = fixed["train_steps"] = None
    elif source:
        try:
            config = xlnet.read_config(source)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--init_checkpoint {source}: {error}; give the folder of an XLNet") from None
        fixed = {name: config[name] for name in SHAPE if name in config}
        if any((Path(source) / name).is_file() for name in ("vocab.txt", "spiece.model")):
            fixed["tokenizer"] = source
    for name, value in given.items():
        if name in fixed and name not in MAY_CHANGE and value != fixed[name]:
            raise UserError(f"--{name} {value} contradicts {source}, where it is {fixed[name]}; leave it out")
    args = argparse.Namespace(**build_parser().defaults | fixed | given)
    args.data = args.data or [str(Path(__file__).resolve().parent / "data.txt")]
    args.cache_dir = args.cache_dir or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xlnet")
    args.batch_size = args.batch_size or smallest_batch(args)
    if args.num_step is None and args.train_steps is None:
        args.num_step = 100
    check_flags(args)
    return args


def smallest_batch(args):
    """Return of how many rows a batch is a multiple: one for each process, with bi_data one in each direction."""
    return WORLD_SIZE * (2 if args.bi_data else 1)


def on_gpu(args):
    """Return whether a run computes on a GPU."""
    return args.device != "cpu" and torch.cuda.is_available()


def check_flags(args):
    """Raise UserError for flags that do not go together."""
    other_len = args.seq_len - args.reuse_len
    divisors = [n for n in range(1, other_len + 1) if args.reuse_len % n == 0 and other_len % n == 0]
    near = [n for n in divisors if n < args.perm_size][-1:] + [n for n in divisors if n > args.perm_size][:1]
    largest = min(2 * args.reuse_len, 2 * other_len + 1)  # the larger half is predicted in the first part
    rows = args.rows or args.batch_size
    each = smallest_batch(args)
    for wrong, message in (
        (other_len <= 3, f"--reuse_len {args.reuse_len} leaves no room for two segments, two [SEP] and a [CLS] in "
         f"--seq_len {args.seq_len}; give at most {args.seq_len - 4}"),
        (args.perm_size not in divisors, f"--perm_size {args.perm_size} must divide --reuse_len {args.reuse_len} and "
         f"--seq_len - --reuse_len = {other_len}; try {' or '.join(map(str, near))}"),
        (args.num_predict > largest, f"--num_predict {args.num_predict} does not fit into --seq_len {args.seq_len} "
         f"with --reuse_len {args.reuse_len}; give at most {largest}"),
        (args.mask_beta > args.mask_alpha, f"--mask_beta {args.mask_beta} is above --mask_alpha {args.mask_alpha}; "
         f"give at most that"),
        (args.d_model % 2, f"--d_model {args.d_model} is odd, and half of the position features are sines; "
         f"try {args.d_model + 1}"),
        (args.batch_size % each, f"--batch_size {args.batch_size} must be a multiple of {each}, for --bi_data "
         f"{args.bi_data} on {WORLD_SIZE} processes; try {-(-args.batch_size // each) * each}"),
        (rows % args.batch_size, f"--rows {rows} is no multiple of --batch_size "
         f"{args.batch_size}; try {max(1, rows // args.batch_size) * args.batch_size}"),
        (args.min_lr_ratio > 1, f"--min_lr_ratio {args.min_lr_ratio} is a share of --learning_rate; give at most 1"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: PyTorch finds no CUDA device here; "
         "give auto or cpu"),
        (args.device != "cpu" and 0 < torch.cuda.device_count() < LOCAL_WORLD_SIZE,
         f"--device {args.device}: {torch.cuda.device_count()} CUDA devices are too few for {LOCAL_WORLD_SIZE} "
         f"processes; start as many, or give cpu"),
        (args.output_dir and args.n_head * args.d_head != args.d_model, f"--n_head {args.n_head} times --d_head "
         f"{args.d_head} is not --d_model {args.d_model}, which a Hugging Face XLNet needs; leave out --output_dir, or "
         f"try --d_head {max(1, args.d_model // args.n_head)}"),
        (args.save_steps and not args.output_dir, f"--save_steps {args.save_steps} needs --output_dir; give a folder"),
        (args.tensorboard and not args.output_dir, "--tensorboard needs --output_dir; give a folder"),
        (args.eval_steps and not args.valid, f"--eval_steps {args.eval_steps} needs --valid; give a held-out text"),
    ):
        if wrong:
            raise UserError(message)


def get_lr(update, args, total_updates):
    """Return the learning rate of an update, counted from 0, of total_updates.

    Source: official model_utils.get_train_op, one update ahead: no update is made with rate 0 while it rises, and the
    last one has the decay's last value.
    """
    if update < args.warmup_steps:
        return args.learning_rate * (update + 1) / args.warmup_steps
    done = (update - args.warmup_steps) / max(1, total_updates - 1 - args.warmup_steps)  # 0 to 1
    left = {"constant": 1, "poly": 1 - done, "cos": (1 + math.cos(math.pi * done)) / 2}[args.decay_method]
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * left)


def lm_loss(logits, target, target_mask):
    """Return the mean of -log p, equation (4), over the real targets, equation (5), in nats: empty slots weigh nothing.

    logits: [num_predict, bsz, n_token]; target, target_mask: [num_predict, bsz]
    Source: the paper, section 2.3; official two_stream_loss.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 would round the sum
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    weight = target_mask.flatten()
    return (nll * weight).sum() / weight.sum().clamp(min=1)


def parameter_groups(model, weight_decay):
    """Return AdamW's groups: biases and LayerNorm are not decayed.

    Source: official AdamWeightDecayOptimizer, which does decay r_w_bias, r_r_bias and r_s_bias. With the local start
    r_r_bias tells each head where to look, and is left alone.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if "bias" in name or "layer_norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def unigram_entropy(counts):
    """Return the cost, in nats per token, of knowing how often every token occurs and nothing else."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def warn(message):
    """Print a line to stderr, once a machine."""
    if LOCAL_RANK == 0:
        print(f"main.py: {message}", file=sys.stderr)


def names(paths):
    """Return how a message names files."""
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def load_text(flag, paths, args, tokenizer, vocab):
    """Return the Text of the files that a flag names; raise UserError if that fails."""
    try:
        try:
            return data_utils.read_text(paths, tokenizer, vocab, args.cache_dir)
        except OSError as error:
            if error.filename in paths:
                raise
            warn(f"--cache_dir {args.cache_dir}: {error.strerror}; the text will be tokenized at every start")
            with tempfile.TemporaryDirectory() as folder:  # what is mapped outlives its name
                return data_utils.read_text(paths, tokenizer, vocab, folder)
    except OSError as error:
        if error.filename not in paths:
            raise
        raise UserError(f"--{flag} {error.filename}: {error.strerror}; give a text file") from None
    except ValueError as error:
        raise UserError(f"--{flag} {error}") from None


def cut_rows(flag, paths, text, n_rows, args):
    """Return the groups of rows of a text; raise UserError if it is too short for them."""
    groups = data_utils.batchify(text.ids, text.cuts, n_rows, args.batch_size, args.bi_data)
    if len(groups[0][0].ids) < args.seq_len:
        needed = args.seq_len * (n_rows // 2 if args.bi_data else n_rows)
        smaller = "--rows" if n_rows > args.batch_size else "--batch_size"
        raise UserError(f"--{flag} {names(paths)} has {len(text.ids)} tokens and needs {needed}, a window of --seq_len "
                        f"{args.seq_len} for each row; give more text, or a smaller --seq_len or {smaller}")
    return groups


def default_rows(n_tokens, args):
    """Return batch_size on a page; on a longer text up to MAX_TURNS times that, if rows have TURN_WINDOWS windows."""
    row_len = args.seq_len + (TURN_WINDOWS - 1) * args.reuse_len
    forward_rows = args.batch_size // (2 if args.bi_data else 1)
    return args.batch_size * min(MAX_TURNS, max(1, n_tokens // (forward_rows * row_len)))


def sizes(args):
    """Return the flags that say how windows are made, by name."""
    return {name: getattr(args, name)
            for name in ("seq_len", "reuse_len", "perm_size", "num_predict", "mask_alpha", "mask_beta")}


def total(tensor):
    """Return the sum of a tensor over the processes of a run."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


class Run:
    """A training run between two steps: everything that a checkpoint must hold so that the run goes on to the bit.

    With torchrun each process has its share of every group of rows, with their memory, and the same model. What they
    do together is what one process does with all rows: a mean over targets is one over those of all processes.
    """

    def __init__(self, args, state=None):
        """Begin a run, or go on from the state of a checkpoint; raise UserError if text or vocabulary do not fit."""
        self.args = args
        try:
            self.tokenizer = data_utils.load_tokenizer(args.tokenizer)
            self.vocab = data_utils.vocabulary(self.tokenizer)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {args.tokenizer}: {error}") from None
        self.text = load_text("data", args.data, args, self.tokenizer, self.vocab)
        args.rows = args.rows or default_rows(len(self.text.ids), args)
        self.groups = cut_rows("data", args.data, self.text, args.rows, args)
        halves = np.arange(args.batch_size).reshape(1 + args.bi_data, WORLD_SIZE, -1)  # forward, backward
        self.members = halves[:, RANK].ravel().tolist()  # of each group, the rows of this process
        if args.valid:
            text = load_text("valid", [args.valid], args, self.tokenizer, self.vocab)
            [self.valid_rows] = cut_rows("valid", [args.valid], text, args.batch_size, args)
        windows = data_utils.n_windows(len(self.groups[0][0].ids), args.seq_len, args.reuse_len)
        self.pass_len = windows * len(self.groups)
        ends = (args.num_step or math.inf) * self.pass_len, (args.train_steps or math.inf) * args.grad_accum_steps
        self.last = min(ends)  # the step after which the run is over
        self.total_updates = self.last // args.grad_accum_steps
        if self.total_updates == 0:
            raise UserError(f"--grad_accum_steps {args.grad_accum_steps} is more than the {self.last} steps of the "
                            f"run; give at most that")

        # what must not change while a run lasts: the word pieces, and the text with its sentences
        self.identity = {"vocabulary": self.vocab.digest, "text": self.text.digest}

        torch.manual_seed(args.seed)
        arguments = {name: value for name, value in vars(args).items() if name in xlnet.ARGUMENTS}
        arguments["n_token"] = self.vocab.size
        source = state["checkpoint"] if state else args.init_checkpoint
        try:
            if source and (n_token := xlnet.read_config(source)["n_token"]) != self.vocab.size:
                raise ValueError(f"it has {n_token} word pieces and --tokenizer {args.tokenizer} {self.vocab.size}")
            model = xlnet.XLNet.from_pretrained(source, **arguments) if source else xlnet.XLNet(**arguments)
        except (OSError, ValueError, SafetensorError) as error:
            flag = "resume" if state else "init_checkpoint"
            raise UserError(f"--{flag} {source}: {error}; give the folder of an XLNet that fits") from None
        self.device = torch.device("cpu")
        if on_gpu(args):
            self.device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(self.device)
        self.model = self.network = model.to(self.device)
        if args.compile:
            self.model.compile(dynamic=False)  # a memory grows in a few steps, and is long everywhere else
        if dist.is_initialized():
            self.network = DistributedDataParallel(self.model)
            torch.manual_seed(args.seed + (RANK << 32))  # of dropout
        groups = parameter_groups(model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, eps=args.adam_epsilon, fused=True)
        self.step = 0  # windows trained on, a line printed for each
        self.mems, self.pass_cost = [None] * len(self.groups), 0.0  # of each group; the costs of this pass, added up
        self.loader, self.coming = ThreadPoolExecutor(max_workers=1), {}  # batches, by step, made ahead of need
        if state:
            self.load_state_dict(state)
        if self.step > self.last:
            raise UserError(f"--resume: the run is at step {self.step}, beyond its end at step {self.last}; give a "
                            f"larger --num_step or --train_steps")

    def next_batch(self):
        """Return the batch of the next step; a new pass begins every row again, with nothing before it."""
        if self.step % self.pass_len == 0:
            self.mems, self.pass_cost = [None] * len(self.groups), 0.0
        for step in (self.step, self.step + 1):  # the model computes while the one after is made
            if step not in self.coming:
                self.coming[step] = self.loader.submit(self.load_batch, step)
        return self.coming.pop(self.step).result()

    def load_batch(self, step):
        """Return the batch of a step: a row depends on nothing but the text, the seed, the step and its place."""
        window, turn = divmod(step % self.pass_len, len(self.groups))
        rows = [self.groups[turn][member] for member in self.members]
        rngs = [np.random.default_rng([self.args.seed, step, member]) for member in self.members]
        return self.to_device(data_utils.create_batch(rows, window, self.vocab, rngs, **sizes(self.args)))

    def to_device(self, batch):
        if self.device.type == "cpu":
            return batch
        return {key: tensor.pin_memory().to(self.device, non_blocking=True) for key, tensor in batch.items()}

    def forward(self, batch, mems):
        """Take the targets out of a batch; return their mean cost, their number, and the new memory."""
        target, target_mask = batch.pop("target"), batch.pop("target_mask")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            logits, mems = self.network(**batch, mems=mems)
        return lm_loss(logits, target, target_mask), target_mask.sum(), mems

    def update(self):
        """Make an update from the gathered gradient; return the learning rate and the norm of the gradient."""
        lr = get_lr(self.step // self.args.grad_accum_steps, self.args, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # then AdamW changes nothing, and the run stops
        self.optimizer.step()
        self.optimizer.zero_grad()
        return lr, norm

    def train_step(self):
        """Train on the next window, with an update at the end of an accumulation; return metrics, numbers and tensors.

        Nothing here waits for the device.
        """
        turn = self.step % len(self.groups)
        accumulated = (self.step + 1) % self.args.grad_accum_steps == 0
        batch = self.next_batch()
        alone = self.network is self.model
        with contextlib.nullcontext() if alone or accumulated else self.network.no_sync():
            loss, targets, self.mems[turn] = self.forward(batch, self.mems[turn])
            if not alone:
                loss = loss * targets / total(targets)  # what this process adds to the mean over all targets
            # DistributedDataParallel takes the mean of all gradients, and they are to be added
            (loss * WORLD_SIZE / self.args.grad_accum_steps).backward()
        metrics = {"pass": self.step // self.pass_len + 1, "step": self.step + 1, "cost": total(loss.detach())}
        if accumulated:
            metrics["learning_rate"], metrics["gradient_norm"] = self.update()
        self.step += 1
        self.pass_cost += metrics["cost"].double()
        return metrics

    def valid_batches(self):
        """Return the held-out batches: the generator, and so every target, is the same each time and for any model."""
        rngs = [np.random.default_rng(0)] * len(self.valid_rows)
        return data_utils.create_batches(self.valid_rows, self.vocab, rngs, **sizes(self.args))

    @torch.no_grad()
    def evaluate(self, batches):
        """Return the mean cost of all targets of successive batches, in nats, with dropout off and memory carried."""
        self.network.eval()
        cost_sum, count, mems = 0.0, 0.0, None
        for batch in batches:
            cost, targets, mems = self.forward(self.to_device(batch), mems)
            cost_sum += (cost * targets).item()
            count += targets.item()
        self.network.train()
        return cost_sum / max(1, count)

    def state_dict(self):
        """Return the state as tensors and plain values, in the process of rank 0; the weights are in model.safetensors.

        Every process must call it.
        """
        own = {
            "mems": [None if mems is None or mems[0] is None else torch.stack(mems).cpu() for mems in self.mems],
            # of a half done accumulation
            "gradients": [None if p.grad is None else p.grad.cpu() for p in self.model.parameters()],
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        processes = [own] * WORLD_SIZE
        if dist.is_initialized():
            dist.gather_object(own, None if RANK else processes)
        paths = {name: os.path.abspath(path) for name in ("valid", "tokenizer")
                 if (path := getattr(self.args, name)) and path not in data_utils.TOKENIZERS}
        return self.identity | {
            "flags": vars(self.args) | paths | {"data": [os.path.abspath(path) for path in self.args.data]},
            "step": self.step,
            "pass_cost": float(self.pass_cost),
            "optimizer": self.optimizer.state_dict(),
            "processes": processes,
        }

    def load_state_dict(self, state):
        given = f"--tokenizer {self.args.tokenizer}", f"--data {names(self.args.data)}"
        for (what, here), flag in zip(self.identity.items(), given):
            if state[what] != here:
                raise UserError(f"{flag}: the {what} has changed since the run began; "
                                f"give the old one, or start anew in another --output_dir")
        if len(state["processes"]) != WORLD_SIZE:
            raise UserError(f"--resume: the run had {len(state['processes'])} processes and now has "
                            f"{WORLD_SIZE}; start as many")
        own = state["processes"][RANK]
        self.step, self.pass_cost = state["step"], state["pass_cost"]
        self.mems = [None if mems is None else list(mems.to(self.device)) for mems in own["mems"]]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, gradient in zip(self.model.parameters(), own["gradients"]):
            parameter.grad = gradient if gradient is None else gradient.to(self.device)
        torch.set_rng_state(own["torch_rng"])
        if self.device.type == "cuda" and own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"])


def checkpoints(output_dir):
    """Return the checkpoints of a run, the newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def open_output_dir(output_dir, resumed):
    """Make the folder of a run; raise UserError if it cannot be written, or holds another run."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None
    if checkpoints(output_dir) and not resumed:
        raise UserError(f"--output_dir {output_dir} holds a run already; go on with --resume, or give another folder")


def save_checkpoint(run, state):
    """Write checkpoint-<step>, state in it, under a temporary name until it is whole on the disk; drop the oldest ones.

    Raises OSError if that fails; the earlier checkpoints stay as they are.
    """
    args = run.args
    checkpoint = Path(args.output_dir) / f"checkpoint-{run.step}"
    temporary = Path(args.output_dir) / f".checkpoint-{run.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        # transformers' BERT tokenizer puts [CLS] first: that is where fine-tuning has to look; XLNet's puts it last
        summary_type = "first" if "[CLS]" in run.tokenizer.vocab else "last"
        run.model.save_pretrained(temporary, summary_type=summary_type, pad_token_id=run.vocab.pad_id,
                                  bos_token_id=run.vocab.bos_id, eos_token_id=run.vocab.eos_id)
        data_utils.save_tokenizer(run.tokenizer, temporary)
        torch.save(state, temporary / "trainer_state.pt")
        sums = [f"{data_utils.sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / "SHA256SUMS").write_text("".join(sums))  # as `sha256sum --check` reads it
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if checkpoint.exists():  # a damaged one, or newer than the one from which the run goes on
            shutil.rmtree(checkpoint)
        temporary.rename(checkpoint)
        sync(checkpoint.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are how libraries tell of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{checkpoint} cannot be saved: {error}") from None
    older = [path for path in checkpoints(args.output_dir) if path != checkpoint]
    for path in older[args.save_total_limit - 1 :] if args.save_total_limit else ():
        shutil.rmtree(path)


def sync(path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def damage(checkpoint):
    """Return which file of a checkpoint is not as it was written, or None."""
    try:
        sums = dict(line.split("  ")[::-1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines())
        if not {"model.safetensors", "trainer_state.pt"} <= set(sums):
            return "SHA256SUMS"
        return next((name for name, digest in sums.items() if data_utils.sha256(checkpoint / name) != digest), None)
    except (OSError, ValueError) as error:
        return Path(getattr(error, "filename", None) or "SHA256SUMS").name


def load_state(given):
    """Return the state of the checkpoint that --resume means, given the flags on the command line."""
    if "output_dir" not in given:
        raise UserError("--resume needs --output_dir, or the name of a checkpoint")
    for checkpoint in [Path(given["resume"])] if given["resume"] else checkpoints(given["output_dir"]):
        if damaged := damage(checkpoint):
            warn(f"{checkpoint} is damaged: {damaged} is not as it was written")
            continue
        try:
            state = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
            return state | {"checkpoint": str(checkpoint)}
        except pickle.UnpicklingError:
            raise UserError(f"--resume: {checkpoint}/trainer_state.pt holds more than tensors and plain values and may "
                            f"run code; do not trust this folder") from None
    raise UserError(f"--resume: there is no whole checkpoint in {given['resume'] or given['output_dir']}; "
                    f"start anew without it, in another folder")


class Log:
    """What a run tells: lines on stdout, a bar on a terminal, metrics.csv and TensorBoard events in output_dir.

    A GPU works on a step while the one before is told: its numbers have arrived by then, and nothing waits for them.
    """

    def __init__(self, run):
        args = run.args
        self.pass_len, self.lag = run.pass_len, int(run.device.type == "cuda")
        self.waiting, self.told = [], {}  # metrics of steps that are not told yet; of the last one that is
        self.progress = tqdm(initial=run.step, total=run.last, unit="step", leave=False, disable=True if RANK else None)
        self.file = self.events = None
        if args.output_dir and RANK == 0:
            self.file = open_metrics(args.output_dir, run.step)
        if args.tensorboard and RANK == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package that is not here; pip install tensorboard") from None
            self.events = SummaryWriter(args.output_dir, purge_step=run.step + 1)

    def wait(self):
        """Wait for the numbers of the last step that was added."""
        if self.waiting:
            self.waiting[-1][1].synchronize()

    def add(self, metrics):
        """Take what a step measured, numbers and tensors, and tell it, on a GPU that of the step before."""
        copies = {name: value.detach().to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
                  for name, value in metrics.items()}
        self.waiting.append((copies, torch.cuda.current_stream().record_event() if self.lag else None))
        self.flush(self.lag)

    def flush(self, behind=0):
        """Tell all steps but the last `behind`."""
        while len(self.waiting) > behind:
            copies, arrived = self.waiting.pop(0)
            if arrived:
                arrived.synchronize()
            self.told = {name: value.item() if isinstance(value, torch.Tensor) else value
                         for name, value in copies.items()}
            self.write(self.told)

    def write(self, metrics):
        """Print the line of a step and write its row; end the run if a number is not finite: see `Run.update`."""
        step, epoch, cost = metrics["step"], metrics["pass"], metrics["cost"]
        window = (step - 1) % self.pass_len + 1
        self.line(f"Number of Epoch: {epoch:04d} in {window:04d} Step cost = {cost:.6f}")
        for what, value in ("cost", cost), ("norm of the gradient", metrics.get("gradient_norm", 0)):
            if not math.isfinite(value):
                self.close()
                warn(f"the {what} of step {step}, window {window} of pass {epoch}, is {value}; stopped before the "
                     f"update; try a smaller --learning_rate")
                sys.exit(1)
        if "validation_cost" in metrics:
            valid = metrics["validation_cost"]
            perplexity = torch.tensor(valid, dtype=torch.float64).exp()  # which may be infinite
            self.line(f"Validation cost = {valid:.6f} perplexity = {perplexity:.2f}")
        self.progress.update()
        if self.file:
            csv.DictWriter(self.file, METRICS).writerow(metrics)
            self.file.flush()
        if self.events:
            for name in METRICS[2:]:
                if name in metrics:
                    self.events.add_scalar(name, metrics[name], step)

    def line(self, text):
        with self.progress.external_write_mode():
            print(text, flush=True)

    def close(self):
        for each in (self.progress, self.file, self.events):
            if each is not None:
                each.close()


def open_metrics(output_dir, step):
    """Return metrics.csv open for appending, without rows of steps after `step`, which will be made again."""
    path = Path(output_dir) / "metrics.csv"
    kept = []
    if step and path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", newline="")


def draw_loss(output_dir):
    """Draw loss.png from metrics.csv, where matplotlib is installed: each step, the running mean, validation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    table = np.genfromtxt(Path(output_dir) / "metrics.csv", delimiter=",", names=True, ndmin=1)
    step, cost, valid = table["step"], table["cost"], table["validation_cost"]
    width = min(50, len(cost))
    mean = np.convolve(cost, np.full(width, 1 / width), mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="cost, nats per predicted token")
    axes.plot(step, cost, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(step[width // 2 :][: len(mean)], mean, label=f"training, mean of {width} steps around")
    if np.isfinite(valid).any():
        axes.plot(step[np.isfinite(valid)], valid[np.isfinite(valid)], marker=".", label="validation")
    axes.legend()
    figure.savefig(Path(output_dir) / "loss.png", dpi=100)


@contextlib.contextmanager
def stop_signals():
    """Yield a function that returns the first Ctrl-C or SIGTERM that any process has received, 0 before.

    The loop heeds it after the step. The second one kills; not with torchrun, which passes on what a terminal sends to
    all, and kills by itself after a while.
    """
    received = []

    def receive(signum, frame):
        received.append(signum)
        for each in () if dist.is_initialized() else before:
            signal.signal(each, signal.SIG_DFL)

    def first():
        signum = torch.tensor(received[0] if received else 0)
        if dist.is_initialized():
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        return signum.item()

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield first
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(run):
    """Print a line for each step until the run is over, save and evaluate on the way, and return the final metrics."""
    args = run.args
    entropy, unknown = unigram_entropy(run.text.counts), run.text.counts[run.vocab.unk_id] / len(run.text.ids)
    if unknown > UNKNOWN:
        warn(f"--tokenizer {args.tokenizer} does not know {unknown:.1%} of the text's pieces; make a vocabulary of its "
             f"own, see the README")
    print(
        f"XLNet of {sum(p.numel() for p in run.model.parameters()):,} parameters on {run.device.type}; "
        f"{names([Path(path).name for path in args.data])}: {len(run.text.ids):,} tokens, {unknown:.1%} unknown, "
        f"unigram entropy {entropy:.3f}; {run.pass_len} windows a pass, {run.total_updates:,} updates", flush=True)

    def due(every):
        return run.step % (every or run.pass_len) == 0 or run.step == run.last

    with contextlib.closing(Log(run)) as log, stop_signals() as stop:
        while run.step < run.last:
            begin = time.perf_counter()
            metrics = run.train_step()
            log.wait()  # a GPU, so that it is never more than a step behind
            metrics["tokens_per_second"] = args.batch_size * args.seq_len / (time.perf_counter() - begin)
            if args.valid and due(args.eval_steps) and RANK == 0:
                metrics["validation_cost"] = run.evaluate(run.valid_batches())
            log.add(metrics)
            stopped = stop()  # a signal that comes from here on waits for the next step
            if due(args.save_steps) or stopped:
                log.flush()
                if args.output_dir:
                    state = run.state_dict()
                    if RANK == 0:
                        save_checkpoint(run, state)
                        draw_loss(args.output_dir)
            if stopped:
                saved = f"saved {args.output_dir}/checkpoint-{run.step}, --resume goes on" if args.output_dir else (
                    "nothing is saved without --output_dir")
                log.close()
                warn(f"stopped after step {run.step}; {saved}")
                sys.exit(128 + stopped)

    mean_cost = float(run.pass_cost) / ((run.last - 1) % run.pass_len + 1)
    print(f"Mean cost of pass {-(-run.last // run.pass_len)}: {mean_cost:.3f}; of guessing by word frequency: "
          f"{entropy:.3f}, of guessing blindly: {math.log(run.vocab.size):.3f}")
    return log.told | {"updates": run.total_updates, "mean_cost": mean_cost, "unigram_entropy": entropy}


def main(argv=None):
    """Run the command line argv, sys.argv by default, and return the final metrics as a dict.

    The columns of metrics.csv in the last step, if one was made, and updates, mean_cost of the last pass,
    unigram_entropy.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    try:
        if given.get("resume"):
            given.setdefault("output_dir", os.path.dirname(os.path.abspath(given["resume"])))
        state = load_state(given) if "resume" in given else None
        args = settle(given, state)
        if args.output_dir and RANK == 0:
            open_output_dir(args.output_dir, resumed=state is not None)
        if WORLD_SIZE > 1:
            # one of them may evaluate or tokenize for long while the others wait
            backend = "cpu:gloo,cuda:nccl" if on_gpu(args) else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        with contextlib.redirect_stdout(None if RANK else sys.stdout):
            metrics = train(Run(args, state))
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        return metrics
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "main.py: stopped by Ctrl-C before the first step; nothing is saved\n")
    except BrokenPipeError:  # python main.py | head: the reader has gone, and nobody wants to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except OSError as error:
        parser.exit(1, f"main.py: {error}; checkpoints saved before are whole\n")
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--compile: {reason}; leave it out, or give PyTorch what it needs, a C++ compiler on a CPU")
    except RuntimeError as error:
        if WORLD_SIZE == 1 or "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        parser.exit(1, f"main.py: another process of the run is gone: {str(error).splitlines()[0]}; --resume goes on "
                       f"from the last checkpoint\n")


if __name__ == "__main__":
    main()
