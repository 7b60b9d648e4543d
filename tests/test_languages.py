"""Other vocabularies and scripts: SentencePiece, WordPiece of one's own, and going on from a released model."""

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

import data_utils
import main
from test_readme import BLOCKS
from xlnet import XLNet

ROOT = Path(main.__file__).parent
SMALL = ("--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 6 --n_layer 2 --n_head 2 --d_head 4 "
         "--d_model 8 --d_inner 8").split()
SPECIAL = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]  # official ids 0 to 8


def readme_command(words):
    """Return the command of the README with such words in it, as the shell would take it."""
    [block] = [block for block in BLOCKS if words in block]
    return block


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder in which the README's two commands for a vocabulary of data.txt have been run."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data.txt").write_bytes((ROOT / "data.txt").read_bytes())
    for words in ("SentencePieceTrainer", "BertWordPieceTokenizer"):
        command = readme_command(words).replace("python ", f"{sys.executable} ", 1)
        subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    return folder


# ---------------------------------------------------------------- SentencePiece


def test_special_pieces_have_their_official_ids(own):
    tokenizer = data_utils.load_tokenizer(str(own / "spiece.model"))
    assert [tokenizer.processor.id_to_piece(i) for i in range(9)] == SPECIAL
    vocab = data_utils.vocabulary(tokenizer)
    assert vocab[:8] == (len(tokenizer.vocab), 4, 3, 5, 7, 0, 1, 2)
    starts = {tokenizer.processor.id_to_piece(int(i)) for i in np.flatnonzero(vocab.word_start)}
    assert {"<sep>", "▁the", ".", "("} <= starts and not {"s", "ing", "ed"} & starts


@pytest.mark.parametrize("text, pieces", [
    ("  the \t cat  ", "the cat"),
    ("``the'' cat", '"the" cat'),
    ("thé çat naïve Å", "the cat naive A"),
    ("ﬁve ½", "five 1⁄2"),
])
def test_text_is_treated_as_officially(own, text, pieces):
    """Spaces, quotes and accents: the pieces are those of the plain spelling."""
    tokenizer = data_utils.load_tokenizer(str(own))
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
    """With a model that has learnt pieces such as `0,` and `▁19,`, in the middle of a word and at its beginning."""
    lines = [f"in 19{n % 10},000 of 10,{n % 7}00, and 5, {n}, x{n % 3}0, " for n in range(300)]
    (tmp_path / "numbers.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "numbers.txt"), model_prefix=str(tmp_path / "numbers"), vocab_size=60,
        control_symbols=SPECIAL[3:8], hard_vocab_limit=False, minloglevel=2)
    tokenizer = data_utils.load_tokenizer(str(tmp_path / "numbers.model"))
    glued = 0
    for line in lines:
        plain = tokenizer.processor.encode(line.strip(), out_type=str)
        glued += sum(bool(re.fullmatch(r".*\d,", piece)) for piece in plain)
        pieces = tokenizer.tokenize(line)
        assert pieces == official_pieces(tokenizer.processor, line.strip())
        assert "".join(pieces) == "".join(plain) and not any(re.fullmatch(r".*\d,", piece) for piece in pieces)
    assert glued > 100


def test_lower_case_and_accents_as_transformers_config_says(own, tmp_path):
    """do_lower_case and keep_accents in the tokenizer_config.json beside the model; both go with a checkpoint."""
    (tmp_path / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    plain = data_utils.vocabulary(data_utils.load_tokenizer(str(tmp_path)))
    config = {"do_lower_case": True, "keep_accents": True, "tokenizer_class": "XLNetTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = data_utils.load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("The é") == tokenizer.processor.encode("the é", out_type=str)
    assert data_utils.vocabulary(tokenizer).digest != plain.digest  # another text in the cache
    (tmp_path / "saved").mkdir()
    data_utils.save_tokenizer(tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) == config


def test_ids_are_those_of_transformers(own, tmp_path):
    """Line by line on data.txt."""
    tokenizer = data_utils.load_tokenizer(str(own / "spiece.model"))
    data_utils.save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("XLNetTokenizer")
    lines = [line for line in (ROOT / "data.txt").read_text().splitlines() if line]
    ours = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line)) for line in lines]
    assert len(lines) > 100 and ours == [theirs.encode(line, add_special_tokens=False) for line in lines]


