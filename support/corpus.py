"""Tokenizers, vocabularies, text files -> token ids in a memory-mapped cache.

The path of a text, in reading order:

    load_tokenizer      name or path   -> a WordPiece or a SentencePiece: text -> pieces -> ids
    tokenizer_json      SentencePiece  -> the same tokenizer for transformers, in a checkpoint
    vocabulary          tokenizer      -> a Vocabulary: special ids, which pieces start a word, a digest
    load_text           a flag's files -> a Text, or a UserError
    read_text           files          -> a Text: ids and sentence starts, from the cache if they are there
        fill_cache      files          -> a new cache folder, complete or not there at all
        tokenize        files          -> the three files in it, with all cores
        read_chunks     files          -> chunks of about CHUNK characters
        encode_chunk    one chunk      -> its ids and sentence starts, in a worker process
        open_text       cache folder   -> the Text, memory-mapped
"""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import stat
import string
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, TextIO

import joblib
import numpy as np
from filelock import FileLock, Timeout
from pytorch_pretrained_bert import BertTokenizer
from tqdm import tqdm

from support import UserError, warn
from support.tokenizer_json import tokenizer_json

VOCAB_DIR = Path(__file__).resolve().parent.parent / "vocab"
TOKENIZERS = {  # the large models were published with the vocabulary of the base models
    "bert-base-uncased": "bert-base-uncased.txt",
    "bert-large-uncased": "bert-base-uncased.txt",
    "bert-base-cased": "bert-base-cased.txt",
    "bert-large-cased": "bert-base-cased.txt",
}
CHUNK = 2**20  # characters read and encoded together
WORDS = 2**16  # distinct words whose ids a worker process remembers
CACHED = ("ids", "begins", "documents")  # the arrays of a text on the disk
LONG_LINES = 10_000  # mean characters per line; a text with longer lines hardly has one sentence on each line


# ---------------------------------------------------------------- tokenizers


class SpecialPieces(NamedTuple):
    """How a kind of vocabulary spells its special pieces."""

    sep: str  # ends a segment
    cls: str  # stands for the whole window
    unk: str  # stands for text that no piece covers
    pad: str
    bos: str  # beginning and end of a sequence, in the terms of transformers
    eos: str
    eod: str = "<eod>"  # ends a document


class Tokenizer:
    """The interface of all tokenizers.

    A new kind needs these attributes and methods, a case in `load_tokenizer`, and its `saved_name` in
    `find_vocabulary` and in `hub.SMALL_FILES`. Each worker process makes its own
    tokenizer, from the vocabulary file alone.
    """

    special: SpecialPieces
    saved_name: str  # file name of the vocabulary in a checkpoint; transformers looks for it
    splits_at_spaces: bool  # no piece crosses a space: the ids of a line are the ids of its words
    cls_is_first: bool  # transformers' tokenizer puts the class mark first (BERT) or last (XLNet)
    remedy: str  # how to add a special piece that a vocabulary lacks

    vocab: dict[str, int]  # piece -> id
    vocab_file: Path
    config: dict  # content of tokenizer_config.json

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text."""
        raise NotImplementedError

    def convert_tokens_to_ids(self, pieces: Sequence[str]) -> list[int]:
        """Return the id of each piece."""
        raise NotImplementedError

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id."""
        raise NotImplementedError

    @staticmethod
    def is_word_start(piece: str) -> bool:
        """Return whether a piece starts a word."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.convert_tokens_to_ids(self.tokenize(text))

    def warn_of_surprises(self) -> None:
        """Warn if the tokenizer does something that its user may not expect."""

    def save(self, directory: str | Path) -> None:
        """Write the vocabulary and tokenizer_config.json; transformers' AutoTokenizer then gives the same ids."""
        shutil.copyfile(self.vocab_file, Path(directory) / self.saved_name)
        write_json(Path(directory) / "tokenizer_config.json", self.saved_config())

    def saved_config(self) -> dict:
        """Return the content of a checkpoint's tokenizer_config.json."""
        return self.config


