"""Draw the README's figures from real tensors of data.txt: `python docs/figures.py` writes docs/*.png, seeded.

- order.png: a factorization order over a dozen word pieces, and what either stream may see
- window.png: a window of 512 tokens: its parts, its masked spans, and the whole mask
- memory.png: what three windows in succession read, and what they leave to the next
- attention.png: a model trained for a minute: where the query stream looks for one target, and its best guesses
- loss.png: the loss of `python main.py`, from docs/loss.csv
"""

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main
import xlnet
from support import corpus

DOCS = Path(__file__).resolve().parent
INK, PAPER, BLUE, PALE_BLUE, ORANGE = "#222222", "#ffffff", "#3b6fb6", "#7fb0e6", "#e07b39"
GREY, PALE_GREY, DARK_GREY, GREEN = "#d9d9d9", "#aaaaaa", "#8f8f8f", "#4c9a5b"


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)  # a ground of its own, on any page


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / f"{name}.png", dpi=110)


# ---------------------------------------------------------------- the data


def draw_order(run: main.Run) -> None:
    """Draw two halves of a window of 16: an order, and the masks of both streams, words on both axes."""
    seq_len, reuse_len, num_predict = 16, 8, 6
    rng = np.random.default_rng(44)
    feature = data_utils.create_feature(
        run.loader.turns[0][0], 0, run.vocab, seq_len, reuse_len, num_predict, mask_alpha=2, mask_beta=1, rng=rng
    )
    arrays = data_utils.permute(feature, reuse_len, perm_size=8, num_predict=num_predict, rng=rng)
    rank, is_target = arrays["rank"], arrays["inp_q"] > 0
    query_mask = data_utils.ranks_to_mask(rank, is_target)  # 1 = must not see
    content_mask = query_mask.copy()
    np.fill_diagonal(content_mask, 0)

    pieces = run.tokenizer.convert_ids_to_tokens(arrays["inp_k"].tolist())
    place = ["given"] * seq_len
    in_order = [i for i in np.argsort(rank, kind="stable") if rank[i] not in (-1, reuse_len)]
    for number, i in enumerate(in_order, start=1):
        place[i] = str(number)
    labels = [f"{piece}  {where}" for piece, where in zip(pieces, place, strict=True)]

    figure = new_figure(11, 5.4)
    left, right = figure.subplots(1, 2)
    streams = (
        (left, "content stream", content_mask, list(range(seq_len))),
        (right, "query stream: a row for each target", query_mask, np.flatnonzero(is_target).tolist()),
    )
    for axes, title, mask, rows in streams:
        shown = np.ones((seq_len, seq_len))
        shown[rows] = mask[rows]
        axes.imshow(1 - shown, cmap=ListedColormap([GREY, BLUE]), vmin=0, vmax=1)
        axes.set_xticks(range(seq_len), pieces, rotation=90)
        axes.set_yticks(range(seq_len), labels)
        for i, label in enumerate(axes.get_yticklabels()):
            label.set_color(ORANGE if is_target[i] else INK if i in rows else PALE_GREY)
        axes.set_xticks(np.arange(-0.5, seq_len), minor=True)
        axes.set_yticks(np.arange(-0.5, seq_len), minor=True)
        axes.grid(which="minor", color=PAPER)
        axes.tick_params(which="both", length=0)
        axes.axhline(reuse_len - 0.5, color=INK, linewidth=1)
        axes.axvline(reuse_len - 0.5, color=INK, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("is seen (blue)")
    left.set_ylabel("who looks, and its place in the order; orange: to be predicted")
    save(figure, "order")


def draw_window(run: main.Run) -> None:
    """Draw parts and spans of the third window of data.txt as two strips, and its mask with the memory before it."""
    batch, args = run.loader.batch(2), run.args
    rank, inp_q, seg_id, inp_k = (batch[name][:, 0].numpy() for name in ("rank", "inp_q", "seg_id", "inp_k"))
    sees = 1 - data_utils.ranks_to_mask(rank, inp_q)
    sees = np.concatenate([np.ones((args.seq_len, args.mem_len)), sees], axis=1)  # all of the memory
    is_mark = np.isin(inp_k, [run.vocab.sep_id, run.vocab.cls_id])
    part = np.where(np.arange(args.seq_len) < args.reuse_len, 1, 2 + seg_id)
    part[is_mark] = 5
    memory_part = np.zeros(args.mem_len)
    colours = ListedColormap([DARK_GREY, BLUE, PALE_BLUE, GREEN, GREEN, INK])  # by part, from 0

    figure = new_figure(11, 7)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(1, 1, 12), sharex=True)
    left, right = -args.mem_len, args.seq_len
    strip = {"aspect": "auto", "extent": (left, right, 0, 1)}
    top.imshow(np.concatenate([memory_part, part])[None], cmap=colours, vmin=0, vmax=5, **strip)
    middle.imshow(np.concatenate([memory_part, inp_q])[None], cmap=ListedColormap([GREY, ORANGE]), **strip)
    first_sep, second_sep, _ = np.flatnonzero(is_mark)
    names = (
        ("memory", left, 0),
        ("inp: becomes memory", 0, args.reuse_len),
        ("A", args.reuse_len, first_sep),
        ("B", first_sep + 1, second_sep),
    )
    for name, begin, end in names:
        top.text((begin + end) / 2, 1.15, name, ha="center", va="bottom")
    bottom.imshow(sees, cmap=ListedColormap([GREY, BLUE]), aspect="auto", extent=(left, right, args.seq_len, 0))
    top.set_yticks([])
    middle.set_yticks([])
    top.set_ylabel("parts", rotation=0, ha="right", va="center")
    middle.set_ylabel("targets", rotation=0, ha="right", va="center")
    bottom.set_ylabel("position that looks")
    bottom.set_xlabel(
        "position that is seen (blue) or not; the content stream also sees its own\n"
        "the black columns above are [SEP], [SEP] and [CLS]"
    )
    save(figure, "window")


