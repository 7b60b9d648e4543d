"""Tokenizers and vocabularies, the way from files to ids, and the cache, whatever happens to it."""

import errno
import json
import math
import os
import threading
import time

import joblib
import numpy as np
import psutil
import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import UserError, corpus

TOKENIZER = corpus.load_tokenizer("bert-base-uncased")
VOCAB = corpus.vocabulary(TOKENIZER)


# ---------------------------------------------------------------- tokenizers and vocabularies


def test_bundled_tokenizers():
    """Sizes are as published; only the cased ones keep case and accents; special ids are the tokenizer's own."""
    assert TOKENIZER.tokenize("Über Paris's") == ["uber", "paris", "'", "s"]
    assert (VOCAB.size, VOCAB.sep_id, VOCAB.cls_id, VOCAB.eod_id) == (30522, 102, 101, None)
    cased = corpus.load_tokenizer("bert-large-cased")
    assert corpus.vocabulary(cased).size == 28996
    assert cased.tokenize("Paris paris") == ["Paris", "par", "##is"]
    pieces = ["un", "##bel", "##ie", "##va", "##bly", "so"]
    assert TOKENIZER.tokenize("unbelievably so") == pieces
    ids = TOKENIZER.convert_tokens_to_ids(pieces)
    assert VOCAB.word_start[ids].tolist() == [True, *[False] * 4, True]
    assert TOKENIZER.convert_ids_to_tokens(ids) == pieces


@pytest.mark.parametrize("pieces, lower", [(["the", "##s"], True), (["The", "the"], False)])
@pytest.mark.parametrize("as_directory", [False, True])
def test_a_vocabulary_of_ones_own(tmp_path, pieces, lower, as_directory):
    """A file or its directory loads; one piece with a capital letter, special pieces aside, makes it cased."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eod>", *pieces]))
    tokenizer = corpus.load_tokenizer(str(tmp_path if as_directory else tmp_path / "vocab.txt"))
    assert tokenizer.tokenize("THE the")[0] == ("the" if lower else "[UNK]")
    vocab = corpus.vocabulary(tokenizer)
    assert vocab[:5] == (7, 3, 2, 0, 4)


@pytest.mark.parametrize(
    "piece, starts",
    [("▁the", True), ("the", False), ("<sep>", True), (",", True), ("~", True), ("...", False), ("—", False)],
)
def test_sentence_piece_word_starts(piece, starts):
    """The mark, a special piece, or one ASCII punctuation mark starts a word."""
    assert corpus.SentencePiece.is_word_start(piece) == starts


def test_a_saved_tokenizer_is_the_same(tmp_path):
    """A checkpoint's directory gives back the pieces, the treatment of text and the digest."""
    for name in ("bert-base-uncased", "bert-base-cased"):
        tokenizer = corpus.load_tokenizer(name)
        tokenizer.save(tmp_path)
        again = corpus.load_tokenizer(tmp_path)
        assert again.vocab_file == tmp_path / "vocab.txt" and again.vocab == tokenizer.vocab
        assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == tokenizer.config == again.config
        assert corpus.vocabulary(again).digest == corpus.vocabulary(tokenizer).digest


