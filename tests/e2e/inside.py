"""What a user may bring into a training process: a `sitecustomize` module that does to it what a file says.

A ConfigMap puts it on the path of the pods' Python, so the images hold nothing of it. The kinds of faults are those
of nvidia-resiliency-ext's `inject_fault` (https://github.com/NVIDIA/nvidia-resiliency-ext); those that are signals
are sent from outside instead.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

MAIN = threading.main_thread().ident
ORDER = "/tmp/order-{pid}"


class SignalError(RuntimeError):
    """Raised by the handler of a signal, wherever that finds the main thread."""


class AsynchronousError(RuntimeError):
    """Raised by another thread, wherever the main thread is."""


def deadlock(library: ctypes.CDLL) -> None:
    """Lock a mutex twice: a call that returns for no signal."""
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def in_next_step(work: Callable[[], object]) -> None:
    """Do it in the main thread, where the loss is computed."""
    from torch.nn import functional

    real = functional.cross_entropy

    def replaced(*arguments: object, **options: object) -> object:
        functional.cross_entropy = real
        work()
        return real(*arguments, **options)

    functional.cross_entropy = replaced


def gpu_error() -> None:
    import torch

    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def workload_exception() -> None:
    raise ValueError("a mistake in the training code")


def raise_in_main() -> None:
    error = ctypes.py_object(AsynchronousError)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(MAIN or 0), error)


def fill_memory() -> None:
    taken = []
    while True:
        taken.append(b"x" * 2**26)
        time.sleep(0.01)


FAULTS: dict[str, Callable[[], None]] = {
    "gpu-error": lambda: in_next_step(gpu_error),
    "hung-kernel": lambda: in_next_step(lambda: deadlock(ctypes.CDLL(None))),
    "workload-exception": lambda: in_next_step(workload_exception),
    "asynchronous-exception": raise_in_main,
    "exception-by-signal": lambda: signal.pthread_kill(MAIN or 0, signal.SIGUSR2),
    "abort": os.abort,
    "stuck-interpreter-lock": lambda: deadlock(ctypes.PyDLL(None)),
    "segmentation-fault": lambda: ctypes.string_at(0) and None,
    "full-memory": fill_memory,
}


def listen() -> None:
    """Wait for an order; Event.wait, so that this thread's stack counts as idle."""
    order, never = ORDER.format(pid=os.getpid()), threading.Event()
    while not os.path.exists(order):
        never.wait(0.05)
    with open(order) as file:
        FAULTS[file.read()]()


def on_signal(*_: object) -> None:
    raise SignalError("raised by the handler of a signal")


if "internlm_trainer.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, on_signal)
    threading.Thread(target=listen, name="order", daemon=True).start()
