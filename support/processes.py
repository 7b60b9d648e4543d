"""The processes of a run: which one this is, sums over all of them, its device, and the signals that stop a run.

torchrun starts the processes and tells each its place in environment variables; without torchrun there is one process.
"""

import contextlib
import ctypes
import datetime
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support import UserError

MEETING = 300  # seconds that a process waits for the others to start


def rank() -> int:
    """Return the number of this process in the run, from 0."""
    return from_environment("RANK", 0)


def world_size() -> int:
    """Return the number of processes in the run."""
    return from_environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return from_environment("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of the run's processes on this machine."""
    return from_environment("LOCAL_WORLD_SIZE", 1)


def from_environment(name: str, default: int) -> int:
    """Return the number in an environment variable; raise UserError if it holds something else."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r} in the environment; start with torchrun, or unset it")
    return int(value)


# ---------------------------------------------------------------- devices


def choose_device(name: str) -> torch.device:
    """Return the device of this process; "auto" is its accelerator if there is one, else the CPU.

    name: auto, cpu, cuda, mps or xpu
    Raises UserError if there is no such device, or if this machine has fewer devices than processes.
    """
    found = accelerator()
    if name == "cpu" or (name == "auto" and found is None):
        return torch.device("cpu")
    if found is None or name not in ("auto", found):
        raise UserError(f"--device {name}: PyTorch finds {found or 'only a cpu'} here; give auto")
    n_devices = torch.accelerator.device_count()
    if n_devices < local_world_size():
        raise UserError(
            f"--device {name}: {n_devices} {found} devices are too few for {local_world_size()} processes; start as "
            f"many processes as there are devices, or give cpu"
        )
    torch.accelerator.set_device_index(local_rank())
    return torch.device(found, local_rank())


def accelerator() -> str | None:
    """Return the type of this machine's accelerator, such as cuda, mps or xpu, or None."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None


def check_bf16(device: torch.device) -> None:
    """Raise UserError if a device cannot multiply matrices in bfloat16 under autocast."""
    try:
        with torch.autocast(device.type, torch.bfloat16):
            torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--bf16: {device.type} does not do it ({error}); leave it out") from None


def set_matmul_precision(device: torch.device) -> None:
    """Let PyTorch multiply float32 matrices as fast as it can: in TF32 on a GPU, without loss of precision on a CPU.

    On a CPU "medium" hands products to oneDNN instead of MKL, and allows it to round to bfloat16. oneDNN rounds only
    with AMX, Intel's matrix units. Elsewhere it computes in float32, and on AMD CPUs it uses AVX-512, which MKL does
    not. A test product shows whether it rounds.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
        return
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    if (x @ x - exact).abs().max() > 1e-5 * exact.abs().max():  # bfloat16: 3e-3; float32: 6e-7
        torch.set_float32_matmul_precision("highest")


def keep_freed_memory(largest: int) -> None:
    """Let the C library keep the memory of freed tensors, because the next step needs as much again.

    glibc gives large blocks back to the system. When the next step asks for them again, the system clears each page,
    and the step waits. Other C libraries are left unchanged.

    largest: bytes of the largest tensor of a step
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back
    if largest <= 2**25:
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at most 32 MB: an evaluation's larger tensors are given back
    else:
        libc.mallopt(-4, 0)  # M_MMAP_MAX: blocks of any size come from the heap


def fused_adamw_skips(device: torch.device) -> bool:
    """Return whether a device has a fused AdamW that changes nothing where found_inf is 1."""
    if device.type in ("cpu", "cuda"):  # the tests verify these
        return True
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    parameter.grad = torch.full_like(parameter, torch.nan)
    try:
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
    except (RuntimeError, NotImplementedError):
        return False
    return bool((parameter == 1).all())


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of this process on an accelerator, in MB; None if the backend does not count it."""
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return count(device) / 1e6 if count else None


# ---------------------------------------------------------------- several processes


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the processes of a run in the with block, using the accelerator's library, and gloo for CPUs.

    Raises UserError if the environment gives this process no place among them, or another process never connects.
    """
    if rank() >= world_size():
        raise UserError(
            f"RANK is {rank()} in the environment and WORLD_SIZE {world_size()}; start with torchrun, or unset both"
        )
    if world_size() > 1:
        backend, found = "gloo", accelerator()
        if found is not None:
            backend = f"cpu:gloo,{found}:{dist.get_default_backend_for_device(found)}"
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING)))
        except dist.DistError as error:
            raise UserError(
                f"process {rank()} of WORLD_SIZE {world_size()} has waited {MEETING} s for the others: "
                f"{str(error).partition(chr(10))[0]}; start all of them"
            ) from None
        except ValueError as error:  # the environment lacks a variable
            raise UserError(
                f"WORLD_SIZE is {world_size()} in the environment, and {str(error).rpartition(': ')[2]}; start with "
                f"torchrun, or unset WORLD_SIZE"
            ) from None
        # one process may tokenize for a long time while the others wait
        day = datetime.timedelta(days=1)
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=day)
    yield  # after an error they stay connected: `is_lost_process` checks that, and disconnecting could hang
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error says that another process of the run is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether an error says that this process, or its GPU, has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def tell_torchrun(message: str) -> None:
    """Let torchrun repeat a message below its own traceback, which would otherwise bury it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the processes of the run. All processes must call this."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_gather(value: object) -> list:
    """Return the values of all processes, in the order of their ranks. All processes must call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(prepare: Callable[[], Any]) -> Any:
    """Return prepare(). A UserError in one process is raised in all, so all end and each machine prints it once."""
    result = message = None
    try:
        result = prepare()
    except UserError as error:
        message = str(error)
    messages = all_gather(message)
    for number, message in enumerate(messages):
        if message is not None:
            everywhere = messages.count(message) == len(messages)
            raise UserError(message if everywhere else f"process {number} alone: {message}")
    return result


def check_same(values: dict[str, Any]) -> None:
    """Raise UserError in all processes if a value differs from that of process 0; name the first such value."""
    first, *others = all_gather(values)
    for number, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != first[name]:
                raise UserError(
                    f"process {number} has {name} {value} and process 0 has {first[name]}; start all processes with "
                    f"the same flags, text and checkpoint"
                )


def gather(value: object) -> list | None:
    """Return the values of all processes at rank 0, ordered by rank; None elsewhere. All processes must call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[..., int]]:
    """Yield a function that returns the number of the stop signal that any process has received, or 0.

    Stop signals are SIGINT, SIGTERM and SIGHUP. All processes must call the function. It returns the same number in
    all: the largest, if they received different ones.

    A signal number given to the function counts as received by this process if no signal came before.

    A second signal kills the process. Under torchrun it is ignored: torchrun forwards the Ctrl-C that the terminal has
    already sent to all processes, and kills those that do not end.
    """
    signums = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        signums.append(signal.SIGHUP)
    received = []

    def receive(signum, frame):
        received.append(signum)
        if not dist.is_initialized():
            for each in signums:
                signal.signal(each, signal.SIG_DFL)

    def first_signal(instead: int = 0) -> int:
        signum = torch.tensor(received[0] if received else instead)
        if dist.is_initialized():
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        return signum.item()

    handlers = {each: signal.signal(each, receive) for each in signums}
    try:
        yield first_signal
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
