"""Runs the programs that interpret and compile Triton kernels: processes of their own, because Triton reads
``TRITON_INTERPRET`` when it is imported."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

Report = list[dict]
HERE = importlib.util.find_spec("triton") is not None
TRITON = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2]) if HERE else ()
INTEGER = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA" if TRITON < (3, 8) else "UTCIMMA"}
"""What multiplies int8; before 3.8 Triton uses the smaller units of sm_100 for it."""


def reports(programs: dict[str, tuple[str, ...]], folders: pytest.TempPathFactory) -> dict[str, Report]:
    """What each of ``programs`` (file and arguments) reports as lines of JSON, under the first word of its name; all run at
    once, with empty caches."""
    started = {}
    for name, (program, *arguments) in programs.items():
        folder = folders.mktemp(name.replace(" ", "_"))
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(program)), *arguments]
        env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "QCOMPILE_CACHE_DIR": str(folder / "sources")}
        env.pop("TRITON_INTERPRET", None)
        out, err = (folder / "out").open("w+"), (folder / "err").open("w+")
        started[name] = subprocess.Popen(command, stdout=out, stderr=err, env=env), out, err
    found: dict[str, Report] = {}
    for name, (process, out, err) in started.items():
        code = process.wait(timeout=1500)
        out.seek(0), err.seek(0)
        assert code == 0, f"{name} ended with {code}: {err.read()[-3000:]}"
        found.setdefault(name.split()[0], []).extend(json.loads(line) for line in out)
        out.close(), err.close()
    return found
