"""Draw the README's figures from real tensors of data.txt: `python docs/figures.py` writes docs/*.png, seeded.

    order.png       a factorization order over a dozen word pieces, and what either stream may see
    window.png      a window of 512 tokens: its parts, its masked spans, and the whole mask
    memory.png      what three windows in succession read, and what they leave to the next
    attention.png   a model trained for a minute: where the query stream looks for one target, and its best guesses
    loss.png        the cost of `python main.py`, from docs/loss.csv
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main
import xlnet

DOCS = Path(__file__).resolve().parent
INK, PAPER, BLUE, ORANGE, GREY, GREEN = "#222222", "#ffffff", "#3b6fb6", "#e07b39", "#d9d9d9", "#4c9a5b"


def new_figure(width, height):
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)  # its own ground, on any page


def save(figure, name):
    figure.savefig(DOCS / f"{name}.png", dpi=110)


def draw_order(run):
    """Two halves of a window of 16: an order, and the masks of both streams, words on both axes."""
    flags = dict(seq_len=16, reuse_len=8, num_predict=6, mask_alpha=2, mask_beta=1)
    rng = np.random.default_rng(44)
    feature = data_utils.create_feature(run.groups[0][0], 0, run.vocab, **flags, rng=rng)
    arrays = data_utils.permute(feature, 8, 8, 6, rng)
    rank, is_target = arrays["perm_mask"], arrays["inp_q"] > 0
    blocked = data_utils.perm_mask(rank, is_target)
    pieces = run.tokenizer.convert_ids_to_tokens(arrays["inp_k"].tolist())
    place = np.full(len(rank), "given", dtype=object)
    in_order = [i for i in np.argsort(rank, kind="stable") if rank[i] not in (-1, 8)]
    for number, i in enumerate(in_order, start=1):
        place[i] = str(number)
    labels = [f"{piece}  {where}" for piece, where in zip(pieces, place)]
    figure = new_figure(11, 5.4)
    both = figure.subplots(1, 2)
    content = blocked.copy()
    np.fill_diagonal(content, 0)
    streams = ((content, "content stream", range(16)),
               (blocked, "query stream: a row for each target", np.flatnonzero(is_target)))
    for axes, (mask, title, rows) in zip(both, streams):
        shown = np.ones((16, 16))
        shown[list(rows)] = mask[list(rows)]
        axes.imshow(1 - shown, cmap=ListedColormap([GREY, BLUE]), vmin=0, vmax=1)
        axes.set_xticks(range(16), pieces, rotation=90)
        axes.set_yticks(range(16), labels)
        for i, label in enumerate(axes.get_yticklabels()):
            label.set_color(ORANGE if is_target[i] else INK if i in rows else "#aaaaaa")
        axes.set_xticks(np.arange(-0.5, 16), minor=True)
        axes.set_yticks(np.arange(-0.5, 16), minor=True)
        axes.grid(which="minor", color=PAPER)
        axes.tick_params(which="both", length=0)
        axes.axhline(7.5, color=INK, linewidth=1)
        axes.axvline(7.5, color=INK, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("is seen (blue)")
    both[0].set_ylabel("who looks, and its place in the order; orange: to be predicted")
    save(figure, "order")


def draw_window(run):
    """Parts and spans of the third window of data.txt as two strips, and its mask with the memory before it."""
    batch = run.load_batch(2)
    rank, inp_q, seg_id = (batch[key][:, 0].numpy() for key in ("perm_mask", "inp_q", "seg_id"))
    args = run.args
    mask = 1 - data_utils.perm_mask(rank, inp_q)
    sees = np.concatenate([np.ones((args.seq_len, args.mem_len)), mask], axis=1)
    is_mark = np.isin(batch["inp_k"][:, 0].numpy(), [run.vocab.sep_id, run.vocab.cls_id])
    part = np.where(np.arange(args.seq_len) < args.reuse_len, 1, 2 + seg_id)
    part[is_mark] = 5
    strip = np.concatenate([np.zeros(args.mem_len, dtype=int), part])
    figure = new_figure(11, 7)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(1, 1, 12), sharex=True)
    colours = ListedColormap(["#8f8f8f", BLUE, "#7fb0e6", GREEN, GREEN, INK])
    extent = (-args.mem_len, args.seq_len)
    top.imshow(strip[None], cmap=colours, vmin=0, vmax=5, aspect="auto", extent=(*extent, 0, 1))
    middle.imshow(np.concatenate([np.zeros(args.mem_len), inp_q])[None], cmap=ListedColormap([GREY, ORANGE]),
                  aspect="auto", extent=(*extent, 0, 1))
    sep = np.flatnonzero(is_mark)
    names = (("memory", -args.mem_len, 0), ("inp: becomes memory", 0, args.reuse_len),
             ("A", args.reuse_len, sep[0]), ("B", sep[0] + 1, sep[1]))
    for name, begin, end in names:
        top.text((begin + end) / 2, 1.15, name, ha="center", va="bottom")
    bottom.imshow(sees, cmap=ListedColormap([GREY, BLUE]), aspect="auto", extent=(*extent, args.seq_len, 0))
    top.set_yticks([])
    middle.set_yticks([])
    top.set_ylabel("parts", rotation=0, ha="right", va="center")
    middle.set_ylabel("targets", rotation=0, ha="right", va="center")
    bottom.set_ylabel("position that looks")
    bottom.set_xlabel("position that is seen (blue) or not; the content stream also sees its own\n"
                      "the black columns above are [SEP], [SEP] and [CLS]")
    save(figure, "window")


def draw_memory(args, windows=3):
    """Bars over the text: what a window reads as memory, what is its own, and what it leaves to the next."""
    figure = new_figure(11, 3)
    axes = figure.add_subplot()
    for window in range(windows):
        begin = window * args.reuse_len
        past = min(args.mem_len, begin)
        y = windows - window
        bars = ((begin - past, past, "#8f8f8f", "memory"), (begin, args.reuse_len, BLUE, "inp"),
                (begin + args.reuse_len, args.seq_len - args.reuse_len, "#7fb0e6", "A and B: not kept"))
        for left, width, colour, name in bars:
            axes.barh(y, width, left=left, color=colour, height=0.55, edgecolor=PAPER)
            if width:
                ink = INK if colour == "#7fb0e6" else PAPER
                axes.text(left + width / 2, y, name, ha="center", va="center", color=ink)
        if window + 1 < windows:
            axes.annotate("", xy=(begin + args.reuse_len / 2, y - 0.72), xytext=(begin + args.reuse_len / 2, y - 0.3),
                          arrowprops={"arrowstyle": "->", "color": INK})
    axes.set_yticks(range(1, windows + 1), [f"window {window}" for window in range(windows, 0, -1)])
    axes.set_xticks(range(0, args.reuse_len * windows + args.seq_len - args.reuse_len + 1, args.reuse_len // 2))
    axes.set_xlabel(f"token of the text, if B follows A (reuse_len {args.reuse_len}, mem_len {args.mem_len}, "
                    f"seq_len {args.seq_len})")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, "memory")


@torch.no_grad()
def attention_of_queries(model, batch, mems):
    """Return the logits and, of every layer, the attention weights of the query stream: [n_head, num_predict, klen]."""
    weights, core = [], xlnet.RelativeAttention.rel_attn_core

    def spy(self, q, k, v, *others):
        keys = torch.eye(k.size(2)).expand(*k.shape[:2], -1, -1)  # reading the keys' numbers gives their weights
        weights.append(core(self, q, k, keys, *others)[0, :, -batch["target_mapping"].size(0) :])
        return core(self, q, k, v, *others)

    xlnet.RelativeAttention.rel_attn_core = spy
    logits, _ = model(**{key: batch[key] for key in batch if key not in ("target", "target_mask")}, mems=mems)
    xlnet.RelativeAttention.rel_attn_core = core
    return logits, weights


def draw_attention(passes):
    """Train on data.txt, then look at one target of the window that would come next."""
    run = main.Run(main.settle({"num_step": passes, "device": "cpu"}))
    while run.step < run.last - 10:
        run.train_step()
    run.model.eval()
    mems, batch = run.mems[0], run.load_batch(run.step)
    logits, weights = attention_of_queries(run.model, batch, mems)
    mean = torch.stack(weights).mean(dim=(0, 1))[:, mems[0].size(0) :]  # of layers and heads: [num_predict, seq_len]
    share = logits[:, 0].softmax(dim=1)
    places = batch["target_mapping"][:, 0].tolist()
    hidden_from = data_utils.perm_mask(batch["perm_mask"][:, 0].numpy(), batch["inp_q"][:, 0].numpy()) > 0
    pieces = run.tokenizer.convert_ids_to_tokens(batch["inp_k"][:, 0].tolist())
    near_hidden = [slot for slot, at in enumerate(places) if 12 <= at < run.args.reuse_len - 12
                   and pieces[at].isalpha() and hidden_from[at, at - 6 : at + 7].sum() > 1]
    sure = share.gather(1, batch["target"])[:, 0]
    slot = min(near_hidden, key=lambda slot: abs(sure[slot] - 0.6))  # neither a riddle nor known by heart
    at = places[slot]
    begin, end = at - 12, at + 13
    best, which = share[slot].topk(5)
    blocked = hidden_from[at, begin:end]
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    bars = left.bar(range(begin, end), mean[slot, begin:end], color=BLUE)
    for bar, hidden in zip(bars, blocked):
        bar.set_color(GREY if hidden else BLUE)
    left.set_xticks(range(begin, end), pieces[begin:end], rotation=90)
    for label, position, hidden in zip(left.get_xticklabels(), range(begin, end), blocked):
        label.set_color(ORANGE if position == at else "#aaaaaa" if hidden else INK)
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


def draw_loss(entropy, n_token):
    """The mean cost of each pass of the README's command, beside what guessing costs and what the port published."""
    with open(DOCS / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    costs = {}
    for row in rows:
        costs.setdefault(int(row["pass"]), []).append(float(row["cost"]))
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot(xlabel="pass over the text", ylabel="nats per predicted token", ylim=(0, 28))
    axes.plot(list(costs), [np.mean(each) for each in costs.values()], color=BLUE, linewidth=2)
    axes.plot([1, 100], [26.3, 17.1], color="#8f8f8f", marker="o", linestyle=":")
    for y, text in ((np.log(n_token), "guessing blindly"), (entropy, "guessing by word frequency")):
        axes.axhline(y, color=INK, linewidth=0.8, linestyle="--")
        axes.text(100, y + 0.3, f"{text}, {y:.2f}", ha="right", va="bottom")
    axes.text(100, 24, "graykode/xlnet-Pytorch, first and last pass as published (its own text)", ha="right",
              va="bottom", color="#666666")
    axes.text(30, 3.0, "python main.py", color=BLUE, va="bottom")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "loss")


def draw():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=30, help="that the model of attention.png trains (default: 30)")
    options = parser.parse_args()
    run = main.Run(main.settle({"device": "cpu"}))
    draw_order(run)
    draw_window(run)
    draw_memory(run.args)
    draw_loss(main.unigram_entropy(run.text.counts), run.vocab.size)
    draw_attention(options.passes)


if __name__ == "__main__":
    draw()
