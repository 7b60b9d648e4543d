"""Checkpoints: written whole or not at all, verified by checksums, found and loaded again.

out/checkpoint-<step>/
    config.json, model.safetensors      the model, as Hugging Face has it
    vocab.txt or spiece.model, tokenizer_config.json
    trainer_state.pt                    the TrainingState
    SHA256SUMS                          as `sha256sum --check` reads it
"""

import dataclasses
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from support import UserError, processes, warn

NEEDED = {"model.safetensors", "trainer_state.pt"}


class SaveError(Exception):
    """A checkpoint could not be written; its text is one line."""


@dataclasses.dataclass
class TrainingState:
    """All that a run needs, beside the weights of the model, to go on to the bit."""

    step: int  # number of steps made so far
    pass_loss: float  # sum of the losses of this pass
    memory: list[torch.Tensor | None]  # of each turn of rows: [n_layer, mlen, batch_size, d_model]; None before any
    optimizer: dict[str, Any]  # AdamW's state_dict
    processes: list[dict[str, Any]]  # of each: gradients (of a half done accumulation), torch_rng, cuda_rng
    flags: dict[str, Any]  # of the command line, by name; paths are absolute
    text: str  # digest of the text
    vocabulary: str  # digest of the vocabulary


def collect(
    *,
    step: int,
    pass_loss: float,
    memory: list[list[torch.Tensor] | None],
    members: Sequence[int],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    flags: dict[str, Any],
    text: str,
    vocabulary: str,
) -> TrainingState | None:
    """Return the state of a run, in the process of rank 0; None in others. Every process must call it.

    memory: of each turn of rows, a list of n_layer [mlen, bsz, d_model] for this process's rows, or None
    members: the places of these rows in a turn
    """
    own = {
        "members": list(members),
        "memory": [None if mems is None or mems[0] is None else torch.stack(mems).cpu() for mems in memory],
        "gradients": [None if p.grad is None else p.grad.cpu() for p in model.parameters()],
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }
    parts = processes.gather(own)
    if parts is None:
        return None
    return TrainingState(
        step=step,
        pass_loss=pass_loss,
        memory=[join_rows(parts, turn) for turn in range(len(memory))],
        optimizer=optimizer.state_dict(),
        processes=[{name: part[name] for name in ("gradients", "torch_rng", "cuda_rng")} for part in parts],
        flags=flags,
        text=text,
        vocabulary=vocabulary,
    )


def join_rows(parts: list[dict[str, Any]], turn: int) -> torch.Tensor | None:
    """Return the memory of a turn's rows in the order of their places, from the parts of all processes.

    -> [n_layer, mlen, batch_size, d_model], or None if the turn has no memory
    """
    tensors = [part["memory"][turn] for part in parts]
    if tensors[0] is None or len(tensors) == 1:
        return tensors[0]
    places = torch.tensor([member for part in parts for member in part["members"]])
    return torch.cat(tensors, dim=2)[:, :, places.argsort()]


def restore(
    state: TrainingState,
    members: Sequence[int],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> list[list[torch.Tensor] | None]:
    """Set optimizer, gradients and random states as `collect` found them; return the memory of this process's rows."""
    optimizer.load_state_dict(state.optimizer)
    own = state.processes[processes.rank()]
    for parameter, gradient in zip(model.parameters(), own["gradients"], strict=True):
        parameter.grad = None if gradient is None else gradient.to(device)
    torch.set_rng_state(own["torch_rng"])
    if device.type == "cuda" and own["cuda_rng"] is not None:
        torch.cuda.set_rng_state(own["cuda_rng"])
    memory = []
    for mems in state.memory:
        memory.append(None if mems is None else list(mems[:, :, members].to(device)))
    return memory


def open_output_dir(output_dir: str, resumed: bool) -> None:
    """Make the folder of a run; raise UserError if it cannot be written to, or holds another run."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None
    if checkpoints(output_dir) and not resumed:
        raise UserError(f"--output_dir {output_dir} holds a run already; go on with --resume, or give another folder")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            steps[path] = int(number)
    return sorted(steps, key=steps.get, reverse=True)


def save(
    output_dir: str | Path, state: TrainingState, model: Any, tokenizer: Any, config: dict[str, Any], limit: int
) -> None:
    """Write checkpoint-<step>, then delete the oldest ones beyond `limit` (0 = keep all).

    The folder has a temporary name until it is whole and on the disk.

    model, tokenizer: what save_pretrained(folder, **config) and save(folder) write into it
    Raises SaveError if that fails; the earlier checkpoints stay as they are.
    """
    checkpoint = Path(output_dir) / f"checkpoint-{state.step}"
    temporary = checkpoint.with_name(f".{checkpoint.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        model.save_pretrained(temporary, **config)
        tokenizer.save(temporary)
        torch.save(vars(state), temporary / "trainer_state.pt")
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / "SHA256SUMS").write_text("".join(sums))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if checkpoint.exists():  # damaged, or of steps that are made again
            shutil.rmtree(checkpoint)
        temporary.rename(checkpoint)
        sync(checkpoint.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the libraries raise the last two on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"{checkpoint} cannot be saved: {error}; earlier checkpoints are whole") from None
    if limit:
        older = [path for path in checkpoints(output_dir) if path != checkpoint]
        for path in older[limit - 1 :]:
            shutil.rmtree(path)


def damaged_file(checkpoint: Path) -> str | None:
    """Return the name of a file that is not as it was written, or None if the checkpoint is whole."""
    try:
        digests = {}
        for line in (checkpoint / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            digests[name] = digest
        if not NEEDED <= set(digests):
            return "SHA256SUMS"
        for name, digest in digests.items():
            if sha256(checkpoint / name) != digest:
                return name
        return None
    except (OSError, ValueError) as error:
        return Path(getattr(error, "filename", None) or "SHA256SUMS").name


def find(name: str, output_dir: str | None) -> tuple[str, TrainingState]:
    """Return the checkpoint from which a run goes on, and the state in it.

    name: of a checkpoint, or "" for the newest whole one in output_dir
    Raises UserError if there is none, or what it holds cannot be used.
    """
    if not name and not output_dir:
        raise UserError("--resume needs --output_dir, or the name of a checkpoint")
    if name and not Path(name).is_dir():
        raise UserError(f"--resume {name} does not exist; give the folder of a checkpoint, or --output_dir alone")
    for path in [Path(name)] if name else checkpoints(output_dir):
        damaged = damaged_file(path)
        if damaged is None:
            return str(path), load(path)
        warn(f"{path} is damaged: {damaged} is not as it was written")
    raise UserError(
        f"--resume: there is no whole checkpoint in {name or output_dir}; start anew without it, in another folder"
    )


def load(checkpoint: Path) -> TrainingState:
    """Return the state in a whole checkpoint.

    Raises UserError if it holds more than tensors and plain values, or another version of this project wrote it.
    """
    path = checkpoint / "trainer_state.pt"
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--resume: {path} holds more than tensors and plain values and may run code; do not trust this folder"
        ) from None
    if set(values) != {field.name for field in dataclasses.fields(TrainingState)}:
        raise UserError(
            f"--resume: another version of this project wrote {checkpoint}; start a new run from its weights with "
            f"--init_checkpoint {checkpoint}"
        )
    return TrainingState(**values)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
