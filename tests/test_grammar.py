"""benchmarks/grammar.py: its pairs against rules written down once more, and its scores against naive computations."""

import itertools
import re
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import main
from support import UserError, corpus
from xlnet import XLNet

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import grammar

DATA = str(Path(main.__file__).parent / "data.txt")
NEGATION = {  # the paradigms without twins: how often each word is right, and wrong
    "not any": ({"not": 100, "never": 100}, {"also": 200}),
    "no ... any": ({"No": 200}, {"This": 100, "Each": 100}),
}

# Rules that right sentences obey and wrong ones break, written without a look at the templates.
ONE, MANY = r"(?!men\b)\w*[^s\W]", r"(?:\w+s|men)"  # a noun, in the singular and in the plural
DONE = r"(?:\w+ed|made|seen)"  # participles
DO = rf"(?!{DONE}\b)(?:\w*[^s\W]|pass)"  # plain forms of verbs
GIVES = r"(?:gives|provides|brings|requires|shows|increases)"
MODAL = "(?:can|could|may|might|must|should|will|would)"
VOWEL = "(?:honest|[aeiou](?<!u))"  # "useful" and "united" begin with a consonant
PERSON = "(?:men|women|officers|citizens|farmers|workers)"
MASS = "(?:money|information|attention|progress|gold|confidence|wealth|relief)"
RULES = {
    "subject, verb": rf"The (?:{ONE} (?:is|was|has)|{MANY} (?:are|were|have)) .*",
    "subject, phrase, verb": rf"The (?:{ONE} (?:of|from) the {MANY} (?:is|was|has)|"
    rf"{MANY} (?:of|from) the {ONE} (?:are|were|have)) .*",
    "subject, relative clause, verb": rf"The (?:{ONE} wh(?:ich|o) (?:the {MANY} \w+|\w+ the {MANY}) (?:is|was|has)|"
    rf"{MANY} wh(?:ich|o) (?:the {ONE} \w+|\w+ the {ONE}) (?:are|were|have)) .*",
    "there is, there are": rf"There (?:(?:is|was) (?:a(?! {VOWEL})|one|no) \w+ {ONE}|"
    rf"(?:are|were) (?:some|many|two|three|no) \w+ {MANY}) in .*",
    "itself, themselves": rf"The (?:{ONE} \w+ \w+ itself|{MANY} \w+ \w+ themselves)\.",
    "ourselves, themselves": r"(?:We .* ourselves|They .* themselves|I .* myself|He .* himself) .*",
    "its own, their own": rf"The (?:{ONE} \w+ \w+ its|{MANY} \w+ \w+ their) own \w+\.",
    "this, these": rf".*\b(?i:this {ONE}|these {MANY})\b.*",
    "this new, these new": rf".*\b(?i:this \w+ {ONE}|these \w+ {MANY})\b.*",
    "one, many": rf".* (?:(?:one|each|every|another) {ONE}|(?:two|three|several|many) {MANY})\.",
    "many, much": rf".* (?:much {MASS}|many (?!{MASS}){MANY}) in .*",
    "a, an": rf".* (?i:an {VOWEL}|a (?!{VOWEL})).*",
    "has made, will make": rf".* (?:ha[sd] (?:(?:also|now|never|always) )?{DONE}|{MODAL} (?:\w+ )?{DO}) the .*",
    "has it made, did it make": rf"(?:Ha[sd] the \w+ {DONE}|(?i:did|{MODAL}) the \w+ {DO}) the \w+\?",
    "will give, now gives": rf"The \w+ (?:{MODAL} {DO}|(?!{MODAL})\w+ {GIVES}) \w+\.",
    "is changing, has changed": r"The \w+ (?:(?:is|was) \w+ing|(?:has|had) \w+ed) the \w+\.",
    "of changing, to change": r".* (?:of \w+ing|to (?!\w+ing)\w+) the \w+\.",
    "they, them": r".* (?:they|we|he|I) would .*|.* (?:them|us|him|me) to .*",
    "who, which": rf"The (?:{PERSON} who|(?!{PERSON})\w+ which) .*",
    "more than, as as": r".* (?:more \w+ than|is as \w+ as) that .*",
    "both and, either or": r"(?:Both .* and|Either .* or|Neither .* nor) .*",
    "not any": r".* (?:not|never) .* any .*",
    "no ... any": r"No .* any .*",
}


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.load_tokenizer("bert-base-uncased")