def test_what_transformers_is_told_of_special_pieces():
    """transformers' BERT tokenizer puts [CLS] first and has no other marks of a sequence; XLNet's comes last."""
    expected = {"summary_type": "first", "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
    assert VOCAB.hugging_face_config() == expected
    plain = corpus.Vocabulary(9, 4, 3, None, 7, 0, 1, 2, np.ones(9, dtype=bool), "")
    expected = {"summary_type": "last", "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    assert plain.hugging_face_config() == expected


@pytest.mark.parametrize("present, words", [("[SEP]", r"no \[CLS\] and no \[UNK\]; add"), ("[SEP] [CLS]", "no .UNK.;")])
def test_a_vocabulary_without_special_pieces_is_refused(tmp_path, present, words):
    """The message names the pieces that are missing, all of them and no others."""
    (tmp_path / "vocab.txt").write_text("\n".join([*present.split(), "the"]))
    with pytest.raises(ValueError, match=f"has {words}"):
        corpus.vocabulary(corpus.load_tokenizer(tmp_path))


def test_a_vocabulary_with_a_byte_order_mark_is_refused(tmp_path):
    """The mark would be a part of the first piece, which then nothing finds; one line names file and remedy."""
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe")
    with pytest.raises(ValueError, match=f"{tmp_path}/vocab.txt begins with a byte-order mark; save it"):
        corpus.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- from files to ids


def plainly(paths, eod_id=None):
    """Return ids, sentence starts and document starts as BERT's tokenizer gives them, line by line, file after file."""
    lines = []
    for path in paths:
        content = path.read_bytes().decode("utf-8-sig")
        lines += [""] * bool(lines) + content.removesuffix("\n").split("\n")
    ids, starts, documents = [], [], []
    after_blank = True
    for line in lines:
        pieces = TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(line))
        if pieces and after_blank:
            documents.append(len(ids))
        after_blank = not line.strip() or (after_blank and not pieces)
        if sentence := pieces if line.strip() else [eod_id] * (eod_id is not None):
            starts.append(len(ids))
            ids += sentence
    return ids, starts, documents


def assert_same(text, ids, starts, documents):
    assert text.ids.tolist() == ids and [0, *text.cuts.tolist()] == starts
    assert text.documents.tolist() == documents[1:]
    assert text.counts.tolist() == np.bincount(ids, minlength=VOCAB.size).tolist()


WORDS = [
    *["the", "cat's", "Über", "naïve", "你好", "x" * 130, "\u200bsat", "m\x07at", "a\x0bb", "ΣΑΣ", "[SEP]", "İx", "."],
    *["\ufffdon", "e\u0301a"],
]
SPACES = [
    *[" ", " ", " ", "  ", "\t", "\u3000", "\xa0", "\x85", "\u2028", "\r", "\n", "\n", "\r\n", "\n\n", "\n \t\n"],
    *["   ", "\n  "],
]
LINES = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), min_size=1)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@example([[("the", "\n  "), ("cat", " ")]], 1, True, False, True)  # cut after blanks at a line's beginning
@example([[("today", " \n"), ("the", "\n")]], 3, True, False, True)  # before blanks at its end
@example([[("", "\n"), ("the", "\n")]], 60, True, True, True)  # a byte-order mark, and nothing else in the line
@given(st.lists(LINES, min_size=1, max_size=3), st.integers(1, 60), st.booleans(), st.booleans(), st.booleans())
def test_any_text_cut_anywhere(tmp_path_factory, files, chunk, eod, bom, newline):
    """With chunks and lines of any length, any blanks and any marks, the ids are those of the tokenizer itself."""
    folder = tmp_path_factory.mktemp("text")
    paths = []
    for i, words in enumerate(files):
        content = "".join(word + space for word, space in words)
        content = content + "\n" if newline else content.rstrip()
        paths.append(folder / f"{i}.txt")
        paths[-1].write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.encode())
    vocab = VOCAB._replace(eod_id=7 if eod else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK", chunk)
        patch.setattr(joblib, "cpu_count", lambda: 1)
        text = corpus.read_text(list(map(str, paths)), TOKENIZER, vocab, folder / "cache")
    assert_same(text, *plainly(paths, vocab.eod_id))


@pytest.fixture
def files(tmp_path):
    """Two files of several chunks each."""
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.txt")
        sentences = (f"file {i} has a sentence of number {n}" + "\n" * (n % 9 == 0) for n in range(400))
        paths[-1].write_bytes("\n".join(sentences).encode())
    return paths


def read(files, cache):
    return corpus.read_text(list(map(str, files)), TOKENIZER, VOCAB, cache)


def test_a_line_is_a_sentence_and_a_blank_one_ends_a_document(tmp_path):
    """By hand: a byte-order mark, Windows line ends, blank lines, a line without a piece, no newline at the end."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfthe cat\r\n\r\n  \nsat on the mat\n\xe2\x80\x8b\nthe end")
    the, cat, sat, on, mat, end = TOKENIZER.convert_tokens_to_ids("the cat sat on mat end".split())
    text = read([path], tmp_path / "cache")
    assert text.ids.tolist() == [the, cat, sat, on, the, mat, the, end] and text.cuts.tolist() == [2, 6]
    text = corpus.read_text([path, path], TOKENIZER, VOCAB._replace(eod_id=7), tmp_path / "other")
    assert text.ids.tolist() == [the, cat, 7, 7, sat, on, the, mat, the, end, 7, the, cat, *text.ids[13:]]
    assert text.cuts.tolist() == [2, 3, 4, 8, 10, 11, *text.cuts[6:]]


def test_ids_are_small_and_stay_on_the_disk(tmp_path, files):
    """Ids take two bytes where the vocabulary allows it; the arrays are memory-mapped and read-only."""
    text = read(files, tmp_path / "cache")
    assert text.ids.dtype == np.uint16 and isinstance(text.ids.base, np.memmap) and not text.ids.flags.writeable
    large = VOCAB._replace(size=2**16 + 1, word_start=np.ones(2**16 + 1, dtype=bool))
    assert corpus.read_text(files, TOKENIZER, large, tmp_path / "other").ids.dtype == np.int32


def test_a_long_line_is_read_in_pieces(tmp_path, monkeypatch):
    """A chunk of a text without a newline is never longer than CHUNK and one word, and is cut behind a space."""
    path = tmp_path / "text.txt"
    path.write_text("a line of many words " * 500)
    monkeypatch.setattr(corpus, "CHUNK", 100)
    with corpus.tqdm(disable=True) as progress:
        chunks = list(corpus.read_chunks([path], [corpus.sha256(path)], progress))
    assert "".join(chunk.text for chunk in chunks) == path.read_text()
    assert all(len(chunk.text) <= 100 + len("words ") and chunk.text.endswith(" ") for chunk in chunks)
    assert [chunk.continues_line for chunk in chunks] == [False] + [True] * (len(chunks) - 1)


def test_a_word_without_end_is_read_in_few_steps(tmp_path, monkeypatch):
    """Reading a text without a space takes linear time: each step reads as much as all steps before it."""
    path = tmp_path / "text.txt"
    path.write_text("x" * 100_000)
    monkeypatch.setattr(corpus, "CHUNK", 10)
    read_characters, sizes = corpus.read_characters, []
    monkeypatch.setattr(corpus, "read_characters", lambda file, n: sizes.append(n) or read_characters(file, n))
    with corpus.tqdm(disable=True) as progress:
        [chunk] = corpus.read_chunks([path], [corpus.sha256(path)], progress)
    assert chunk == ("x" * 100_000, False, True) and len(sizes) < 20


@pytest.mark.parametrize(
    "end, n_sentences, warned",
    [("\n", 2000, False), ("\r\n", 2000, False), ("\r", 1, True), ("\u2028", 1, True), ("\f", 1, True), (" ", 1, True)],
)
def test_only_a_line_feed_ends_a_line(tmp_path, capsys, end, n_sentences, warned):
    """Other marks are blanks; a file that is one gigantic sentence gives one line with its name."""
    path = tmp_path / "text.txt"
    path.write_bytes(("the cat sat" + end).encode() * 2000)
    text = read([path], tmp_path / "cache")
    assert (len(text.ids), len(text.cuts) + 1) == (6000, n_sentences)
    err = capsys.readouterr().err
    assert err.count("\n") == warned and (f"{path} has 0 line ends" in err) == warned


@pytest.mark.slow
def test_in_parallel(tmp_path, files, monkeypatch):
    """Two processes give the same text as one, whichever finishes first."""
    expected = read(files, tmp_path / "one")
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    text = read(files, tmp_path / "two")
    assert np.array_equal(text.ids, expected.ids) and np.array_equal(text.cuts, expected.cuts)
    assert text.digest == expected.digest


@pytest.mark.parametrize(
    "content, words",
    [
        (b"fine\nnot \xff fine\n", "1.txt, line 2 is not UTF-8"),
        (b"fine\n" * 500 + b"\xff", "1.txt, line 501 is not UTF-8"),
        (b"", "1.txt holds no text"),
        (b"\n \n", "1.txt holds no text"),
    ],
)
@pytest.mark.parametrize("eod_id", [None, 7])
def test_unreadable_text_is_named(tmp_path, files, monkeypatch, content, words, eod_id):
    """The message names the file wherever it stands in the list; nothing of the text stays in the cache."""
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    files[1].write_bytes(content)
    for order in (files, files[::-1]):
        with pytest.raises(ValueError, match=words):
            corpus.read_text(list(map(str, order)), TOKENIZER, VOCAB._replace(eod_id=eod_id), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("chunk", [10, 1000, 2**20])
@pytest.mark.parametrize("change", ["truncated", "grown", "other", "not UTF-8", "emptied"])
def test_a_file_that_changes_while_it_is_read(tmp_path, files, monkeypatch, chunk, change):
    """A cache is named by the bytes that were tokenized: any other bytes give one line, and nothing is kept."""
    content = files[1].read_bytes()
    cases = {"truncated": content[:-3], "grown": content + b"more\n", "other": content[:-3] + b"abc", "emptied": b""}
    text_digest = corpus.text_digest

    def change_after_digest(path):
        digest = text_digest(path)
        files[1].write_bytes(cases.get(change, content[:-3] + b"\xff\n"))
        return digest

    monkeypatch.setattr(corpus, "CHUNK", chunk)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    monkeypatch.setattr(corpus, "text_digest", change_after_digest)
    words = "is not UTF-8" if change == "not UTF-8" else "changed while it was read; start again"
    with pytest.raises(UserError, match=f"--data {files[1]}.* {words}"):
        corpus.load_text("data", [str(files[1])], str(tmp_path / "cache"), TOKENIZER, VOCAB)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_file_that_is_completed_while_it_is_read(tmp_path, monkeypatch):
    """A character that was cut in two and is whole when its line is looked for is a change, too."""
    path = tmp_path / "text.txt"
    path.write_bytes("the café".encode()[:-1])
    first_line_not_utf8 = corpus.first_line_not_utf8

    def complete_and_look(name):
        path.write_bytes("the café".encode())
        return first_line_not_utf8(name)

    monkeypatch.setattr(corpus, "first_line_not_utf8", complete_and_look)
    with pytest.raises(ValueError, match="text.txt changed while it was read"):
        read([path], tmp_path / "cache")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a file system without pipes")
def test_a_pipe_is_refused(tmp_path):
    """A pipe can be read once only, and its name would be that of a text that is gone; nobody waits for a writer."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        with pytest.raises(UserError, match=f"--data {path} is a pipe or a device.* write it into a file"):
            corpus.load_text("data", [path], str(tmp_path / "cache"), TOKENIZER, VOCAB)


def kill_this_process(*args):
    psutil.Process().kill()


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path, files, monkeypatch):
    """A worker process that the system kills, as it does when memory is short, gives one line with the remedy."""
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(corpus, "encode_chunk", kill_this_process)
    with pytest.raises(UserError, match="^--data .* was killed, perhaps for want of memory; set LOKY_MAX_CPU_COUNT=1"):
        corpus.load_text("data", list(map(str, files)), str(tmp_path / "cache"), TOKENIZER, VOCAB)


