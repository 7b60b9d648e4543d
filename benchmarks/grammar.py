"""Test the grammar of a checkpoint with minimal pairs of a right and a wrong sentence, as BLiMP does.

    python benchmarks/corpus.py
    python main.py --data corpus/train.txt --output_dir out --train_steps 6000
    python benchmarks/grammar.py ours=out bert=FOLDER --five_gram corpus/train.txt --csv grammar.csv
    python benchmarks/grammar.py --pairs

The two sentences of a pair differ in one word: "the laws of the state are clear", "the laws of the state is clear". A
model passes if it gives the right word the higher probability; a tie counts half. Each paradigm tests one rule of
grammar with 200 pairs made from templates; the pairs are always the same. Chance is 50%. If pairs were independent, the
standard error of one accuracy would be at most 3.5 points; pairs from one template share words, so it is larger.

The words are frequent: each occurs at least 50 times in the training text of corpus.py. Most paradigms consist of
twins, two pairs in which the right and the wrong word change places. With twins, a model that always prefers the same
word scores 50%. The two paradigms of negation have no twins: such a model scores anything from 0 to 100%, but 50% if it
prefers the more frequent word. Therefore the mean leaves them out.

FOLDER is a checkpoint, a run (its newest checkpoint is used), a Hugging Face XLNet, or a BertForMaskedLM. No model
reads anything before or after a sentence.

XLNet     predicts the word from the rest of the sentence, with the query stream, as in examples/fill_blank.py. No
          position sees the word, so [MASK] in its place would change nothing, even for models trained with [MASK].
BERT      reads [MASK] in place of the word. --bert_marks puts [CLS] and [SEP] around the sentence, as in the training
          of the released BERTs; the BERTs of benchmarks/neighbours.py are trained without these marks.
5-gram    neighbours.FiveGram counts the word pieces of TEXT, and compares the probabilities of whole sentences.

Source: BLiMP, Warstadt et al. 2020, arXiv:1912.00582. Templates and words are our own.
"""

import argparse
import csv
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import UserError, checkpoint, corpus, flags, mistakes_in_one_line
from support.corpus import Tokenizer
from xlnet import XLNet

N_PAIRS = 200  # in each paradigm
BATCH = 64  # sentences in a forward pass
TOKENIZER = "bert-base-uncased"  # of the 5-gram model, and of a folder that holds no vocabulary

