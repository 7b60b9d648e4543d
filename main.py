"""Pretrain XLNet on a text file: see `python main.py --help`.

main       runs a command line and turns errors into messages and exit statuses
prepare    flags -> text -> batches -> model: a Run
train      the training loop
evaluate   the loss on a validation set
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # Ctrl-C while PyTorch is imported ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import xlnet
from data_utils import Loader, default_rows, evaluation_rows, members_of_process, prefetch
from support import UserError, checkpoint, corpus, flags, processes, warn
from support.checkpoint import TrainingState
from support.muon import Muon
from support.report import Reporter
from xlnet import XLNet, prediction_loss

# flags that an --init_checkpoint fixes
SHAPE = ("n_layer", "n_head", "d_head", "d_model", "d_inner", "ff_activation", "attn_type", "clamp_len", "same_length")
LENGTHS = ("seq_len", "reuse_len", "perm_size", "num_predict", "mem_len")  # of a window
PATHS = {"data", "valid", "cache_dir", "tokenizer", "output_dir", "resume", "init_checkpoint"}
SIGPIPE = 13  # number of the signal for a closed pipe; Windows lacks signal.SIGPIPE
DEFAULT_INTERVAL = 1000  # steps between checkpoints, and between evaluations, in an epoch that is longer
START_ANEW = (
    "start anew with a smaller --learning_rate, or from a checkpoint with --init_checkpoint, another --output_dir and "
    "a smaller --learning_rate"
)
MANY_UNKNOWN = 0.05  # warn about the vocabulary above this share of unknown pieces


class NotFinite(Exception):
    """A loss or a gradient is infinite or not a number."""


class Stopped(Exception):
    """A signal has stopped the run after a step, or --eval_only (step: None)."""

    def __init__(self, signum: int, step: int | None, output_dir: str | None):
        super().__init__(signum, step, output_dir)
        self.signum, self.step, self.output_dir = signum, step, output_dir

    def __str__(self) -> str:
        if self.step is None:
            return "stopped before the evaluation was complete"
        saved = "nothing is saved without --output_dir"
        if self.output_dir:
            saved = f"saved {self.output_dir}/checkpoint-{self.step}; go on with --resume {self.output_dir}"
        return f"stopped after step {self.step}; {saved}"


@dataclass
class Run:
    """All parts of the run that a command line asks for, ready to train."""

    args: argparse.Namespace  # all flags
    tokenizer: corpus.Tokenizer
    vocab: corpus.Vocabulary
    text: corpus.Text
    valid_text: corpus.Text | None
    loader: Loader  # with --eval_only that of the validation text, like text
    valid_loader: Loader | None
    model: XLNet
    device: torch.device
    state: TrainingState | None  # from the checkpoint that the run resumes
    source: str | None  # the folder of that checkpoint, or of the initial weights

    @property
    def first_step(self) -> int:
        """The number of steps done before this start."""
        return 0 if self.state is None else self.state.step

    @property
    def last_step(self) -> int:
        """The number of steps in the whole run."""
        by_passes = (self.args.num_step or math.inf) * self.loader.pass_len
        by_updates = (self.args.train_steps or math.inf) * self.args.grad_accum_steps
        return min(by_passes, by_updates)

    @property
    def variant(self) -> list[str]:
        """The class names of the loader and of the model."""
        return [type(self.loader).__qualname__, type(self.model).__qualname__]

    @property
    def total_updates(self) -> int:
        return self.last_step // self.args.grad_accum_steps


# ---------------------------------------------------------------- training


def train(run: Run, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Train until the run ends; after each step, yield its metrics (numbers and tensors).

    With several processes, each one has the same model and its share of every batch. The processes together compute
    what one process with all rows would.

    Raises NotFinite if a loss or gradient is not finite, before the update that it would spoil, or if the validation
    loss is not; Stopped after a step in which a signal came; and checkpoint.SaveError.
    """
    args, loader, model, device = run.args, run.loader, run.model, run.device
    save_steps, eval_steps = intervals(run)
    distributed = processes.world_size() > 1
    network = DistributedDataParallel(model) if distributed else model
    optimizer = make_optimizer(model, args)
    # memory[turn]: memory of the rows of a turn (see Loader), a list of n_layer [mlen, bsz, d_model]
    memory = [None] * len(loader.turns)
    if run.state is not None:
        memory = checkpoint.restore(run.state, loader.members, model, optimizer, device)
    elif distributed:
        torch.manual_seed(args.seed + (processes.rank() << 32))  # each process has its own dropout

    batches = prefetch(loader, range(run.first_step, run.last_step), device)
    with contextlib.closing(batches), processes.stop_signals() as received_signal:
        if run.valid_loader is not None and args.init_checkpoint and run.state is None:
            validation_loss = evaluate(model, run.valid_loader, device, args.bf16, received_signal)
            if validation_loss is not None:  # None after a signal: the first step is then the last one
                reporter.validation(validation_loss)
        for step in range(run.first_step, run.last_step):
            reporter.begin_step()
            done = step + 1
            if step % loader.pass_len == 0:  # each pass reads every row again from its beginning
                memory = [None] * len(loader.turns)

            update, is_update = step // args.grad_accum_steps, done % args.grad_accum_steps == 0
            learning_rate = get_lr(update, args, run.total_updates)

            with reporter.waiting_for_data():
                batch, turn = next(batches), loader.turn(step)
            target, target_mask = batch.pop("target"), batch.pop("target_mask")
            holds_back = distributed and not is_update  # processes exchange gradients once per update
            with network.no_sync() if holds_back else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    logits, memory[turn] = network(**batch, mems=memory[turn])
                loss = prediction_loss(logits, target, target_mask)
                if distributed:  # weighted by its share of the targets, so that the sum is the mean over all targets
                    loss = loss * target_mask.sum() / processes.sum_over_processes(target_mask.sum()).clamp(min=1)
                # DistributedDataParallel divides the sum of gradients by the number of processes: undo that
                (loss * processes.world_size() / args.grad_accum_steps).backward()
            del logits  # otherwise the largest tensor stays alive during the next forward pass
            loss = processes.sum_over_processes(loss.detach())
            metrics = {"pass": step // loader.pass_len + 1, "step": done, "loss": loss}

            if is_update:
                norm = clip_grad_norm_(model.parameters(), args.clip or math.inf)
                finite = loss.isfinite() & norm.isfinite()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                if optimizer.defaults["fused"]:
                    optimizer.found_inf = (~finite).float()  # 1 skips the update without waiting for the device
                    optimizer.step()
                elif finite:
                    optimizer.step()
                optimizer.zero_grad()
                metrics |= {"learning_rate": learning_rate, "gradient_norm": norm}

            is_last = done == run.last_step
            evaluates = run.valid_loader is not None and (is_last or done % eval_steps == 0)
            saves = is_last or done % save_steps == 0
            stop_signal = received_signal(SIGPIPE if reporter.reader_is_gone else 0)
            # On a GPU the report is one step late, unless it has to wait for this step.
            for numbers in reporter.end_step(metrics, wait=evaluates or saves or stop_signal > 0):
                stop_if_not_finite(numbers, loader.pass_len)
            if evaluates and not stop_signal:
                validation_loss = evaluate(model, run.valid_loader, device, args.bf16, received_signal)
                stop_signal = received_signal()
                if validation_loss is not None:
                    reporter.validation(validation_loss)
                    if not math.isfinite(validation_loss):
                        raise NotFinite(f"the validation loss after step {done} is {validation_loss}; {START_ANEW}")
            if args.output_dir and (saves or stop_signal):
                save_checkpoint(run, done, memory, optimizer, reporter)
            if stop_signal:
                raise Stopped(stop_signal, done, args.output_dir)
            yield metrics


def intervals(run: Run) -> tuple[int, int]:
    """Return the numbers of steps between checkpoints and between evaluations."""
    pass_len = run.loader.pass_len
    save_steps = min(pass_len, DEFAULT_INTERVAL)
    eval_steps = save_steps
    if run.valid_loader is not None:  # an evaluation step takes a third of the time of a training step
        eval_steps = min(pass_len, max(DEFAULT_INTERVAL, 5 * run.valid_loader.pass_len))
    return run.args.save_steps or save_steps, run.args.eval_steps or eval_steps


@torch.no_grad()
def evaluate(
    model: XLNet,
    loader: Loader,
    device: torch.device,
    bf16: bool = False,
    received_signal: Callable[..., int] = lambda: 0,
) -> float | None:
    """Return the mean loss over all targets of one pass, in nats, with dropout off and memory carried.

    Each process evaluates its share of the rows. A signal ends the evaluation between two batches; the result is None.
    """
    model.eval()
    sums = []  # for each batch, the sum of losses and the number of targets: [2]
    memory = [None] * len(loader.turns)
    for step, batch in enumerate(prefetch(loader, range(loader.pass_len), device)):
        turn = loader.turn(step)
        if batch:
            target, target_mask = batch.pop("target"), batch.pop("target_mask")
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, memory[turn] = model(**batch, mems=memory[turn])
            n_target = target_mask.sum()
            sums.append(torch.stack([prediction_loss(logits, target, target_mask) * n_target, n_target]))
        if received_signal():
            model.train()
            return None
    model.train()
    # sum on the CPU, because not every accelerator has float64
    total = torch.stack(sums).cpu().double().sum(dim=0) if sums else torch.zeros(2, dtype=torch.float64)
    loss_sum, n_target = processes.sum_over_processes(total).tolist()
    return loss_sum / max(1, n_target)


def get_lr(update: int, args: argparse.Namespace, total_updates: int) -> float:
    """Return the learning rate of one update, counted from 0, out of total_updates.

    Source: official model_utils.get_train_op, shifted by one update: the first update of a warm-up has a rate above 0,
    and the last update has the final rate of the decay.
    """
    if update < args.warmup_steps:
        return args.learning_rate * (update + 1) / args.warmup_steps
    done = (update - args.warmup_steps) / max(1, total_updates - 1 - args.warmup_steps)  # 0 to 1
    left = {"constant": 1, "poly": 1 - done, "cos": (1 + math.cos(math.pi * done)) / 2}[args.decay_method]
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * left)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW, or Muon for matrices and AdamW for the rest, without weight decay on biases and LayerNorm.

    Muon is for hidden layers, so embeddings stay with AdamW; the largest embedding is also the output head.
    Source: official AdamWeightDecayOptimizer, which does decay r_w_bias, r_r_bias and r_s_bias. With --init local,
    r_r_bias sets the distance that each head prefers, so it is not decayed here.
    """
    matrices, decayed, not_decayed = [], [], []
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name.lower():
            not_decayed.append(parameter)
        elif args.optimizer == "muon" and "emb" not in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    # `train` sets the learning rate of each update, and found_inf of the fused optimizer.
    fused = processes.fused_adamw_skips(next(model.parameters()).device)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, eps=args.adam_epsilon, fused=fused)
    groups.append({"params": matrices, "weight_decay": args.weight_decay, "muon": True})
    return Muon(groups, eps=args.adam_epsilon, fused=fused)


def stop_if_not_finite(numbers: dict[str, Any], pass_len: int) -> None:
    """Raise NotFinite if the loss or the gradient of a step is not finite."""
    for name, column in ("loss", "loss"), ("norm of the gradient", "gradient_norm"):
        value = numbers.get(column, 0.0)
        if not math.isfinite(value):
            step_of_epoch = (numbers["step"] - 1) % pass_len + 1
            raise NotFinite(
                f"the {name} of step {numbers['step']}, step {step_of_epoch} of epoch {numbers['pass']}, is {value}; "
                f"stopped before the update; {START_ANEW}"
            )


def save_checkpoint(
    run: Run, step: int, memory: list[list[torch.Tensor] | None], optimizer: torch.optim.Optimizer, reporter: Reporter
) -> None:
    """Write a checkpoint after `step` steps, in the process of rank 0. Every process must call it."""
    reporter.flush()
    if step % run.loader.pass_len == 0:  # the next pass begins without memory
        memory = [None] * len(memory)
    state = checkpoint.collect(
        step=step,
        pass_loss=reporter.pass_loss,
        memory=memory,
        members=run.loader.members,
        model=run.model,
        optimizer=optimizer,
        device=run.device,
        flags=flags.with_absolute_paths(run.args),
        text=run.text.digest,
        vocabulary=run.vocab.digest,
        variant=run.variant,
    )
    if state is not None:
        config = run.vocab.hugging_face_config() | {name: vars(run.args)[name] for name in LENGTHS}
        checkpoint.save(run.args.output_dir, state, run.model, run.tokenizer, config, run.args.save_total_limit)
        reporter.draw_if_due()


# ---------------------------------------------------------------- from flags to a run


def prepare(
    argv: list[str] | None = None, loader_class: type[Loader] = Loader, model_class: type[XLNet] = XLNet
) -> Run:
    """Return the run that a command line asks for.

    argv: words of the command line; None = those of this program
    loader_class, model_class: a variant of the data or of the model
    Raises UserError for any mistake.
    """
    args, state, source = read_flags(argv)
    if args.output_dir and not args.eval_only:
        checkpoint.open_output_dir(args.output_dir, source if state is not None else None)
    device = processes.choose_device(args.device)
    processes.set_matmul_precision(device)
    if args.bf16:
        processes.check_bf16(device)
    try:
        tokenizer = corpus.load_tokenizer(args.tokenizer)
        vocab = corpus.vocabulary(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {args.tokenizer}: {error}") from None
    flags.check_memory(args, vocab.size, processes.world_size())
    if device.type == "cpu":
        processes.keep_freed_memory(flags.largest_tensor(args, vocab.size, processes.world_size()))

    text, valid_text = load_texts(args, tokenizer, vocab)
    window = args.bi_data, args.seq_len, args.reuse_len
    valid_loader = None
    if valid_text is not None:
        n_rows, together = evaluation_rows(len(valid_text.ids), args.batch_size, *window)
        name = f"valid {args.valid}"
        valid_loader = make_loader(name, valid_text, vocab, args, n_rows, together, 0, loader_class)
    if args.eval_only:
        text, loader = valid_text, valid_loader
    else:
        if args.rows is None:
            args.rows = default_rows(len(text.ids), args.batch_size, *window)
        name = f"data {list_files(args.data)}"
        loader = make_loader(name, text, vocab, args, args.rows, args.batch_size, args.seed, loader_class)

    torch.manual_seed(args.seed)
    model = make_model(args, vocab, source, model_class).to(device)
    if args.compile:
        model.compile(dynamic=False)  # the length of memory changes in only a few steps
    run = Run(args, tokenizer, vocab, text, valid_text, loader, valid_loader, model, device, state, source)
    check_run(run)
    if state is not None and not args.eval_only:
        checkpoint.check(state, source, model, make_optimizer(model, args), shapes_of_memory(run))
    return run


def shapes_of_memory(run: Run) -> list[tuple[int, ...] | None]:
    """Return the shape of each turn's memory at the step of the state; None for a turn that has no memory."""
    step, args, loader = run.state.step, run.args, run.loader
    visits = Counter(loader.turn(each) for each in range(step - step % loader.pass_len, step))
    shapes = []
    for turn in range(len(loader.turns)):
        mlen = min(args.mem_len, visits[turn] * args.reuse_len)
        shapes.append((args.n_layer, mlen, args.batch_size, args.d_model) if mlen else None)
    return shapes


