"""Fixtures for all tests; tests marked ``gpu`` run where there is a CUDA device."""

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what the tests of the zoo found."""
    lines = [text for report in terminalreporter.stats.get("passed", []) for key, text in report.user_properties if key == "zoo"]
    if lines:
        terminalreporter.write_sep("-", "linear layers computed packed")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def debug_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Repros that failures leave go to a temporary folder."""
    torch._dynamo.config.debug_dir_root = str(tmp_path_factory.mktemp("torch_compile_debug"))


@pytest.fixture
def reset_dynamo() -> Iterator[None]:
    """No compiled code and no counters from other tests."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo(reset_dynamo: None) -> Iterator[None]:
    """As :func:`reset_dynamo`, and gradients off."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: waiting for a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
