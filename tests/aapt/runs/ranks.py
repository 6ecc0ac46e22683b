"""Runs a function on several ranks of a gloo group, as torchrun would.

Ranks are forked from one process that has imported everything, so that a rank starts in a tenth of
a second instead of five.
"""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from ...progress import Progress

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "aapt.runs.state", "tests.aapt.helpers"])
KILLS = {signal.SIGKILL, signal.SIGPROF}  # with which tests end a rank


def run(world: int, function: Callable, *arguments) -> list:
    """Return the result of `function(*arguments)` of every rank, or the signal that ended the rank.

    A rank that raises or crashes fails the test, unless a test's own signal ended another rank,
    which breaks the connection between them. Ranks may take any time, as long as one of them works.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, readers = [], []
    for rank in range(world):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        reader, writer = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=_rank, args=(environment, writer, function, arguments))
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    results: dict[int, object] = {}
    progress = Progress(*(process.pid for process in processes))
    try:
        while len(results) < world:
            ready = wait([r for i, r in enumerate(readers) if i not in results], timeout=1)
            progress.check()
            for reader in ready:
                results[readers.index(reader)] = _result(reader, processes[readers.index(reader)])
    finally:
        for process in processes:
            process.kill()
            process.join()
    ended = {rank: r for rank, r in results.items() if isinstance(r, signal.Signals)}
    if not KILLS & set(ended.values()):
        assert not ended, f"ranks ended by a signal: {ended}"
        for rank, result in results.items():
            assert not isinstance(result, Failure), f"rank {rank}: {result}"
    return [results[rank] for rank in range(world)]


class Failure(str):
    """A rank's traceback."""


def _result(reader: Connection, process) -> object:
    try:
        return reader.recv()
    except EOFError:
        process.join()
        return signal.Signals(-process.exitcode)


def _rank(environment: dict, writer: Connection, function: Callable, arguments) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = function(*arguments)
    except BaseException:
        result = Failure(traceback.format_exc())
    writer.send(result)
    if dist.is_initialized():
        dist.destroy_process_group()
