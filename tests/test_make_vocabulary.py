"""examples/make_vocabulary.py: official pieces, an even sample, the treatment of text that training has."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tqdm import tqdm

import main
from support import UserError, corpus

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import make_vocabulary

ROOT = Path(main.__file__).parent

pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

# The first pieces of the released xlnet-base-cased.
OFFICIAL = '<unk> <s> </s> <cls> <sep> <pad> <mask> <eod> <eop> . ( ) " - – £ €'.split()
LINES = [
    "Über den Wäldern (nördlich von Köln) lag 1,5 m Schnee; schon schön.",
    "„Ärger“, sagte er, ``müde'' und 'süß'; 10,000 Jahre, 19, 20, und 3.",
    "が ぎ ぐ げ ご、か き く け こ（10,000円）です。",
    "パリのピザはデリシャス、ハリのヒサ、5, 6個。",
    "안녕하세요 (10,000원), 반갑습니다. 오늘은 날씨가 좋네요.",
    'The e\u0301te\u0301 – "quoted" £5 and €7 \u00a0 end.',
]


def make(*flags):
    """Run the program, and return the tokenizer that main.py would load."""
    make_vocabulary.main([str(flag) for flag in flags])
    return corpus.load_tokenizer(flags[flags.index("--output_dir") + 1])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of data.txt and a few hundred lines of words drawn from LINES."""
    rng = random.Random(0)
    words = [word for line in LINES for word in line.split()]
    path = tmp_path_factory.mktemp("text") / "my.txt"
    english = (ROOT / "data.txt").read_text(encoding="utf-8").split("\n")
    path.write_text(
        "\n".join([*LINES, *english, *(" ".join(rng.choices(words, k=12)) for _ in range(300))]), encoding="utf-8"
    )
    return path


def sample(paths, limit):
    paths = [str(path) for path in paths]
    return make_vocabulary.sample(paths, sum(map(make_vocabulary.size_of, paths)), limit)


# ---------------------------------------------------------------- SentencePiece


def test_special_pieces_are_official(text, tmp_path):
    """The first 17 ids are those of the released models, and the vocabulary has exactly --size pieces."""
    tokenizer = make(text, "--output_dir", tmp_path / "v", "--size", 300)
    assert tokenizer.convert_ids_to_tokens(range(17)) == OFFICIAL and len(tokenizer.vocab) == 300
    vocab = corpus.vocabulary(tokenizer)
    assert (vocab.cls_id, vocab.sep_id, vocab.pad_id, vocab.eod_id, vocab.unk_id) == (3, 4, 5, 7, 0)


def test_accents_are_kept_by_default(text, tmp_path, capsys):
    """Umlauts, voiced kana and Hangul survive, with nothing unknown; main.py has nothing to warn of."""
    tokenizer = make(text, "--output_dir", tmp_path / "v", "--size", 300)
    for word in ("schön", "がぎぐ", "パリ", "안녕", "Über"):
        ids = tokenizer.encode(word)
        assert tokenizer.processor.decode(ids) == word and 0 not in ids
    capsys.readouterr()
    corpus.vocabulary(tokenizer)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("keep_accents", [True, False])
@pytest.mark.parametrize("lower_case", [True, False])
def test_no_piece_is_trained_that_never_occurs(text, tmp_path, keep_accents, lower_case):
    """The training text is treated as training treats it: no piece has a capital or an accent that is taken off."""
    flags = ["--keep_accents", keep_accents, "--lower_case", lower_case]
    tokenizer = make(text, "--output_dir", tmp_path / "v", "--size", 250, *flags)
    assert tokenizer.config["keep_accents"] == keep_accents and tokenizer.config["do_lower_case"] == lower_case
    pieces = [piece for piece in tokenizer.vocab if piece not in OFFICIAL]
    assert any(re.search("[äöüがピ]", piece) for piece in pieces) == keep_accents
    assert any(piece != piece.lower() for piece in pieces) != lower_case
    if not keep_accents:
        assert any("안" in piece for piece in pieces)  # Hangul has no accents


