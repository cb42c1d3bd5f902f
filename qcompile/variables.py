"""The environment variables that qcompile reads; ``docs/debugging.md`` has the same table."""

from __future__ import annotations

VARIABLES = {
    "QCOMPILE_CACHE_DIR": "folder of the cache; else the user's cache folder",
    "QCOMPILE_CACHE_SIZE": "bytes that the cache may take, such as 20G (the default is 50G); 0: nothing is kept",
    "QCOMPILE_EXAMPLES_DIR": "where the examples and tests keep the decoder that they train",
    "QCOMPILE_TEST_EVERYTHING": "set: the tests look at the whole zoo, and compile every kernel for every GPU",
    "QCOMPILE_TEST_FUZZ": "how many damaged files of each kind the tests of checkpoints try; else 25",
    "QCOMPILE_TEST_SCHEMES": "a regular expression: the schemes that the tests of GPU kernels compile",
}
"""Name → what it does."""

OTHERS = {
    "CXX": "the C++ compiler that kernels for CPUs are built with, as for Inductor",
    "TORCH_LOGS": "+qcompile: everything; or some of qcompile_graph, qcompile_plan, qcompile_code",
    "TORCH_TRACE": "folder of structured traces for tlparse: graphs, plan and code are artefacts in them",
    "TORCH_COMPILE_DEBUG": "1: a folder for every graph with graphs, plan, kernels and a script that runs it again",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0: importing torch does not load qcompile's log names, and TORCH_LOGS does not know them",
    "TRITON_INTERPRET": "1: kernels for GPUs run on the CPU, in Triton's interpreter, with the types that a GPU multiplies",
}
"""Variables of others that matter here."""