def tokenize_for_ever(files, folder):
    """Tokenize in two processes, each of which tells its id and then hangs."""
    corpus.CHUNK = 1000
    joblib.cpu_count = lambda: 2

    def hang(*args):
        (folder / str(os.getpid())).touch()
        time.sleep(600)

    corpus.encode_chunk = hang
    read(files, folder / "cache")


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path, context, files):
    """If a program is killed, which leaves it no time for anything, the processes that tokenize for it end soon."""
    process = context.Process(target=tokenize_for_ever, args=(files, tmp_path))
    process.start()
    workers = []
    while len(workers) < 2:
        time.sleep(0.1)
        assert process.is_alive()
        workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir() if path.name.isdecimal()]
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---------------------------------------------------------------- the cache


def test_a_text_is_tokenized_once(tmp_path, files, monkeypatch):
    """A renamed file is the same text; other content with the same name, size and time is another text."""
    first = read(files, tmp_path / "cache")
    calls = []
    tokenize = corpus.tokenize
    monkeypatch.setattr(corpus, "tokenize", lambda *args: calls.append(args) or tokenize(*args))
    files[0] = files[0].rename(tmp_path / "renamed.txt")
    again = read(files, tmp_path / "cache")
    assert not calls and np.array_equal(first.ids, again.ids) and first.digest == again.digest
    assert np.array_equal(first.cuts, again.cuts) and np.array_equal(first.counts, again.counts)

    before = files[0].stat()
    files[0].write_bytes(files[0].read_bytes().replace(b"number 7", b"number 8"))
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[0].stat().st_size == before.st_size
    assert_same(read(files, tmp_path / "cache"), *plainly(files))
    assert len(calls) == 1
    read(files[::-1], tmp_path / "cache")  # another order
    cased = corpus.load_tokenizer("bert-base-cased")
    corpus.read_text(files, cased, corpus.vocabulary(cased), tmp_path / "cache")
    assert len(calls) == 3


