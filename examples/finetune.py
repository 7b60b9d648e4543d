"""Fine-tune a checkpoint to classify sentences, with transformers.

    pip install "transformers>=5,<6"
    python examples/finetune.py out/checkpoint-1400 sentences.tsv --valid held_out.tsv --output_dir classifier
    python -c "import transformers; print(transformers.pipeline('text-classification', 'classifier')('A sentence.'))"

A file is UTF-8 text with one example a line. The first line decides the format. If it has a tab, tabs separate the
columns, otherwise commas. If it has a cell `label` and a cell `text` or `sentence`, it is a header, and other columns
are ignored; otherwise there is no header, and the first two columns are text and label. In a file with commas a text
may stand in quotes, as spreadsheets write it; in a file with tabs quotes are ordinary characters.
"""

import argparse
import collections
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import UserError, corpus, flags, mistakes_in_one_line
from support.checkpoint import checkpoints, find_model

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMN = "label"
WARMUP = 0.1  # share of the updates over which the learning rate rises
LARGEST_NORM = 1.0  # of the gradient


class Example(NamedTuple):
    """A line of a file."""

    text: str
    label: str


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and fine-tune."""
    with mistakes_in_one_line("finetune.py"):
        finetune(parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a command line; raise UserError for a wrong one."""
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        type=flags.not_empty,
        help="folder of a checkpoint, of a run (its newest checkpoint is used), or of any Hugging Face XLNet with its "
        "tokenizer, or its name at the hub",
    )
    parser.add_argument("train", type=flags.not_empty, metavar="train_file", help="examples to train on")
    parser.add_argument(
        "--valid",
        type=flags.not_empty,
        metavar="FILE",
        help="examples to measure accuracy on (default: a random tenth of the training file, held out)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=flags.not_empty,
        metavar="DIR",
        help="folder for the model; it holds that of the last finished epoch",
    )
    parser.add_argument(
        "--epochs",
        type=flags.number(int, 1, 10**6),
        metavar="N",
        default=3,
        help="passes over the examples; a small model needs more (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=flags.number(int, 1, 2**16),
        metavar="N",
        default=16,
        help="examples in an update (default: %(default)s)",
    )
    parser.add_argument(
        "--learning_rate",
        type=flags.number(float, 0, 10),
        metavar="N",
        help="peak; it rises over a tenth of the updates, then falls to 0 (default: by the width of the model, 2e-3 at "
        "32, 2.5e-4 at 128, 1.7e-5 at 768)",
    )
    parser.add_argument(
        "--max_len",
        type=flags.number(int, 8, 2**16),
        metavar="N",
        default=128,
        help="tokens of a text, special ones too; the rest of a longer text is cut off (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=flags.number(int, 0, 2**63 - 1),
        metavar="N",
        default=0,
        help="of the order of examples, the new weights and dropout (default: %(default)s)",
    )
    return parser.parse_args(argv)


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune a checkpoint, and print loss and validation accuracy after each epoch.

    Raises UserError for a wrong flag, a file that cannot be used, or a missing package.
    """
    refuse_used_folder(args.output_dir)
    train, valid = read_examples_of(args)
    labels = sorted({example.label for example in [*train, *valid]})
    checkpoint = find_checkpoint(args.checkpoint)
    open_folder(args.output_dir)
    torch.manual_seed(args.seed)
    tokenizer, model = load(checkpoint, labels)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)

    n_batches = -(-len(train) // args.batch_size)
    learning_rate = args.learning_rate if args.learning_rate is not None else default_learning_rate(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(args.epochs * n_batches))
    label, count = collections.Counter(example.label for example in valid).most_common(1)[0]
    print(f"{checkpoint}: {len(train):,} examples, {len(labels)} labels, peak learning rate {learning_rate:.2g}")
    print(f"always answering {label!r} has validation accuracy {count / len(valid):.3f}", flush=True)

    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        batches = torch.randperm(len(train)).split(args.batch_size)
        for batch in tqdm(batches, desc=f"epoch {epoch}", unit="batch", delay=1, leave=False, disable=None):
            examples = [train[i] for i in batch.tolist()]
            loss = model(**encode(examples, tokenizer, labels, args.max_len).to(device)).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            if not norm.isfinite():
                raise UserError(
                    f"--learning_rate {learning_rate:.2g}: the gradient is infinite or not a number in epoch {epoch}; "
                    f"give a smaller one"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(examples)
        correct = accuracy(model, tokenizer, valid, labels, args)
        print(
            f"epoch {epoch} of {args.epochs}: loss {total / len(train):.4f}, validation accuracy {correct:.3f}",
            flush=True,
        )
        save(model, tokenizer, args.output_dir)
    print(f"saved in {args.output_dir}; transformers.pipeline('text-classification', {args.output_dir!r}) uses it")


def default_learning_rate(config: Any) -> float:
    """Return the learning rate for a width: a power law with 2e-3 at width 32, near the paper's 2e-5 at width 768.

    At width 32, twice this rate gained little, and with four times this rate the model learnt nothing.
    """
    return 2e-3 * (32 / config.hidden_size) ** 1.5


def warm_up_and_decay(n_updates: int) -> Callable[[int], float]:
    """Return a function from the number of updates made to the next update's share of the peak learning rate."""
    n_warmup = max(1, round(WARMUP * n_updates))

    def share(n_made: int) -> float:
        return min((n_made + 1) / n_warmup, (n_updates - n_made) / (n_updates - n_warmup + 1))

    return share