def draw_memory(args: argparse.Namespace, n_window: int = 3) -> None:
    """Draw bars over the text: what a window reads as memory, what is its own, and what it leaves to the next."""
    figure = new_figure(11, 3)
    axes = figure.add_subplot()
    rest_len = args.seq_len - args.reuse_len
    for window in range(n_window):
        begin = window * args.reuse_len
        past = min(args.mem_len, begin)
        y = n_window - window
        bars = (
            (begin - past, past, DARK_GREY, PAPER, "memory"),
            (begin, args.reuse_len, BLUE, PAPER, "inp"),
            (begin + args.reuse_len, rest_len, PALE_BLUE, INK, "A and B: not kept"),
        )
        for left, width, colour, ink, name in bars:
            axes.barh(y, width, left=left, color=colour, height=0.55, edgecolor=PAPER)
            if width:
                axes.text(left + width / 2, y, name, ha="center", va="center", color=ink)
        if window + 1 < n_window:
            middle = begin + args.reuse_len / 2
            arrow = {"arrowstyle": "->", "color": INK}
            axes.annotate("", xy=(middle, y - 0.72), xytext=(middle, y - 0.3), arrowprops=arrow)
    axes.set_yticks(range(1, n_window + 1), [f"window {number}" for number in range(n_window, 0, -1)])
    axes.set_xticks(range(0, args.reuse_len * n_window + rest_len + 1, args.reuse_len // 2))
    axes.set_xlabel(
        f"token of the text, if B follows A (reuse_len {args.reuse_len}, mem_len {args.mem_len}, "
        f"seq_len {args.seq_len})"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, "memory")


# ---------------------------------------------------------------- a trained model


def train(n_step: int) -> tuple[main.Run, list[Tensor]]:
    """Return a run on data.txt after so many steps, and the memory of its row."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        main.main(["--device", "cpu", "--output_dir", folder, "--train_steps", str(n_step)])
        run = main.prepare(["--output_dir", folder, "--resume"])
    [memory] = run.state.memory
    return run, list(memory)


@torch.no_grad()
def attention_of_queries(
    model: xlnet.XLNet, batch: dict[str, Tensor], memory: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and, of every layer, the attention weights of the query stream: [n_head, num_predict, klen]."""
    weights, core = [], xlnet.RelativeAttention.rel_attn_core
    num_predict = batch["target_mapping"].size(0)

    def spy(self, q, k, v, *others):
        keys = torch.eye(k.size(2)).expand(*k.shape[:2], -1, -1)  # reading the keys' numbers gives their weights
        weights.append(core(self, q, k, keys, *others)[0, :, -num_predict:])
        return core(self, q, k, v, *others)

    xlnet.RelativeAttention.rel_attn_core = spy
    logits, _ = model(**{name: batch[name] for name in batch if name not in ("target", "target_mask")}, mems=memory)
    xlnet.RelativeAttention.rel_attn_core = core
    return logits, weights


def choose_slot(share: Tensor, batch: dict[str, Tensor], pieces: list[str], hidden: np.ndarray, reuse_len: int) -> int:
    """Return a target that is worth a look: a word in inp with hidden neighbours, neither a riddle nor known by heart.

    share: [num_predict, n_token], the probability of each piece; hidden: [seq_len, seq_len] bool, True = must not see
    """
    probability = share.gather(1, batch["target"])[:, 0]
    slots = []
    for slot, at in enumerate(batch["target_mapping"][:, 0].tolist()):
        in_middle = 12 <= at < reuse_len - 12
        if in_middle and pieces[at].isalpha() and hidden[at, at - 3 : at + 4].sum() > 1:
            slots.append(slot)
    return min(slots, key=lambda slot: abs(probability[slot] - 0.6))


def draw_attention(n_step: int) -> None:
    """Train on data.txt, then look at one target of the window that would come next."""
    run, memory = train(n_step)
    batch = run.loader.batch(run.state.step)
    logits, weights = attention_of_queries(run.model.eval(), batch, memory)
    mean = torch.stack(weights).mean(dim=(0, 1))  # of layers and heads: [num_predict, klen]
    mean = mean[:, memory[0].size(0) :]  # of the window's own positions
    share = logits[:, 0].softmax(dim=1)
    hidden = data_utils.ranks_to_mask(batch["rank"][:, 0].numpy(), batch["inp_q"][:, 0].numpy()) > 0
    pieces = run.tokenizer.convert_ids_to_tokens(batch["inp_k"][:, 0].tolist())
    slot = choose_slot(share, batch, pieces, hidden, run.args.reuse_len)
    at = int(batch["target_mapping"][slot, 0])
    around = range(at - 12, at + 13)
    best, which = share[slot].topk(5)

    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    colours = [GREY if hidden[at, position] else BLUE for position in around]
    left.bar(around, mean[slot, around[0] : around[-1] + 1], color=colours)
    left.set_xticks(around, [pieces[position] for position in around], rotation=90)
    for label, position in zip(left.get_xticklabels(), around, strict=True):
        label.set_color(ORANGE if position == at else PALE_GREY if hidden[at, position] else INK)
    left.set_ylabel("attention, mean of layers and heads")
    left.set_title("orange: the target; grey: words that it may not see")
    right.barh(range(5), best, color=GREEN)
    right.set_yticks(range(5), run.tokenizer.convert_ids_to_tokens(which.tolist()))
    right.invert_yaxis()
    right.set_xlabel("probability")
    right.set_title("five likeliest")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, "attention")


def draw_loss(entropy: float, n_token: int) -> None:
    """Draw the mean loss of each pass of the README's command, beside that of guessing and that of the port."""
    losses: dict[int, list[float]] = {}  # of each pass
    with open(DOCS / "loss.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            losses.setdefault(int(row["pass"]), []).append(float(row["loss"]))
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot(xlabel="pass over the text", ylabel="nats per predicted token", ylim=(0, 28))
    axes.plot(list(losses), [np.mean(of_pass) for of_pass in losses.values()], color=BLUE, linewidth=2)
    axes.plot([1, 100], [26.3, 17.1], color=DARK_GREY, marker="o", linestyle=":")
    for y, text in ((np.log(n_token), "guessing blindly"), (entropy, "guessing by word frequency")):
        axes.axhline(y, color=INK, linewidth=0.8, linestyle="--")
        axes.text(100, y + 0.3, f"{text}, {y:.2f}", ha="right", va="bottom")
    port = "graykode/xlnet-Pytorch, first and last pass as published (its own text)"
    axes.text(100, 24, port, ha="right", va="bottom", color="#666666")
    axes.text(30, 3.0, "python main.py", color=BLUE, va="bottom")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "loss")


def draw(argv: Sequence[str] | None = None) -> None:
    """Read the flags and draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=30, help="that the model of attention.png trains (default: 30)")
    options = parser.parse_args(argv)
    run = main.prepare(["--device", "cpu"])
    draw_order(run)
    draw_window(run)
    draw_memory(run.args)
    draw_loss(corpus.unigram_entropy(run.text.counts), run.vocab.size)
    draw_attention(options.passes * run.loader.pass_len - 10)  # a window in the middle of the text comes next


if __name__ == "__main__":
    draw()