# Lists of words that templates draw from. An entry a/b holds two forms: a for one twin, b for the other. _ is a space.
LISTS = {
    # nouns and adjectives
    "AGENT": "congress president senate house committee government commission secretary convention nation",
    # not the subject of a verb whose agreement is tested:
    # "the committee have" is grammatical in older and in British English
    "GROUP": "state/states nation/nations government/governments committee/committees court/courts city/cities "
    "department/departments officer/officers citizen/citizens company/companies leader/leaders bank/banks",
    "PERSON": "man/men officer/officers citizen/citizens leader/leaders farmer/farmers worker/workers judge/judges",
    "THING": "law/laws bill/bills treaty/treaties measure/measures plan/plans program/programs report/reports "
    "policy/policies system/systems tax/taxes agreement/agreements proposal/proposals amendment/amendments",
    "LAW": "law bill treaty measure plan program policy system tax agreement",
    "LAWS": "laws bills treaties measures plans programs policies systems taxes agreements",
    "REPUBLIC": "country/countries state/states city/cities island/islands republic/republics "
    "territory/territories system/systems",
    "PLACE": "country world south north west east union district territory nation",
    "VALUE": "value force effect purpose object strength character place",
    "HELP": "help relief money confidence strength work progress power wealth security",
    "GOOD": "important necessary useful new great effective complete sufficient wise just clear difficult good",
    "LONG": "important necessary useful effective difficult essential satisfactory valuable dangerous favorable",
    "NEW": "new great good clear special general wise large just full",  # all begin with a consonant
    "STRONG": "important necessary useful great effective good strong",
    # verbs
    "BE": "is/are was/were",
    "ACCEPTED": "accepted approved adopted received proposed rejected required established",
    "ACCEPT": "accept approve adopt receive propose support reduce extend change",
    "MODAL": "will can must should may would could might",
    "DEFEND": "protect defend help support improve strengthen prepare save",
    "KEEP": "keep lose achieve show prove reach retain serve",
    "HELPED": "helped served saved protected supported",
    "NEEDED": "received needed required sought",
    # a cue decides both twins: the first form of one word requires the first form of another
    "SOME": "a/some a/many one/two one/three no",
    "MANY": "one/two one/three each/several every/many another/several each/many",
    "PEOPLE/LAWS": "men/laws officers/measures citizens/programs farmers/treaties workers/banks women/reforms",
    "REPORTS/MONEY": "reports/money laws/information proposals/attention programs/progress vessels/gold "
    "agreements/confidence ships/wealth schools/relief",
    "HONEST/FAIR": "honest/fair important/great effective/strong early/late open/free old/new easy/hard "
    "immediate/prompt earnest/serious American/foreign independent/British excellent/good extensive/full",
    "HAS/WILL": "has/will has/can has/must has/should has/may had/would had/could",
    "HAS/DID": "has/did has/will has/can had/did had/would had/could",
    "MADE/MAKE": "made/make passed/pass adopted/adopt approved/approve established/establish maintained/maintain "
    "improved/improve received/receive required/require proposed/propose accepted/accept considered/consider "
    "supported/support reduced/reduce extended/extend seen/see",
    "WILL/NOW": "will/now can/also must/still should/already may/always might/again would/now could/also",
    "GIVE/GIVES": "give/gives provide/provides bring/brings require/requires show/shows increase/increases",
    "IS/HAS": "is/has was/had",
    "CHANGING/CHANGED": "changing/changed reducing/reduced improving/improved maintaining/maintained "
    "extending/extended developing/developed increasing/increased enforcing/enforced",
    "CHANGING/CHANGE": "changing/change reducing/reduce improving/improve maintaining/maintain extending/extend "
    "developing/develop increasing/increase enforcing/enforce establishing/establish making/make passing/pass",
    "HOPED/ASKED": "hoped/asked believed/urged said/told felt/directed knew/invited thought/advised",
    "THEY/THEM": "they/them we/us he/him I/me",
    # other
    "ALSO": "also now never always",
    "RIGHT": "right power duty means authority opportunity privilege",
    "AT-HOME": "at_home in_peace in_war this_year",
}
WORDS = {name: entries.split() for name, entries in LISTS.items()}

