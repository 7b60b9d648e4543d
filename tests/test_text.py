"""From files to ids: what is tokenized, and the cache in which it is kept, whatever happens to it."""

import json
import multiprocessing
import os
import signal
import time

import joblib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_utils

TOKENIZER = data_utils.load_tokenizer("bert-base-uncased")
VOCAB = data_utils.vocabulary(TOKENIZER)


def plainly(paths, eod_id=None):
    """Return ids and begins of sentences as BERT's tokenizer gives them, line after line, file after file."""
    lines = []
    for path in paths:
        content = path.read_bytes().decode("utf-8-sig")
        lines += [""] * bool(lines) + content.removesuffix("\n").split("\n")
    ids, begins = [], []
    for line in lines:
        pieces = TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(line))
        if sentence := pieces if line.strip() else [eod_id] * (eod_id is not None):
            begins.append(len(ids))
            ids += sentence
    return ids, begins


def same(text, ids, begins):
    assert text.ids.tolist() == ids and [0, *text.cuts.tolist()] == begins
    assert text.counts.tolist() == np.bincount(ids, minlength=VOCAB.size).tolist()


WORDS = ["the", "cat's", "Über", "naïve", "你好", "x" * 130, "\u200bsat", "m\x07at", "a\x0bb", "ΣΑΣ", "[SEP]", "İx",
         ".", "\ufffdon", "e\u0301a"]
SPACES = [" ", " ", " ", "  ", "\t", "\u3000", "\xa0", "\x85", "\u2028", "\r", "\n", "\n", "\r\n", "\n\n", "\n \t\n",
          "   ", "\n  "]
LINES = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), min_size=1)


@settings(max_examples=300, deadline=None)
@example([[("the", "\n  "), ("cat", " ")]], 1, True, False, True)  # cut after blanks at a line's beginning
@example([[("today", " \n"), ("the", "\n")]], 3, True, False, True)  # before blanks at its end
@example([[("", "\n"), ("the", "\n")]], 60, True, True, True)  # a mark, and nothing else in the line
@given(st.lists(LINES, min_size=1, max_size=3), st.integers(1, 60), st.booleans(), st.booleans(), st.booleans())
def test_any_text_cut_anywhere(tmp_path_factory, files, chunk, eod, bom, newline):
    """In chunks of any length, lines of any length, with any blanks and marks: the ids of the tokenizer itself."""
    folder = tmp_path_factory.mktemp("text")
    paths = []
    for i, words in enumerate(files):
        content = "".join(word + space for word, space in words)
        content = content + "\n" if newline else content.rstrip()
        paths.append(folder / f"{i}.txt")
        paths[-1].write_bytes((b"\xef\xbb\xbf" if bom else b"") + content.encode())
    vocab = VOCAB._replace(eod_id=7 if eod else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "CHUNK", chunk)
        patch.setattr(joblib, "cpu_count", lambda: 1)
        text = data_utils.read_text(list(map(str, paths)), TOKENIZER, vocab, folder / "cache")
    same(text, *plainly(paths, vocab.eod_id))


@pytest.fixture
def files(tmp_path):
    """Two files of several chunks each."""
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.txt")
        sentences = (f"file {i} has a sentence of number {n}" + "\n" * (n % 9 == 0) for n in range(400))
        paths[-1].write_text("\n".join(sentences))
    return paths


def read(files, cache):
    return data_utils.read_text(list(map(str, files)), TOKENIZER, VOCAB, cache)


