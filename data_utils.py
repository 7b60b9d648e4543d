"""The way of the data: text -> ids and sentence boundaries -> windows with masked spans -> permutations.

    read_text      files           -> ids of one long stream, and the places where a sentence begins, from a cache
    batchify       stream          -> rows in groups of batch_size that take turns, half of them backwards with bi_data
    create_data    row             -> a feature for each window: input, is_masked, seg_id
    permute        feature         -> what the model takes: a fresh factorization order as ranks, and the targets
    create_batch   rows, window    -> the same of all rows, stacked; make_permute gives the order as a mask instead

Sources: the paper, arXiv:1906.08237, sections 2.2, 2.5 and 3.1, and zihangdai/xlnet, data_utils.py ("official").
The official records also have every position's next token, from which the token at the position itself is made again,
and whether B follows A, which no loss reads; neither exists here. All randomness is drawn from the numpy Generator
passed in.
"""

import argparse
import bisect
import contextlib
import functools
import hashlib
import json
import os
import shutil
import string
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional

import joblib
import numpy as np
import torch
from filelock import FileLock
from pytorch_pretrained_bert import BertTokenizer
from tqdm import tqdm

VOCAB_DIR = Path(__file__).resolve().parent / "vocab"
TOKENIZERS = {  # the large models were published with the vocabulary of the base models
    "bert-base-uncased": "bert-base-uncased.txt",
    "bert-large-uncased": "bert-base-uncased.txt",
    "bert-base-cased": "bert-base-cased.txt",
    "bert-large-cased": "bert-base-cased.txt",
}
MAX_GRAM = 5  # longest span, in word pieces
CHUNK = 2**20  # characters of text that are tokenized together
WORDS = 2**16  # whose ids are remembered while a text is tokenized


class Vocabulary(NamedTuple):
    """What the pipeline needs to know of a tokenizer."""

    size: int  # one more than the largest id
    sep_id: int
    cls_id: int
    pad_id: Optional[int]  # None: the vocabulary has no such piece
    eod_id: Optional[int]  # ends a document; None: it has no such piece
    unk_id: int  # stands for what is in no piece
    bos_id: int  # what transformers is told of the beginning and the end of a sequence
    eos_id: int
    word_start: np.ndarray  # [size] bool, by id: the piece begins a word
    digest: str  # sha256 of the pieces and of the treatment of text


class Text(NamedTuple):
    """A tokenized text in the cache: arrays mapped from the disk, of which memory holds what is looked at."""

    ids: np.ndarray  # [n_tokens] uint16, or int32 where the vocabulary needs it
    cuts: np.ndarray  # [n_sentences - 1] int64, ascending: where every sentence but the first begins
    counts: np.ndarray  # [size of the vocabulary] int64: how often each id occurs
    digest: str  # of the content of its files and of the vocabulary


class Row(NamedTuple):
    """A contiguous part of a text, read in one direction: views of its arrays."""

    ids: np.ndarray  # [row_len] int
    cuts: np.ndarray  # [n_cuts] int64, in the row's direction: where a sentence begins, counted as in the text
    backward: bool
    origin: int = 0  # where the row begins, counted so

    def cut(self, i):
        """Return the position in the row at which a sentence begins; 0 < cut(0) < cut(1) < ... < row_len."""
        return abs(int(self.cuts[i]) - self.origin)

    def find_cut(self, position):
        """Return the index of the first cut at a position or after it, len(cuts) if there is none."""
        return bisect.bisect_left(range(len(self.cuts)), position, key=self.cut)


