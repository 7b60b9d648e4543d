"""Other vocabularies and scripts: SentencePiece, your own WordPiece, and training that continues a released model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

import main
from support import corpus
from support.checkpoint import checkpoints
from support.flags import default_cache_dir
from xlnet import XLNet

ROOT = Path(main.__file__).parent
SMALL = (
    "--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 6 --n_layer 2 --n_head 2 --d_head 4 "
    "--d_model 8 --d_inner 8"
).split()
SPECIAL = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]  # official ids 0 to 8
PUBLISHED = """{
    "architectures": ["XLNetLMHeadModel"], "attn_type": "bi", "bi_data": false, "bos_token_id": 1, "clamp_len": -1,
    "d_head": 8, "d_inner": 64, "d_model": 32, "dropout": 0.1, "end_n_top": 5, "eos_token_id": 2,
    "ff_activation": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-12, "mem_len": null,
    "model_type": "xlnet", "n_head": 4, "n_layer": 2, "pad_token_id": 5, "reuse_len": null, "same_length": false,
    "start_n_top": 5, "summary_activation": "tanh", "summary_last_dropout": 0.1, "summary_type": "last",
    "summary_use_proj": true, "untie_r": true
}"""  # config.json of xlnet-base-cased as published, but for its sizes


def documented_command(words):
    """Return the one command in the README and docs/ with such words in it, as the shell takes it."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.S | re.M)]
    [command] = [block for block in blocks if words in block]
    return command.replace("python ", f"{sys.executable} ", 1)


def train_sentence_piece(text_file, prefix, vocab_size, **options):
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(prefix),
        vocab_size=vocab_size,
        control_symbols=SPECIAL[3:8],
        minloglevel=2,
        **options,
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder in which the two documented commands have made vocabularies of data.txt."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data.txt").write_bytes((ROOT / "data.txt").read_bytes())
    for words in ("SentencePieceTrainer", "BertWordPieceTokenizer"):
        subprocess.run(documented_command(words), shell=True, cwd=folder, check=True, capture_output=True)
    return folder


# ---------------------------------------------------------------- SentencePiece


def test_special_pieces_have_their_official_ids(own):
    """Special pieces have the ids 0 to 8 of the released models; pieces with the mark and punctuation start words."""
    tokenizer = corpus.load_tokenizer(str(own / "spiece.model"))
    assert tokenizer.convert_ids_to_tokens(range(9)) == SPECIAL
    vocab = corpus.vocabulary(tokenizer)
    assert vocab[:8] == (len(tokenizer.vocab), 4, 3, 5, 7, 0, 1, 2)
    starts = set(tokenizer.convert_ids_to_tokens(np.flatnonzero(vocab.word_start)))
    assert {"<sep>", "▁the", ".", "("} <= starts and not {"s", "ing", "ed"} & starts


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("  the \t cat  ", "the cat"),
        ("``the'' cat", '"the" cat'),
        ("thé çat naïve Å", "the cat naive A"),
        ("ﬁve ½", "five 1⁄2"),
    ],
)
def test_text_is_treated_as_officially(own, text, pieces):
    """A text with odd spaces, quotes or accents has the pieces of its plain spelling."""
    tokenizer = corpus.load_tokenizer(str(own))
    assert tokenizer.tokenize(text) == tokenizer.processor.encode(pieces, out_type=str)


def official_pieces(processor, text):
    """encode_pieces of the official prepro_utils.py, step by step, with a comma after a digit split off."""
    result = []
    for piece in processor.encode(text, out_type=str):
        if not re.fullmatch(r".*\d,", piece):
            result.append(piece)
            continue
        again = processor.encode(piece[:-1].replace("▁", ""), out_type=str)
        if piece[0] != "▁" and again[0][0] == "▁":
            if len(again[0]) == 1:
                del again[0]
            else:
                again[0] = again[0][1:]
        result += again + [","]
    return result