def test_another_vocabulary_in_the_same_file(tmp_path):
    """The text gets the ids of the new vocabulary; nothing of the old one is remembered."""
    (tmp_path / "text.txt").write_text("the cat\n")
    pieces, ids = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"], []
    for order in (pieces, pieces[::-1]):
        (tmp_path / "vocab.txt").write_text("\n".join(order))
        tokenizer = corpus.load_tokenizer(tmp_path / "vocab.txt")
        vocab = corpus.vocabulary(tokenizer)
        ids.append(corpus.read_text([tmp_path / "text.txt"], tokenizer, vocab, tmp_path / "cache").ids.tolist())
    assert ids == [[4, 5], [1, 0]]


def test_a_vocabulary_that_changes_before_it_is_used(tmp_path):
    """Worker processes read it again: other pieces than those that were loaded make no ids, and nothing is kept."""
    (tmp_path / "text.txt").write_text("the cat\n")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = corpus.load_tokenizer(tmp_path / "vocab.txt")
    vocab = corpus.vocabulary(tokenizer)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces[::-1]))
    with pytest.raises(ValueError, match="vocab.txt changed while it was read; start again"):
        corpus.read_text([tmp_path / "text.txt"], tokenizer, vocab, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_of_an_earlier_version_is_made_anew(tmp_path):
    """Vocabulary and text keep the digests they always had; what an earlier version has not written comes to them."""
    (tmp_path / "text.txt").write_bytes(b"the cat\n")
    text = corpus.read_text([tmp_path / "text.txt"] * 2, TOKENIZER, VOCAB, tmp_path / "cache")
    assert VOCAB.digest == "0377c8f2a4bff92aa0989f744b66b9ee9078021d61f57b27d13dd2b46b7ff967"
    assert text.digest == "a7f4d91732b47c4cb3487337e6a43a3e"
    folder = tmp_path / "cache" / text.digest
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "begins", "documents", "ids"]

    (folder / "documents").unlink()
    again = corpus.read_text([tmp_path / "text.txt"] * 2, TOKENIZER, VOCAB, tmp_path / "cache")
    assert again.ids.tolist() == text.ids.tolist() and again.documents.tolist() == [2]