class SentencePiece:
    """A SentencePiece model and the official treatment of text, with the methods of BertTokenizer that are used here.

    A tokenizer_config.json beside the model, as transformers writes it, may set do_lower_case and keep_accents.

    Source: official prepro_utils.preprocess_text and encode_pieces.
    """

    def __init__(self, path):
        import sentencepiece  # only who has such a model needs the package

        self.vocab_file = path
        self.config = {"tokenizer_class": "XLNetTokenizer", "do_lower_case": False, "keep_accents": False}
        beside = path.with_name("tokenizer_config.json")
        if beside.is_file():
            given = json.loads(beside.read_text(encoding="utf-8"))
            self.config |= {name: given[name] for name in ("do_lower_case", "keep_accents") if name in given}
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab = {self.processor.id_to_piece(i): i for i in range(self.processor.get_piece_size())}

    def tokenize(self, text):
        """Return the pieces of a text; a comma after digits is a piece of its own."""
        text = " ".join(text.split()).replace("``", '"').replace("''", '"')
        if not self.config["keep_accents"]:
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        if self.config["do_lower_case"]:
            text = text.lower()
        pieces = []
        for piece in self.processor.encode(text, out_type=str):
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                number = self.processor.encode(piece[:-1].replace("▁", ""), out_type=str)
                if piece[0] != "▁":  # it goes on a word: take off the mark that encoding it alone gave it
                    number = [number[0].removeprefix("▁"), *number[1:]]
                pieces += [part for part in number if part] + [","]
            else:
                pieces.append(piece)
        return pieces

    def convert_tokens_to_ids(self, pieces):
        return [self.processor.piece_to_id(piece) for piece in pieces]


def load_tokenizer(name_or_path):
    """Return the tokenizer of a known name, a vocab.txt, a SentencePiece .model, or a directory that holds one.

    A WordPiece vocabulary with a capital letter in any piece is a cased one, and its text keeps its case.

    Raises ValueError if it is none of these, or not a vocabulary.
    """
    path = VOCAB_DIR / TOKENIZERS[name_or_path] if name_or_path in TOKENIZERS else Path(name_or_path)
    if path.is_dir():
        path = next((path / name for name in ("spiece.model", "vocab.txt") if (path / name).is_file()), path)
    if not path.is_file():
        raise ValueError(f"no known tokenizer and no vocabulary; give {', '.join(TOKENIZERS)}, a vocab.txt, a "
                         f"SentencePiece .model, or a directory with one")
    if path.suffix == ".model":
        try:
            return SentencePiece(path)
        except ImportError:
            raise ValueError("needs a package that is not here; pip install sentencepiece") from None
        except RuntimeError:
            raise ValueError("not a SentencePiece model; give the .model file that its training wrote") from None
    try:
        pieces = path.read_text(encoding="utf-8").split()
        cased = any(piece != piece.lower() for piece in pieces if piece[0] not in "[<")  # [SEP] and its kin aside
        tokenizer = BertTokenizer(str(path), do_lower_case=not cased)
        tokenizer.vocab_file, tokenizer.config = path, {"tokenizer_class": "BertTokenizer", "do_lower_case": not cased}
        return tokenizer
    except UnicodeDecodeError:
        raise ValueError("not a vocabulary; give a UTF-8 text file with one word piece a line") from None


def save_tokenizer(tokenizer, directory):
    """Write the vocabulary and tokenizer_config.json, from which transformers' AutoTokenizer gives the same ids."""
    name = "spiece.model" if isinstance(tokenizer, SentencePiece) else "vocab.txt"
    shutil.copyfile(tokenizer.vocab_file, Path(directory) / name)
    config = json.dumps(tokenizer.config, indent=2) + "\n"
    (Path(directory) / "tokenizer_config.json").write_text(config, encoding="utf-8")


def is_start_piece(piece):
    """Return whether a SentencePiece piece begins a word.

    Source: official _is_start_piece, whose list of marks lacks ', = and >.
    """
    return piece.startswith(("▁", "<")) or (len(piece) == 1 and piece in string.punctuation)


def vocabulary(tokenizer):
    """Return the Vocabulary of a tokenizer.

    Raises ValueError if it lacks a separator, a class mark or a piece for unknown words.
    """
    ids, sentence_piece = tokenizer.vocab, isinstance(tokenizer, SentencePiece)
    sep, cls, unk, pad, bos, eos = "[SEP]", "[CLS]", "[UNK]", "[PAD]", "[CLS]", "[SEP]"
    if sentence_piece:
        sep, cls, unk, pad, bos, eos = "<sep>", "<cls>", "<unk>", "<pad>", "<s>", "</s>"
    if missing := [piece for piece in (sep, cls, unk) if piece not in ids]:
        remedy = "train it with them, see the README" if sentence_piece else "add it as a line"
        raise ValueError(f"the vocabulary has no {' and no '.join(missing)}; {remedy}")
    size = max(ids.values()) + 1
    word_start = np.zeros(size, dtype=bool)
    for piece, i in ids.items():
        word_start[i] = is_start_piece(piece) if sentence_piece else not piece.startswith("##")
    content = json.dumps(tokenizer.config) + sha256(tokenizer.vocab_file)
    return Vocabulary(
        size, sep_id=ids[sep], cls_id=ids[cls], pad_id=ids.get(pad), eod_id=ids.get("<eod>"), unk_id=ids[unk],
        bos_id=ids.get(bos, ids[cls]), eos_id=ids.get(eos, ids[sep]), word_start=word_start,
        digest=hashlib.sha256(content.encode()).hexdigest())


