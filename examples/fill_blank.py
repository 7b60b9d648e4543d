"""Fill the blanks in a text with a pretrained XLNet, or score the text.

    python examples/fill_blank.py out "the president of the ___ states"
    python examples/fill_blank.py out "the ___ of the united states" --pieces 2 --context speech.txt
    python examples/fill_blank.py out "the president of the united states" --score

MODEL is the folder of a checkpoint, of a run (its newest checkpoint is used), or of any Hugging Face XLNet with its
vocabulary, or a name at the hub such as xlnet/xlnet-base-cased. Three or more underscores are a blank. The query stream
predicts each blank from the rest of TEXT, and from the memory of --context; the other blanks of TEXT, one piece each,
are hidden.

The positions tell the model how many pieces a blank has. So the probabilities of all fillings of one length add up to
1, and a probability compares fillings of the same length. The column "nats/piece" is -log(probability) /
length. It puts lengths on one scale but favours long words, whose last pieces follow from the first. Neither number
says how likely a length is.

The score of a text is the sum of log p(piece | the pieces before it in a random order): the paper, section 2.2,
equation (3), with the mean over orders outside the logarithm. Compare it only with scores of the same model: in
pretraining most of a window is given, and here the first pieces of an order see almost nothing.

transformers' pipeline "fill-mask" is wrong for XLNet, and does not say so. It puts <mask> into the text and reads the
content stream there, without target_mapping. No text in pretraining holds a <mask>, and the content stream is trained
to encode a token, not to predict it. With transformers, these lines give the probabilities of fill_blank.py:

    import torch
    from transformers import AutoTokenizer, XLNetLMHeadModel

    tokenizer = AutoTokenizer.from_pretrained("out/checkpoint-1000")
    model = XLNetLMHeadModel.from_pretrained("out/checkpoint-1000").eval()
    before = tokenizer.encode("the president of the", add_special_tokens=False)
    after = tokenizer.encode("states", add_special_tokens=False)
    blank, length = len(before), len(before) + 1 + len(after)
    input_ids = torch.tensor([before + [0] + after])  # nobody sees the blank: any id will do
    perm_mask = torch.zeros(1, length, length)
    perm_mask[:, :, blank] = 1  # 1 = must not see
    target_mapping = torch.zeros(1, 1, length)
    target_mapping[0, 0, blank] = 1
    with torch.no_grad():
        logits = model(input_ids, perm_mask=perm_mask, target_mapping=target_mapping).logits
    log_p = logits[0, 0].log_softmax(dim=0)
    print(tokenizer.convert_ids_to_tokens(log_p.topk(5).indices), log_p.topk(5).values.exp())
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_utils import ranks_to_mask
from support import UserError, checkpoint, corpus, flags, mistakes_in_one_line
from support.corpus import Tokenizer, Vocabulary
from xlnet import XLNet

BLANK = re.compile("_{3,}")
BEAM = 32  # partial fillings that the search keeps
MOST_PIECES = 2048  # in TEXT: time and memory grow with the square


class Filling(NamedTuple):
    """One way to fill a blank."""

    pieces: list[str]
    log_p: float  # joint log-probability of the pieces, given their number, in nats


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, and print the fillings or the score that they ask for."""
    if hasattr(sys.stdout, "reconfigure"):  # a piece may hold characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    with mistakes_in_one_line("fill_blank.py"):
        args = parse(argv)
        check_text(args.text, args.score)
        model, tokenizer, vocab = load(args.model)
        check_special_pieces(args.text, tokenizer)
        parts = split_at_blanks(args.text, tokenizer)
        n_pieces = sum(map(len, parts))
        if n_pieces > MOST_PIECES:
            raise UserError(
                f"TEXT has {n_pieces} pieces; give at most {MOST_PIECES}, and the text before them as --context"
            )
        mems = None
        if args.context is not None:
            mems = read_context(model, load_context(args.context, model, tokenizer, vocab))

    if args.score:
        show_scores(score(model, parts[0], mems, args.orders, args.seed), len(parts[0]))
    else:
        show_fillings(model, tokenizer, vocab, parts, mems, args.pieces, args.top)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=flags.not_empty,
        help="folder of a checkpoint, run or XLNet, or a name at the hub",
    )
    parser.add_argument("text", metavar="TEXT", help="a sentence; ___ is a blank")
    parser.add_argument(
        "--pieces",
        type=flags.number(int, 1, 16),
        default=1,
        metavar="N",
        help="fill a blank with 1 to N pieces, each number on its own; a beam search keeps the 32 likeliest beginnings "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--top",
        type=flags.number(int, 1, 1000),
        default=5,
        metavar="N",
        help="show the N likeliest fillings of each length (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=flags.not_empty,
        metavar="FILE",
        help="UTF-8 text that stands before TEXT, as for --data of main.py; the model reads as much of its end as can "
        "reach TEXT through memory",
    )
    parser.add_argument("--score", action="store_true", help="print the log-probability of TEXT, which has no blank")
    parser.add_argument(
        "--orders",
        type=flags.number(int, 1, 10**6),
        default=16,
        metavar="N",
        help="random orders of a score (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=flags.number(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of these orders (default: %(default)s)",
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------- from the command line to tensors


def check_text(text: str, is_score: bool) -> None:
    """Raise UserError if a text is empty, is not UTF-8, lacks a blank, or has a blank although it is to be scored."""
    if not text.strip():
        raise UserError(f"TEXT {text!r} is empty; give a sentence")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python turns other bytes of a command line into surrogates
        raise UserError(f"TEXT {ascii(text)} is not UTF-8; set the terminal to UTF-8") from None
    if is_score and BLANK.search(text):
        raise UserError(f"--score: TEXT {text!r} has a blank; give the whole text, or leave --score out")
    if not is_score and not BLANK.search(text):
        raise UserError(f"TEXT {text!r} has no blank; write ___ in place of a word, or give --score")


def check_special_pieces(text: str, tokenizer: Tokenizer) -> None:
    """Raise UserError if a text contains a special piece, which would not be read as text."""
    for piece in (*tokenizer.special, "[MASK]", "<mask>"):
        if piece in tokenizer.vocab and piece in text:
            raise UserError(f"TEXT {text!r} holds the special piece {piece}; leave it out, and write ___ for a blank")


def load(name: str) -> tuple[XLNet, Tokenizer, Vocabulary]:
    """Return the model, tokenizer and vocabulary of a model folder, a run folder, or a name at the hub.

    The model reads forwards, with one row, even if it was trained with bi_data.
    """
    path = Path(checkpoint.find_model(name, "MODEL"))
    try:
        model = XLNet.from_pretrained(path, bi_data=False).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"MODEL {path}: {error}; give the folder of an XLNet") from None
    vocab_file = corpus.find_vocabulary(path)
    if vocab_file is None:
        raise UserError(
            f"MODEL {path} has no spiece.model or vocab.txt; give the checkpoint of a pretrained model, no classifier"
        )
    try:
        tokenizer = corpus.load_tokenizer(vocab_file)
        vocab = corpus.vocabulary(tokenizer)
    except ValueError as error:
        raise UserError(f"MODEL {vocab_file}: {error}") from None
    n_token = model.config["vocab_size"]
    if n_token != vocab.size:
        raise UserError(
            f"MODEL {path}: the model has {n_token} pieces and {vocab_file.name} {vocab.size}; put the right one there"
        )
    return model, tokenizer, vocab