class WordPiece(BertTokenizer, Tokenizer):
    """BERT's tokenizer with a vocab.txt, one piece per line; BertTokenizer defines the methods missing here.

    A vocabulary with a capital letter in any piece is cased: its text keeps its case.

    Raises ValueError if the file is not UTF-8, or begins with a byte-order mark.
    """

    special = SpecialPieces(sep="[SEP]", cls="[CLS]", unk="[UNK]", pad="[PAD]", bos="[CLS]", eos="[SEP]")
    saved_name = "vocab.txt"
    splits_at_spaces = True
    cls_is_first = True
    remedy = "add it as a line"

    def __init__(self, vocab_file: Path):
        try:
            content = vocab_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError("not a vocabulary; give a UTF-8 text file with one word piece a line") from None
        if content.startswith("\ufeff"):  # it would be a part of the first piece
            raise ValueError(f"{vocab_file} begins with a byte-order mark; save it as UTF-8 without one")
        pieces = content.split()
        ordinary = (piece for piece in pieces if piece[0] not in "[<")  # [SEP] and the like do not show case
        cased = any(piece != piece.lower() for piece in ordinary)
        super().__init__(str(vocab_file), do_lower_case=not cased)
        self.vocab_file = vocab_file
        self.config = {"tokenizer_class": "BertTokenizer", "do_lower_case": not cased}

    def saved_config(self) -> dict:
        """Return the content of a checkpoint's tokenizer_config.json.

        transformers gives a missing [PAD] or [MASK] an id that the model lacks, unless the config sets it to null.
        """
        tokens = {"pad_token": "[PAD]", "mask_token": "[MASK]"}
        return self.config | {name: None for name, piece in tokens.items() if piece not in self.vocab}

    @staticmethod
    def is_word_start(piece: str) -> bool:
        """Return whether a piece starts a word: it lacks the mark `##`."""
        return not piece.startswith("##")