def read_text(paths, tokenizer, vocab, cache_dir):
    """Return the Text of UTF-8 files, one sentence a line: from the cache, if it has been tokenized before.

    A blank line ends a document, and so does the end of a file before another: it leaves vocab.eod_id as a sentence of
    its own, or nothing if that is None. A folder of cache_dir is named by content, of files and vocabulary; it is
    complete before it has its name, and while one process makes it, others that want it wait.

    Raises OSError if a file cannot be read or cache_dir not be written, ValueError if a file is not UTF-8 or holds no
    token.
    """
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(sha256, paths))
    folder = Path(cache_dir) / hashlib.sha256("\n".join([vocab.digest, *contents]).encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (text := open_text(folder)) is None:
            temporary = folder.with_suffix(".tmp")
            for leftover in (temporary, folder):  # of a process that was killed; damaged
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir()
            try:
                tokenize(paths, tokenizer, vocab, temporary)
            except BaseException:  # Ctrl-C too
                shutil.rmtree(temporary)
                raise
            temporary.rename(folder)
            text = open_text(folder)
    return text


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_text(folder):
    """Return the Text that `tokenize` wrote into a folder, or None if it is not there as it was written."""
    try:
        about = json.loads((folder / "about.json").read_text())
        ids = np.memmap(folder / "ids", about["dtype"], mode="r")
        begins = np.memmap(folder / "begins", np.int64, mode="r")
        if len(ids) != sum(about["counts"]) or len(begins) != about["sentences"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return Text(np.asarray(ids), np.asarray(begins[1:]), np.array(about["counts"]), folder.name)


def tokenize(paths, tokenizer, vocab, folder):
    """Tokenize files, on all cores, into a folder: ids, begins (of sentences, int64) and about.json."""
    dtype = np.dtype(np.uint16 if vocab.size <= 2**16 else np.int32)
    size = sum(map(os.path.getsize, paths))
    progress = tqdm(desc="tokenizing", total=size, unit="B", unit_scale=True, delay=1, leave=False, disable=None)
    parallel = joblib.Parallel(min(joblib.cpu_count(), 1 + size // CHUNK), return_as="generator", idle_worker_timeout=5)
    encoded = parallel(joblib.delayed(encode_chunk)(chunk, goes_on, tokenizer.vocab_file, vocab.digest, vocab.eod_id)
                       for chunk, goes_on in read_chunks(paths, progress))
    counts, sentences = np.zeros(vocab.size, dtype=np.int64), 0
    with (open(folder / "ids", "wb") as ids_file, open(folder / "begins", "wb") as begins_file, progress,
          contextlib.closing(encoded)):
        for ids, begins in encoded:
            ids_file.write(ids.astype(dtype))
            begins_file.write(begins + counts.sum())
            counts += np.bincount(ids, minlength=vocab.size)
            sentences += len(begins)
        for file in (ids_file, begins_file):
            file.flush()
            os.fsync(file.fileno())
    about = {"dtype": dtype.name, "sentences": sentences, "counts": counts.tolist()}
    (folder / "about.json").write_text(json.dumps(about))


def read_chunks(paths, progress):
    """Yield the text of files in chunks, and whether the first line of a chunk goes on one begun before it.

    A chunk is about CHUNK characters long: whole lines, or of a longer line as many words as fit. Between files it has
    a blank line. progress: a bar that counts bytes

    Raises ValueError if a file is not UTF-8, or has no letter, digit or punctuation mark.
    """
    for i, path in enumerate(paths):
        rest, more, goes_on, has_text = "\n" * (i > 0), True, False, False
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            while more:
                try:
                    more = file.read(CHUNK)
                except UnicodeDecodeError as error:
                    with open(path, "rb") as lines:
                        broken = (n for n, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line)
                        raise ValueError(f"{path}, line {next(broken)} is not UTF-8 ({error.reason}); "
                                         f"convert it to UTF-8") from None
                text = rest + more
                first = len(text) - len(text.lstrip())
                end = (text.rfind("\n") + 1 or text.rfind(" ", first) + 1) if more else len(text)
                chunk, rest = text[:end], text[end:]
                if chunk:
                    yield chunk, goes_on
                    goes_on = not chunk.endswith("\n")
                    has_text = has_text or any(c.isalnum() or c in string.punctuation for c in chunk)
                progress.update(len(more.encode()))
        if not has_text:
            raise ValueError(f"{path} holds no text; give one with a sentence on each line")


@functools.lru_cache(maxsize=1)
def encoder(vocab_file, digest):
    """Return the function from a line to its ids; `digest` tells another vocabulary in the same file.

    BERT's tokenizer is slow, and none of its pieces crosses a space: it is given words, and the frequent ones once.
    """
    tokenizer = load_tokenizer(vocab_file)

    def encode(text):
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))

    if isinstance(tokenizer, SentencePiece):
        return encode
    encode_word = functools.lru_cache(maxsize=WORDS)(encode)
    return lambda line: [i for word in line.split(" ") for i in encode_word(word)]


def encode_chunk(chunk, goes_on, vocab_file, digest, eod_id):
    """Return the ids of a chunk, [n] int32, and at which of them a sentence begins, [n_begins] int64."""
    encode, ids, begins = encoder(vocab_file, digest), [], []
    for line in chunk.removesuffix("\n").split("\n"):
        line = line.strip()
        sentence = encode(line) if line else [] if goes_on or eod_id is None else [eod_id]
        if sentence and not goes_on:
            begins.append(len(ids))
        ids.extend(sentence)
        goes_on = False
    return np.array(ids, dtype=np.int32), np.array(begins, dtype=np.int64)


def batchify(ids, cuts, n_rows, batch_size, bi_data):
    """Cut the stream into n_rows rows of equal length, in groups of batch_size that are visited in turn.

    With bi_data half of a group are forward rows, the other half the same ones backwards.

    -> list of n_rows / batch_size lists of batch_size Rows; a remainder of the text shorter than the number of rows is
    dropped
    Source: official batchify and create_tfrecords, where n_rows is batch_size.
    """
    n_rows, batch_size = (n_rows // 2, batch_size // 2) if bi_data else (n_rows, batch_size)  # forward ones
    row_len = len(ids) // n_rows
    rows = []
    for begin in (b * row_len for b in range(n_rows)):
        inside = slice(*np.searchsorted(cuts, (begin + 1, begin + row_len)))
        rows.append(Row(ids[begin : begin + row_len], cuts[inside], backward=False, origin=begin))
    groups = [rows[b : b + batch_size] for b in range(0, n_rows, batch_size)]
    if bi_data:
        groups = [group + [Row(row.ids[::-1], row.cuts[::-1], True, row.origin + row_len) for row in group]
                  for group in groups]
    return groups


def n_windows(row_len, seq_len, reuse_len):
    """Return how many windows fit into a row, one every reuse_len tokens; an incomplete one at the end is left out."""
    return max(0, (row_len - seq_len) // reuse_len + 1)


def split_a_and_b(row, begin_idx, tot_len, rng):
    """Cut two segments: A from begin_idx up to a sentence's end, B what follows it or text from anywhere.

    Half of the time B follows A; never, if no sentence ends within tot_len tokens. Whole sentences are taken, then
    the longer segment loses its last token until the two are tot_len tokens long together.

    -> ids of A and of B, together tot_len long; B is empty if tot_len is 1
    Source: the paper, section 2.5; official _split_a_and_b.
    """
    ids, n_cuts = row.ids, len(row.cuts)
    last = row.find_cut(begin_idx + tot_len)
    # sentences that begin after begin_idx and less than tot_len tokens away
    cut_points = [row.cut(i) for i in range(row.find_cut(begin_idx + 1), last)]
    end_idx = row.cut(last) if last < n_cuts else len(ids)

    a_end = rng.choice(cut_points) if cut_points else end_idx
    if cut_points and rng.random() < 0.5:
        b_begin, b_end = a_end, end_idx
    else:
        b_len = max(1, tot_len - (a_end - begin_idx))
        b_begin = rng.integers(len(ids) - b_len + 1)
        b_end = b_begin + b_len
        # widen to whole sentences
        before, after = row.find_cut(b_begin + 1), row.find_cut(b_end)
        b_begin = row.cut(before - 1) if before > 0 else 0
        b_end = row.cut(after) if after < n_cuts else len(ids)

    # A gets what B leaves, at least half (rounded up), at most what it has
    a_len = min(a_end - begin_idx, max(tot_len - (b_end - b_begin), (tot_len + 1) // 2))
    return ids[begin_idx : begin_idx + a_len], ids[b_begin : b_begin + tot_len - a_len]


def sample_mask(word_start, mask_alpha, mask_beta, goal_num_predict, rng, reverse=False):
    """Choose the tokens to predict: spans of 1 to MAX_GRAM pieces from a word's beginning on, P(L) ~ 1/L.

    A span of L pieces stands in a context of L * mask_alpha // mask_beta further ones, so that about mask_beta
    pieces in mask_alpha + mask_beta are chosen; single pieces drawn from the rest make up what is then missing.

    word_start: [seg_len] bool, in the order of the row; reverse: the row is backward, look for spans from its end
    -> [seg_len] bool, exactly goal_num_predict True
    Source: the paper, section 3.1, "we first sample a length L"; official _sample_mask, which counts the pieces of
    a span and not, as its comment says, words.
    """
    seg_len = len(word_start)
    assert goal_num_predict <= seg_len and 1 <= mask_beta <= mask_alpha
    mask = np.zeros(seg_len, dtype=bool)
    if reverse:
        word_start = word_start[::-1]
    # next_start[p]: the first word that begins at p or later, seg_len if there is none; p in [0, seg_len]
    next_start = np.where(word_start, np.arange(seg_len), seg_len)
    next_start = [*np.minimum.accumulate(next_start[::-1])[::-1].tolist(), seg_len]

    weight = 1 / np.arange(1, MAX_GRAM + 1)
    lengths = rng.choice(np.arange(1, MAX_GRAM + 1), size=goal_num_predict, p=weight / weight.sum()).tolist()
    places = rng.random(goal_num_predict).tolist()  # of a span in its context, 0 = at the left end

    num_predict = cur_len = 0
    for length, place in zip(lengths, places):
        length = min(length, goal_num_predict - num_predict)
        ctx_size = length * mask_alpha // mask_beta
        l_ctx = int(place * ctx_size)
        beg = next_start[min(cur_len + l_ctx, seg_len)]
        end = beg + length
        if length == 0 or end >= seg_len:
            break
        mask[beg:end] = True
        num_predict += length
        cur_len = end + ctx_size - l_ctx

    rest = rng.choice(np.flatnonzero(~mask), size=goal_num_predict - num_predict, replace=False)
    mask[rest] = True
    return mask[::-1] if reverse else mask


def mask_window(parts, vocab, num_predict, mask_alpha, mask_beta, rng, reverse=False):
    """Return `sample_mask` of both parts of a window, [seq_len] bool: the first has the larger half of num_predict."""
    goals = (num_predict - num_predict // 2, num_predict // 2)
    return np.concatenate([sample_mask(vocab.word_start[part], mask_alpha, mask_beta, goal, rng, reverse)
                           for part, goal in zip(parts, goals)])


def create_feature(row, window, vocab, seq_len, reuse_len, num_predict, mask_alpha, mask_beta, rng):
    """Return the feature of one window of a row.

    A window advances by reuse_len. Its first reuse_len tokens, inp, are the next stretch of the text and become
    memory; the rest is [A, SEP, B, SEP, CLS], where A goes on from inp:

        input    inp ... inp   A ... A SEP   B ... B SEP   CLS
        seg_id    0  ...  0    0 ... 0  0    1 ... 1  1     2

    -> dict of input: [seq_len] int64; seg_id: [seq_len] int64; is_masked: [seq_len] bool with exactly num_predict
    True, the larger half of them in inp
    Source: the paper, sections 2.4 and 2.5, where CLS stands first; official create_tfrecords, where it is last.
    """
    begin = window * reuse_len
    inp = row.ids[begin : begin + reuse_len]
    a, b = split_a_and_b(row, begin_idx=begin + reuse_len, tot_len=seq_len - reuse_len - 3, rng=rng)
    rest = np.concatenate([a, [vocab.sep_id], b, [vocab.sep_id, vocab.cls_id]])
    return {
        "input": np.concatenate([inp, rest]),
        "is_masked": mask_window((inp, rest), vocab, num_predict, mask_alpha, mask_beta, rng, reverse=row.backward),
        "seg_id": np.repeat([0, 1, 2], [reuse_len + len(a) + 1, len(b) + 1, 1]),
    }


def create_data(row, vocab, seq_len, reuse_len, num_predict, mask_alpha, mask_beta, rng):
    """Yield the feature of each window of a row, made when it is asked for; see `create_feature`."""
    for window in range(n_windows(len(row.ids), seq_len, reuse_len)):
        yield create_feature(row, window, vocab, seq_len, reuse_len, num_predict, mask_alpha, mask_beta, rng)


def local_perm(is_masked, functional, perm_size, rng):
    """Draw a factorization order; return each position's place in it, and which positions are to be predicted.

    One order of perm_size positions is drawn and used in every block of that length; an earlier block comes before
    a later one. What is neither masked nor SEP or CLS (functional) is given at the start: its rank is -1. SEP and CLS
    take part in the order like the targets, so that what they have gathered is seen only by those who may; nothing is
    to be predicted there. What ranks say of who sees whom: `perm_mask`.

    is_masked, functional: [part_len] bool; perm_size divides part_len
    -> rank: [part_len] int64, -1 to part_len - 1; is_target: [part_len] bool, masked and not functional
    Source: the paper, sections 2.2 and 2.3; official _local_perm.
    """
    blocks = np.arange(len(is_masked)).reshape(-1, perm_size)  # [n_block, perm_size]
    order = blocks[:, rng.permutation(perm_size)].ravel()
    return np.where(is_masked | functional, order, -1), is_masked & ~functional


def perm_mask(rank, is_target):
    """Return the attention mask that ranks mean: nobody sees what comes later, and a target not its own token.

    Four tokens, "the cat sat [SEP]", "cat" and "sat" masked, order sat (0), [SEP] (1), cat (3); "the" is given (-1):

                 the cat sat SEP        1 = the row must not see the column
            the   0   1   1   1         given: sees what is given
            cat   0   1   0   0         last: sees all but itself
            sat   0   1   1   1         first: sees what is given
            SEP   0   1   0   0         second: sees sat, and itself

    rank: [len] int; is_target: [len] bool -> [len, len] float32
    Source: the paper, section 2.3; official _local_perm. The content stream sees itself in any case.
    """
    return (rank > (rank - is_target)[:, None]).astype(np.float32)


def permute(feature, reuse_len, perm_size, num_predict, rng):
    """Turn a feature of `create_feature` into what the model takes, under a factorization order drawn for this visit.

    The first part, inp, comes before the second: it sees nothing of it, and the second sees all of the first.

    -> dict of inp_k: [seq_len] int64, the tokens, targets included: the content stream needs them;
    inp_q: [seq_len] float32, 1 = to be predicted;
    perm_mask: [seq_len] int64, ranks, which stand for the matrix; those of the second part are above all of the first;
    target_mapping: [num_predict] int64, the position of each prediction, -1 in an empty slot;
    target: [num_predict] int64, the token there, 0 in an empty slot;
    target_mask: [num_predict] float32, 1 = counts, 0 = empty slot, which a masked SEP or CLS leaves;
    seg_id: [seq_len] int64
    All are numpy arrays.
    Source: official get_dataset, parser.
    """
    inp_k, is_masked, seg_id = feature["input"], feature["is_masked"], feature["seg_id"]
    functional = np.append(seg_id[1:] != seg_id[:-1], True)  # SEP ends A, SEP ends B, CLS is a segment of its own
    parts = (slice(reuse_len), slice(reuse_len, None))
    ranks, is_target = zip(*(local_perm(is_masked[part], functional[part], perm_size, rng) for part in parts))
    is_target = np.concatenate(is_target)
    filled = np.arange(num_predict) < is_target.sum()  # empty slots are at the end
    target_mapping = np.full(num_predict, -1)
    target_mapping[filled] = np.flatnonzero(is_target)
    return {
        "inp_k": inp_k,
        "inp_q": is_target.astype(np.float32),
        "perm_mask": np.concatenate([ranks[0], reuse_len + 1 + ranks[1]]),
        "target_mapping": target_mapping,
        "target": np.where(filled, inp_k[target_mapping], 0),
        "target_mask": filled.astype(np.float32),
        "seg_id": seg_id,
    }


def make_permute(feature, reuse_len, seq_len, perm_size, num_predict, rng=None):
    """Do what `permute` does, with the order written out as the mask that it means.

    rng: numpy Generator, or a seed for a new one
    -> dict as of `permute`, of tensors, but perm_mask: [seq_len, seq_len] float32, 1 = row i must not see column j
    """
    arrays = permute(feature, reuse_len, perm_size, num_predict, np.random.default_rng(rng))
    arrays["perm_mask"] = perm_mask(arrays["perm_mask"], arrays["inp_q"])
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def create_batch(rows, window, vocab, rngs, *, seq_len, reuse_len, perm_size, num_predict, mask_alpha, mask_beta):
    """Return the batch of one window: that window of every row, stacked along a last axis, bsz.

    rngs: a numpy Generator for each row
    -> dict as of `permute`, of tensors [..., bsz]
    """
    members = []
    for row, rng in zip(rows, rngs, strict=True):
        feature = create_feature(row, window, vocab, seq_len, reuse_len, num_predict, mask_alpha, mask_beta, rng)
        members.append(permute(feature, reuse_len, perm_size, num_predict, rng))
    return {key: torch.from_numpy(np.stack([member[key] for member in members], axis=-1)) for key in members[0]}


def create_batches(rows, vocab, rngs, **sizes):
    """Yield the batches of a pass, from the first window to the last; arguments as of `create_batch`."""
    for window in range(n_windows(len(rows[0].ids), sizes["seq_len"], sizes["reuse_len"])):
        yield create_batch(rows, window, vocab, rngs, **sizes)


def show(text, tokenizer, seed):
    """Print a factorization order over a text, its targets, and who must not see whom in either stream.

    A third of the pieces is to be predicted, more than in training, so that there is something to look at.
    """
    rng, vocab = np.random.default_rng(seed), vocabulary(tokenizer)
    pieces = [*tokenizer.tokenize(text), "[SEP]"]
    ids = np.array([*tokenizer.convert_tokens_to_ids(pieces[:-1]), vocab.sep_id])
    functional = np.arange(len(ids)) == len(ids) - 1
    is_masked = sample_mask(vocab.word_start[ids], 2, 1, max(1, len(ids) // 3), rng)
    rank, is_target = local_perm(is_masked, functional, len(ids), rng)
    query = perm_mask(rank, is_target).astype(int)
    content = np.where(np.eye(len(ids)), 0, query)
    order = [i for i in np.argsort(rank) if rank[i] >= 0]
    lines = [("", "", "place", "content stream", "query stream: 1 = must not see"),
             ("", "", "", *[" ".join(str(i % 10) for i in range(len(ids)))] * 2)]
    for i, piece in enumerate(pieces):
        place = str(order.index(i) + 1) if i in order else "given"
        lines.append((str(i), piece, place, " ".join(map(str, content[i])),
                      " ".join(map(str, query[i])) if is_target[i] else ""))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"order: {', '.join(pieces[i] for i in order)}; to be predicted: {', '.join(np.array(pieces)[is_target])}\n")
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def main():
    parser = argparse.ArgumentParser(description=f"{show.__doc__.splitlines()[0]} See the README, \"How it works\".")
    parser.add_argument("--text", default="the cat sat on the mat", help="a sentence (default: %(default)s)")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="as of main.py (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the targets (default: 0)")
    options = parser.parse_args()
    try:
        show(options.text, load_tokenizer(options.tokenizer), options.seed)
    except ValueError as error:
        parser.error(f"--tokenizer {options.tokenizer}: {error}")


if __name__ == "__main__":
    main()
