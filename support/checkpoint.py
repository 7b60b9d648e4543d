"""Checkpoints: save them atomically, verify their checksums, find and load them.

out/checkpoint-<step>/
    config.json, model.safetensors      the model, as Hugging Face has it
    vocab.txt or spiece.model, tokenizer_config.json
    trainer_state.pt                    the TrainingState
    SHA256SUMS                          as `sha256sum --check` reads it
out/abandoned-<n>/                      the checkpoints after the step that a run resumed from, with a copy of
                                        metrics.csv; --resume can continue from here too
out/.lock                               held by the process that writes to the folder

The checkpoints in a run's folder belong to one history of training: `set_aside` moves all others away.

A resumed run calls `find`, `load`, `check_flags`, `check`, `set_aside` and, in `main.train`, `restore`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import pickle
import shutil
import tempfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support import UserError, hub, processes, warn
from support.corpus import sha256

NEEDED = {"model.safetensors", "trainer_state.pt"}
OF_PROCESS = ("gradients", "torch_rng", "device", "device_rng")
LOCKS: dict[tuple[int, int], FileLock] = {}  # of the folders that this process writes to; held until it ends


class SaveError(Exception):
    """A checkpoint could not be written; its text is one line."""


@dataclasses.dataclass
class TrainingState:
    """All that a run needs, besides the model's weights, to resume bit-exactly."""

    step: int  # number of steps done so far
    pass_loss: float  # sum of the losses of this pass
    memory: list[torch.Tensor | None]  # for each turn of rows: [n_layer, mlen, batch_size, d_model]; None = no memory
    optimizer: dict[str, Any]  # the optimizer's state_dict; the state of a parameter that was never updated is None
    processes: list[dict[str, Any]]  # of each: gradients (of an unfinished accumulation), torch_rng, device, device_rng
    flags: dict[str, Any]  # of the command line, by name; paths of texts, vocabulary and cache are absolute
    text: str  # digest of the text
    vocabulary: str  # digest of the vocabulary
    variant: list[str]  # names of the classes of loader and model


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
    variant: list[str],
) -> TrainingState | None:
    """Return the state of a run in the process of rank 0, None in the others. Every process must call this.

    memory: for each turn of rows, a list of n_layer [mlen, bsz, d_model] for this process's rows, or None
    members: the places of these rows in a turn
    """
    own = {
        "members": list(members),
        "memory": [None if mems is None or mems[0] is None else torch.stack(mems).cpu() for mems in memory],
        "gradients": [None if p.grad is None else p.grad.cpu() for p in model.parameters()],
        "torch_rng": torch.get_rng_state(),
        "device": device.type,
        "device_rng": device_rng_state(device),
    }
    parts = processes.gather(own)
    if parts is None:
        return None
    moments = optimizer.state_dict()
    moments["state"] = {number: moments["state"].get(number) for number in range(len(own["gradients"]))}
    return TrainingState(
        step=step,
        pass_loss=pass_loss,
        memory=[join_rows(parts, turn) for turn in range(len(memory))],
        optimizer=moments,
        processes=[{name: part[name] for name in OF_PROCESS} for part in parts],
        flags=flags,
        text=text,
        vocabulary=vocabulary,
        variant=variant,
    )


def device_rng_state(device: torch.device) -> torch.Tensor | None:
    """Return the random state of an accelerator; None for a CPU, whose state torch.get_rng_state returns."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def join_rows(parts: list[dict[str, Any]], turn: int) -> torch.Tensor | None:
    """Join the parts of all processes into the memory of a turn, with the rows in the order of their places.

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
    """Restore optimizer, gradients and random states as `collect` saved them; return the memory of this process's rows.

    With another number of processes each gets a new random state, so dropout differs from that of an unbroken run, and
    each starts from the mean of the saved gradients.
    """
    moments = {number: each for number, each in state.optimizer["state"].items() if each is not None}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if len(state.processes) == processes.world_size():
        own = state.processes[processes.rank()]
        gradients = own["gradients"]
        torch.set_rng_state(own["torch_rng"])
        if own["device"] == device.type != "cpu":
            torch.get_device_module(device).set_rng_state(own["device_rng"])
    else:
        of_processes = [each["gradients"] for each in state.processes]
        gradients = [mean_gradient(of_one) for of_one in zip(*of_processes, strict=True)]
        seed = np.random.SeedSequence([state.flags["seed"], state.step, processes.rank()])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(device)
    memory = []
    for mems in state.memory:
        memory.append(None if mems is None else list(mems[:, :, members].to(device)))
    return memory