def encode(examples: Sequence[Example], tokenizer: Any, labels: list[str], max_len: int) -> Any:
    """Return the arguments of the model for a batch, padded on the side that the tokenizer sets.

    -> input_ids, token_type_ids, attention_mask (1 = token, 0 = padding): [batch, longest text]; labels: [batch]
    """
    texts = [example.text for example in examples]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_len, return_tensors="pt")
    batch["labels"] = torch.tensor([labels.index(example.label) for example in examples])
    return batch


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, tokenizer: Any, examples: Sequence[Example], labels: list[str], args: argparse.Namespace
) -> float:
    """Return the share of examples whose label the model predicts."""
    model.eval()
    n_correct = 0
    for start in range(0, len(examples), args.batch_size):
        batch = encode(examples[start : start + args.batch_size], tokenizer, labels, args.max_len).to(model.device)
        n_correct += (model(**batch).logits.argmax(dim=1) == batch["labels"]).sum().item()
    return n_correct / len(examples)


# ---------------------------------------------------------------- examples


def read_examples_of(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Return the training and validation examples; without --valid, hold some out and print how many.

    Raises UserError if a file cannot be used, there is only one label, or --valid has a label that training lacks.
    """
    train = read_examples(args.train, "train_file")
    labels = {example.label for example in train}
    if len(labels) == 1:
        raise UserError(f"{args.train} has one label only, {train[0].label!r}; give examples of two or more")
    if not args.valid:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
        n_valid = max(1, len(train) // 10)
        print(f"no --valid: {n_valid:,} of the {len(train):,} examples in {args.train} are held out for validation")
        return [train[i] for i in order[n_valid:]], [train[i] for i in order[:n_valid]]
    valid = read_examples(args.valid, "--valid")
    for example in valid:
        if example.label not in labels:
            raise UserError(
                f"--valid {args.valid} has the label {example.label!r}, which {args.train} lacks; mend either file"
            )
    return train, valid


def read_examples(path: str, flag: str) -> list[Example]:
    """Return the examples of a file; the docstring of this module describes the format.

    Raises UserError if it cannot be read, has no example, lacks a column, or has a line without text or label.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            has_tabs = "\t" in file.readline()
            file.seek(0)
            reader = csv.reader(
                file,
                delimiter="\t" if has_tabs else ",",
                quoting=csv.QUOTE_NONE if has_tabs else csv.QUOTE_MINIMAL,
                strict=True,
            )
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give a tsv or csv file") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{flag} {path}, line {corpus.first_line_not_utf8(path)} is not UTF-8; convert it to UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(f"{flag} {path}, line {reader.line_num}: {error}; mend the quotes of this file") from None

    names = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    text_columns = [names.index(name) for name in TEXT_COLUMNS if name in names]
    has_label = LABEL_COLUMN in names
    if bool(text_columns) != has_label:
        missing = "text or sentence" if has_label else LABEL_COLUMN
        raise UserError(f"{flag} {path}: the first line names no column {missing}; name both, or leave that line out")
    text_column, label_column = 0, 1
    if has_label:
        text_column, label_column = text_columns[0], names.index(LABEL_COLUMN)
        rows = rows[1:]
    if not rows:
        raise UserError(f"{flag} {path} has no example; give one on each line, text and label")
    examples = []
    for line, row in rows:
        cells = dict(enumerate(cell.strip() for cell in row))
        for what, column in (("text", text_column), ("label", label_column)):
            if not cells.get(column):
                raise UserError(
                    f"{flag} {path}, line {line} has no {what} in column {column + 1}; separate columns by a tab or a "
                    f"comma, the same in all lines"
                )
        examples.append(Example(cells[text_column], cells[label_column]))
    return examples


# ---------------------------------------------------------------- models


def find_checkpoint(name: str) -> Path:
    """Return the folder of a model: the named folder, the newest checkpoint in it, or a model from the hub.

    Raises UserError if the folder holds no model.
    """
    folder = Path(find_model(name, "checkpoint"))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"checkpoint {name} is no model and no run; give a folder with config.json, model.safetensors and a "
            f"vocabulary"
        )
    return folder


def refuse_used_folder(output_dir: str) -> None:
    """Raise UserError if a folder holds a model or a run."""
    if (Path(output_dir) / "config.json").exists() or checkpoints(output_dir):
        raise UserError(f"--output_dir {output_dir} holds a model already; give another folder")


def open_folder(output_dir: str) -> None:
    """Make the folder of the new model; raise UserError if it cannot be written to."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
        (folder / "config.json").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None


def load(checkpoint: Path, labels: list[str]) -> tuple[Any, Any]:
    """Return the tokenizer and the model of a checkpoint, with a new head for these labels, on the CPU.

    Raises UserError if transformers is missing or cannot load them, or if weights below the head are missing.
    """
    try:
        import transformers
    except ImportError:
        raise UserError('this program needs a package that is not here; pip install "transformers>=5,<6"') from None
    transformers.logging.set_verbosity_error()  # it would report the missing head, which is expected here
    transformers.logging.disable_progress_bar()
    id2label = dict(enumerate(labels))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            id2label=id2label,
            label2id={label: i for i, label in id2label.items()},
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be loaded: {error!s:.200}; give another folder") from None
    missing = sorted(key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise UserError(f"checkpoint {checkpoint} lacks the weights {', '.join(missing)[:200]}; give another folder")
    if tokenizer.pad_token is None:
        raise UserError(f"checkpoint {checkpoint}: its vocabulary has no piece for padding; train one that has [PAD]")
    return tokenizer, model


def save(model: Any, tokenizer: Any, output_dir: str) -> None:
    """Write model and tokenizer in Hugging Face's format; raise UserError if that fails."""
    try:
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output_dir {output_dir}: {error}; give a folder with more space") from None


if __name__ == "__main__":
    main()