def test_a_run_and_its_checkpoint(own, tmp_path, capsys):
    """A whole run with a vocabulary of one's own: documents end with <eod>; transformers takes model and tokenizer."""
    flags = [*SMALL, "--data", str(own / "data.txt"), "--tokenizer", str(own / "spiece.model")]
    main.main([*flags, "--num_step", "2", "--output_dir", str(tmp_path / "out")])
    first = capsys.readouterr().out.splitlines()[0]
    tokens = int(re.search(r"([\d,]+) tokens, 0\.\d% unknown", first).group(1).replace(",", ""))
    tokenizer = data_utils.load_tokenizer(str(own / "spiece.model"))
    lines = (ROOT / "data.txt").read_text().split("\n")[:-1]
    assert tokens == sum(len(tokenizer.tokenize(line)) if line else 1 for line in lines)

    checkpoint = main.checkpoints(tmp_path / "out")[0]
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
    main.main([*SMALL, "--data", str(own / "data.txt"), "--tokenizer", str(own / "vocab.txt"), "--train_steps", "2"])
    assert " 0.0% unknown" in capsys.readouterr().out
    assert data_utils.vocabulary(data_utils.load_tokenizer(str(own / "vocab.txt"))).size == 800


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
    """A few hundred lines: ids of the vocabulary, the share of unknown pieces told, a warning if it is large."""
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(" ".join(rng.choice(SCRIPTS[script], 3)) + "\n" * (1 + (n % 20 == 0)) for n in range(300)))
    name = str(own / tokenizer) if tokenizer.endswith("model") else tokenizer
    metrics = main.main([*SMALL, "--data", str(path), "--tokenizer", name, "--train_steps", "5"])
    out, err = capsys.readouterr()
    assert 0 < metrics["cost"] < 12
    loaded = data_utils.load_tokenizer(name)
    vocab = data_utils.vocabulary(loaded)
    text = data_utils.read_text([str(path)], loaded, vocab, main.settle({}).cache_dir)
    assert text.ids.max() < vocab.size
    share = (text.ids == vocab.unk_id).mean()
    assert f" {share:.1%} unknown" in out
    assert (f"--tokenizer {name} does not know {share:.1%}" in err and "README" in err) == (share > 0.05)


def test_a_vocabulary_of_the_text_knows_it(own, tmp_path, capsys):
    """The remedy that the warning names."""
    (tmp_path / "data.txt").write_text("".join("\n".join(lines) + "\n" for lines in SCRIPTS.values()) * 40)
    command = readme_command("SentencePieceTrainer").replace("python ", f"{sys.executable} ", 1)
    command = re.sub(r"vocab_size=\d+", "vocab_size=150", command)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    main.main([*SMALL, "--data", str(tmp_path / "data.txt"), "--tokenizer", str(tmp_path / "spiece.model"),
               "--train_steps", "1"])
    out, err = capsys.readouterr()
    assert float(re.search(r"([\d.]+)% unknown", out).group(1)) < 1 and err == ""


# ---------------------------------------------------------------- a released model