def mean_gradient(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the mean of one parameter's gradients over all processes, which exchange them once per update."""
    return None if any(gradient is None for gradient in gradients) else torch.stack(gradients).mean(dim=0)


def open_output_dir(output_dir: str, source: str | None) -> None:
    """Make the folder of a run, and lock it until this process ends.

    source: the checkpoint that the run resumes, or None
    Raises UserError if the folder cannot be written to, another process writes to it, or it holds another run.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
        if processes.rank() == 0:
            lock(output_dir)
            for leftover in Path(output_dir).glob(".checkpoint-*"):  # left by a killed process
                remove(leftover)
    except Timeout:
        raise UserError(
            f"--output_dir {output_dir}: another process trains there; wait for its end, or give another folder"
        ) from None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None
    if not checkpoints(output_dir):
        return
    if source is None:
        raise UserError(f"--output_dir {output_dir} holds a run already; go on with --resume, or give another folder")
    if not os.path.samefile(run_folder(source), output_dir):  # names may differ in upper and lower case only
        raise UserError(
            f"--output_dir {output_dir} holds another run than --resume {source}; leave it out, or give a new folder"
        )


def lock(output_dir: str) -> None:
    """Lock a folder until this process ends, however it ends; raise Timeout if another process has locked it."""
    path = os.path.abspath(os.path.join(output_dir, ".lock"))
    if os.path.exists(path) and file_number(path) in LOCKS:
        return
    new = FileLock(path)
    new.acquire(timeout=0)
    LOCKS[file_number(path)] = new


def file_number(path: str) -> tuple[int, int]:
    """Return two numbers that are the same for all names of a file, and of no other file while it is open."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def run_folder(checkpoint: str) -> str:
    """Return the real path of the folder that contains a checkpoint."""
    return os.path.realpath(os.path.dirname(os.path.abspath(checkpoint)))


def set_aside(output_dir: str, step: int) -> None:
    """Move the checkpoints after `step` into a new folder abandoned-<n>; the run will repeat their steps.

    The copy of metrics.csv makes it the folder of a run, which --resume can continue. The newest checkpoint moves last:
    if the process is killed before that, --resume finds the same one as before. The metrics.csv of a run that saved
    nothing is deleted.

    The first process does this; the others only call it. Raises UserError if the folder cannot be written to.
    """
    if processes.rank() > 0:
        return
    metrics = Path(output_dir) / "metrics.csv"
    later = [path for path in reversed(checkpoints(output_dir)) if step_of(path) > step]
    try:
        if not checkpoints(output_dir) and metrics.is_file():
            metrics.unlink()
        if not later:
            return
        folders = (Path(output_dir) / f"abandoned-{number}" for number in itertools.count(1))
        abandoned = next(folder for folder in folders if not folder.exists())
        abandoned.mkdir()
        if metrics.is_file():
            shutil.copyfile(metrics, abandoned / metrics.name)
        for path in later:
            path.rename(abandoned / path.name)
        sync(abandoned)
        sync(Path(output_dir))
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; give a folder to write to") from None
    warn(f"--resume goes on from step {step}; the checkpoints of later steps and their metrics are now in {abandoned}")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    paths = Path(output_dir).glob("checkpoint-*")
    found = [path for path in paths if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def save(
    output_dir: str | Path, state: TrainingState, model: Any, tokenizer: Any, config: dict[str, Any], limit: int
) -> None:
    """Write checkpoint-<step>, then delete the oldest checkpoints beyond `limit` (0 = keep all).

    The folder has a temporary name until it is complete and on the disk.

    model, tokenizer: their save_pretrained(folder, **config) and save(folder) write the files
    Raises SaveError if writing fails or a weight is not finite; earlier checkpoints stay unchanged.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise SaveError(
                f"the last update left {name} infinite or not a number, so step {state.step} is not saved; earlier "
                f"checkpoints are whole, but --resume would come here again: start anew from one with "
                f"--init_checkpoint, another --output_dir, and a smaller --learning_rate or a larger --adam_epsilon"
            )
    checkpoint = Path(output_dir) / f"checkpoint-{state.step}"
    temporary = checkpoint.with_name(f".{checkpoint.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        model.save_pretrained(temporary, **config)
        tokenizer.save(temporary)
        torch.save(vars(state), temporary / "trainer_state.pt")
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / "SHA256SUMS").write_text("".join(sums), encoding="utf-8", newline="\n")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        temporary.rename(checkpoint)
        sync(checkpoint.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the libraries raise the last two on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"{checkpoint} cannot be saved: {error}; earlier checkpoints are whole") from None
    if limit:
        saved = [path for path in checkpoints(output_dir) if step_of(path) <= state.step]
        for path in saved[limit:]:
            try:
                # The next save copies the vocabulary from where this run has read it.
                holds_vocabulary = path.samefile(tokenizer.vocab_file.resolve().parent)
                if not holds_vocabulary:
                    remove(path)
            except OSError as error:
                warn(f"{path} cannot be deleted: {error.strerror}")


def remove(path: Path) -> None:
    """Delete a folder, or a symbolic link to one, but not what the link points to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def damaged_file(checkpoint: Path) -> str | None:
    """Return the name of a missing or changed file, or None if the checkpoint is intact."""
    try:
        digests = {}
        for line in (checkpoint / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
            digest, name = line.split("  ")
            if name in ("", "..") or Path(name).name != name:  # a file in another folder
                return "SHA256SUMS"
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
    """Return the checkpoint that a run resumes, and its state.

    name: a checkpoint, or the folder of a run, or "" for output_dir; in a folder, the newest intact checkpoint is used
    Raises UserError if there is none, or its content cannot be used.
    """
    if not name and not output_dir:
        raise UserError("--resume needs the folder of a run; give --resume DIR, or --output_dir DIR")
    if name and not os.path.isdir(name):
        raise UserError(f"--resume {name} does not exist; give the folder of a run or of a checkpoint")
    if not name and not os.path.isdir(output_dir):
        raise UserError(f"--resume: --output_dir {output_dir} does not exist; leave --resume out to begin a run there")
    in_folder = checkpoints(name or output_dir)
    if not name and not in_folder:
        raise UserError(f"--resume: {output_dir} has no checkpoint yet; leave --resume out to begin a run there")
    if name and not in_folder and not any((Path(name) / file).exists() for file in ("SHA256SUMS", "trainer_state.pt")):
        raise UserError(f"--resume {name} is not a checkpoint and holds none; give the folder of one, or of a run")
    for path in in_folder or [Path(name)]:
        damaged = damaged_file(path)
        if damaged is None:
            return str(path), load(path)
        warn(f"{path} is damaged: {damaged} is not as it was written")
    raise UserError(
        f"--resume: there is no whole checkpoint in {name or output_dir}; start anew without it, in another folder"
    )


def find_model(name: str, flag: str, check: Callable[[str], object] | None = None) -> str:
    """Return the folder of a model: the named folder, the newest checkpoint of the named run, or a model from the hub.

    flag: the flag that has this value, for messages; check: see hub.fetch
    Raises UserError if there is no such folder and no such model at the hub.
    """
    if not os.path.isdir(name):
        return hub.fetch(name, flag, check)
    newest = checkpoints(name)[:1]
    return str(newest[0]) if newest else name


def load(checkpoint: Path) -> TrainingState:
    """Return the state in an intact checkpoint.

    Raises UserError if it holds more than tensors and plain values, if another version of this project wrote it, or if
    a field has another type than in TrainingState.
    """
    path = checkpoint / "trainer_state.pt"
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--resume: {path} holds more than tensors and plain values and may run code; do not trust this folder"
        ) from None
    except Exception as error:  # torch.load raises anything for a file that torch.save did not write
        raise UserError(f"--resume: {path} cannot be read: {error!r:.200}; resume from another checkpoint") from None
    fields = dataclasses.fields(TrainingState)
    if type(values) is not dict or set(values) != {field.name for field in fields}:
        raise UserError(
            f"--resume: another version of this project wrote {checkpoint}; start a new run from its weights with "
            f"--init_checkpoint {checkpoint}"
        )
    types = {field.name: typing.get_origin(field.type) or field.type for field in fields}
    refuse_misfit(misfit(values, types), checkpoint)
    if values["step"] < 0:
        refuse_misfit("['step']", checkpoint)
    if not values["processes"]:
        refuse_misfit("['processes']", checkpoint)
    if not all(type(name) is str for name in values["flags"]):
        refuse_misfit("['flags']", checkpoint)
    return TrainingState(**values)


def check_flags(state: TrainingState, checkpoint: str, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Raise UserError if a flag in the state has a value that the command line would not accept.

    parse: turns words into flags, as flags.parse does
    """
    defaults = vars(parse([]))
    known = {name: value for name, value in state.flags.items() if name in defaults}
    words = []
    for name, value in known.items():
        if type(value) is list:
            words += [f"--{name}", *map(str, value)]
        elif value is not None and type(value) is not bool:
            words.append(f"--{name}={value}")
    try:
        again = vars(parse(words))
    except UserError as error:
        raise UserError(f"--resume: {checkpoint}/trainer_state.pt has a wrong flag: {error}") from None
    for name, value in known.items():
        expected = type(defaults[name]) if value is None or type(value) is bool else Value(again[name])
        refuse_misfit(misfit(value, expected, f"['flags'][{name!r}]"), checkpoint)


def check(
    state: TrainingState,
    checkpoint: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    memory: list[tuple[int, ...] | None],
) -> None:
    """Raise UserError if an entry of the state does not have the type and shape that this run needs.

    optimizer: a new one; memory: for each turn of rows, the shape that the memory must have, or None
    """
    groups = []
    for group in optimizer.state_dict()["param_groups"]:
        groups.append({name: Value(group[name]) for name in ("params", "betas", "eps", "weight_decay")})
    moments = {}
    for group in optimizer.param_groups:
        names = ("exp_avg",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            entries = {"step": Array(())} | {name: Array(parameter.shape) for name in names}
            moments[len(moments)] = OrNone(entries)
    gradients = [OrNone(Array(parameter.shape)) for parameter in model.parameters()]
    of_processes = []
    for found in state.processes:
        of_processes.append(
            {
                "gradients": gradients,
                "torch_rng": Array(torch.get_rng_state().shape, torch.uint8),
                "device": str,
                "device_rng": expected_rng(found, next(model.parameters()).device),
            }
        )
    expected = {
        "memory": [Value(None) if shape is None else Array(shape) for shape in memory],
        "optimizer": {"state": moments, "param_groups": groups},
        "processes": of_processes,
    }
    saved_groups = state.optimizer.get("param_groups")
    if type(saved_groups) is list and all(type(group) is dict for group in saved_groups):  # their other entries vary
        saved_groups = [{name: group.get(name) for name in groups[0]} for group in saved_groups]
    found = {
        "memory": state.memory,
        "optimizer": state.optimizer | {"param_groups": saved_groups},
        "processes": state.processes,
    }
    refuse_misfit(misfit(found, expected), checkpoint)


def expected_rng(process: Any, device: torch.device) -> Any:
    """Return what `misfit` should expect as the accelerator's random state in the state of one process."""
    kind = process.get("device") if type(process) is dict else None
    if kind == "cpu":
        return Value(None)
    if kind == device.type:
        return Array(device_rng_state(device).shape, torch.uint8)
    return torch.Tensor  # of an accelerator that this run does not use


def refuse_misfit(entry: str | None, checkpoint: str | Path) -> None:
    """Raise UserError if there is an entry that does not fit."""
    if entry is not None:
        raise UserError(
            f"--resume: {checkpoint}/trainer_state.pt does not fit this run at {entry}; resume from another checkpoint"
        )


@dataclasses.dataclass
class Array:
    """Expected by `misfit`: a tensor of this shape, of floats or of the given dtype."""

    shape: Sequence[int]
    dtype: torch.dtype | None = None

    def fits(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.shape != torch.Size(self.shape):
            return False
        return value.is_floating_point() if self.dtype is None else value.dtype == self.dtype


@dataclasses.dataclass
class Value:
    """Expected by `misfit`: this plain value."""

    value: Any

    def fits(self, value: Any) -> bool:
        return type(value) is type(self.value) and repr(value) == repr(self.value)


@dataclasses.dataclass
class OrNone:
    """Expected by `misfit`: None, or a value that fits `form`."""

    form: Any


def misfit(found: Any, expected: Any, name: str = "") -> str | None:
    """Return the name of the first entry that does not fit, such as ['memory'][0], or None.

    expected: a type, an Array, a Value, an OrNone, or a dict or a list of these
    """
    if isinstance(expected, OrNone):
        return None if found is None else misfit(found, expected.form, name)
    if isinstance(expected, dict):
        if type(found) is not dict or found.keys() != expected.keys():
            return name
        pairs = [(found[key], expected[key], f"{name}[{key!r}]") for key in expected]
    elif isinstance(expected, list):
        if type(found) is not list or len(found) != len(expected):
            return name
        pairs = [(found[i], expected[i], f"{name}[{i}]") for i in range(len(expected))]
    elif isinstance(expected, type):
        fits = isinstance(found, torch.Tensor) if expected is torch.Tensor else type(found) is expected
        return None if fits else name
    else:
        return None if expected.fits(found) else name
    return next((entry for pair in pairs if (entry := misfit(*pair)) is not None), None)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder where the system can sync one."""
    if not path.is_dir():
        with open(path, "r+b") as file:  # Windows does not sync a file that is open for reading only
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # Windows cannot open folders; some network file systems cannot sync them
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