class SentencePiece(Tokenizer):
    """A SentencePiece model, with the official treatment of text.

    A tokenizer_config.json beside the model, as transformers writes it, may set do_lower_case and keep_accents.

    Raises ValueError if the package is missing or the file is not such a model.
    Source: official prepro_utils.py, preprocess_text and encode_pieces.
    """

    special = SpecialPieces(sep="<sep>", cls="<cls>", unk="<unk>", pad="<pad>", bos="<s>", eos="</s>")
    saved_name = "spiece.model"
    splits_at_spaces = False
    cls_is_first = False
    remedy = "make one with examples/make_vocabulary.py"
    fast_class = "PreTrainedTokenizerFast"  # transformers' class that follows tokenizer.json

    def __init__(self, vocab_file: Path):
        try:
            import sentencepiece  # only these models need the package

            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        except ImportError:
            raise ValueError("needs a package that is not here; pip install sentencepiece") from None
        except RuntimeError:
            raise ValueError("not a SentencePiece model; give the .model file that its training wrote") from None
        self.vocab = {self.processor.id_to_piece(i): i for i in range(self.processor.get_piece_size())}
        self.vocab_file = vocab_file
        self.config = {"tokenizer_class": "XLNetTokenizer", "do_lower_case": False, "keep_accents": False}
        config_file = vocab_file.with_name("tokenizer_config.json")
        given = read_json_object(config_file) if config_file.is_file() else {}
        self.config |= {name: given[name] for name in ("do_lower_case", "keep_accents") if name in given}
        self.given_config = given  # the content of the file beside the model

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text; a comma after digits is a piece of its own."""
        pieces = []
        for piece in self.processor.encode(self.normalize(text), out_type=str):
            pieces += self.split_off_comma(piece)
        return pieces

    def normalize(self, text: str) -> str:
        """Return a text with plain spaces and quotes, and without accents or capitals unless the config keeps them."""
        text = " ".join(text.split()).replace("``", '"').replace("''", '"')
        if not self.config["keep_accents"]:
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        return text.lower() if self.config["do_lower_case"] else text

    def split_off_comma(self, piece: str) -> list[str]:
        """Split a piece such as `19,` into the pieces of its number and a comma; return any other piece unchanged."""
        ends_number = len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
        if not ends_number:
            return [piece]
        number = self.processor.encode(piece[:-1].replace("▁", ""), out_type=str)
        if not piece.startswith("▁"):  # inside a word: drop the word mark that encoding the number alone adds
            number[0] = number[0].removeprefix("▁")
        return [part for part in number if part] + [","]

    def save(self, directory: str | Path) -> None:
        """Write the model, tokenizer_config.json, and the tokenizer.json that transformers' AutoTokenizer reads.

        A released tokenizer.json beside the model is copied and keeps its tokenizer class.
        """
        super().save(directory)
        if self.released_tokenizer_json is not None:
            shutil.copyfile(self.released_tokenizer_json, Path(directory) / "tokenizer.json")
        elif self.tokenizer_json is not None:
            write_json(Path(directory) / "tokenizer.json", self.tokenizer_json)

    def saved_config(self) -> dict:
        """Return the content of a checkpoint's tokenizer_config.json.

        transformers' class for XLNet ignores keep_accents and splits a text at more pieces than the special ones.
        The config therefore names this class only where there is no tokenizer.json of ours.
        """
        if self.released_tokenizer_json is not None:
            return self.config | self.given_config
        if self.tokenizer_json is None:
            return self.config
        names = ["bos", "eos", "unk", "sep", "cls", "pad"]
        tokens = {f"{name}_token": getattr(self.special, name) for name in names} | {"mask_token": "<mask>"}
        known = {name: piece for name, piece in tokens.items() if piece in self.vocab}
        how = {
            "tokenizer_class": self.fast_class,
            "padding_side": "left",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        }
        return self.config | how | known

    @property
    def released_tokenizer_json(self) -> Path | None:
        """The tokenizer.json that others wrote for the model, or None.

        A tokenizer.json of ours is written again, because its tokenizer_config.json may have been edited since.
        """
        path = self.vocab_file.with_name("tokenizer.json")
        is_of_this_model = self.vocab_file.name == self.saved_name
        is_ours = self.given_config.get("tokenizer_class") == self.fast_class
        return path if path.is_file() and is_of_this_model and not is_ours else None

    @functools.cached_property
    def tokenizer_json(self) -> dict | None:
        """The content of tokenizer.json, or None if it cannot express the model."""
        return tokenizer_json(self.vocab_file.read_bytes(), self.config, self.special.sep, self.special.cls)

    def warn_of_surprises(self) -> None:
        """Warn of pieces with accents if keep_accents is not set, and of a model that tokenizer.json cannot express."""
        if self.tokenizer_json is None:
            warn(
                f"--tokenizer {self.vocab_file} is no unigram model with the usual spaces; transformers' AutoTokenizer "
                f"may give other ids than training"
            )
        if "keep_accents" in self.given_config:
            return
        lost = [piece for piece in self.vocab if any(map(unicodedata.combining, unicodedata.normalize("NFKD", piece)))]
        if lost:
            warn(
                f"--tokenizer {self.vocab_file}: {len(lost):,} of its {len(self.vocab):,} pieces, such as {lost[0]}, "
                f'have accents, which are stripped from the text; write {{"keep_accents": true}}, or false, into a '
                f"tokenizer_config.json beside it"
            )

    def convert_tokens_to_ids(self, pieces: Sequence[str]) -> list[int]:
        """Return the id of each piece."""
        return [self.processor.piece_to_id(piece) for piece in pieces]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id."""
        return [self.processor.id_to_piece(int(i)) for i in ids]

    @staticmethod
    def is_word_start(piece: str) -> bool:
        """Return whether a piece starts a word: the mark `▁`, a special piece, or one ASCII punctuation mark.

        Source: official _is_start_piece, whose list of punctuation marks lacks ', = and >.
        """
        return piece.startswith(("▁", "<")) or (len(piece) == 1 and piece in string.punctuation)