def split_at_blanks(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids before, between and after the blanks of a text: one list more than there are blanks.

    Raises UserError if a blank covers only a part of a word, and the tokenizer cannot know how the rest continues it.
    """
    parts = BLANK.split(text)
    ids = []
    for number, part in enumerate(parts):
        touches_left = number > 0 and part[:1].strip() != ""
        touches_right = number + 1 < len(parts) and part[-1:].strip() != ""
        if tokenizer.splits_at_spaces:
            for touches, pair in ((touches_left, "a" + part[:1]), (touches_right, part[-1:] + "a")):
                if touches and is_one_word(pair, tokenizer):
                    raise UserError(
                        f"TEXT {text!r}: a blank takes a part of a word; put spaces around it, for whole words"
                    )
        pieces = tokenizer.tokenize(part)
        if touches_left and pieces and pieces[0].startswith("▁"):  # the mark means a space, but there is none
            first = pieces[0].removeprefix("▁")
            pieces[:1] = [first] if first in tokenizer.vocab else list(first)
        ids.append(tokenizer.convert_tokens_to_ids(pieces))
    return ids


def is_one_word(pair: str, tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer that splits at spaces reads two characters as one word."""
    return tokenizer.tokenize(pair) != tokenizer.tokenize(f"{pair[0]} {pair[1]}")


def load_context(path: str, model: XLNet, tokenizer: Tokenizer, vocab: Vocabulary) -> np.ndarray:
    """Return the ids of a text file, as main.py reads it.

    Raises UserError if it cannot be read, or if the model has no memory.
    """
    if model.mem_len == 0:
        raise UserError(f"--context {path}: the model has mem_len 0, no memory; put the context into TEXT")
    return corpus.load_text("context", [path], flags.default_cache_dir(), tokenizer, vocab).ids


# ---------------------------------------------------------------- the model


@torch.no_grad()
def read_context(model: XLNet, ids: np.ndarray) -> list[Tensor] | None:
    """Return the memory of a text: a list of n_layer [mlen, 1, d_model].

    The model reads chunks of reuse_len pieces, as many as it caches of a window in pretraining: a whole chunk becomes
    memory. The last chunk ends with the text. Each layer sees mem_len pieces before a chunk, so a piece more than
    n_layer * (mem_len + reuse_len) before the end has no influence; only later pieces are read. The config.json of the
    released models sets neither mem_len nor reuse_len; XLNet's defaults, 384 and 256, are those of their pretraining.

    ids: [n_tokens] int, at least one
    """
    chunk = model.reuse_len or model.mem_len  # reuse_len 0: memory takes whole windows
    reach = len(model.layer) * (model.mem_len + chunk)
    ids = torch.from_numpy(ids[-reach:].astype(np.int64))
    first = len(ids) % chunk
    mems = None
    for part in (ids[:first], *ids[first:].split(chunk)):
        if len(part) > 0:
            part = part[:, None]  # [len, 1]
            _, mems = model.hidden(part, seg_id=torch.zeros_like(part), mems=mems)
    return mems


@torch.no_grad()
def log_probabilities(
    model: XLNet, ids: Tensor, rank: np.ndarray, positions: Sequence[int], mems: list[Tensor] | None
) -> Tensor:
    """Return the log-probability of every piece at some positions, by the query stream.

    ids: [len, bsz] int; rank: [len] int, the place of each position in the order, -1 = given
    positions: the positions to predict. A position sees given pieces and lower ranks
    mems: list of n_layer [mlen, 1, d_model], or None
    -> [n_positions, bsz, n_token]
    """
    length, bsz = ids.shape
    is_target = rank >= 0
    perm_mask = torch.from_numpy(ranks_to_mask(rank, is_target))  # [len, len] 1 = must not see
    target_mapping = torch.tensor(positions)[:, None].expand(-1, bsz)
    if mems is not None:
        mems = [mem.expand(-1, bsz, -1) for mem in mems]
    logits, _ = model(
        ids,
        seg_id=torch.zeros_like(ids),
        mems=mems,
        perm_mask=perm_mask[:, :, None].expand(-1, -1, bsz),
        target_mapping=target_mapping,
        inp_q=torch.from_numpy(is_target)[:, None].expand(-1, bsz),
    )
    return logits.log_softmax(dim=-1)


def lay_out(parts: list[list[int]], blank: int, length: int, hidden_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and ranks of a text in which one blank has `length` pieces and the others have one.

    The text is given. The pieces of the blank follow from left to right; the other blanks come last, so that no piece
    sees them. "the ___ of ___ states", blank 0 with two pieces:

        ids    the  ?  ?  of  ?  states        ? = hidden_id
        rank   -1   0  1  -1  2  -1

    parts: the ids before, between and after the blanks
    -> ids, rank: [len] int64
    """
    ids, rank = list(parts[0]), [-1] * len(parts[0])
    for number, part in enumerate(parts[1:]):
        slots = list(range(length)) if number == blank else [length]
        ids += [hidden_id] * len(slots) + part
        rank += slots + [-1] * len(part)
    return np.array(ids, dtype=np.int64), np.array(rank, dtype=np.int64)


def fill(
    model: XLNet,
    parts: list[list[int]],
    blank: int,
    length: int,
    hidden_id: int,
    mems: list[Tensor] | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return the likeliest fillings of a blank with `length` pieces, by a beam search from left to right.

    width: fillings that the search keeps; if width is at least n_token ** (length - 1), none is missed
    the other arguments as in `lay_out`; mems as in `log_probabilities`
    -> log_p: [n] joint log-probabilities, the largest first, n at most width; pieces: [n, length] their ids
    """
    ids, rank = lay_out(parts, blank, length, hidden_id)
    begin = int(np.flatnonzero(rank == 0)[0])
    beam = torch.from_numpy(ids)[:, None]  # [len, 1]
    log_p = torch.zeros(1)
    for position in range(begin, begin + length):
        of_next = log_probabilities(model, beam, rank, [position], mems)[0]  # [n_beam, n_token]
        of_longer = (log_p[:, None] + of_next).flatten()
        log_p, best = of_longer.topk(min(width, len(of_longer)))
        parent, piece = best // of_next.size(1), best % of_next.size(1)
        beam = beam[:, parent]
        beam[position] = piece
    return log_p, beam[begin : begin + length].t()


def fillings(
    model: XLNet,
    tokenizer: Tokenizer,
    parts: list[list[int]],
    blank: int,
    length: int,
    hidden_id: int,
    mems: list[Tensor] | None,
    top: int,
) -> list[Filling]:
    """Return the `top` likeliest fillings of a blank with `length` pieces; the other arguments as in `fill`."""
    log_p, ids = fill(model, parts, blank, length, hidden_id, mems, width=max(BEAM, top))
    return [
        Filling(tokenizer.convert_ids_to_tokens(pieces), value)
        for pieces, value in zip(ids[:top].tolist(), log_p[:top].tolist(), strict=True)
    ]


def score(model: XLNet, ids: list[int], mems: list[Tensor] | None, n_orders: int, seed: int) -> np.ndarray:
    """Return the log-probability of a text in each of n_orders random factorization orders, in nats: [n_orders].

    ids: of the text; mems as in `log_probabilities`
    Source: the paper, section 2.2, equation (3).
    """
    rng = np.random.default_rng(seed)
    return np.array([score_by_order(model, ids, rng.permutation(len(ids)), mems) for _ in range(n_orders)])


def score_by_order(model: XLNet, ids: list[int], rank: np.ndarray, mems: list[Tensor] | None) -> float:
    """Return the log-probability of a text in one order, in nats; rank: [len], the place of each piece in the order."""
    text = torch.tensor(ids)[:, None]  # [len, 1]
    log_p = log_probabilities(model, text, rank, range(len(ids)), mems)  # [len, 1, n_token]
    return log_p.gather(2, text[:, :, None]).sum(dtype=torch.float64).item()


# ---------------------------------------------------------------- output


def show_fillings(
    model: XLNet,
    tokenizer: Tokenizer,
    vocab: Vocabulary,
    parts: list[list[int]],
    mems: list[Tensor] | None,
    most_pieces: int,
    top: int,
) -> None:
    """Print the likeliest fillings of each blank, for each length up to most_pieces."""
    print("blank  length  probability  nats/piece  filling")
    for blank in range(len(parts) - 1):
        for length in range(1, most_pieces + 1):
            for filling in fillings(model, tokenizer, parts, blank, length, vocab.unk_id, mems, top):
                probability, cost = np.exp(filling.log_p), -filling.log_p / length
                pieces = " ".join(filling.pieces)
                text = join_pieces(filling.pieces, tokenizer) or "a space"
                shown = text if text == pieces else f"{text}  ({pieces})"
                print(f"{blank + 1:5}  {length:6}  {probability:11.4f}  {cost:10.2f}  {shown}")


def join_pieces(pieces: list[str], tokenizer: Tokenizer) -> str:
    """Return the text of pieces: un ##able -> unable; ▁new ▁y ork -> new york."""
    if tokenizer.splits_at_spaces:
        return " ".join(pieces).replace(" ##", "").removeprefix("##")
    return "".join(pieces).replace("▁", " ").strip()


def show_scores(scores: np.ndarray, n_pieces: int) -> None:
    """Print the mean log-probability over orders, in total and per piece, and its spread."""
    mean, spread = scores.mean(), scores.std()
    print(f"log-probability {mean:.4f} nats, {mean / n_pieces:.4f} per piece")
    print(f"{n_pieces} pieces; mean of {len(scores)} random orders, standard deviation {spread:.4f}")


if __name__ == "__main__":
    main()
