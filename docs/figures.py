"""Draw the pictures of the documents: `python docs/figures.py` writes docs/*.png.

- order.png: an order over sixteen tokens, and what both streams see
- window.png: a window of 64 tokens: its content, its targets, and who sees whom
- streams.png: one target through both streams, from its position to its prediction
- memory.png: what three consecutive windows read
- hero.png: held-out loss of this project and its neighbours, from benchmarks/results/learning.csv
- attention.png: what a trained model looks at, and its guesses; only with --model and --text

order.png and window.png show batches of data.txt, seeded. For attention.png:

    python benchmarks/corpus.py
    python benchmarks/record.py --csv out/record.csv --minutes 10 --entries muon-128 --save out/record
    python docs/figures.py --model out/record/muon-128-10-0 --text corpus/valid.txt
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main
import xlnet
from support import UserError, mistakes_in_one_line

DOCS = Path(__file__).resolve().parent
LEARNING = DOCS.parent / "benchmarks" / "results" / "learning.csv"
WIDTH = 8.5  # inches; GitHub shows a picture about this wide
INK, PAPER, BLUE, PALE_BLUE, ORANGE = "#222222", "#ffffff", "#3b6fb6", "#7fb0e6", "#d9662b"
GREY, PALE_GREY, DARK_GREY, GREEN = "#dddddd", "#aaaaaa", "#8f8f8f", "#4c9a5b"
HIDDEN_OR_SEEN = ListedColormap([GREY, BLUE])
SHAPE = "n_layer=4 d_model=128 d_inner=512"
HERO = (  # variant in learning.csv, label, colour, and whether the label is at, below or above the end of the curve
    (f"optimizer=muon decay_method=poly {SHAPE} num_predict=480 mem_len=0", "this project", BLUE, "center"),
    (f"bert {SHAPE} optimizer=muon decay_method=poly", "BERT (transformers), our optimizer", GREEN, "top"),
    (f"transformers {SHAPE} learning_rate=1e-3 decay_method=poly", "XLNet (transformers)", ORANGE, "bottom"),
)


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)  # readable on a dark page too


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / f"{name}.png", dpi=160)


def draw_cells(axes: Axes, sees: np.ndarray) -> None:
    """Draw who sees whom as cells with white lines between them: [n_query, n_key], 1 = sees, blue."""
    n_query, n_key = sees.shape
    axes.imshow(sees, cmap=HIDDEN_OR_SEEN, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(np.arange(-0.5, n_key), minor=True)
    axes.set_yticks(np.arange(-0.5, n_query), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=0.6)
    axes.tick_params(which="both", length=0)


# ---------------------------------------------------------------- the data


def draw_order(run: main.Run) -> None:
    """Draw two parts of a window of 16: an order, and what both streams see, tokens on both axes."""
    seq_len, reuse_len, num_predict = 16, 8, 6
    rng = np.random.default_rng(44)
    feature = data_utils.create_feature(
        run.loader.turns[0][0], 0, run.vocab, seq_len, reuse_len, num_predict, mask_alpha=2, mask_beta=1, rng=rng
    )
    arrays = data_utils.permute(feature, reuse_len, perm_size=8, num_predict=num_predict, rng=rng)
    rank, is_target = arrays["rank"], arrays["inp_q"] > 0
    query_sees = 1 - data_utils.ranks_to_mask(rank, is_target)
    content_sees = query_sees.copy()
    np.fill_diagonal(content_sees, 1)

    pieces = run.tokenizer.convert_ids_to_tokens(arrays["inp_k"].tolist())
    place = ["given"] * seq_len
    in_order = [i for i in np.argsort(rank, kind="stable") if rank[i] not in (-1, reuse_len)]
    for number, i in enumerate(in_order, start=1):
        place[i] = str(number)

    figure = new_figure(4.9)
    left, right = figure.subplots(1, 2)
    streams = (
        (left, "content stream", content_sees, set(range(seq_len))),
        (right, "query stream", query_sees, set(np.flatnonzero(is_target).tolist())),
    )
    for axes, title, sees, rows in streams:
        shown = np.array([sees[i] if i in rows else np.zeros(seq_len) for i in range(seq_len)])
        draw_cells(axes, shown)
        for i in set(range(seq_len)) - rows:
            axes.axhspan(i - 0.5, i + 0.5, color=PAPER)  # no such row
        axes.set_xticks(range(seq_len), pieces, rotation=90)
        axes.set_yticks(range(seq_len), pieces)
        axes.tick_params(axis="y", pad=38)
        for i, label in enumerate(axes.get_yticklabels()):
            colour = ORANGE if is_target[i] else INK if i in rows else PALE_GREY
            label.set_color(colour)
            axes.text(-0.8, i, place[i], ha="right", va="center_baseline", color=colour)
        axes.text(-0.8, -0.9, "place", ha="right", va="center", color=INK, fontsize=9)
        axes.axhline(reuse_len - 0.5, color=INK, linewidth=1)
        axes.axvline(reuse_len - 0.5, color=INK, linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("sees (blue)")
    save(figure, "order")


def draw_window() -> None:
    """Draw the parts and targets of a window of 64 tokens as two strips, and below them who sees whom."""
    flags = "--device cpu --seq_len 64 --rows 1 --mem_len 24 --seed 3"
    run = main.prepare(flags.split())
    args = run.args
    batch = run.loader.batch(1)
    rank, inp_q, seg_id, inp_k = (batch[name][:, 0].numpy() for name in ("rank", "inp_q", "seg_id", "inp_k"))
    sees = 1 - data_utils.ranks_to_mask(rank, inp_q)
    sees[inp_q == 0] += np.eye(args.seq_len)[inp_q == 0]  # the content stream sees itself
    sees = np.concatenate([np.ones((args.seq_len, args.mem_len)), sees.clip(max=1)], axis=1)  # all see the memory
    is_mark = np.isin(inp_k, [run.vocab.sep_id, run.vocab.cls_id])
    part = np.where(np.arange(args.seq_len) < args.reuse_len, 1, 2 + seg_id)
    part[is_mark] = 4
    memory = np.zeros(args.mem_len)
    part_colours = ListedColormap([DARK_GREY, BLUE, PALE_BLUE, GREEN, INK])  # memory, inp, A, B, [SEP] and [CLS]

    figure = new_figure(7)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(1, 1, 17), sharex=True)
    parts, targets = np.concatenate([memory, part])[None], np.concatenate([memory, inp_q])[None]
    top.imshow(parts, cmap=part_colours, vmin=0, vmax=4, aspect="auto")
    middle.imshow(targets, cmap=ListedColormap([GREY, ORANGE]), aspect="auto")
    first_sep, second_sep, _ = args.mem_len + np.flatnonzero(is_mark)
    names = (
        ("memory", 0, args.mem_len),
        ("inp", args.mem_len, args.mem_len + args.reuse_len),
        ("A", args.mem_len + args.reuse_len, first_sep),
        ("B", first_sep + 1, second_sep),
    )
    for name, begin, end in names:
        top.text((begin + end - 1) / 2, -0.75, name, ha="center", va="bottom")
    draw_cells(bottom, sees)
    for axes, label in ((top, "content"), (middle, "targets")):
        axes.set_yticks([])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.tick_params(which="both", length=0)
    ticks = np.arange(0, args.seq_len + 1, 16)
    bottom.set_xticks([0, *(args.mem_len + ticks)], [-args.mem_len, *ticks])
    bottom.set_yticks(ticks[:-1])
    for i in np.flatnonzero(inp_q):
        bottom.plot(-1.2, i, marker=">", color=ORANGE, markersize=4, clip_on=False)
    bottom.set_xlim(-0.5, args.mem_len + args.seq_len - 0.5)
    bottom.axhline(args.reuse_len - 0.5, color=INK, linewidth=1)
    bottom.axvline(args.mem_len - 0.5, color=INK, linewidth=1)
    bottom.axvline(args.mem_len + args.reuse_len - 0.5, color=INK, linewidth=1)
    bottom.set_ylabel("position that reads (orange: a target)", labelpad=10)
    bottom.set_xlabel("position that is read (blue: seen); black above: [SEP] after A, [SEP] and [CLS] after B")
    save(figure, "window")


def draw_memory(args: argparse.Namespace, n_window: int = 3) -> None:
    """Draw bars over the text: what a window reads as memory, what is its own, and what it leaves to the next."""
    figure = new_figure(2.9)
    axes = figure.add_subplot()
    rest_len = args.seq_len - args.reuse_len
    for window in range(n_window):
        begin = window * args.reuse_len
        past = min(args.mem_len, begin)
        y = n_window - window
        bars = (
            (begin - past, past, DARK_GREY, PAPER, "memory"),
            (begin, args.reuse_len, BLUE, PAPER, "inp"),
            (begin + args.reuse_len, rest_len, PALE_BLUE, INK, "A and B, not cached"),
        )
        for left, width, colour, ink, name in bars:
            axes.barh(y, width, left=left, color=colour, height=0.5, edgecolor=PAPER)
            if width:
                axes.text(left + width / 2, y, name, ha="center", va="center", color=ink, fontsize=9)
        if past:
            axes.plot([begin, begin], [y - 0.33, y + 0.33], color=ORANGE, linestyle="--", linewidth=2)
            axes.text(begin - 6, y - 0.31, "no gradient", ha="right", va="top", color=ORANGE, fontsize=9)
        if window + 1 < n_window:
            kept = [begin + args.reuse_len / 3]  # what the next window finds in its memory
            if past:
                kept.append(begin - 0.46 * args.reuse_len)  # left of "no gradient"
            for x in kept:
                arrow = {"arrowstyle": "->", "color": INK}
                axes.annotate("", xy=(x, y - 0.73), xytext=(x, y - 0.27), arrowprops=arrow)
    axes.set_yticks(range(1, n_window + 1), [f"window {number}" for number in range(n_window, 0, -1)])
    axes.set_xticks(range(0, args.reuse_len * n_window + rest_len + 1, args.reuse_len // 2))
    axes.set_xlabel("position in the text, drawn as if B always followed A")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, "memory")


# ---------------------------------------------------------------- the model


def draw_streams() -> None:
    """Draw both streams of one target in a model of two layers: "cat" of examples/show_order.py, seed 0.

    The order is cat, [SEP], the. So "cat" reads the given words, and the first "the" reads "cat" too.
    """
    words, target, later = ("the", "cat", "sat", "on", "the", "mat"), 1, 0
    given = range(2, len(words))
    h_at = [1.5 * i for i in range(len(words))]
    h_at[target] += 0.3
    g_at = {target: 1.5 * target - 0.3, later: -0.3}
    figure = new_figure(4.8)
    axes = figure.add_subplot(xlim=(-2.6, 8), ylim=(-0.75, 3.5))
    axes.axis("off")

    def node(x: float, y: float, text: str, colour: str) -> None:
        box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": INK}
        axes.text(x, y, text, ha="center", va="center", bbox=box, color=PAPER, zorder=3)

    def arrow(
        begin: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-", width: float = 1.5
    ) -> None:
        look = {"arrowstyle": "->", "color": colour, "linestyle": style, "shrinkA": 12, "shrinkB": 14}
        axes.annotate("", xy=end, xytext=begin, arrowprops=look | {"linewidth": width})

    for reader in given:  # first, so that they lie below
        for x in given:
            arrow((h_at[x], 0), (h_at[reader], 1.3), GREY, width=0.8)
    for i, word in enumerate(words):
        axes.text(1.5 * i, -0.6, word, ha="center", color=ORANGE if i == target else INK)
    for y, text in ((0, "embeddings"), (1.3, "layer 1"), (2.6, "layer 2, the last")):
        axes.text(-0.9, y, text, ha="right", va="center")
        node(g_at[target], y, "g", ORANGE)
    for y in (0, 1.3):
        for i in (target, *given):
            node(h_at[i], y, "h", BLUE)
        for x in given:
            arrow((h_at[x], y), (g_at[target], y + 1.3), ORANGE)
        arrow((g_at[target], y), (g_at[target], y + 1.3), ORANGE, "--")
    for x in (*given, target):
        arrow((h_at[x], 0), (h_at[target], 1.3), BLUE)
    node(g_at[later], 2.6, "g", DARK_GREY)
    arrow((h_at[target], 1.3), (g_at[later], 2.6), BLUE)
    axes.text(g_at[target] + 0.25, 3.3, "probability of each word: cat, dog, ...", color=ORANGE, va="center")
    arrow((g_at[target], 2.6), (g_at[target], 3.4), ORANGE)
    axes.text(g_at[later], 2.95, "“the”,\npredicted later", ha="center", va="bottom", color=DARK_GREY, fontsize=8.5)
    save(figure, "streams")


@torch.no_grad()
def attention_of_queries(model: xlnet.XLNet, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and, of every layer, the attention weights of the query stream: [n_head, num_predict, klen]."""
    weights, core = [], xlnet.RelativeAttention.rel_attn_core
    num_predict = batch["target_mapping"].size(0)

    def spy(self, q, k, v, *others):
        keys = torch.eye(k.size(2)).expand(*k.shape[:2], -1, -1)  # with these values the output is the weights
        weights.append(core(self, q, k, keys, *others)[0, :, -num_predict:])
        return core(self, q, k, v, *others)

    xlnet.RelativeAttention.rel_attn_core = spy
    logits, _ = model(**{name: batch[name] for name in batch if name not in ("target", "target_mask")})
    xlnet.RelativeAttention.rel_attn_core = core
    return logits, weights