# Each word of a template names a list to draw from, or is an entry itself. * marks the word in which the sentences of a
# pair differ; *a>b means that a is right and b is wrong in every pair. ~ takes the other form than the rest of the
# sentence, so that the noun next to the verb misleads.
PARADIGMS = {
    "subject, verb": (
        "the THING *BE GOOD .",
        "the PERSON *has/have ACCEPTED the LAW .",
    ),
    "subject, phrase, verb": (
        "the THING of the ~GROUP *BE GOOD .",
        "the THING from the ~GROUP *has/have been GOOD .",
    ),
    "subject, relative clause, verb": (
        "the THING which the ~GROUP ACCEPTED *BE GOOD .",
        "the PERSON who ACCEPTED the ~THING *has/have served the PLACE .",
    ),
    "there is, there are": ("there *BE SOME NEW THING in the PLACE .",),
    "itself, themselves": ("the REPUBLIC MODAL DEFEND *itself/themselves .",),
    "ourselves, themselves": (
        "we/they MODAL DEFEND *ourselves/themselves AT-HOME .",
        "I/he MODAL DEFEND *myself/himself AT-HOME .",
    ),
    "its own, their own": ("the THING MODAL KEEP *its/their own VALUE .",),
    "this, these": (
        "the AGENT ACCEPTED this/these *THING .",
        "this/these *THING MODAL help the PLACE .",
    ),
    "this new, these new": (
        "the AGENT ACCEPTED this/these NEW *THING .",
        "this/these NEW *THING MODAL help the PLACE .",
    ),
    "one, many": ("the AGENT ACCEPTED MANY *THING .",),
    "many, much": ("the AGENT NEEDED *many/much REPORTS/MONEY in the PLACE .",),
    "a, an": ("the AGENT ACCEPTED *an/a HONEST/FAIR LAW .",),
    "has made, will make": (
        "the AGENT HAS/WILL *MADE/MAKE the LAW .",
        "the AGENT HAS/WILL ALSO *MADE/MAKE the LAW .",
    ),
    "has it made, did it make": ("HAS/DID the AGENT *MADE/MAKE the LAW ?",),
    "will give, now gives": ("the LAW WILL/NOW *GIVE/GIVES HELP .",),
    "is changing, has changed": ("the AGENT IS/HAS *CHANGING/CHANGED the LAW .",),
    "of changing, to change": ("the AGENT has the RIGHT of/to *CHANGING/CHANGE the LAW .",),
    "they, them": ("the AGENT HOPED/ASKED *THEY/THEM would/to ACCEPT the LAW .",),
    "who, which": ("the PEOPLE/LAWS *who/which HELPED the PLACE are STRONG .",),
    "more than, as as": ("this LAW is more/as LONG *than/as that LAW .",),
    "both and, either or": (
        "both/either the AGENT *and/or the AGENT ACCEPTED the LAW .",
        "both/neither the AGENT *and/nor the AGENT ACCEPTED the LAW .",
    ),
    "not any": (
        "the AGENT has *not>also ACCEPTED any LAWS .",
        "the AGENT has *never>also ACCEPTED any LAWS .",
    ),
    "no ... any": (
        "*no>this AGENT has ACCEPTED any LAWS .",
        "*no>each AGENT has ACCEPTED any LAWS .",
    ),
}

NEGATION = ("not any", "no ... any")  # without twins

# ---------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """A right and a wrong sentence, which differ in one word."""

    before: str  # with the space before the word
    right: str
    wrong: str
    after: str

    def sentence(self, word: str) -> str:
        return self.before + word + self.after


class Encoded(NamedTuple):
    """The word pieces of a pair."""

    right: list[int]  # ids of the right sentence
    wrong: list[int]  # ids of the wrong sentence, the same number
    position: int  # where the two differ


def make_pairs(paradigm: str) -> list[Pair]:
    """Return the N_PAIRS pairs of a paradigm, all distinct, the same number from each template."""
    rng = random.Random(paradigm)  # so a new paradigm leaves the others as they are
    templates = PARADIGMS[paradigm]
    pairs: list[Pair] = []
    for template in templates:
        found: dict[Pair, None] = {}  # an ordered set
        while len(found) < N_PAIRS // len(templates):
            entries = draw(template, rng)
            twins = dict.fromkeys([make_pair(entries, 0), make_pair(entries, 1)])
            if found.keys().isdisjoint(twins):  # both new, else a word would be right more often than wrong
                found.update(twins)
        pairs += found
    return pairs


def draw(template: str, rng: random.Random) -> list[tuple[str, str]]:
    """Return the mark, or "", and an entry for each word of a template; no entry of a list is drawn twice.

    "the THING *BE new ." -> ("", "the"), ("", "law/laws"), ("*", "is/are"), ("", "new"), ("", ".")
    """
    drawn: list[tuple[str, str]] = []
    for word in template.split():
        mark = word[0] if word[0] in "*~" else ""
        entry = word.removeprefix(mark)
        if entry in WORDS:
            used = {entry for _, entry in drawn}
            entry = rng.choice([each for each in WORDS[entry] if each not in used])
        drawn.append((mark, entry))
    return drawn