@pytest.fixture(scope="module")
def released(own, tmp_path_factory):
    """A folder in the format of xlnet-base-cased, but small: made by transformers, config.json as published."""
    folder = tmp_path_factory.mktemp("released")
    size = data_utils.vocabulary(data_utils.load_tokenizer(str(own / "spiece.model"))).size
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=4, d_inner=64)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["XLNetLMHeadModel"], "attn_type": "bi", "bi_data": False, "bos_token_id": 1, "clamp_len": -1,
        "d_head": 8, "d_inner": 64, "d_model": 32, "dropout": 0.1, "end_n_top": 5, "eos_token_id": 2,
        "ff_activation": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-12, "mem_len": None,
        "model_type": "xlnet", "n_head": 4, "n_layer": 2, "pad_token_id": 5, "reuse_len": None, "same_length": False,
        "start_n_top": 5, "summary_activation": "tanh", "summary_last_dropout": 0.1, "summary_type": "last",
        "summary_use_proj": True, "untie_r": True, "vocab_size": size,
    }))
    (folder / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    return folder


def test_continued_pretraining(released, own, tmp_path, capsys):
    """300 steps on other text: the held-out cost falls; transformers loads the result, logits within 1e-5."""
    lines = (ROOT / "data.txt").read_text().splitlines()
    (tmp_path / "valid.txt").write_text("\n".join(lines[:20]))
    (tmp_path / "domain.txt").write_text("\n".join(lines[20:]))
    flags = ["--init_checkpoint", str(released), "--data", str(tmp_path / "domain.txt"), "--valid",
             str(tmp_path / "valid.txt"), *"--seq_len 64 --reuse_len 32 --perm_size 32 --num_predict 10".split()]
    main.main([*flags, "--train_steps", "300", "--eval_steps", "100", "--output_dir", str(tmp_path / "out")])
    held_out = [float(cost) for cost in re.findall(r"Validation cost = (\S+)", capsys.readouterr().out)]
    untouched = main.main([*flags, "--learning_rate", "0", "--train_steps", "1"])
    assert len(held_out) == 3 and held_out[-1] < untouched["validation_cost"] - 0.5

    checkpoint = main.checkpoints(tmp_path / "out")[0]
    assert json.loads((checkpoint / "config.json").read_text())["ff_activation"] == "gelu"
    model = XLNet.from_pretrained(checkpoint).eval()
    assert (model.mem_len, model.reuse_len) == (384, 32)  # null as published: the flags' values
    theirs = transformers.XLNetLMHeadModel.from_pretrained(checkpoint).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(checkpoint)(lines[30], return_tensors="pt")
    with torch.no_grad():
        logits = model(inputs["input_ids"].t())[0].transpose(0, 1)
        torch.testing.assert_close(logits, theirs(inputs["input_ids"]).logits, rtol=0, atol=1e-5)


def test_weights_in_the_older_format(released, tmp_path):
    """pytorch_model.bin, as the models were first published; it is loaded as tensors, or not at all."""
    expected = XLNet.from_pretrained(released, mem_len=4, reuse_len=4).state_dict()
    (tmp_path / "config.json").write_bytes((released / "config.json").read_bytes())
    theirs = transformers.XLNetLMHeadModel.from_pretrained(released).state_dict()
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    found = XLNet.from_pretrained(tmp_path, mem_len=4, reuse_len=4).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected | found)
    torch.save({"where": tmp_path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        XLNet.from_pretrained(tmp_path, mem_len=4, reuse_len=4)


@pytest.mark.parametrize("flags, words", [
    ("--init_checkpoint {released} --tokenizer bert-base-uncased", ["--init_checkpoint", "800", "30522"]),
    ("--init_checkpoint {released} --tokenizer {other}", ["--init_checkpoint", "800", "500"]),
    ("--init_checkpoint {bert} --tokenizer {own}/spiece.model", ["--init_checkpoint", "30522", "800"]),
    ("--tokenizer {own}/data.model", ["--tokenizer", "not a SentencePiece model"]),
])
def test_wrong_pairs_are_refused(released, own, tmp_path, capsys, flags, words):
    """One line with both sizes."""
    if "{other}" in flags:
        sentencepiece.SentencePieceTrainer.train(
            input=str(own / "data.txt"), model_prefix=str(tmp_path / "other"), vocab_size=500,
            control_symbols=SPECIAL[3:8], user_defined_symbols=["<eop>"], minloglevel=2)
    if "{bert}" in flags:
        main.main([*SMALL, "--train_steps", "1", "--output_dir", str(tmp_path / "bert")])
    (own / "data.model").write_text("this is no model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(flags.format(released=released, own=own, other=tmp_path / "other.model",
                               bert=tmp_path / "bert" / "checkpoint-1").split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words)


def test_without_the_package(own, capsys, monkeypatch):
    """Only who has such a model needs sentencepiece, and is told so."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["--tokenizer", str(own / "spiece.model")])
    assert stop.value.code == 2 and "pip install sentencepiece" in capsys.readouterr().err
    assert main.main([*SMALL, "--train_steps", "1"])["step"] == 1