def choose_slot(share: Tensor, batch: dict[str, Tensor], pieces: list[str], hidden: np.ndarray, reuse_len: int) -> int:
    """Return a target that is worth a look: a long word in inp with hidden neighbours, found but not certain.

    share: [num_predict, n_token], the probability of each token; hidden: [seq_len, seq_len] bool, True = must not see
    """
    probability = share.gather(1, batch["target"])[:, 0]
    slots = []
    for slot, at in enumerate(batch["target_mapping"][:, 0].tolist()):
        in_middle = 12 <= at < reuse_len - 12
        n_hidden = hidden[at, at - 6 : at + 7].sum() - 1  # without itself
        word = pieces[at].removeprefix("▁")  # SentencePiece's mark of a word's beginning
        if in_middle and len(word) > 4 and word.isalpha() and n_hidden > 0:
            slots.append(slot)
    if not slots:
        raise UserError("--text: no target of the first window is a long word with hidden neighbours; give another")
    return min(slots, key=lambda slot: abs(probability[slot] - 0.5))


def draw_attention(model: str, text: str) -> None:
    """Look at one target of the first window of a text, which has no memory, in a trained model."""
    flags = ["--device", "cpu", "--init_checkpoint", model, "--data", text, "--rows", "1", "--num_predict", "85"]
    run = main.prepare(flags)
    batch = run.loader.batch(0)
    logits, weights = attention_of_queries(run.model.eval(), batch)
    mean = torch.stack(weights).mean(dim=(0, 1))  # of layers and heads: [num_predict, klen]
    share = logits[:, 0].softmax(dim=1)
    hidden = data_utils.ranks_to_mask(batch["rank"][:, 0].numpy(), batch["inp_q"][:, 0].numpy()) > 0
    pieces = run.tokenizer.convert_ids_to_tokens(batch["inp_k"][:, 0].tolist())
    slot = choose_slot(share, batch, pieces, hidden, run.args.reuse_len)
    at = int(batch["target_mapping"][slot, 0])
    around = range(at - 12, at + 13)
    best, which = share[slot].topk(5)

    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    left.bar(around, mean[slot, around[0] : around[-1] + 1], color=BLUE)
    left.set_xticks(around, [pieces[position] for position in around], rotation=90)
    for label, position in zip(left.get_xticklabels(), around, strict=True):
        label.set_color(ORANGE if position == at else PALE_GREY if hidden[at, position] else INK)
    left.set_ylabel("attention, mean of layers and heads")
    right.barh(range(5), best, color=GREEN)
    right.set_yticks(range(5), run.tokenizer.convert_ids_to_tokens(which.tolist()))
    right.invert_yaxis()
    right.set_xlabel("probability")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, "attention")


