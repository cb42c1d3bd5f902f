"""Compiled models in several threads at once, in forked processes and in spawned ones."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader
from workers import Encoded, inputs, network, serve

import qcompile
from qcompile.tensor import QuantizedTensor


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None) -> Iterator[None]:
    yield


def test_two_models_run_in_several_threads_at_once() -> None:
    """Also their first calls, which pack: every thread gets its own model's results, always."""
    models = [network(0), network(1, 96)]
    wanted = []
    for model in models:
        qcompile.quantize_(again := copy.deepcopy(model), inputs(), policy="int8")
        wanted.append(again(inputs()))
    steps = [torch.compile(m, backend="qcompile", options={"policy": "int8"}) for m in models]
    errors: list[BaseException] = []

    def work(which: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(steps[which](inputs()), wanted[which], rtol=1e-4, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert all(isinstance(m[i].weight, QuantizedTensor) for m in models for i in (0, 2))


def test_workers_forked_after_the_first_callserve() -> None:
    """As a server's master that loads and warms up before it forks. GNU's OpenMP has no threads after a fork: code of Inductor
    is compiled for one, and workers set PyTorch's number, which our kernels ask for, to one."""
    options = {"policy": "int8", "inductor": {"cpp.threads": 1}}
    model = torch.compile(network(0), backend="qcompile", options=options)
    expected = model(inputs())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=serve, args=(model, inputs(), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        torch.testing.assert_close(torch.tensor(queue.get(timeout=60)), expected)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def test_spawned_workers_take_packed_weights() -> None:
    qcompile.quantize_(model := network(0), inputs(), policy="int8")
    expected = model(inputs())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=serve, args=(model, inputs(), queue))
    worker.start()
    torch.testing.assert_close(torch.tensor(queue.get(timeout=120)), expected)
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_packed_models_in_the_workers_of_a_data_loader(method: str) -> None:
    qcompile.quantize_(model := network(0), inputs(), policy="int8")
    loader = DataLoader(Encoded(model), batch_size=2, num_workers=2, multiprocessing_context=method)
    torch.testing.assert_close(torch.cat(list(loader)), model(inputs()[:4]), rtol=1e-5, atol=1e-6)
