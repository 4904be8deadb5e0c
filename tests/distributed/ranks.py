"""Processes that share a process group on the CPU over gloo, and run functions together, one after the other.

They are forked from a server that has imported torch once, so that another group of them costs little. A rank whose
function fails says why and ends, so that no other waits for it; the group is made anew for the next function.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import threading
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import interpreter
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ]
)


class Ranks:
    """`world` processes, started when they are first asked for something.

    A function may take `patience` seconds and a collective `collective_patience` seconds.
    """

    def __init__(self, world, patience=180, collective_patience=60):
        self.world = world
        self._patience = patience
        self._collective_patience = collective_patience
        self._folder = None
        self._processes = []
        self._connections = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def call(self, function, **arguments):
        """Run `function` on all ranks; it and its arguments must be picklable.

        Returns a dictionary from ranks to None or the text of an error, with the rank that failed first in front.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # the rank has ended, which is noticed below
                connection.send((function, arguments))
        waiting = dict(zip(self._connections, range(self.world), strict=True))
        failed, passed = {}, {}
        while waiting:
            for connection in multiprocessing.connection.wait(list(waiting)):
                rank = waiting.pop(connection)
                try:
                    error = connection.recv()
                except (EOFError, ConnectionResetError):
                    error = self._last_words(rank)
                (passed if error is None else failed)[rank] = error
        if failed:
            self.stop()
        return failed | passed

    def stop(self):
        """End all ranks, whatever they are doing."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            process.join()
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.world):
            ours, theirs = _CONTEXT.Pipe()
            arguments = rank, self.world, theirs, Path(self._folder.name), self._patience, self._collective_patience
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _last_words(self, rank):
        """What is known of a rank that ended without an answer; faulthandler wrote its stack if it waited too long."""
        self._processes[rank].join()
        stack = (Path(self._folder.name) / f"stack.{rank}").read_text()
        return f"The process ended with exit code {self._processes[rank].exitcode}.\n{stack}"


def _serve(rank, world, connection, folder, patience, collective_patience):
    """One rank's side: run what comes through `connection`, until the parent has ended or something fails."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    stack = (folder / f"stack.{rank}").open("w")
    faulthandler.enable(stack)
    _join_group(rank, world, folder / "rendezvous", timedelta(seconds=collective_patience))
    while True:
        call = connection.recv_bytes()
        faulthandler.dump_traceback_later(patience, exit=True, file=stack)
        error = None
        try:
            function, arguments = pickle.loads(call)
            torch.manual_seed(0)
            function(**arguments)
        except BaseException:
            error = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(error)
        if error is not None:
            os._exit(1)


def _end_with_the_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _join_group(rank, world, rendezvous, patience):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    interpreter.import_kernels("cpu")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # tensor parallel layers do
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=patience)