def read_flags(argv: list[str] | None) -> tuple[argparse.Namespace, TrainingState | None, str | None]:
    """Return the flags, the checkpoint's state (None without --resume) and the folder of the initial weights, or None.

    With --resume, a checkpoint fixes most flags (see flags.MAY_CHANGE); with --init_checkpoint, shape and vocabulary.
    """
    given = flags.parse(argv)
    args, state, source = given, None, None
    if given.resume is not None:
        source, state = checkpoint.find(given.resume, given.output_dir)
        checkpoint.check_flags(state, source, flags.parse)
        args = flags.parse(argv, state.flags, source)
        is_saved = args.tokenizer == state.flags.get("tokenizer") and args.tokenizer not in corpus.TOKENIZERS
        is_copy = checkpoint.run_folder(args.tokenizer) == checkpoint.run_folder(source)
        if is_saved and (is_copy or not os.path.exists(args.tokenizer)):
            args.tokenizer = source  # each checkpoint has its own copy; an earlier checkpoint may be deleted
        if given.output_dir is None:  # the run continues in the folder of its checkpoint
            args.output_dir = os.path.dirname(source) or "."
    elif given.init_checkpoint:
        name = given.init_checkpoint
        source = checkpoint.find_model(name, "--init_checkpoint", check=lambda folder: flags_of_model(folder, name))
        fixed, suggested = flags_of_model(source, name)
        if given.seq_len is None:  # lengths belong together
            suggested |= lengths_of_model(source, name)
        args = flags.parse(argv, fixed, name, suggested)
    flags.fill_defaults(args, processes.world_size())
    flags.check(args, processes.world_size())
    return args, state, source