@pytest.mark.parametrize("name", ["ids", "begins", "documents", "about.json"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "missing", "longer", "changed"])
def test_a_damaged_cache_is_made_anew(tmp_path, files, name, harm):
    """Whichever file is damaged, the text is right and the file is as it was."""
    read(files, tmp_path / "cache")
    [path] = (tmp_path / "cache").glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        changed = content[:-8] + bytes(byte ^ 1 for byte in content[-8:])
        longer = content + b"12345678"
        path.write_bytes({"truncated": content[:-8], "emptied": b"", "longer": longer, "changed": changed}[harm])
    assert_same(read(files, tmp_path / "cache"), *plainly(files))
    assert path.read_bytes() == content


@pytest.mark.slow
def test_who_waits_says_so(tmp_path, files, capsys):
    """While another process holds the lock of a text, one line says so; the text is then read."""
    digest = read(files, tmp_path / "cache").digest
    lock = FileLock(tmp_path / "cache" / f"{digest}.lock")
    with lock:
        thread = threading.Thread(target=read, args=(files, tmp_path / "cache"))
        thread.start()
        thread.join(2)
        [line] = capsys.readouterr().err.splitlines()
        assert thread.is_alive() and line.endswith(f"it holds {lock.lock_file}")
    thread.join(10)
    assert not thread.is_alive()


def die(files, cache):
    """Tokenize, and be killed after three chunks."""
    corpus.CHUNK = 1000
    joblib.cpu_count = lambda: 1
    encode_chunk, calls = corpus.encode_chunk, []

    def encode_three_chunks(*args):
        if len(calls) == 3:
            psutil.Process().kill()
        calls.append(1)
        return encode_chunk(*args)

    corpus.encode_chunk = encode_three_chunks
    read(files, cache)