def make_pair(entries: Sequence[tuple[str, str]], twin: int) -> Pair:
    """Return one of the two pairs that the entries of a template define.

    ("", "the"), ("", "law/laws"), ("*", "is/are"), ("", "new"), ("", ".")
    -> twin 0: The law is / are new.    twin 1: The laws are / is new.
    """
    parts = []  # of the sentence, with "*" in place of the differing word
    for mark, entry in entries:
        if mark == "*":
            right, wrong = entry.split(">") if ">" in entry else (form(entry, twin), form(entry, 1 - twin))
            parts.append("*")
        else:
            parts.append(form(entry, 1 - twin if mark == "~" else twin))
    text = " ".join(parts).replace("_", " ").replace(" .", ".").replace(" ?", "?")
    before, after = text.split("*")
    if before:
        return Pair(before[0].upper() + before[1:], right, wrong, after)
    return Pair("", right.capitalize(), wrong.capitalize(), after)


def form(entry: str, twin: int) -> str:
    """Return one of the two forms of an entry a/b; an entry without a slash has one form for both."""
    forms = entry.split("/")
    return forms[twin % len(forms)]


def encode(pair: Pair, tokenizer: Tokenizer) -> Encoded:
    """Return the pieces of a pair; raise ValueError if its sentences differ in more than one piece."""
    right, wrong = (tokenizer.encode(pair.sentence(word)) for word in (pair.right, pair.wrong))
    differ = [i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b]
    if len(right) != len(wrong) or len(differ) != 1:
        raise ValueError(f"the vocabulary has no single piece for each of {pair.right!r} and {pair.wrong!r}")
    return Encoded(right, wrong, differ[0])


def encode_all(pairs: Sequence[Pair], tokenizer: Tokenizer, argument: str) -> list[Encoded]:
    """Return the pieces of each pair; raise UserError for the argument if the vocabulary splits a differing word."""
    try:
        return [encode(pair, tokenizer) for pair in pairs]
    except ValueError as error:
        raise UserError(f"{argument}: {error}; give a model with the vocabulary {TOKENIZER}") from None


# ---------------------------------------------------------------- scores

# The score of a pair is log p(right word) - log p(wrong word), or of the sentences, in nats: > 0 passes.
Scorer = Callable[[Sequence[Pair]], np.ndarray]  # pairs -> [n_pairs]
LogitsAt = Callable[[Tensor, Tensor], Tensor]  # ids [bsz, len], position [bsz] -> logits [bsz, n_token] there


def batches(items: Sequence[Encoded]) -> Iterator[np.ndarray]:
    """Yield the indices of all items, in arrays of at most BATCH items whose sentences have the same length."""
    lengths = np.array([len(item.right) for item in items])
    for length in np.unique(lengths):
        numbers = np.flatnonzero(lengths == length)
        yield from np.split(numbers, range(BATCH, len(numbers), BATCH))


@torch.no_grad()
def score_words(items: Sequence[Encoded], logits_at: LogitsAt, hidden_id: int) -> np.ndarray:
    """Return log p(right word) - log p(wrong word) of each pair, given the rest of the sentence: [n_pairs].

    The rest is the same for both words, so one forward pass scores both, and logits have the same difference.

    hidden_id: the id in place of the word
    """
    scores = np.empty(len(items))
    for numbers in batches(items):
        batch = [items[number] for number in numbers]
        row = torch.arange(len(batch))
        position = torch.tensor([item.position for item in batch])
        right, wrong = torch.tensor([item.right for item in batch]), torch.tensor([item.wrong for item in batch])
        ids = right.clone()
        ids[row, position] = hidden_id
        logits = logits_at(ids, position).double()
        scores[numbers] = logits[row, right[row, position]] - logits[row, wrong[row, position]]
    return scores


def xlnet_logits(model: XLNet, ids: Tensor, position: Tensor) -> Tensor:
    """Return the logits of the query stream at one position of each sentence; no other position sees that one.

    There is one segment and no memory, so segment ids would change nothing.

    ids: [bsz, len]; position: [bsz] -> [bsz, n_token]
    """
    bsz, length = ids.shape
    is_word = torch.zeros(length, bsz).scatter_(0, position[None], 1)  # 1 = to be predicted
    logits, _ = model(
        ids.t(),
        perm_mask=is_word[None].expand(length, -1, -1),  # [len (query), len (key), bsz] 1 = must not see
        target_mapping=position[None],
        inp_q=is_word,
    )
    return logits[0]