# ---------------------------------------------------------------- the result


def draw_hero() -> None:
    """Draw the held-out losses of ten minutes, from the rows that learning.py has written; seed 0 of each variant."""
    with open(LEARNING, newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["budget"] == "10 minutes" and row["shape"] == "32" and row["targets"] == "2"
        ]
    figure = new_figure(3.8)
    axes = figure.add_subplot(xlabel="minutes of training on two CPU cores", ylabel="held-out loss, nats per token")
    for variant, label, colour, alignment in HERO:
        curve = [row for row in rows if row["variant"] == variant and row["seed"] == "0"]
        minutes = [float(row["seconds"]) / 60 for row in curve]
        losses = [float(row["held_out_loss"]) for row in curve]
        axes.plot(minutes, losses, color=colour, linewidth=2, marker="o", markersize=3)
        axes.text(minutes[-1] + 0.15, losses[-1], f"{label}: {losses[-1]:.2f}", color=colour, va=alignment)
    [counts] = [float(row["held_out_loss"]) for row in rows if row["variant"] == "five-gram"]
    axes.axhline(counts, color=INK, linestyle="--", linewidth=1)
    axes.text(10.15, counts, f"5-gram: {counts:.2f}", color=INK, va="center", backgroundcolor=PAPER)
    axes.set(xlim=(0, 14.2), ylim=(3.9, 6.95))
    axes.set_xticks(range(0, 11, 2))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "hero")


def draw(argv: Sequence[str] | None = None) -> None:
    """Read the flags and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint, for attention.png")
    parser.add_argument("--text", default="data.txt", help="that the model reads (default: %(default)s)")
    options = parser.parse_args(argv)
    run = main.prepare(["--device", "cpu"])
    draw_order(run)
    draw_window()
    draw_streams()
    draw_memory(run.args)
    draw_hero()
    if options.model:
        draw_attention(options.model, options.text)


if __name__ == "__main__":
    with mistakes_in_one_line("figures.py"):
        draw()