def test_a_comma_after_digits_is_a_piece(tmp_path):
    """A model that has learnt pieces such as `0,` and `▁19,`, inside and at the beginning of words, loses them."""
    lines = [f"in 19{n % 10},000 of 10,{n % 7}00, and 5, {n}, x{n % 3}0, " for n in range(300)]
    (tmp_path / "numbers.txt").write_text("\n".join(lines))
    train_sentence_piece(tmp_path / "numbers.txt", tmp_path / "numbers", 60, hard_vocab_limit=False)
    tokenizer = corpus.load_tokenizer(str(tmp_path / "numbers.model"))
    glued = 0
    for line in lines:
        plain = tokenizer.processor.encode(line.strip(), out_type=str)
        glued += sum(bool(re.fullmatch(r".*\d,", piece)) for piece in plain)
        pieces = tokenizer.tokenize(line)
        assert pieces == official_pieces(tokenizer.processor, line.strip())
        assert "".join(pieces) == "".join(plain) and not any(re.fullmatch(r".*\d,", piece) for piece in pieces)
    assert glued > 100


def test_lower_case_and_accents_as_transformers_config_says(own, tmp_path):
    """The tokenizer_config.json beside the model sets do_lower_case and keep_accents; a checkpoint keeps both."""
    (tmp_path / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    plain = corpus.vocabulary(corpus.load_tokenizer(str(tmp_path)))
    config = {"do_lower_case": True, "keep_accents": True, "tokenizer_class": "XLNetTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = corpus.load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("The é") == tokenizer.processor.encode("the é", out_type=str)
    assert corpus.vocabulary(tokenizer).digest != plain.digest  # another text in the cache
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) == config


def test_ids_are_those_of_transformers(own, tmp_path):
    """Every line of data.txt has the ids that transformers gives it."""
    tokenizer = corpus.load_tokenizer(str(own / "spiece.model"))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("XLNetTokenizer")
    lines = [line for line in (ROOT / "data.txt").read_text().splitlines() if line]
    ours = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line)) for line in lines]
    assert len(lines) > 100 and ours == [theirs.encode(line, add_special_tokens=False) for line in lines]