def bert_logits(model: nn.Module, before: list[int], after: list[int], ids: Tensor, position: Tensor) -> Tensor:
    """Return the logits of a BertForMaskedLM at one position of each sentence; the sentence has [MASK] there.

    before, after: ids around each sentence, [CLS] and [SEP] or none; ids: [bsz, len]; position: [bsz]
    -> [bsz, n_token]
    """
    around = [torch.tensor(marks, dtype=torch.long).expand(len(ids), -1) for marks in (before, after)]
    logits = model(torch.cat([around[0], ids, around[1]], dim=1)).logits  # [bsz, before + len + after, n_token]
    return logits[torch.arange(len(ids)), len(before) + position]


def score_sentences(items: Sequence[Encoded], log_probs: Callable[[Sequence[int]], np.ndarray]) -> np.ndarray:
    """Return log p(right sentence) - log p(wrong sentence) of each pair: [n_pairs].

    log_probs: ids of a sentence -> [len], log-probability of each piece given those before it
    """
    return np.array([log_probs(item.right).sum() - log_probs(item.wrong).sum() for item in items])


def accuracy(scores: np.ndarray) -> float:
    """Return the share of pairs that pass; a tie counts half."""
    return float(np.mean(scores > 0) + np.mean(scores == 0) / 2)


# ---------------------------------------------------------------- models


def load_scorer(argument: str, name: str, bert_marks: bool) -> Scorer:
    """Return the scorer of a model.

    argument: NAME=FOLDER, for messages; name: a folder, or a name at the hub
    bert_marks: a BERT reads [CLS] and [SEP] around each sentence
    Raises UserError if there is no XLNet or BertForMaskedLM, or its vocabulary does not fit.
    """
    folder = Path(checkpoint.find_model(name, f"{argument}:"))
    try:
        is_bert = corpus.read_json_object(folder / "config.json").get("model_type") == "bert"
        tokenizer = corpus.load_tokenizer(corpus.find_vocabulary(folder) or TOKENIZER)
        vocab = corpus.vocabulary(tokenizer)
        model = load_bert(folder) if is_bert else XLNet.from_pretrained(folder, bi_data=False).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{argument}: {error}; give the folder of an XLNet or a BertForMaskedLM") from None
    n_token = model.config.vocab_size if is_bert else model.config["vocab_size"]
    if n_token != vocab.size:
        raise UserError(
            f"{argument}: the model has {n_token} pieces and {tokenizer.vocab_file.name} {vocab.size}; "
            f"put its own vocabulary into {folder}"
        )
    if is_bert:
        before, after = ([vocab.cls_id], [vocab.sep_id]) if bert_marks else ([], [])
        hidden_id, logits_at = tokenizer.vocab["[MASK]"], partial(bert_logits, model, before, after)
    else:
        hidden_id, logits_at = vocab.unk_id, partial(xlnet_logits, model)
    return lambda pairs: score_words(encode_all(pairs, tokenizer, argument), logits_at, hidden_id)


def load_bert(folder: Path) -> nn.Module:
    """Return the BertForMaskedLM of a folder; raise OSError or ValueError if it holds none, or one without a head."""
    import transformers  # only here: XLNets do not need it

    model, found = transformers.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"]:  # transformers only warns, and draws them at random
        raise ValueError(f"{folder} lacks the weights {', '.join(sorted(found['missing_keys']))}")
    return model.eval()


def count_five_grams(path: str) -> Scorer:
    """Return the scorer of a 5-gram model of a text; raise UserError if the text cannot be read."""
    import neighbours

    tokenizer = corpus.load_tokenizer(TOKENIZER)
    vocab = corpus.vocabulary(tokenizer)
    text = corpus.load_text("five_gram", [path], flags.default_cache_dir(), tokenizer, vocab)
    model = neighbours.FiveGram(text.ids, vocab.size)
    return lambda pairs: score_sentences([encode(pair, tokenizer) for pair in pairs], model.log_probs)