@pytest.mark.parametrize("flags", [[], ["--keep_accents", "False"], ["--lower_case", "True"], ["--kind", "wordpiece"]])
def test_transformers_gives_the_same_ids(text, tmp_path, flags):
    """AutoTokenizer on a checkpoint's copy of the vocabulary has the ids of training on lines of several scripts."""
    ours = make(text, "--output_dir", tmp_path / "v", "--size", 350, *flags)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "xlnet"}', encoding="utf-8")
    ours.save(tmp_path / "checkpoint")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    for line in text.read_text(encoding="utf-8").split("\n"):
        assert theirs.encode(line, add_special_tokens=False) == ours.encode(line)


def test_the_same_text_gives_the_same_vocabulary(text, tmp_path):
    """Two runs write the same bytes; the text in two files in another order gives the same pieces.

    Their scores may then differ in the last bits, because sums are taken in another order.
    """
    lines = text.read_text(encoding="utf-8").split("\n")
    (tmp_path / "a.txt").write_text("\n".join(lines[150:]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(lines[:150]), encoding="utf-8")
    tokenizers = []
    for name, files in (("v", [text]), ("w", [text]), ("x", [tmp_path / "a.txt", tmp_path / "b.txt"])):
        tokenizers.append(make(*files, "--output_dir", tmp_path / name, "--size", 300))
    first, second, in_two_files = tokenizers
    assert first.vocab_file.read_bytes() == second.vocab_file.read_bytes()
    assert set(in_two_files.vocab) == set(first.vocab)


@pytest.mark.parametrize("mark", ["", "▅", "\0"])
def test_no_line_is_dropped(tmp_path, mark):
    """A line of 120,000 characters trains pieces, and so do lines with characters at which SentencePiece drops them."""
    lines = f"{mark} zebra\n" * 100 if mark else "zebra " * 20_000
    (tmp_path / "my.txt").write_text((ROOT / "data.txt").read_text(encoding="utf-8") + lines, encoding="utf-8")
    tokenizer = make(tmp_path / "my.txt", "--output_dir", tmp_path / "v", "--size", 400)
    assert tokenizer.tokenize("zebra") == ["▁zebra"]


def test_the_largest_size_is_named(text, tmp_path, capsys):
    """The size that the message names works."""
    with pytest.raises(SystemExit):
        make(text, "--output_dir", tmp_path / "v", "--size", 100_000)
    most = int(re.search(r"--size 100000 is too large .* at most (\d+)", capsys.readouterr().err).group(1))
    assert len(make(text, "--output_dir", tmp_path / "v", "--size", most).vocab) == most


def test_the_smallest_size_is_named(text, tmp_path, capsys):
    """The size that the message names works."""
    with pytest.raises(SystemExit):
        make(text, "--output_dir", tmp_path / "v", "--size", 20)
    least = int(re.search(r"--size 20 is too small .* at least (\d+)", capsys.readouterr().err).group(1))
    assert len(make(text, "--output_dir", tmp_path / "v", "--size", least).vocab) == least


# ---------------------------------------------------------------- WordPiece


def test_word_piece_keeps_case_and_accents(text, tmp_path):
    """main.py takes it for cased, special pieces come first, and nothing in the text is unknown."""
    tokenizer = make(text, "--output_dir", tmp_path / "v", "--size", 600, "--kind", "wordpiece")
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert not tokenizer.config["do_lower_case"] and {"ü", "Ü"} <= {piece[-1] for piece in tokenizer.vocab}
    assert not any(tokenizer.vocab["[UNK]"] in tokenizer.encode(line) for line in LINES)


def test_word_piece_of_a_text_without_capitals_keeps_accents(tmp_path):
    """A Japanese text has no capital; main.py would take its vocabulary for lower-case and strip accents from kana."""
    (tmp_path / "my.txt").write_text("が ぎ か き がぎ かき です\n" * 50, encoding="utf-8")
    tokenizer = make(tmp_path / "my.txt", "--output_dir", tmp_path / "v", "--size", 60, "--kind", "wordpiece")
    assert not tokenizer.config["do_lower_case"]
    assert tokenizer.tokenize("がぎ") == ["がぎ"] and tokenizer.tokenize("かき") == ["かき"]


def test_word_piece_in_lower_case(text, tmp_path):
    """main.py takes it for lower-case, and no piece has a capital or an umlaut."""
    flags = ["--kind", "wordpiece", "--lower_case", "True", "--size", 400]
    tokenizer = make(text, "--output_dir", tmp_path / "v", *flags)
    assert tokenizer.config["do_lower_case"] and tokenizer.tokenize("ÜBER") == tokenizer.tokenize("uber")
    assert not any(re.search("[äöü]", piece) for piece in tokenizer.vocab)
    assert tokenizer.vocab["[UNK]"] not in tokenizer.encode("Wäldern schön")


# ---------------------------------------------------------------- the sample


def test_a_small_text_is_used_whole(tmp_path):
    """All lines but blank ones, in the order of files and lines; a byte-order mark is no text."""
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\u2028two\r\n", encoding="utf-8", newline="\n")
    (tmp_path / "b.txt").write_text("three\nfour", encoding="utf-8", newline="\n")
    assert sample([tmp_path / "a.txt", tmp_path / "b.txt"], 10**6) == ["one", "two\u2028two\r", "three", "four"]


def test_a_sample_is_even_and_within_the_limit(tmp_path):
    """Of 20,000 lines in files of 3 to 1, each tenth of the text gives a tenth of the sample, up to 5 deviations.

    Whole lines are drawn, in their order; long ones as often as short ones; the same at every call.
    """
    lines = [f"{i} {'x' * (i % 2 * 50)}" for i in range(20_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:15_000]) + "\n", encoding="utf-8", newline="\n")
    (tmp_path / "b.txt").write_text("\n".join(lines[15_000:]), encoding="utf-8", newline="\n")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    limit = sum(len(line) + 1 for line in lines) // 4
    drawn = sample(paths, limit)
    assert 0.95 * limit < sum(map(len, drawn)) <= limit
    numbers = [int(line.split(" ")[0]) for line in drawn]
    assert numbers == sorted(set(numbers)) and drawn == [lines[i] for i in numbers]
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    for tenth in range(10):
        assert abs(sum(i // 2000 == tenth for i in numbers) - 500) < 5 * deviation
    assert abs(sum(i % 2 for i in numbers) - len(numbers) / 2) < 5 * (len(numbers) / 4) ** 0.5
    assert sample(paths, limit) == drawn


def test_chance_does_not_break_the_limit(tmp_path, monkeypatch):
    """Where chance would draw every line, only as many as fit are taken."""

    class Always(random.Random):
        def random(self):
            return 0.0

    monkeypatch.setattr(make_vocabulary.random, "Random", Always)
    (tmp_path / "my.txt").write_text(f"{'x' * 1000}\n" * 20, encoding="utf-8")
    assert len(sample([tmp_path / "my.txt"], 7500)) == 7


def test_a_file_of_one_line_is_sampled(tmp_path, monkeypatch):
    """Parts of a line that no line end cuts are drawn evenly; together they are the line, cut at spaces."""
    monkeypatch.setattr(corpus, "CHUNK", 10_000)  # many chunks
    words = [f"w{i}" for i in range(100_000)]
    (tmp_path / "my.txt").write_text(" ".join(words), encoding="utf-8")
    with tqdm(disable=True) as progress:
        parts = list(make_vocabulary.read_lines(str(tmp_path / "my.txt"), progress))
    assert "".join(parts) == " ".join(words) and all(part.endswith(" ") for part in parts[:-1])
    assert max(map(len, parts)) <= make_vocabulary.PART
    drawn = sample([tmp_path / "my.txt"], (tmp_path / "my.txt").stat().st_size // 3)
    places = [int(part.split()[0][1:]) for part in drawn]
    assert 25 < len(drawn) < 75 and places == sorted(places)
    assert min(places) < 20_000 and max(places) > 60_000


def test_a_line_without_spaces_is_cut(tmp_path):
    """No character is lost, and none is split."""
    line = "がぎぐげご" * 3000
    parts = make_vocabulary.parts(line)
    assert "".join(parts) == line and [len(part) for part in parts] == [4096, 4096, 4096, 2712]
    assert make_vocabulary.parts("") == [""] and make_vocabulary.parts("a b") == ["a b"]


def test_memory_holds_the_sample_and_not_the_file(tmp_path):
    """Sampling 0.1 MB of 20 MB takes less than 8 MB at its peak; a chunk is 1 MB, for a while there are a few."""
    import tracemalloc

    (tmp_path / "my.txt").write_text(f"{'words ' * 100}\n" * 33_000, encoding="utf-8")
    tracemalloc.start()
    drawn = sample([tmp_path / "my.txt"], 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(drawn) > 100 and peak < 8e6


# ---------------------------------------------------------------- what it says


@pytest.mark.slow
def test_the_command_that_it_prints_works(text, tmp_path):
    """main.py trains with the vocabulary as the last line says; the fit is that of the whole text."""
    program = [sys.executable, make_vocabulary.__file__, str(text), "--output_dir", "my vocabulary", "--size", "300"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    _, fit, command = done.stdout.splitlines()
    tokenizer = corpus.load_tokenizer(tmp_path / "my vocabulary")
    lines = text.read_text(encoding="utf-8").split("\n")
    mean = sum(len(tokenizer.encode(line)) for line in lines) / sum(len(line.split()) for line in lines)
    assert "300 pieces" in fit and "0.00% of the pieces are unknown" in fit and f"{mean:.2f} pieces" in fit
    small = "--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 8 --num_predict 6 --n_layer 1 --train_steps 1"
    command = command.removeprefix("use it: ").replace("python main.py", f"{sys.executable} {ROOT / 'main.py'}")
    done = subprocess.run(f"{command} {small}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "0.0% unknown" in done.stdout


@pytest.mark.parametrize("platform, quoted", [("win32", r'"C:\my texts\a.txt"'), ("linux", r"'C:\my texts\a.txt'")])
def test_names_are_quoted_as_the_platform_does(platform, quoted):
    """A name with a space; a plain name gets no quotes."""
    assert make_vocabulary.command_line(["--data", r"C:\my texts\a.txt", "out"], platform) == f"--data {quoted} out"


def test_unknown_pieces_are_counted(tmp_path):
    """Half of the pieces of a text in another script are unknown: each word is its mark and an unknown piece."""
    tokenizer = make(ROOT / "data.txt", "--output_dir", tmp_path / "v", "--size", 300)
    line = make_vocabulary.fit(tokenizer, ["が ぎ", "ぐ"])
    assert "50.00% of the pieces are unknown" in line and "a word has 2.00 pieces" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("my.txt --size 1", ["--size", "'1'", "at least 20"]),
        ("my.txt --sample_mb 0", ["--sample_mb", "'0'"]),
        ("my.txt --keep_accents maybe", ["--keep_accents", "'maybe'", "True or False"]),
        ("my.txt --kind bpe", ["--kind", "bpe"]),
        ("nonesuch.txt", ["nonesuch.txt", "give a text file"]),
        ("folder", ["folder", "give a text file"]),
        ("empty.txt", ["empty.txt", "no line of text"]),
        ("latin.txt", ["latin.txt, line 2", "convert it to UTF-8"]),
        ("my.txt --output_dir full", ["--output_dir full", "spiece.model", "another folder"]),
        ("my.txt --output_dir words", ["--output_dir words", "vocab.txt", "another folder"]),
        ("my.txt --output_dir config", ["--output_dir config", "tokenizer_config.json"]),
        ("my.txt --output_dir my.txt", ["--output_dir my.txt", "give a folder"]),
        ("my.txt --kind wordpiece --keep_accents False", ["--keep_accents False", "--lower_case False", "leave"]),
        ("my.txt --size 9000", ["--size 9000", "too large", "at most"]),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, flags, words):
    """The line names the flag or file, its value and the remedy; exit status 2, no traceback, no vocabulary."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text((ROOT / "data.txt").read_text(encoding="utf-8"), encoding="utf-8")
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("latin.txt").write_bytes("one\nMünchen\n".encode("latin-1"))
    Path("folder").mkdir()
    for folder, name in (("full", "spiece.model"), ("words", "vocab.txt"), ("config", "tokenizer_config.json")):
        Path(folder).mkdir()
        Path(folder, name).touch()
    if "output_dir" not in flags:
        flags += " --output_dir new"
    with pytest.raises(SystemExit) as stop:
        make_vocabulary.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize("kind, package", [("sentencepiece", "sentencepiece"), ("wordpiece", "tokenizers")])
def test_a_missing_package_is_named(monkeypatch, kind, package):
    """The message has the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--kind {kind} .* pip install {package}"):
        make_vocabulary.require_package(package, kind)


def test_the_config_says_how_text_is_treated(text, tmp_path):
    """tokenizer_config.json beside the model has the two entries that main.py and transformers read."""
    make(text, "--output_dir", tmp_path / "v", "--size", 300)
    config = json.loads((tmp_path / "v" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == {"do_lower_case": False, "keep_accents": True}