# ---------------------------------------------------------------- finding a vocabulary


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Return the tokenizer of a known name, a vocab.txt, a SentencePiece .model, or a directory that holds either.

    Raises ValueError if the argument is none of these, or the file is not a vocabulary.
    """
    path = VOCAB_DIR / TOKENIZERS[name_or_path] if name_or_path in TOKENIZERS else Path(name_or_path)
    if path.is_dir():
        path = find_vocabulary(path) or path
    if not path.is_file():
        raise ValueError(
            f"no known tokenizer and no vocabulary; give {', '.join(TOKENIZERS)}, a vocab.txt, a SentencePiece .model, "
            f"or a directory with one"
        )
    return SentencePiece(path) if path.suffix == ".model" else WordPiece(path)


def find_vocabulary(directory: Path) -> Path | None:
    """Return the vocabulary file in a directory, or None."""
    for name in (SentencePiece.saved_name, WordPiece.saved_name):
        if (directory / name).is_file():
            return directory / name
    return None


class Vocabulary(NamedTuple):
    """The facts about a tokenizer that the data pipeline and a checkpoint need."""

    size: int  # one more than the largest id
    sep_id: int
    cls_id: int
    pad_id: int | None  # None: the vocabulary has no such piece
    eod_id: int | None  # ends a document; None: the vocabulary has no such piece
    unk_id: int
    bos_id: int  # beginning and end of a sequence, in the terms of transformers
    eos_id: int
    word_start: np.ndarray  # [size] bool, by id: the piece starts a word
    digest: str  # sha256 of the pieces and of the treatment of text
    cls_is_first: bool = False  # transformers' tokenizer puts the class mark first (BERT) or last (XLNet)

    def hugging_face_config(self) -> dict[str, str | int | None]:
        """Return the entries of config.json about special pieces.

        summary_type says where fine-tuning finds the class mark.
        """
        return {
            "summary_type": "first" if self.cls_is_first else "last",
            "pad_token_id": self.pad_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
        }


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the Vocabulary of a tokenizer; warn of behavior that its user may not expect.

    Raises ValueError if it lacks a separator, a class mark or a piece for unknown text.
    """
    ids, special = tokenizer.vocab, tokenizer.special
    missing = [piece for piece in (special.sep, special.cls, special.unk) if piece not in ids]
    if len(missing) == 3:
        raise ValueError(
            f"{tokenizer.vocab_file} is no vocabulary: it has no {', no '.join(missing)}; give a vocab.txt or a "
            f"SentencePiece .model (a text is given with --data)"
        )
    if missing:
        raise ValueError(f"the vocabulary has no {' and no '.join(missing)}; {tokenizer.remedy}")
    size = max(ids.values()) + 1
    word_start = np.zeros(size, dtype=bool)
    for piece, i in ids.items():
        word_start[i] = tokenizer.is_word_start(piece)
    tokenizer.warn_of_surprises()
    return Vocabulary(
        size=size,
        sep_id=ids[special.sep],
        cls_id=ids[special.cls],
        pad_id=ids.get(special.pad),
        eod_id=ids.get(special.eod),
        unk_id=ids[special.unk],
        bos_id=ids.get(special.bos, ids[special.cls]),
        eos_id=ids.get(special.eos, ids[special.sep]),
        word_start=word_start,
        digest=digest_of(tokenizer),
        cls_is_first=tokenizer.cls_is_first,
    )


def digest_of(tokenizer: Tokenizer) -> str:
    """Return the sha256 of the pieces of a tokenizer and of its treatment of text."""
    content = json.dumps(tokenizer.config) + sha256(tokenizer.vocab_file)
    return hashlib.sha256(content.encode()).hexdigest()


# ---------------------------------------------------------------- texts and their cache


class Text(NamedTuple):
    """A tokenized text: memory-mapped arrays from the cache."""

    ids: np.ndarray  # [n_tokens] uint16, or int32 if the vocabulary needs it
    cuts: np.ndarray  # [n_sentences - 1] int64, ascending: where every sentence but the first begins
    documents: np.ndarray  # [n_documents - 1] int64, ascending: where every document but the first begins
    counts: np.ndarray  # [size of the vocabulary] int64: how often each id occurs
    digest: str  # of the content of its files and of the vocabulary; for a part of a text, also of its place


def split_off_end(text: Text, share: float) -> tuple[Text, Text]:
    """Split a text at a document boundary; the second part is as near to the given share of its tokens as possible.

    Raises ValueError if the text is one document.
    """
    if len(text.documents) == 0:
        raise ValueError("is one document, of which no part can be held out; put blank lines between its documents")
    nearest = np.abs(text.documents - (1 - share) * len(text.ids)).argmin()
    place = int(text.documents[nearest])
    end = Text(
        ids=text.ids[place:],
        cuts=text.cuts[np.searchsorted(text.cuts, place, side="right") :] - place,
        documents=text.documents[nearest + 1 :] - place,
        counts=np.bincount(text.ids[place:], minlength=len(text.counts)),
        digest=f"{text.digest}, from token {place}",
    )
    begin = Text(
        ids=text.ids[:place],
        cuts=text.cuts[: np.searchsorted(text.cuts, place)],
        documents=text.documents[:nearest],
        counts=text.counts - end.counts,
        digest=f"{text.digest}, to token {place}",
    )
    return begin, end


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the loss, in nats per token, of predicting each token from the token frequencies alone."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def load_text(flag: str, paths: list[str], cache_dir: str, tokenizer: Tokenizer, vocab: Vocabulary) -> Text:
    """Return the Text of the files that a flag names; do without a cache if cache_dir cannot be written.

    Raises UserError if the text cannot be read, tokenized or stored.
    """
    try:
        try:
            return read_text(paths, tokenizer, vocab, cache_dir)
        except OSError as error:
            if error.filename in paths:
                raise
            warn(f"--cache_dir {cache_dir}: {error.strerror}; the text will be tokenized at every start")
            # a mapped file outlives its name; on Windows it cannot be deleted
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                return read_text(paths, tokenizer, vocab, folder)
    except OSError as error:
        if error.filename in paths:
            raise UserError(f"--{flag} {error.filename}: {error.strerror}; give a text file") from None
        raise UserError(f"--cache_dir {cache_dir}: {error}; give a folder with more space") from None
    except ValueError as error:
        raise UserError(f"--{flag} {error}") from None