@pytest.fixture(scope="module")
def some_items(tokenizer):
    """Two pairs of each paradigm, in pieces."""
    return [grammar.encode(pair, tokenizer) for name in grammar.PARADIGMS for pair in grammar.make_pairs(name)[:2]]


def make_xlnet(**options):
    """Return a small XLNet with weights large enough to look at its input."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, d_head=4, d_model=8, d_inner=16, init="normal", init_std=0.5)
    return XLNet(30522, **shape | options).eval()


def make_bert(**options):
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=16)
    config = transformers.BertConfig(vocab_size=30522, initializer_range=0.5, **shape | options)
    return transformers.BertForMaskedLM(config).eval()


@pytest.fixture
def two_paradigms(monkeypatch):
    """Leave two paradigms, for speed: an / a and a / an; not, never / also, 100 pairs each."""
    monkeypatch.setattr(grammar, "PARADIGMS", {name: grammar.PARADIGMS[name] for name in ("a, an", "not any")})


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("paradigm", grammar.PARADIGMS)
def test_pairs_differ_in_one_word_of_one_piece(paradigm, tokenizer):
    """A paradigm has 200 distinct pairs; their sentences differ in one word, a single piece in both."""
    pairs = grammar.make_pairs(paradigm)
    assert len(set(pairs)) == len(pairs) == grammar.N_PAIRS == 200
    assert pairs == grammar.make_pairs(paradigm)
    for pair in pairs:
        right, wrong = pair.sentence(pair.right), pair.sentence(pair.wrong)
        assert re.fullmatch(r"[A-Z]\w*( \w+)+[.?]", right)
        assert [a != b for a, b in zip(right.split(), wrong.split(), strict=True)].count(True) == 1
        item = grammar.encode(pair, tokenizer)
        for word, ids in ((pair.right, item.right), (pair.wrong, item.wrong)):
            assert ids == tokenizer.encode(pair.sentence(word))
            assert tokenizer.convert_ids_to_tokens([ids[item.position]]) == [word.lower()]


@pytest.mark.parametrize("paradigm", grammar.PARADIGMS)
def test_right_sentences_obey_the_rule_and_wrong_ones_break_it(paradigm):
    """Each right sentence matches the paradigm's rule; no wrong one does."""
    for pair in grammar.make_pairs(paradigm):
        assert re.fullmatch(RULES[paradigm], pair.sentence(pair.right)), pair
        assert not re.fullmatch(RULES[paradigm], pair.sentence(pair.wrong)), pair


@pytest.mark.parametrize("paradigm", grammar.PARADIGMS)
def test_each_word_is_right_as_often_as_wrong(paradigm):
    """Knowing how frequent words are does not help; in the paradigms of negation it helps in half of the pairs."""
    pairs = grammar.make_pairs(paradigm)
    right, wrong = Counter(pair.right for pair in pairs), Counter(pair.wrong for pair in pairs)
    assert (right, wrong) == NEGATION.get(paradigm, (right, right))
    assert (paradigm in grammar.NEGATION) == (paradigm in NEGATION)


def test_the_misleading_noun_has_the_other_number():
    """Across a phrase or a relative clause, the noun next to the verb would ask for the wrong verb."""
    pairs = grammar.make_pairs("subject, phrase, verb") + grammar.make_pairs("subject, relative clause, verb")
    for pair in pairs:
        nouns = [word for word in pair.before.split() if word.lower() not in ("the", "of", "from", "which", "who")]
        assert nouns[0].endswith(("s", "men")) == (pair.right in ("are", "were", "have"))
        is_plural = [word.endswith("s") for word in nouns[1:] if not word.endswith("ed")]
        assert is_plural == [pair.right in ("is", "was", "has")]


def test_all_words_are_single_pieces(tokenizer):
    """Every word of the lists and of the templates is a piece of the vocabulary."""
    entries = [
        *itertools.chain(*grammar.WORDS.values()),
        *" ".join(itertools.chain(*grammar.PARADIGMS.values())).split(),
    ]
    words = {
        word.lower()
        for entry in entries
        if entry.strip("*~") not in grammar.WORDS
        for word in re.split(r"[*~/>_]", entry)
    }
    assert len(words) > 300
    assert [word for word in words - {""} if word not in tokenizer.vocab] == []