def test_a_line_is_encoded_as_a_whole(tmp_path):
    """Pieces that cross spaces survive on the way to the cache: the ids are those of each line, not of its words."""
    lines = [f"of the cat {n}, in the end of the day" for n in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = {"split_by_whitespace": False, "hard_vocab_limit": False}
    train_sentence_piece(tmp_path / "text.txt", tmp_path / "crossing", 60, **options)
    tokenizer = corpus.load_tokenizer(tmp_path / "crossing.model")
    vocab = corpus.vocabulary(tokenizer)
    assert any("▁" in piece[1:] for piece in tokenizer.tokenize(lines[0]))
    text = corpus.read_text([tmp_path / "text.txt"], tokenizer, vocab, tmp_path / "cache")
    assert text.ids.tolist() == [i for line in lines for i in tokenizer.encode(line)]


def test_what_transformers_is_told_of_special_pieces(own):
    """transformers' XLNet tokenizer puts <cls> last; the marks of a sequence are <s> and </s>."""
    vocab = corpus.vocabulary(corpus.load_tokenizer(str(own / "spiece.model")))
    expected = {"summary_type": "last", "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2}
    assert vocab.hugging_face_config() == expected


@pytest.mark.slow
def test_a_run_and_its_checkpoint(own, tmp_path, capsys):
    """A whole run with your own vocabulary: documents end with <eod>; transformers loads model and tokenizer."""
    flags = [*SMALL, "--data", str(own / "data.txt"), "--tokenizer", str(own / "spiece.model")]
    main.main([*flags, "--num_step", "2", "--output_dir", str(tmp_path / "out")])
    first = capsys.readouterr().out.splitlines()[0]
    tokens = int(re.search(r"([\d,]+) tokens, 0\.\d% unknown", first).group(1).replace(",", ""))
    tokenizer = corpus.load_tokenizer(str(own / "spiece.model"))
    lines = (ROOT / "data.txt").read_text().split("\n")[:-1]
    assert tokens == sum(len(tokenizer.tokenize(line)) if line else 1 for line in lines)

    checkpoint = checkpoints(tmp_path / "out")[0]
    config = json.loads((checkpoint / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [5, 1, 2]
    assert config["summary_type"] == "last"
    model = XLNet.from_pretrained(checkpoint).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(theirs) is transformers.XLNetLMHeadModel
    inputs = transformers.AutoTokenizer.from_pretrained(checkpoint)(lines[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(inputs["input_ids"].t())[0].transpose(0, 1)
        torch.testing.assert_close(logits, theirs.eval()(inputs["input_ids"]).logits, rtol=0, atol=1e-5)
    main.main(["--output_dir", str(tmp_path / "out"), "--resume", "--num_step", "3"])


def test_wordpiece_of_ones_own(own, tmp_path, capsys):
    """A run with a WordPiece vocabulary made from its text knows every piece of the text."""
    main.main([*SMALL, "--data", str(own / "data.txt"), "--tokenizer", str(own / "vocab.txt"), "--train_steps", "2"])
    assert " 0.0% unknown" in capsys.readouterr().out
    assert corpus.vocabulary(corpus.load_tokenizer(str(own / "vocab.txt"))).size == 800


# ---------------------------------------------------------------- other scripts


SCRIPTS = {
    "latin": ["Été à Zürich: «où naît le cœur»?", "Ağaçların gölgesinde ılık bir rüzgâr.", "Žluťoučký kůň úpěl ódy."],
    "cyrillic": ["Утром над рекой стоял туман.", "Ёжик ушёл в лес, й не вернулся.", "Щука плыла, а мы ждали."],
    "han": ["早晨河上起了雾。", "他走进树林，再也没有回来。", "我們等了很久，魚沒有來。"],
    "arabic": ["في الصباحِ كان الضبابُ فوق النهر.", "دخل الولدُ الغابةَ ولم يعد.", "انتظرنا طويلاً، ولم تأتِ السمكة."],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("tokenizer", ["bert-base-uncased", "bert-base-cased", "spiece.model"])
def test_every_script_runs(own, tmp_path, capsys, script, tokenizer):
    """On a few hundred lines all ids are legal; the share of unknown pieces is printed, with a warning if large."""
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(" ".join(rng.choice(SCRIPTS[script], 3)) + "\n" * (1 + (n % 20 == 0)) for n in range(300)))
    name = str(own / tokenizer) if tokenizer.endswith("model") else tokenizer
    metrics = main.main([*SMALL, "--data", str(path), "--tokenizer", name, "--train_steps", "5"])
    out, err = capsys.readouterr()
    assert 0 < metrics["loss"] < 12
    loaded = corpus.load_tokenizer(name)
    vocab = corpus.vocabulary(loaded)
    text = corpus.read_text([str(path)], loaded, vocab, default_cache_dir())
    assert text.ids.max() < vocab.size
    share = (text.ids == vocab.unk_id).mean()
    assert f" {share:.1%} unknown" in out
    assert (f"--tokenizer {name} does not know {share:.1%}" in err and "README" in err) == (share > 0.05)


def test_a_vocabulary_of_the_text_knows_it(own, tmp_path, capsys):
    """The remedy that the warning names works: under 1% unknown pieces, and no warning."""
    (tmp_path / "data.txt").write_text("".join("\n".join(lines) + "\n" for lines in SCRIPTS.values()) * 40)
    command = re.sub(r"vocab_size=\d+", "vocab_size=150", documented_command("SentencePieceTrainer"))
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    flags = f"--data {tmp_path}/data.txt --tokenizer {tmp_path}/spiece.model --train_steps 1"
    main.main([*SMALL, *flags.split()])
    out, err = capsys.readouterr()
    assert float(re.search(r"([\d.]+)% unknown", out).group(1)) < 1 and err == ""


# ---------------------------------------------------------------- a released model


@pytest.fixture(scope="module")
def released(own, tmp_path_factory):
    """A small model in the format of xlnet-base-cased: made by transformers, config.json as published."""
    folder = tmp_path_factory.mktemp("released")
    size = corpus.vocabulary(corpus.load_tokenizer(str(own / "spiece.model"))).size
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=4, d_inner=64)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(PUBLISHED) | {"vocab_size": size}))
    (folder / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    return folder


@pytest.mark.slow
def test_continued_pretraining(released, own, tmp_path, capsys):
    """After 300 steps on other text the validation loss is lower; transformers computes the same logits to 1e-5."""
    lines = (ROOT / "data.txt").read_text().splitlines()
    (tmp_path / "valid.txt").write_text("\n".join(lines[:20]))
    (tmp_path / "domain.txt").write_text("\n".join(lines[20:]))
    flags = (
        f"--init_checkpoint {released} --data {tmp_path}/domain.txt --valid {tmp_path}/valid.txt "
        "--seq_len 64 --reuse_len 32 --perm_size 32 --num_predict 10"
    ).split()
    main.main([*flags, "--train_steps", "300", "--eval_steps", "100", "--output_dir", str(tmp_path / "out")])
    held_out = [float(loss) for loss in re.findall(r"Validation cost = (\S+)", capsys.readouterr().out)]
    untouched = main.main([*flags, "--learning_rate", "0", "--train_steps", "1"])
    assert len(held_out) == 3 and held_out[-1] < untouched["validation_loss"] - 0.5

    checkpoint = checkpoints(tmp_path / "out")[0]
    assert json.loads((checkpoint / "config.json").read_text())["ff_activation"] == "gelu"
    model = XLNet.from_pretrained(checkpoint).eval()
    assert (model.mem_len, model.reuse_len) == (384, 32)  # null as published: the flags' values
    theirs = transformers.XLNetLMHeadModel.from_pretrained(checkpoint).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(checkpoint)(lines[30], return_tensors="pt")
    with torch.no_grad():
        logits = model(inputs["input_ids"].t())[0].transpose(0, 1)
        torch.testing.assert_close(logits, theirs(inputs["input_ids"]).logits, rtol=0, atol=1e-5)


def test_weights_in_the_older_format(released, tmp_path):
    """A pytorch_model.bin, the first published format, is loaded as tensors, or not at all."""
    expected = XLNet.from_pretrained(released, mem_len=4, reuse_len=4).state_dict()
    (tmp_path / "config.json").write_bytes((released / "config.json").read_bytes())
    theirs = transformers.XLNetLMHeadModel.from_pretrained(released).state_dict()
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    found = XLNet.from_pretrained(tmp_path, mem_len=4, reuse_len=4).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected | found)
    torch.save({"where": tmp_path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        XLNet.from_pretrained(tmp_path, mem_len=4, reuse_len=4)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--init_checkpoint {released} --tokenizer bert-base-uncased", ["--init_checkpoint", "800", "30522"]),
        ("--init_checkpoint {released} --tokenizer {other}", ["--init_checkpoint", "800", "500"]),
        ("--init_checkpoint {bert} --tokenizer {own}/spiece.model", ["--init_checkpoint", "30522", "800"]),
        ("--tokenizer {own}/data.model", ["--tokenizer", "not a SentencePiece model"]),
    ],
)
def test_wrong_pairs_are_refused(released, own, tmp_path, capsys, flags, words):
    """A model and a vocabulary of different sizes give one line with both sizes."""
    if "{other}" in flags:
        train_sentence_piece(own / "data.txt", tmp_path / "other", 500, user_defined_symbols=["<eop>"])
    if "{bert}" in flags:
        main.main([*SMALL, "--train_steps", "1", "--output_dir", str(tmp_path / "bert")])
    (own / "data.model").write_text("this is no model")
    capsys.readouterr()
    folders = {"released": released, "own": own, "other": tmp_path / "other.model"}
    flags = flags.format(**folders, bert=tmp_path / "bert" / "checkpoint-1")
    with pytest.raises(SystemExit) as stop:
        main.main(flags.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words)


def test_without_the_package(own, capsys, monkeypatch):
    """Only a SentencePiece model needs the package, and the message says how to install it."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["--tokenizer", str(own / "spiece.model")])
    assert stop.value.code == 2 and "pip install sentencepiece" in capsys.readouterr().err
    assert main.main([*SMALL, "--train_steps", "1"])["step"] == 1