def flags_of_model(source: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the flags that a model fixes, and those that a command line may change.

    A model fixes its shape, and its vocabulary if it has one. Dropout may change.

    source: the folder of the model; name: its name for messages
    """
    try:
        config = xlnet.read_config(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--init_checkpoint {name}: {error}; give the folder of an XLNet") from None
    fixed = {flag: config[flag] for flag in SHAPE if flag in config}
    if corpus.find_vocabulary(Path(source)) is not None:
        fixed["tokenizer"] = source
    suggested = {}
    if "dropout" in config:  # transformers has one rate for both
        suggested = {"dropout": config["dropout"], "dropatt": config.get("dropatt", config["dropout"])}
    return fixed, suggested


def lengths_of_model(source: str, name: str) -> dict[str, int]:
    """Return the window lengths that a checkpoint was trained with; {} unless config.json has all of them.

    source: the folder of the model; name: its name for messages
    """
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    lengths = {flag: config.get(flag) for flag in LENGTHS}
    if not all(type(length) is int for length in lengths.values()):
        return {}
    for flag, length in lengths.items():
        least = 0 if flag == "mem_len" else 1
        if not least <= length <= flags.MOST_TOKENS:
            raise UserError(
                f"--init_checkpoint {name}: config.json sets {flag} to {length}, which is not from {least} to "
                f"{flags.MOST_TOKENS}; give --seq_len, and all lengths come from the flags"
            )
    return lengths


def load_texts(
    args: argparse.Namespace, tokenizer: corpus.Tokenizer, vocab: corpus.Vocabulary
) -> tuple[corpus.Text | None, corpus.Text | None]:
    """Return the text to train on, None if nothing needs it, and the one to validate on, if any."""
    is_share = bool(args.valid) and flags.share(args.valid) is not None
    text = None
    if is_share or not args.eval_only:
        text = corpus.load_text("data", args.data, args.cache_dir, tokenizer, vocab)
    if is_share:
        return hold_out(text, args)
    if not args.valid:
        return text, None
    return text, corpus.load_text("valid", [args.valid], args.cache_dir, tokenizer, vocab)


def hold_out(text: corpus.Text, args: argparse.Namespace) -> tuple[corpus.Text, corpus.Text]:
    """Return the training text and the last documents; warn unless they are about the share that --valid asks for."""
    try:
        text, valid_text = corpus.split_off_end(text, flags.share(args.valid))
    except ValueError as error:
        raise UserError(f"--valid {args.valid}: --data {list_files(args.data)} {error}") from None
    got = len(valid_text.ids) / (len(text.ids) + len(valid_text.ids))
    if not 0.5 < got / flags.share(args.valid) < 2:
        warn(f"--valid {args.valid}: documents are whole, so {got:.2g} of the text is held out")
    return text, valid_text


def make_loader(
    name: str,
    text: corpus.Text,
    vocab: corpus.Vocabulary,
    args: argparse.Namespace,
    n_rows: int,
    batch_size: int,
    seed: int,
    loader_class: type[Loader],
) -> Loader:
    """Return the loader of this process's share of a text; raise UserError if the text is too short.

    name: the text's name in messages, such as "data my.txt"
    """
    try:
        return loader_class(
            text,
            vocab,
            n_rows=n_rows,
            batch_size=batch_size,
            bi_data=args.bi_data,
            seq_len=args.seq_len,
            reuse_len=args.reuse_len,
            perm_size=args.perm_size,
            num_predict=args.num_predict,
            mask_alpha=args.mask_alpha,
            mask_beta=args.mask_beta,
            seed=seed,
            members=members_of_process(batch_size, args.bi_data, processes.rank(), processes.world_size()),
        )
    except ValueError as error:
        raise UserError(f"--{name} {error}") from None


def make_model(
    args: argparse.Namespace, vocab: corpus.Vocabulary, source: str | None, model_class: type[XLNet]
) -> XLNet:
    """Return the model, new or with the weights in the folder `source`."""
    arguments = {
        "n_token": vocab.size,
        "n_layer": args.n_layer,
        "n_head": args.n_head,
        "d_head": args.d_head,
        "d_inner": args.d_inner,
        "d_model": args.d_model,
        "dropout": args.dropout,
        "dropatt": args.dropatt,
        "attn_type": args.attn_type,
        "bi_data": args.bi_data,
        "clamp_len": args.clamp_len,
        "same_length": args.same_length,
        "reuse_len": args.reuse_len,
        "mem_len": args.mem_len,
        "ff_activation": args.ff_activation,
        "init": args.init,
        "init_std": args.init_std,
    }
    if source is None:
        return model_class(**arguments)
    try:
        n_token = xlnet.read_config(source)["n_token"]
        if n_token != vocab.size:
            own = corpus.find_vocabulary(Path(source))
            remedy = "it has no spiece.model or vocab.txt of its own" if own is None else "leave --tokenizer out"
            raise ValueError(f"it has {n_token} word pieces and --tokenizer {args.tokenizer} {vocab.size}; {remedy}")
        return model_class.from_pretrained(source, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        given = f"--resume {source}" if args.resume is not None else f"--init_checkpoint {args.init_checkpoint}"
        raise UserError(f"{given}: {error}; give an XLNet that fits") from None


def check_run(run: Run) -> None:
    """Raise UserError if the run has no update, or does not match the checkpoint that it resumes."""
    args, state = run.args, run.state
    if run.total_updates == 0 and not args.eval_only:
        raise UserError(
            f"--grad_accum_steps {args.grad_accum_steps} is more than the {run.last_step} steps of the run; "
            f"give at most that"
        )
    if state is None:
        return
    advice = "give the old one, or start anew in another --output_dir"
    if state.vocabulary != run.vocab.digest:
        raise UserError(f"--tokenizer {args.tokenizer}: the vocabulary has changed since the run began; {advice}")
    if args.eval_only:
        return
    if state.text != run.text.digest:
        raise UserError(
            f"--data {list_files(args.data)}: the text has changed since the run began, or the share of it that "
            f"--valid takes; {advice}"
        )
    if state.variant != run.variant:
        raise UserError(
            f"--resume: the run used {' and '.join(map(str, state.variant))}, and this program uses "
            f"{' and '.join(run.variant)}; go on with the program that began it"
        )
    if state.step > run.last_step:
        raise UserError(
            f"--resume: the run is at step {state.step}, beyond its end at step {run.last_step}; give a larger "
            f"--num_step or --train_steps"
        )


def list_files(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


# ---------------------------------------------------------------- the command


def make_reporter(run: Run, silent: bool = False) -> Reporter:
    """Return the reporter of a run; all processes but the first are silent."""
    return Reporter(
        first_step=run.first_step,
        pass_loss=run.state.pass_loss if run.state else 0.0,
        last_step=run.last_step,
        pass_len=run.loader.pass_len,
        tokens_per_step=run.args.batch_size * run.args.seq_len,
        device=run.device,
        output_dir=None if run.args.eval_only else run.args.output_dir,
        tensorboard=run.args.tensorboard,
        silent=silent or processes.rank() > 0,
        log_steps=run.args.log_steps,
    )


def describe(run: Run) -> str:
    """Return the first line that a run prints."""
    line = describe_model(run, run.text, list_files([Path(path).name for path in run.args.data]))
    n_windows = run.loader.pass_len * run.args.batch_size
    line += f"; {n_windows} windows an epoch, {run.total_updates:,} updates"
    if run.valid_text is not None:
        line += f"; validation: {len(run.valid_text.ids):,} tokens"
    return line


def describe_model(run: Run, text: corpus.Text, name: str) -> str:
    """Return a line about the model and a text; warn if more than MANY_UNKNOWN of the text's pieces are unknown."""
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    n_tokens = len(text.ids)
    unknown = text.counts[run.vocab.unk_id] / n_tokens
    if unknown > MANY_UNKNOWN:
        warn(
            f"--tokenizer {run.args.tokenizer} does not know {unknown:.1%} of the text's pieces; make a vocabulary of "
            f"its own with examples/make_vocabulary.py"
        )
    return (
        f"XLNet of {n_parameters:,} parameters on {run.device.type}; {name}: {n_tokens:,} tokens, "
        f"{unknown:.1%} unknown, unigram entropy {corpus.unigram_entropy(text.counts):.3f}"
    )


def what_processes_share(run: Run) -> dict[str, Any]:
    """Return the values that must be equal in all processes of a run, by name; paths may differ between machines."""
    shared = {f"--{name}": value for name, value in vars(run.args).items() if name not in PATHS}
    shared["a text of digest"] = run.text.digest
    shared["a vocabulary of digest"] = run.vocab.digest
    shared["a first step of"] = run.first_step
    return shared


def run_command(argv: list[str] | None, loader_class: type[Loader], model_class: type[XLNet]) -> dict[str, Any]:
    """Run a command line as `main` does, but raise all errors."""
    with processes.connected():
        run = processes.together(lambda: prepare(argv, loader_class, model_class))
        processes.check_same(what_processes_share(run))
        if run.args.eval_only:
            return evaluate_only(run)
        entropy = corpus.unigram_entropy(run.text.counts)
        if run.args.output_dir:
            processes.together(lambda: checkpoint.set_aside(run.args.output_dir, run.first_step))
        with contextlib.closing(make_reporter(run)) as reporter:
            reporter.line(describe(run))
            if run.state is not None:
                reporter.line(f"Resuming from {run.source}, after step {run.first_step} of {run.last_step}")
            if run.first_step == run.last_step:
                reporter.line("The run is complete; a larger --num_step or --train_steps continues it")
            for _ in train(run, reporter):
                pass
            last_epoch, steps_before = divmod(run.last_step - 1, run.loader.pass_len)
            mean_loss = reporter.pass_loss / (steps_before + 1)
            reporter.line(
                f"Mean loss of epoch {last_epoch + 1}: {mean_loss:.3f} (guessing by word frequency: {entropy:.3f}, "
                f"guessing uniformly: {math.log(run.vocab.size):.3f})"
            )
            saved = f"The model is in {run.args.output_dir}/checkpoint-{run.last_step}"
            reporter.line(
                saved if run.args.output_dir else "Nothing is saved; --output_dir saves the model in a folder"
            )
    return reporter.last | {"updates": run.total_updates, "mean_loss": mean_loss, "unigram_entropy": entropy}


def evaluate_only(run: Run) -> dict[str, Any]:
    """Print the loss of a model on the validation text, and return it as `main` does."""
    share = flags.share(run.args.valid)
    name = f"{share:g} of --data" if share else Path(run.args.valid).name
    with contextlib.closing(make_reporter(run)) as reporter, processes.stop_signals() as received_signal:
        reporter.line(describe_model(run, run.valid_text, name))
        loss = evaluate(run.model, run.valid_loader, run.device, run.args.bf16, received_signal)
        if loss is None:
            raise Stopped(received_signal(), None, None)
        reporter.validation(loss)
    return {"validation_loss": loss, "unigram_entropy": corpus.unigram_entropy(run.valid_text.counts)}


def end(status: int, message: str) -> NoReturn:
    """Print one line on stderr, on each machine once, and exit with a status."""
    processes.tell_torchrun(message)
    warn(message)
    sys.exit(status)


def main(
    argv: list[str] | None = None, loader_class: type[Loader] = Loader, model_class: type[XLNet] = XLNet
) -> dict[str, Any]:
    """Run a command line, by default this program's own, and return the final metrics.

    loader_class, model_class: a variant of the data or of the model; see examples/variant.py and CONTRIBUTING.md
    -> the columns of metrics.csv in the last step, if there was one; updates; mean_loss of the last pass;
    unigram_entropy. With --eval_only: validation_loss, and unigram_entropy of the validation text
    """
    if sys.stderr is None:  # python main.py 2>&-
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if hasattr(sys.stdout, "reconfigure"):  # a file name may hold characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_command(argv, loader_class, model_class)
    except UserError as error:
        end(2, f"error: {error}")
    except (NotFinite, checkpoint.SaveError) as error:
        end(1, str(error))
    except Stopped as error:
        if error.signum == SIGPIPE and error.output_dir is None:  # python main.py | head needs no message
            sys.exit(1)
        end(128 + error.signum, str(error))
    except KeyboardInterrupt:
        end(130, "stopped by Ctrl-C before the first step; nothing new is saved")
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if processes.is_out_of_memory(error):
            end(1, f"out of memory: {reason}; lower --batch_size, --seq_len, --mem_len or --d_model")
        if processes.is_lost_process(error):
            end(1, f"another process of the run is gone: {reason}; --resume goes on from the last checkpoint")
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            end(2, f"error: --compile: {reason}; leave it out, or give PyTorch what it needs, a C++ compiler on a CPU")
        raise


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