# ---------------------------------------------------------------- output


def print_pairs() -> None:
    """Print all pairs, each with both words: The laws *are/is* clear."""
    for paradigm in PARADIGMS:
        print(f"\n{paradigm}\n")
        for pair in make_pairs(paradigm):
            print(show(pair))


def show(pair: Pair) -> str:
    """Return the sentence of a pair with the right and the wrong word."""
    return pair.sentence(f"*{pair.right}/{pair.wrong}*")


def measure(scorers: dict[str, Scorer]) -> dict[str, dict[str, float]]:
    """Return the accuracy of each model in each paradigm: [paradigm][model]."""
    return {
        paradigm: {name: accuracy(score(make_pairs(paradigm))) for name, score in scorers.items()}
        for paradigm in tqdm(PARADIGMS, leave=False, disable=None)
    }


def print_table(accuracies: dict[str, dict[str, float]]) -> None:
    """Print a row for each paradigm, with its first pair, and the mean over the paradigms with twins."""
    names = list(next(iter(accuracies.values())))
    print(f"Accuracy in percent, {N_PAIRS} pairs a paradigm; chance is 50.\n")
    print(f"| paradigm | example: *right/wrong* | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for paradigm, row in accuracies.items():
        cells = [f"{100 * row[name]:.1f}" for name in names]
        print(f"| {paradigm} | {show(make_pairs(paradigm)[0])} | {' | '.join(cells)} |")
    with_twins = [row for paradigm, row in accuracies.items() if paradigm not in NEGATION]
    means = [f"{100 * np.mean([row[name] for row in with_twins]):.1f}" for name in names]
    print(f"| mean without the two of negation | | {' | '.join(means)} |")


def write_csv(path: str, accuracies: dict[str, dict[str, float]]) -> None:
    """Write a line for each paradigm and model; raise UserError if the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["paradigm", "model", "accuracy"])
            for paradigm, row in accuracies.items():
                writer.writerows([paradigm, name, f"{value:.4f}"] for name, value in row.items())
    except OSError as error:
        raise UserError(f"--csv {path}: {error.strerror}; give a file that can be written") from None


# ---------------------------------------------------------------- the command line


def named_folder(text: str) -> tuple[str, str]:
    """Return the name and the folder in NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} will not do; give NAME=FOLDER, as in ours=out")
    return name, folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "models", metavar="NAME=FOLDER", nargs="*", type=named_folder, help="a model, and its name in the table"
    )
    parser.add_argument(
        "--five_gram", metavar="TEXT", type=flags.not_empty, help="add a 5-gram model of this UTF-8 text"
    )
    parser.add_argument("--bert_marks", action="store_true", help="put [CLS] and [SEP] around the sentences of a BERT")
    parser.add_argument("--csv", metavar="FILE", type=flags.not_empty, help="write the accuracies to this file too")
    parser.add_argument("--pairs", action="store_true", help="print all pairs instead")
    options = parser.parse_args(argv)
    names = [name for name, _ in options.models]
    for name in names:
        if names.count(name) > 1 or (name == "5-gram" and options.five_gram):
            raise UserError(f"NAME=FOLDER: two models are called {name}; give each a name of its own")
    if not (names or options.five_gram or options.pairs):
        raise UserError("no model; give NAME=FOLDER, --five_gram TEXT, or --pairs")
    return options


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, and print the pairs or the accuracies."""
    with mistakes_in_one_line("grammar.py"):
        options = parse(argv)
        if options.pairs:
            print_pairs()
            return
        scorers = {name: load_scorer(f"{name}={folder}", folder, options.bert_marks) for name, folder in options.models}
        if options.five_gram:
            scorers["5-gram"] = count_five_grams(options.five_gram)
        accuracies = measure(scorers)
        print_table(accuracies)
        if options.csv:
            write_csv(options.csv, accuracies)


if __name__ == "__main__":
    benchmark()