def test_templates_as_documented():
    """The example in the docstrings: an entry for each word, then both twins; ~ takes the other form."""
    entries = [
        ("", "the"),
        ("", "law/laws"),
        ("", "of"),
        ("~", "state/states"),
        ("*", "is/are"),
        ("", "new"),
        ("", "."),
    ]
    assert grammar.make_pair(entries, 0) == ("The law of states ", "is", "are", " new.")
    assert grammar.make_pair(entries, 1) == ("The laws of state ", "are", "is", " new.")
    assert grammar.make_pair([("*", "no>this"), ("", "law/laws"), ("", ".")], 1) == ("", "No", "This", " laws.")


def test_a_vocabulary_that_splits_a_word(tmp_path):
    """A pair whose words have several pieces is refused, in one line that names the model."""
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n##n\nlaw\n")
    own = corpus.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"own=out: .* piece for each of 'an' and 'a'; give a model"):
        grammar.encode_all([grammar.Pair("law ", "an", "a", " law")], own, "own=out")


# ---------------------------------------------------------------- scores


class Oracle:
    """A stand-in for XLNet that gives the right words of some pairs the logit `sign`, from the context alone."""

    def __init__(self, items, sign):
        self.sign = sign
        self.answers = defaultdict(list)  # some contexts have two: is, was
        for item in items:
            self.answers[self.context(item.right, item.position)].append(item.right[item.position])

    @staticmethod
    def context(ids, position):
        return (*ids[:position], None, *ids[position + 1 :])

    def __call__(self, inp_k, perm_mask, target_mapping, inp_q):
        logits = torch.zeros(1, inp_k.size(1), 30522)
        for row, (ids, position) in enumerate(zip(inp_k.t().tolist(), target_mapping[0].tolist(), strict=True)):
            logits[0, row, self.answers[self.context(ids, position)]] = self.sign
        return logits, None


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_a_model_that_prefers_right_words(tokenizer, sign, expected):
    """The accuracy is 1 for a model that prefers right words, 0 for one that prefers wrong ones, 1/2 for neither."""
    for paradigm in grammar.PARADIGMS:
        items = [grammar.encode(pair, tokenizer) for pair in grammar.make_pairs(paradigm)]
        oracle = Oracle(items, sign)
        scores = grammar.score_words(items, lambda *batch, model=oracle: grammar.xlnet_logits(model, *batch), 0)
        assert grammar.accuracy(scores) == expected


def test_scores_of_xlnet_are_those_of_a_pass_for_each_word(some_items, monkeypatch):
    """A batch gives log p(right) - log p(wrong) of single passes, with a mask written out, to float32's rounding.

    reuse_len is shorter than a sentence: it must not split one.
    """
    monkeypatch.setattr(grammar, "BATCH", 5)
    model = make_xlnet(reuse_len=3, mem_len=4)
    scores = grammar.score_words(some_items, lambda *batch: grammar.xlnet_logits(model, *batch), 100)
    for score, item in zip(scores, some_items, strict=True):
        log_p = []
        for ids in (item.right, item.wrong):
            n, position = len(ids), item.position
            perm_mask, one_hot, inp_q = torch.zeros(n, n, 1), torch.zeros(1, n, 1), torch.zeros(n, 1)
            perm_mask[:, position] = one_hot[0, position] = inp_q[position] = 1
            inp_k = torch.tensor(ids)[:, None]
            with torch.no_grad():
                logits, _ = model(inp_k, torch.zeros_like(inp_k), None, None, perm_mask, one_hot, inp_q)
            log_p.append(logits[0, 0].log_softmax(dim=0)[ids[position]].item())
        assert score == pytest.approx(log_p[0] - log_p[1], abs=1e-4)
    assert scores.std() > 0.1  # a model that knows nothing would agree with anything


def test_scores_of_xlnet_are_those_of_transformers(some_items, tmp_path):
    """XLNetLMHeadModel, with the same mask, has the same scores to 1e-4."""
    model = make_xlnet()
    model.save_pretrained(tmp_path)
    theirs = transformers.XLNetLMHeadModel.from_pretrained(tmp_path).eval()
    scores = grammar.score_words(some_items, lambda *batch: grammar.xlnet_logits(model, *batch), 100)
    for score, item in zip(scores, some_items, strict=True):
        n, position = len(item.right), item.position
        perm_mask, target_mapping = torch.zeros(1, n, n), torch.zeros(1, 1, n)
        perm_mask[:, :, position] = target_mapping[0, 0, position] = 1
        with torch.no_grad():
            logits = theirs(torch.tensor([item.right]), perm_mask=perm_mask, target_mapping=target_mapping).logits[0, 0]
        assert score == pytest.approx((logits[item.right[position]] - logits[item.wrong[position]]).item(), abs=1e-4)


