"""Time and memory of one training step at default flags: this XLNet beside transformers' XLNetLMHeadModel.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --steps 50

Both get the same windows of data.txt, start from the same weights, carry their own memory, and make the same step:
forward, loss, backward, clipping, AdamW. Their steps alternate, so that a noisy machine disturbs both alike; the table
gives medians with the quartiles around them. Peak memory is what a process with one of the two needs above what it
needed before the model was built.
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from xlnet import XLNet

ARGS = main.settle({})  # the default flags
MODELS = ("ours", "transformers")


def load_batches():
    """Return the windows of one pass over data.txt."""
    run = main.Run(ARGS)
    return run.vocab, list(run.create_batches(run.rows, np.random.default_rng(0)))


def build(name, n_token):
    """Return the model of that name at the default shape, with the same weights for both."""
    torch.manual_seed(0)
    ours = XLNet(n_token)
    if name == "ours":
        return ours
    theirs = transformers.XLNetLMHeadModel(transformers.XLNetConfig(
        vocab_size=n_token, n_layer=ARGS.n_layer, n_head=ARGS.n_head, d_model=ARGS.d_model, d_inner=ARGS.d_inner,
        dropout=ARGS.dropout, ff_activation=ARGS.ff_activation, mem_len=ARGS.mem_len, reuse_len=ARGS.reuse_len))
    theirs.load_state_dict(
        {key if key.startswith("lm_loss") else f"transformer.{key}": value for key, value in ours.state_dict().items()})
    return theirs.train()


def inputs_for(name, batch):
    """Return the same tensors in the layout and under the names of either model."""
    given = {key: value for key, value in batch.items() if key not in ("target", "target_mask")}
    if name == "ours":
        return given
    positions = batch["target_mapping"]
    one_hot = F.one_hot(positions.clamp(min=0), ARGS.seq_len) * (positions >= 0)[:, :, None]
    return {
        "input_ids": batch["inp_k"].t(), "token_type_ids": batch["seg_id"].t(),
        "perm_mask": batch["perm_mask"].permute(2, 0, 1), "target_mapping": one_hot.permute(1, 0, 2).float(),
    }


def train_steps(name, n_token, batches):
    """Make one training step at each next(), over the windows again and again; yield its cost and its seconds."""
    model = build(name, n_token)
    optimizer = torch.optim.AdamW(main.parameter_groups(model, ARGS.weight_decay), lr=ARGS.learning_rate)
    prepared = [(inputs_for(name, batch), batch["target"], batch["target_mask"]) for batch in batches]
    mems = None
    for inputs, target, target_mask in itertools.cycle(prepared):
        begin = time.perf_counter()
        if name == "ours":
            logits, mems = model(**inputs, mems=mems)
        else:
            output = model(**inputs, mems=mems, use_mems=True)
            logits, mems = output.logits.transpose(0, 1), output.mems
        loss = main.lm_loss(logits, target, target_mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ARGS.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - begin


def peak_memory(name):
    """Return the MB by which the peak of this process grows over six steps."""
    vocab, batches = load_batches()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(itertools.islice(train_steps(name, vocab.size, batches), 6))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps timed of each model (default: 30)")
    steps = parser.parse_args().steps
    # a new process for each model: its peak is its own
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(MODELS, pool.map(peak_memory, MODELS, chunksize=1)))

    vocab, batches = load_batches()
    runs = {name: train_steps(name, vocab.size, batches) for name in MODELS}
    seconds = {name: [] for name in MODELS}
    for i in tqdm(range(steps + 5), leave=False, disable=None):
        for name, run in runs.items():
            _, spent = next(run)
            if i >= 5:  # after the warm-up, when the memory is full
                seconds[name].append(spent)

    quartiles = {name: 1000 * np.percentile(seconds[name], (25, 50, 75)) for name in MODELS}
    median = {name: quartiles[name][1] for name in MODELS}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"{steps} steps of each\n")
    print("| one training step, default flags | this project | transformers | ratio |")
    print("|---|---|---|---|")
    cells = [f"{median[name]:.0f} ({quartiles[name][0]:.0f} to {quartiles[name][2]:.0f})" for name in MODELS]
    print(f"| time, ms, median (quartiles) | {' | '.join(cells)} | {median['ours'] / median['transformers']:.2f} |")
    print(f"| peak memory, MB | {' | '.join(f'{memory[name]:.0f}' for name in MODELS)} | "
          f"{memory['ours'] / memory['transformers']:.2f} |")


if __name__ == "__main__":
    benchmark()