@pytest.mark.slow
def test_killed_while_tokenizing(tmp_path, context, files):
    """A folder that is half written is never used, blocks nobody, and is gone after the next run."""
    process = context.Process(target=die, args=(files, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode != 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".tmp"]
    assert_same(read(files, tmp_path / "cache"), *plainly(files))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folder.suffix == "" and (folder / "begins").stat().st_size == 8 * 800


def read_slowly(files, cache, results):
    tokenize = corpus.tokenize
    calls = []
    corpus.tokenize = lambda *args: (calls.append(1), time.sleep(0.5), tokenize(*args))
    text = read(files, cache)
    results.put((len(calls), text.ids.tolist(), text.cuts.tolist()))


@pytest.mark.slow
def test_several_processes_at_once(tmp_path, context, files):
    """One process tokenizes, the others wait for it; all get the right ids."""
    results = context.Queue()
    processes = [context.Process(target=read_slowly, args=(files, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    ids, starts, _ = plainly(files)
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, _, _ in found) == [0, 0, 1]
    assert all(each[1:] == (ids, starts[1:]) for each in found)


# ---------------------------------------------------------------- what a run needs of it


@pytest.mark.parametrize("share, place", [(0.01, 18), (0.3, 18), (0.5, 9), (0.8, 4), (0.99, 4)])
def test_the_last_documents_are_held_out(tmp_path, share, place):
    """The two parts are the whole; the cut is the beginning of the document that is nearest to the share."""
    documents = ["the cat\nsat on", "the mat\nthe end\n.", "sat sat sat\nthe cat the cat\nsat on", "on the mat"]
    (tmp_path / "text.txt").write_text("\n\n\n".join(documents))
    text = read([tmp_path / "text.txt"], tmp_path / "cache")
    assert text.documents.tolist() == [4, 9, 18] and len(text.ids) == 21
    begin, end = corpus.split_off_end(text, share)
    assert [*begin.ids, *end.ids] == text.ids.tolist() and len(begin.ids) == place
    assert [*begin.cuts, place, *(end.cuts + place)] == text.cuts.tolist()
    assert [*begin.documents, place, *(end.documents + place)] == text.documents.tolist()
    for part in (begin, end):
        assert part.counts.tolist() == np.bincount(part.ids, minlength=VOCAB.size).tolist()
    assert len({text.digest, begin.digest, end.digest}) == 3


def test_one_document_has_no_part_to_hold_out(tmp_path):
    """A text without blank lines; the error says what to do."""
    (tmp_path / "text.txt").write_text("\nthe cat\nsat\n\n")
    with pytest.raises(ValueError, match="is one document.*put blank lines between"):
        corpus.split_off_end(read([tmp_path / "text.txt"], tmp_path / "cache"), 0.5)


def test_unigram_entropy():
    """The mean of -log p over tokens of which half, a quarter and a quarter are alike."""
    expected = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert corpus.unigram_entropy(np.array([0, 2, 1, 0, 1])) == pytest.approx(expected)


def test_a_cache_that_cannot_be_written_is_told_and_done_without(tmp_path, files, capsys):
    """The text is the same, and stays readable; one line names the flag and the folder."""
    no_folder = tmp_path / "file"
    no_folder.write_text("in the way")
    text = corpus.load_text("data", list(map(str, files)), str(no_folder), TOKENIZER, VOCAB)
    assert_same(text, *plainly(files))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: --cache_dir {no_folder}: ") and "tokenized at every start" in line


@pytest.mark.parametrize("name, words", [("none.txt", "No such file"), ("latin1.txt", "line 2 is not UTF-8")])
def test_a_text_that_cannot_be_read_is_named_with_its_flag(tmp_path, files, name, words):
    (tmp_path / "latin1.txt").write_bytes(b"fine\ncaf\xe9\n")
    paths = [str(files[0]), str(tmp_path / name)]
    with pytest.raises(UserError, match=f"--valid {paths[1]}.*{words}"):
        corpus.load_text("valid", paths, str(tmp_path / "cache"), TOKENIZER, VOCAB)


def test_a_full_disk_of_the_cache_is_named(tmp_path, files, monkeypatch):
    """Neither cache_dir nor a temporary folder has space: one line names the flag and the remedy."""

    def write_nothing(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus, "tokenize", write_nothing)
    with pytest.raises(UserError, match="--cache_dir .*No space left.*more space"):
        corpus.load_text("data", [str(files[0])], str(tmp_path / "cache"), TOKENIZER, VOCAB)


def test_find_vocabulary(tmp_path):
    """A SentencePiece model comes before a vocab.txt."""
    assert corpus.find_vocabulary(tmp_path) is None
    (tmp_path / "vocab.txt").touch()
    assert corpus.find_vocabulary(tmp_path) == tmp_path / "vocab.txt"
    (tmp_path / "spiece.model").touch()
    assert corpus.find_vocabulary(tmp_path) == tmp_path / "spiece.model"