def test_the_word_in_the_input_does_not_leak(some_items):
    """Whatever stands in place of the word, XLNet's scores are the same to the last bit; another context moves them."""
    model = make_xlnet()

    def logits_at(ids, position):
        seen.append(ids)
        return grammar.xlnet_logits(model, ids, position)

    seen = []
    first, second = (grammar.score_words(some_items, logits_at, hidden_id) for hidden_id in (100, 2003))
    assert np.array_equal(first, second)
    assert not torch.equal(seen[0], seen[len(seen) // 2])
    other = [grammar.Encoded([1999, *item.right], [1999, *item.wrong], item.position + 1) for item in some_items]
    assert not np.isclose(grammar.score_words(other, logits_at, 100), first).any()


@pytest.mark.parametrize("bert_marks", [False, True])
def test_scores_of_bert(tmp_path, tokenizer, bert_marks):
    """A BERT has [MASK] in place of the word, and the marks around the sentence if they are asked for."""
    bert = make_bert()
    bert.save_pretrained(tmp_path)
    pairs = [grammar.make_pairs(paradigm)[0] for paradigm in grammar.PARADIGMS]
    scores = grammar.load_scorer(f"bert={tmp_path}", str(tmp_path), bert_marks)(pairs)
    for score, pair in zip(scores, pairs, strict=True):
        pieces = tokenizer.tokenize(pair.before) + ["[MASK]"] + tokenizer.tokenize(pair.after)
        if bert_marks:
            pieces = ["[CLS]", *pieces, "[SEP]"]
        with torch.no_grad():
            logits = bert(torch.tensor([tokenizer.convert_tokens_to_ids(pieces)])).logits
        log_p = logits[0, pieces.index("[MASK]")].log_softmax(dim=0)
        right, wrong = tokenizer.convert_tokens_to_ids([pair.right.lower(), pair.wrong.lower()])
        assert score == pytest.approx((log_p[right] - log_p[wrong]).item(), abs=1e-4)
    assert scores.std() > 0.1


def test_scores_of_sentences(some_items):
    """The log-probabilities of all pieces count; one that depends on the piece alone is right in half of the pairs."""
    scores = grammar.score_sentences(some_items, lambda ids: np.arange(len(ids)) * np.array(ids))
    for score, item in zip(scores, some_items, strict=True):
        assert score == item.position * (item.right[item.position] - item.wrong[item.position])


def test_frequencies_score_one_half(tokenizer):
    """A model that knows only how frequent words are scores 50% in each paradigm with twins."""
    log_p = np.random.default_rng(0).standard_normal(30522)
    for paradigm in grammar.PARADIGMS.keys() - NEGATION.keys():
        items = [grammar.encode(pair, tokenizer) for pair in grammar.make_pairs(paradigm)]
        assert grammar.accuracy(grammar.score_sentences(items, lambda ids: log_p[ids])) == 0.5


# ---------------------------------------------------------------- the command line


def test_table_and_csv(tmp_path, capsys, monkeypatch, two_paradigms, tokenizer):
    """The newest checkpoint of a run, a BERT and a 5-gram model have a column each; the file has the same numbers."""
    for step, bias in ((9, 1000), (10, -1000)):  # the older one always says "also", the newer one never
        model = make_xlnet()
        model.lm_loss.bias.data[tokenizer.vocab["also"]] = bias
        model.lm_loss.bias.data[tokenizer.vocab["an"]] = bias
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        model.save_pretrained(folder)
        tokenizer.save(folder)
    bert = make_bert()
    bert.cls.predictions.bias.data[[tokenizer.vocab["also"], tokenizer.vocab["an"]]] = 1000
    bert.save_pretrained(tmp_path / "bert")

    class FiveGram:
        def __init__(self, ids, n_token):
            assert (len(ids), n_token) == (4015, 30522)  # of data.txt

        def log_probs(self, ids):
            likely = ("never", "an important")
            text = " ".join(tokenizer.convert_ids_to_tokens(ids))
            return np.full(len(ids), -1.0 if any(words in text for words in likely) else -2.0)

    monkeypatch.setitem(sys.modules, "neighbours", types.SimpleNamespace(FiveGram=FiveGram))
    file = tmp_path / "grammar.csv"
    models = [f"ours={tmp_path / 'out'}", f"bert={tmp_path / 'bert'}"]
    grammar.benchmark([*models, "--five_gram", DATA, "--csv", str(file)])
    shown = {name: grammar.show(grammar.make_pairs(name)[0]) for name in grammar.PARADIGMS}
    assert re.fullmatch(r"The \w+ has \*not/also\* \w+ any \w+\.", shown["not any"])
    important = sum(pair.after.startswith(" important") for pair in grammar.make_pairs("a, an"))
    assert important > 0
    five_gram = 50 + important / 4  # percent; the other pairs are ties
    assert capsys.readouterr().out.splitlines() == [
        "Accuracy in percent, 200 pairs a paradigm; chance is 50.",
        "",
        "| paradigm | example: *right/wrong* | ours | bert | 5-gram |",
        "|---|---|---|---|---|",
        f"| a, an | {shown['a, an']} | 50.0 | 50.0 | {five_gram:.1f} |",
        f"| not any | {shown['not any']} | 100.0 | 0.0 | 75.0 |",  # not/also are ties
        f"| mean without the two of negation | | 50.0 | 50.0 | {five_gram:.1f} |",
    ]
    assert file.read_text().splitlines() == [
        "paradigm,model,accuracy",
        '"a, an",ours,0.5000',
        '"a, an",bert,0.5000',
        f'"a, an",5-gram,{five_gram / 100:.4f}',
        "not any,ours,1.0000",
        "not any,bert,0.0000",
        "not any,5-gram,0.7500",
    ]


def test_pairs_are_printed(capsys):
    """--pairs prints every pair once, under the name of its paradigm."""
    grammar.benchmark(["--pairs"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("/" in line for line in lines) == grammar.N_PAIRS * len(grammar.PARADIGMS) == 4600
    assert all(name in lines for name in grammar.PARADIGMS)
    assert len(grammar.PARADIGMS) == len(RULES)


def test_mistakes(tmp_path, capsys, two_paradigms, tokenizer):
    """Each mistake gets one line that names the argument, the value and the remedy, and exit status 2."""
    small, headless, empty, other = (tmp_path / name for name in ("small", "headless", "empty", "other"))
    for folder in (small, empty, other):
        folder.mkdir()
    XLNet(100, n_layer=1, n_head=1, d_head=4, d_model=8, d_inner=16).save_pretrained(small)
    tokenizer.save(small)
    make_bert().bert.save_pretrained(headless)
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    missing = tmp_path / "missing"
    for argv, message in [
        ([], "no model; give NAME=FOLDER, --five_gram TEXT, or --pairs"),
        (["out"], "NAME=FOLDER: 'out' will not do; give NAME=FOLDER"),
        (["a=b", "a=c"], "NAME=FOLDER: two models are called a; give each"),
        (["5-gram=b", "--five_gram", DATA], "NAME=FOLDER: two models are called 5-gram"),
        ([f"a={missing}"], f"a={missing}"),
        ([f"a={empty}"], "config.json"),
        ([f"a={other}"], f"a={other}: config.json is not that of an XLNet"),
        ([f"a={small}"], f"a={small}: the model has 100 pieces and vocab.txt 30522; put its own vocabulary into"),
        ([f"a={headless}"], f"a={headless}: {headless} lacks the weights cls."),
        (["--five_gram", str(missing)], f"--five_gram {missing}"),
    ]:
        with pytest.raises(SystemExit) as error:
            grammar.benchmark(argv)
        captured = capsys.readouterr()
        [line] = [line for line in captured.err.splitlines() if line.startswith("grammar.py: error: ")]
        assert (error.value.code, captured.out) == (2, "")
        assert message in line
        assert "Traceback" not in captured.err


def test_a_csv_that_cannot_be_written(tmp_path):
    """The line names --csv and the file."""
    with pytest.raises(UserError, match="--csv .*no/grammar.csv: No such file .*; give a file"):
        grammar.write_csv(str(tmp_path / "no" / "grammar.csv"), {})
