"""Other vocabularies and scripts: SentencePiece, your own WordPiece, and training that continues a released model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
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
    """A folder with data.txt and two vocabularies of it, spiece.model and vocab.txt."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data.txt").write_bytes((ROOT / "data.txt").read_bytes())
    symbols = ["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"]
    train_sentence_piece(ROOT / "data.txt", folder / "spiece", 800, user_defined_symbols=symbols)
    word_pieces = tokenizers.BertWordPieceTokenizer()
    word_pieces.train(str(ROOT / "data.txt"), vocab_size=800, show_progress=False)
    word_pieces.save_model(str(folder))
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
    (tmp_path / "numbers.txt").write_text("\n".join(lines), encoding="utf-8")
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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = corpus.load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("The é") == tokenizer.processor.encode("the é", out_type=str)
    assert corpus.vocabulary(tokenizer).digest != plain.digest  # another text in the cache
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = corpus.load_tokenizer(tmp_path / "saved")
    assert again.config == config and corpus.vocabulary(again).digest == corpus.vocabulary(tokenizer).digest


@pytest.mark.parametrize("content", ["[1]", "not JSON", '"keep_accents"'])
def test_a_config_that_is_no_object_is_named(own, tmp_path, content):
    (tmp_path / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer_config.json is not a JSON object"):
        corpus.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- the tokenizer that transformers loads


LINES = {
    "latin": [
        "Über den Wäldern (nördlich von Köln) lag 1,5 m Schnee.",
        "„Ärger“, sagte er, ``müde'' und 'süß'; 10,000 Jahre, 19, 20, und 3.",
        "Der Fuß – außen grün, innen weiß – maß ½ Elle (¼ davon: 2,25 €).",
        "  Öl\tund \u00a0Fett:\x1c £5, 7,50 und 1,000,000… e\u0301te\u0302\u0301, cafe\u0301! Ａ\u0301",
    ],
    "cyrillic": [
        "Ёжик ушёл в лес (в 19,5 км), й не вернулся.",
        "«Щука» плыла, 10,000 лет — и ещё 3, 4, 5.",
        "У рі\u0301чки їжак і є ґанок. ЙОД и\u0306",
    ],
    "greek": [
        "Ο Οδυσσέας έφυγε (10,000 μίλια), ΠΡΟΣ ΤΟΥΣ ΦΙΛΟΥΣ ΤΟΥ.",
        "Τα ΝΕΑ: 5, 6, ώρες· «άνοιξη» ῥόδον.",
        "ΣΑΣ, Σ. ΟΔΌΣ ΟΔΟΣ\u0301 Σ'ΑΓΑΠΩ",
    ],
    "hebrew": ["בְּרֵאשִׁית בָּרָא אֱלֹהִים (10,000).", "שלום עולם, 5, 6 ימים."],
    "arabic": ["الصُّبْحُ جَمِيلٌ، مُحَمَّد (10,000)", "م\u0651\u064eد م\u064e\u0651 آ ا\u0653"],
    "indic": ["\u0940\u200b हिन्दी में (10,000) लिखो, 5, 6।", "\u0e33\u200b น้ำใส (10,000 ลิตร)"],
    "han": [
        "早晨河上起了雾（第10,000天）。",
        "他走进树林，再也没有回来，5, 6。",
        "我們等了很久「魚」沒有來，ＡＢＣ１２３。",
    ],
    "kana": ["がぎぐげご、ばびぶ（10,000円）です。", "パリのピザはデリシャス、5, 6個。", "か\u3099ｶﾞﾊﾟ ガラス〜～窓"],
    "hangul": [
        "안녕하세요 (10,000원), 반갑습니다.",
        "오늘은 날씨가 좋네요, 5, 6시.",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8 한국 “책”",
    ],
}


def mixed_lines():
    """Return LINES, and lines of words drawn from all of them."""
    rng = np.random.default_rng(0)
    lines = [line for script in LINES.values() for line in script]
    words = " ".join(lines).split(" ")
    return lines + [" ".join(rng.choice(words, 12)) for _ in range(300)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two models of mixed_lines(): one whose normalizer folds case, and one as in the README."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text("\n".join(mixed_lines()), encoding="utf-8")
    symbols = ["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"]
    options = {"user_defined_symbols": symbols, "character_coverage": 0.99, "hard_vocab_limit": False}
    for rule in ("nmt_nfkc", "nmt_nfkc_cf"):
        train_sentence_piece(folder / "text.txt", folder / rule, 500, normalization_rule_name=rule, **options)
    return folder


def saved(model, folder, config=None):
    """Return the tokenizer of a model with a tokenizer_config.json, and transformers' one of its checkpoint."""
    (folder / "spiece.model").write_bytes(model.read_bytes())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = corpus.load_tokenizer(folder)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text('{"model_type": "xlnet"}', encoding="utf-8")
    ours.save(folder / "checkpoint")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "checkpoint")


def lines_that_differ(ours, theirs, lines):
    return [line for line in lines if theirs.encode(line, add_special_tokens=False) != ours.encode(line)]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("keep_accents", [False, True])
@pytest.mark.parametrize("do_lower_case", [False, True])
def test_ids_are_those_of_transformers(world, tmp_path, rule, keep_accents, do_lower_case):
    """Lines of many scripts have the ids that transformers gives them: quotes, numbers, parentheses, loose accents."""
    config = {"keep_accents": keep_accents, "do_lower_case": do_lower_case}
    ours, theirs = saved(world / f"{rule}.model", tmp_path, config)
    assert len(theirs) == len(ours.vocab) and theirs.get_vocab() == ours.vocab
    assert not lines_that_differ(ours, theirs, mixed_lines())


def test_ids_of_the_page_of_text_are_those_of_transformers(own, tmp_path):
    """With the documented vocabulary data.txt has the ids of transformers, and special pieces have their names."""
    ours, theirs = saved(own / "spiece.model", tmp_path)
    lines = (ROOT / "data.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 100 and not lines_that_differ(ours, theirs, lines)
    names = ("unk", "bos", "eos", "cls", "sep", "pad", "mask")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == list(range(7))


def test_transformers_puts_the_marks_of_xlnet(own, tmp_path):
    """A sequence ends in <sep> <cls>; the second one of a pair is segment 1, <cls> is segment 2; padding is left."""
    ours, theirs = saved(own / "spiece.model", tmp_path)
    sep, cls, pad = 4, 3, 5
    the, of = ours.encode("the"), ours.encode("of")
    assert theirs("the")["token_type_ids"] == [0] * (len(the) + 1) + [2]
    pair = theirs("the", "of")
    assert pair["input_ids"] == [*the, sep, *of, sep, cls]
    assert pair["token_type_ids"] == [0] * (len(the) + 1) + [1] * (len(of) + 1) + [2]
    assert theirs(["the", "the of"], padding=True)["input_ids"][0] == [pad] * len(of) + [*the, sep, cls]
    assert theirs.decode(ours.encode("the end (of it).")) == "the end (of it)."


def test_a_comma_after_digits_is_a_piece_for_transformers(tmp_path):
    """Pieces such as `19,` are never chosen; where they are half of a vocabulary, most lines have the ids of training.

    Others differ because training cuts at such a piece before it looks for the pieces around it.
    """
    lines = [f"in 19{n % 10},000 of 10,{n % 7}00, and 5, {n}, x{n % 3}0, " for n in range(300)]
    (tmp_path / "numbers.txt").write_text("\n".join(lines), encoding="utf-8")
    train_sentence_piece(tmp_path / "numbers.txt", tmp_path / "numbers", 60, hard_vocab_limit=False)
    ours, theirs = saved(tmp_path / "numbers.model", tmp_path)
    assert any(re.fullmatch(r".*\d,", piece) for piece in ours.vocab)
    assert not any(re.fullmatch(r".*\d,", piece) for line in lines for piece in theirs.tokenize(line))
    assert len(lines_that_differ(ours, theirs, lines)) < 75


def test_a_tokenizer_json_beside_the_model_is_kept(own, tmp_path):
    """A released tokenizer.json and the entries of its tokenizer_config.json reach the checkpoint as they were."""
    config = {"model_max_length": 512, "tokenizer_class": "XLNetTokenizer", "keep_accents": True}
    released = json.dumps({"version": "theirs"})
    (tmp_path / "tokenizer.json").write_text(released, encoding="utf-8")
    (tmp_path / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "checkpoint").mkdir()
    corpus.load_tokenizer(tmp_path).save(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8") == released
    kept = json.loads((tmp_path / "checkpoint" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert kept == config | {"do_lower_case": False}


def test_a_tokenizer_json_follows_its_config(world, tmp_path):
    """A checkpoint whose keep_accents was edited gives training and transformers the same ids again."""
    _, theirs = saved(world / "nmt_nfkc.model", tmp_path, {"keep_accents": False})
    lines = [line for line in mixed_lines() if "ü" in line]
    config_file = tmp_path / "checkpoint" / "tokenizer_config.json"
    config_file.write_text(
        config_file.read_text(encoding="utf-8").replace('"keep_accents": false', '"keep_accents": true'),
        encoding="utf-8",
    )
    ours = corpus.load_tokenizer(tmp_path / "checkpoint")
    assert lines and lines_that_differ(ours, theirs, lines) == lines
    (tmp_path / "next").mkdir()
    ours.save(tmp_path / "next")
    assert not lines_that_differ(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "next"), lines)


def test_a_model_that_a_tokenizer_json_cannot_express_is_told(own, tmp_path, capsys):
    """A BPE model runs, with a warning and without a tokenizer.json that would be wrong."""
    train_sentence_piece(own / "data.txt", tmp_path / "spiece", 300, model_type="bpe")
    tokenizer = corpus.load_tokenizer(tmp_path)
    corpus.vocabulary(tokenizer)
    [line] = capsys.readouterr().err.splitlines()
    assert f"--tokenizer {tmp_path}/spiece.model is no unigram model" in line
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "config, warned", [(None, True), ({"do_lower_case": True}, True), ({"keep_accents": 0}, False)]
)
def test_accents_that_are_lost_are_told(world, tmp_path, capsys, config, warned):
    """Pieces with accents that no text can show give one line with the remedy, unless the config decides it."""
    (tmp_path / "spiece.model").write_bytes((world / "nmt_nfkc.model").read_bytes())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    corpus.vocabulary(corpus.load_tokenizer(tmp_path))
    err = capsys.readouterr().err
    assert err.count("\n") == warned
    assert all((word in err) == warned for word in ("keep_accents", "tokenizer_config.json", "stripped", str(tmp_path)))


def test_a_wordpiece_vocabulary_without_pad(tmp_path):
    """transformers adds no piece whose id the model lacks, and refuses to pad."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "the", "cat"]), encoding="utf-8")
    (tmp_path / "saved").mkdir()
    corpus.load_tokenizer(tmp_path).save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "xlnet"}', encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == 5 and theirs("the cat")["input_ids"] == [1, 3, 4, 2]
    with pytest.raises(ValueError, match="padding token"):
        theirs(["the", "the cat"], padding=True)


def test_a_line_is_encoded_as_a_whole(tmp_path):
    """Pieces that cross spaces survive on the way to the cache: the ids are those of each line, not of its words."""
    lines = [f"of the cat {n}, in the end of the day" for n in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
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
    lines = (ROOT / "data.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert tokens == sum(len(tokenizer.tokenize(line)) if line else 1 for line in lines)

    checkpoint = checkpoints(tmp_path / "out")[0]
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
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
    path.write_text(
        "".join(" ".join(rng.choice(SCRIPTS[script], 3)) + "\n" * (1 + (n % 20 == 0)) for n in range(300)),
        encoding="utf-8",
    )
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
    assert (f"--tokenizer {name} does not know {share:.1%}" in err and "make_vocabulary" in err) == (share > 0.05)


def test_a_vocabulary_of_the_text_knows_it(own, tmp_path, capsys):
    """The remedy that the warning names works: under 1% unknown pieces, and no warning."""
    (tmp_path / "data.txt").write_text(
        "".join("\n".join(lines) + "\n" for lines in SCRIPTS.values()) * 40, encoding="utf-8"
    )
    program = [sys.executable, ROOT / "examples" / "make_vocabulary.py", "data.txt"]
    words = ["--output_dir", "vocabulary", "--size", "150"]
    subprocess.run([*program, *words], cwd=tmp_path, check=True, capture_output=True)
    flags = f"--data {tmp_path}/data.txt --tokenizer {tmp_path}/vocabulary --train_steps 1"
    main.main([*SMALL, *flags.split()])
    out, err = capsys.readouterr()
    assert float(re.search(r"([\d.]+)% unknown", out).group(1)) < 1
    assert err == ""


# ---------------------------------------------------------------- a released model


@pytest.fixture(scope="module")
def released(own, tmp_path_factory):
    """A small model in the format of xlnet-base-cased: made by transformers, config.json as published."""
    folder = tmp_path_factory.mktemp("released")
    size = corpus.vocabulary(corpus.load_tokenizer(str(own / "spiece.model"))).size
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=4, d_inner=64)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(PUBLISHED) | {"vocab_size": size}), encoding="utf-8")
    (folder / "spiece.model").write_bytes((own / "spiece.model").read_bytes())
    return folder


@pytest.mark.slow
def test_continued_pretraining(released, own, tmp_path, capsys):
    """After 300 steps on other text the validation loss is lower; transformers computes the same logits to 1e-5."""
    lines = (ROOT / "data.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "valid.txt").write_text("\n".join(lines[:20]), encoding="utf-8")
    (tmp_path / "domain.txt").write_text("\n".join(lines[20:]), encoding="utf-8")
    flags = (
        f"--init_checkpoint {released} --data {tmp_path}/domain.txt --valid {tmp_path}/valid.txt "
        "--seq_len 64 --reuse_len 32 --perm_size 32 --num_predict 10"
    ).split()
    main.main([*flags, "--train_steps", "300", "--eval_steps", "100", "--output_dir", str(tmp_path / "out")])
    held_out = [float(loss) for loss in re.findall(r"Validation loss = (\S+)", capsys.readouterr().out)]
    untouched = main.main([*flags, "--learning_rate", "0", "--train_steps", "1"])
    assert len(held_out) == 4 and held_out[0] == pytest.approx(untouched["validation_loss"], abs=1e-6)
    assert held_out[-1] < held_out[0] - 0.5

    checkpoint = checkpoints(tmp_path / "out")[0]
    assert json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["ff_activation"] == "gelu"
    model = XLNet.from_pretrained(checkpoint).eval()
    assert (model.mem_len, model.reuse_len) == (48, 32)  # null as published: the flags' values
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
    (own / "data.model").write_text("this is no model", encoding="utf-8")
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