def read_text(paths: Sequence[str | Path], tokenizer: Tokenizer, vocab: Vocabulary, cache_dir: str | Path) -> Text:
    """Return the Text of UTF-8 files, one sentence per line; tokenize it only if the cache lacks it.

    A blank line ends a document; so does the end of each file but the last. The end of a document becomes vocab.eod_id,
    as a sentence of its own, or nothing if vocab.eod_id is None.

    The cache has a folder for each text, named by a hash of the content of its files and of the vocabulary. A folder
    gets this name when it is complete, and the hash is that of the bytes that were tokenized. While one process writes
    a folder, others that need it wait.

    Raises OSError if a file cannot be read or cache_dir cannot be written, ValueError if a file is not UTF-8, holds no
    text, is a pipe, or changes while it is read.
    """
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(text_digest, paths))
    name = hashlib.sha256("\n".join([vocab.digest, *digests]).encode()).hexdigest()[:32]
    folder = Path(cache_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{folder}.lock")):
        text = open_text(folder)
        if text is None:
            fill_cache(paths, digests, tokenizer, vocab, folder)
            text = open_text(folder)
    return text


def text_digest(path: str | Path) -> str:
    """Return the sha256 of a text file; raise ValueError if it is a pipe or a device."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises an error later
        raise ValueError(f"{path} is a pipe or a device, and a text is read twice; write it into a file")
    return sha256(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock in the with block; warn if another process has it for more than a second."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        warn(f"waiting for another process that tokenizes the same text; it holds {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fill_cache(
    paths: Sequence[str | Path], digests: Sequence[str], tokenizer: Tokenizer, vocab: Vocabulary, folder: Path
) -> None:
    """Tokenize files into a folder that gets its final name when it is complete.

    digests: of the files, as in the name of the folder
    """
    temporary = folder.with_suffix(".tmp")
    for leftover in (temporary, folder):  # left by a killed process; damaged
        if leftover.exists():
            shutil.rmtree(leftover)  # on Windows this fails if another process has mapped a file in it
    temporary.mkdir()
    try:
        tokenize(paths, digests, tokenizer, vocab, temporary)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(temporary)
        raise
    temporary.rename(folder)


def open_text(folder: Path) -> Text | None:
    """Return the Text that `tokenize` wrote into a folder, or None if the folder is missing or damaged.

    Lengths and checksums must match about.json. A cache of an earlier version, without the starts of documents,
    counts as damaged.
    """
    try:
        summary = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        ids = np.memmap(folder / "ids", summary["dtype"], mode="r")
        sentence_starts = np.memmap(folder / "begins", np.int64, mode="r")
        document_starts = np.memmap(folder / "documents", np.int64, mode="r")
        if len(ids) != sum(summary["counts"]):
            return None
        if any(sha256(folder / name) != summary["sha256"][name] for name in CACHED):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    arrays = (np.asarray(array) for array in (ids, sentence_starts[1:], document_starts[1:]))
    return Text(*arrays, np.array(summary["counts"]), folder.name)


def tokenize(
    paths: Sequence[str | Path], digests: Sequence[str], tokenizer: Tokenizer, vocab: Vocabulary, folder: Path
) -> None:
    """Tokenize files, on all cores, into a folder.

    Writes ids ([n_tokens], uint16 or int32), begins and documents ([n_sentences] and [n_documents] int64, where each
    sentence and each document begins) and about.json: the type of the ids, how often each id occurs, and the checksums
    of the three files.

    digests: of the files, which must still match
    Raises ValueError if a file is not a text or a worker process was killed.
    """
    dtype = np.dtype(np.uint16 if vocab.size <= 2**16 else np.int32)
    n_bytes = sum(os.path.getsize(path) for path in paths)
    n_workers = min(joblib.cpu_count(), 1 + n_bytes // CHUNK)
    progress = tqdm(desc="tokenizing", total=n_bytes, unit="B", unit_scale=True, delay=1, leave=False, disable=None)

    parallel = joblib.Parallel(
        n_workers, return_as="generator", idle_worker_timeout=5, initializer=end_with, initargs=(os.getpid(),)
    )
    encode = joblib.delayed(encode_chunk)
    encoded_chunks = parallel(
        encode(chunk, tokenizer.vocab_file, vocab.digest, vocab.eod_id)
        for chunk in read_chunks(paths, digests, progress)
    )

    counts = np.zeros(vocab.size, dtype=np.int64)
    with (
        open(folder / "ids", "wb") as ids_file,
        open(folder / "begins", "wb") as begins_file,
        open(folder / "documents", "wb") as documents_file,
        progress,
        contextlib.closing(encoded_chunks),
    ):
        try:
            for ids, sentence_starts, document_starts in encoded_chunks:
                n_tokens_before = counts.sum()
                ids_file.write(ids.astype(dtype))
                begins_file.write(n_tokens_before + sentence_starts)
                documents_file.write(n_tokens_before + document_starts)
                counts += np.bincount(ids, minlength=vocab.size)
        except BrokenProcessPool:
            raise ValueError(
                f"{paths[0]}: one of {n_workers} processes that tokenize was killed, perhaps for want of memory; "
                f"set LOKY_MAX_CPU_COUNT=1 for one process"
            ) from None
        for file in (ids_file, begins_file, documents_file):
            file.flush()
            os.fsync(file.fileno())
    checksums = {name: sha256(folder / name) for name in CACHED}
    summary = {"dtype": dtype.name, "counts": counts.tolist(), "sha256": checksums}
    (folder / "about.json").write_text(json.dumps(summary), encoding="utf-8")


# ---------------------------------------------------------------- from files to chunks


class HashingFile(io.FileIO):
    """A file opened for reading that computes the sha256 of the bytes read."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.sha256 = hashlib.sha256()

    def readinto(self, buffer: memoryview) -> int:
        """Read into a buffer and return the number of bytes, 0 at the end."""
        n_bytes = super().readinto(buffer)
        self.sha256.update(buffer[:n_bytes])
        return n_bytes


class Chunk(NamedTuple):
    """A part of a text, with the context from the chunk before that its first line needs."""

    text: str
    continues_line: bool  # the first line began in the chunk before
    begins_document: bool  # the line before the first one is blank, or there is none


def read_chunks(paths: Sequence[str | Path], digests: Sequence[str], progress: tqdm) -> Iterator[Chunk]:
    """Yield the text of files in chunks, with a blank line between two files.

    digests: sha256 of each file
    progress: a bar that counts bytes
    Raises ValueError if a file is not UTF-8, has no letter, digit or punctuation mark, or no longer has its digest.
    """
    for i, (path, digest) in enumerate(zip(paths, digests, strict=True)):
        yield from read_chunks_of_file(path, digest, "" if i == 0 else "\n", progress)


def read_chunks_of_file(path: str | Path, digest: str, prefix: str, progress: tqdm) -> Iterator[Chunk]:
    """Yield a prefix and the text of one file in chunks, as `read_chunks` does.

    A chunk is about CHUNK characters long: whole lines, or as many words of a longer line as fit. A line ends only at a
    line feed; other marks, such as a carriage return alone, a form feed or U+2028, are blanks. A file with very long
    lines causes a warning.
    """
    text = prefix  # read, and not yet yielded
    at_end = continues_line = holds_text = False
    begins_document = True
    n_characters = n_line_ends = 0
    with HashingFile(path) as raw:
        file = io.TextIOWrapper(io.BufferedReader(raw, CHUNK), encoding="utf-8-sig", newline="\n")
        while not at_end:
            new = read_characters(file, max(CHUNK, len(text)))  # double the size until a chunk can end
            at_end = new == ""
            n_characters += len(new)
            n_line_ends += new.count("\n")
            text += new
            end = len(text) if at_end else chunk_end(text)
            chunk, text = text[:end], text[end:]
            if chunk:
                yield Chunk(chunk, continues_line, begins_document)
                last_line = chunk.removesuffix("\n").rpartition("\n")[2]
                is_whole_line = not continues_line or "\n" in chunk[:-1]
                begins_document = is_whole_line and last_line.strip() == ""
                continues_line = not chunk.endswith("\n")
                holds_text = holds_text or any(c.isalnum() or c in string.punctuation for c in chunk)
            progress.update(len(new.encode()))
        if raw.sha256.hexdigest() != digest:
            raise ValueError(changed(path))
    if not holds_text:
        raise ValueError(f"{path} holds no text; give one with a sentence on each line")
    if n_characters > LONG_LINES * (n_line_ends + 1):
        warn(
            f"{path} has {n_line_ends:,} line ends in {n_characters:,} characters, and a line is a sentence; end each "
            f"sentence with a line feed"
        )


def changed(path: str | Path) -> str:
    """Return the message about a file that changed between two reads."""
    return f"{path} changed while it was read; start again when it is complete"


def chunk_end(text: str) -> int:
    """Return where a chunk can end in an unfinished text: after its last line, else after its last space, else 0.

    A space at the beginning of a line does not count: a chunk of blanks alone would look like a blank line.
    """
    if "\n" in text:
        return text.rfind("\n") + 1
    first_word = len(text) - len(text.lstrip())
    return text.rfind(" ", first_word) + 1


def read_characters(file: TextIO, n: int) -> str:
    """Return the next n characters of a file, "" at its end; raise ValueError if they are not UTF-8."""
    try:
        return file.read(n)
    except UnicodeDecodeError as error:
        path = file.buffer.raw.name
        line = first_line_not_utf8(path)
        if line is None:
            raise ValueError(changed(path)) from None
        raise ValueError(f"{path}, line {line} is not UTF-8 ({error.reason}); convert it to UTF-8") from None


def first_line_not_utf8(path: str | Path) -> int | None:
    """Return the number of the first line that is not UTF-8, counted from 1, or None."""
    with open(path, "rb") as lines:
        return next((n for n, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line), None)


# ---------------------------------------------------------------- from chunks to ids, in a worker process


def end_with(parent: int) -> None:
    """Make this worker process end soon after its parent; a killed parent cannot end it."""

    def watch() -> None:
        sentinel = multiprocessing.parent_process().sentinel
        if sentinel is not None:  # loky passes it on Windows only, where getppid never changes
            wait([sentinel])
        else:
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_chunk(
    chunk: Chunk, vocab_file: Path, digest: str, eod_id: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of a chunk, [n] int32, and where in them sentences and documents begin, [n_...] int64."""
    encode = encoder(vocab_file, digest)
    document_end = [] if eod_id is None else [eod_id]
    text, continues_line, begins_document = chunk
    ids, sentence_starts, document_starts = [], [], []
    for line in text.removesuffix("\n").split("\n"):
        line = line.strip()
        if line:
            sentence = encode(line)
            if sentence and begins_document:
                document_starts.append(len(ids))
                begins_document = False
        elif continues_line:  # blanks at the end of a line that began in the chunk before
            sentence = []
        else:
            sentence, begins_document = document_end, True
        if sentence and not continues_line:
            sentence_starts.append(len(ids))
        ids.extend(sentence)
        continues_line = False
    return np.array(ids, np.int32), np.array(sentence_starts, np.int64), np.array(document_starts, np.int64)


@functools.lru_cache(maxsize=1)
def encoder(vocab_file: Path, digest: str) -> Callable[[str], list[int]]:
    """Return the function that turns a line into ids; it is cached until the vocabulary changes.

    digest: of the vocabulary; it differs if another vocabulary now has the same file name
    Raises ValueError if the file no longer has this digest.
    """
    tokenizer = load_tokenizer(vocab_file)
    if digest_of(tokenizer) != digest:
        raise ValueError(f"cannot be tokenized: {changed(vocab_file)}")
    if not tokenizer.splits_at_spaces:
        return tokenizer.encode
    encode_word = functools.lru_cache(maxsize=WORDS)(tokenizer.encode)  # BERT's tokenizer is slow

    def encode_line(line: str) -> list[int]:
        return [i for word in line.split(" ") for i in encode_word(word)]

    return encode_line


# ---------------------------------------------------------------- files


def read_json_object(path: Path) -> dict:
    """Return the object in a JSON file; raise ValueError, with the file's name, if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; mend it or take it away")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