def test_a_line_is_a_sentence_and_a_blank_one_ends_a_document(tmp_path):
    """By hand: a byte-order mark, Windows line ends, blank lines, a line without a piece, no newline at the end."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfthe cat\r\n\r\n  \nsat on the mat\n\xe2\x80\x8b\nthe end")
    the, cat, sat, on, mat, end = TOKENIZER.convert_tokens_to_ids("the cat sat on mat end".split())
    text = read([path], tmp_path / "cache")
    assert text.ids.tolist() == [the, cat, sat, on, the, mat, the, end] and text.cuts.tolist() == [2, 6]
    text = data_utils.read_text([path, path], TOKENIZER, VOCAB._replace(eod_id=7), tmp_path / "other")
    assert text.ids.tolist() == [the, cat, 7, 7, sat, on, the, mat, the, end, 7, the, cat, *text.ids[13:]]
    assert text.cuts.tolist() == [2, 3, 4, 8, 10, 11, *text.cuts[6:]]


def test_ids_are_small_and_stay_on_the_disk(tmp_path, files):
    text = read(files, tmp_path / "cache")
    assert text.ids.dtype == np.uint16 and isinstance(text.ids.base, np.memmap) and not text.ids.flags.writeable
    large = VOCAB._replace(size=2**16 + 1, word_start=np.ones(2**16 + 1, dtype=bool), digest="another")
    assert data_utils.read_text(files, TOKENIZER, large, tmp_path / "cache").ids.dtype == np.int32


def test_in_parallel(tmp_path, files, monkeypatch):
    """Two processes give what one gives; so does any order in which they are done."""
    expected = read(files, tmp_path / "one")
    monkeypatch.setattr(data_utils, "CHUNK", 1000)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    text = read(files, tmp_path / "two")
    assert np.array_equal(text.ids, expected.ids) and np.array_equal(text.cuts, expected.cuts)
    assert text.digest == expected.digest


@pytest.mark.parametrize("content, words", [
    (b"fine\nnot \xff fine\n", "1.txt, line 2 is not UTF-8"),
    (b"fine\n" * 500 + b"\xff", "1.txt, line 501 is not UTF-8"),
    (b"", "1.txt holds no text"),
    (b"\n \n", "1.txt holds no text"),
])
@pytest.mark.parametrize("eod_id", [None, 7])
def test_unreadable_text_is_named(tmp_path, files, monkeypatch, content, words, eod_id):
    """Wherever in the list of files it stands; and nothing of it stays in the cache."""
    monkeypatch.setattr(data_utils, "CHUNK", 1000)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    files[1].write_bytes(content)
    for order in (files, files[::-1]):
        with pytest.raises(ValueError, match=words):
            data_utils.read_text(list(map(str, order)), TOKENIZER, VOCAB._replace(eod_id=eod_id), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


# ---------------------------------------------------------------- the cache


def test_a_text_is_tokenized_once(tmp_path, files, monkeypatch):
    """Also when it has another name; another text of the same name, size and time is another text."""
    first = read(files, tmp_path / "cache")
    calls = []
    tokenize = data_utils.tokenize
    monkeypatch.setattr(data_utils, "tokenize", lambda *args: calls.append(args) or tokenize(*args))
    files[0] = files[0].rename(tmp_path / "renamed.txt")
    again = read(files, tmp_path / "cache")
    assert not calls and np.array_equal(first.ids, again.ids) and first.digest == again.digest
    assert np.array_equal(first.cuts, again.cuts) and np.array_equal(first.counts, again.counts)

    before = files[0].stat()
    files[0].write_text(files[0].read_text().replace("number 7", "number 8"))
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[0].stat().st_size == before.st_size
    same(read(files, tmp_path / "cache"), *plainly(files))
    assert len(calls) == 1
    read(files[::-1], tmp_path / "cache")  # another order
    data_utils.read_text(files, TOKENIZER, VOCAB._replace(digest="another"), tmp_path / "cache")
    assert len(calls) == 3


def test_another_vocabulary_in_the_same_file(tmp_path):
    """Whose ids are others; nothing of the one before is remembered."""
    (tmp_path / "text.txt").write_text("the cat\n")
    pieces, ids = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"], []
    for order in (pieces, pieces[::-1]):
        (tmp_path / "vocab.txt").write_text("\n".join(order))
        tokenizer = data_utils.load_tokenizer(tmp_path / "vocab.txt")
        vocab = data_utils.vocabulary(tokenizer)
        ids.append(data_utils.read_text([tmp_path / "text.txt"], tokenizer, vocab, tmp_path / "cache").ids.tolist())
    assert ids == [[4, 5], [1, 0]]


@pytest.mark.parametrize("name", ["ids", "begins", "about.json"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "missing", "longer"])
def test_a_damaged_cache_is_made_anew(tmp_path, files, name, harm):
    read(files, tmp_path / "cache")
    [path] = (tmp_path / "cache").glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"truncated": content[:-8], "emptied": b"", "longer": content + b"12345678"}[harm])
    same(read(files, tmp_path / "cache"), *plainly(files))
    assert path.read_bytes() == content


def die(files, cache):
    """Tokenize, and be killed after three chunks."""
    data_utils.CHUNK = 1000
    joblib.cpu_count = lambda: 1
    encode_chunk, calls = data_utils.encode_chunk, []
    data_utils.encode_chunk = lambda *args: (
        os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else calls.append(1) or encode_chunk(*args))
    read(files, cache)


def test_killed_while_tokenizing(tmp_path, files):
    """What is half written is never used, holds nobody up, and is gone afterwards."""
    process = multiprocessing.get_context("forkserver").Process(target=die, args=(files, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".tmp"]
    same(read(files, tmp_path / "cache"), *plainly(files))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folder.suffix == "" and json.loads((folder / "about.json").read_text())["sentences"] == 800


def read_slowly(files, cache, results):
    tokenize = data_utils.tokenize
    calls = []
    data_utils.tokenize = lambda *args: (calls.append(1), time.sleep(0.5), tokenize(*args))
    text = read(files, cache)
    results.put((len(calls), text.ids.tolist(), text.cuts.tolist()))


def test_several_processes_at_once(tmp_path, files):
    """One tokenizes, the others wait for it; all have the right ids."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    processes = [context.Process(target=read_slowly, args=(files, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    ids, begins = plainly(files)
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(calls for calls, _, _ in found) == [0, 0, 1]
    assert all(each[1:] == (ids, begins[1:]) for each in found)
