"""Files of tensors: mapped into memory, every size checked before any byte is used, pages let go once they were read."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CorruptCheckpointError, MissingTensorError, UnsupportedCheckpointError, nearest

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""safetensors' names of dtypes."""

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; more is refused, as the format's own library does."""


class MappedFile:
    """A file's bytes as tensors that share memory with the page cache. Raises :class:`MissingTensorError` if there is none,
    :class:`CorruptCheckpointError` if it is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise MissingTensorError(f"{path}: no such file; is a shard of the checkpoint missing?")
        with path.open("rb") as file:
            self.size = path.stat().st_size
            if self.size == 0:
                raise CorruptCheckpointError(f"{path}: the file is empty; download it again")
            # A private mapping is writable, which torch.frombuffer asks for; nothing here writes to it.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor at ``offset``; no copy. The caller has checked that it lies in the file."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.bytes, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self, offset: int, size: int) -> None:
        """Lets go of the pages of ``size`` bytes from ``offset`` on, so that they do not count as resident."""
        self.advise(mmap.MADV_DONTNEED, offset, size)

    def advise(self, what: int, offset: int, size: int) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if size:
            self.bytes.madvise(what, start, offset + size - start)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet: ``dtype``, ``shape``, and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: MappedFile
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """A view of the file's bytes, which the kernel begins to fetch: copy what is to outlive :meth:`release`."""
        self.file.advise(mmap.MADV_WILLNEED, self.offset, self.nbytes)
        return self.file.view(self.offset, self.shape, self.dtype)

    def release(self) -> None:
        self.file.release(self.offset, self.nbytes)

    def expect(self, dtypes: torch.dtype | tuple[torch.dtype, ...], *shape: int | None) -> Stored:
        """Itself, if it has one of ``dtypes`` and ``shape`` (None: any size). Raises :class:`CorruptCheckpointError`."""
        allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        fits = len(shape) == len(self.shape) and all(w in (None, s) for w, s in zip(shape, self.shape, strict=True))
        if not fits or self.dtype not in allowed:
            wanted = [s if s is not None else "any" for s in shape]
            raise CorruptCheckpointError(f"{self.name}: expected {' or '.join(map(str, allowed))} {wanted}, found {self.dtype} "
                                         f"{list(self.shape)}; the file does not fit its own configuration")  # fmt: skip
        return self


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of a checkpoint by name, and the text that the files' headers hold beside them."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def open_safetensors(path: Path) -> TensorFiles:
    """Opens ``path``: a file, a directory with ``model.safetensors`` or the only ``*.safetensors``, or with an index of
    shards (``*.safetensors.index.json``).

    Raises :class:`MissingTensorError` for a shard or tensor that an index names and that is not there,
    :class:`CorruptCheckpointError` for a header that does not fit its file, :class:`UnsupportedCheckpointError` for pickles.
    """
    if path.is_file():
        return _one_file(path)
    if not path.is_dir():
        raise MissingTensorError(f"{path}: no such file or directory")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _shards(path, indexes[0])
    files = sorted(path.glob("*.safetensors"))
    one = path / "model.safetensors"
    if one in files:
        return _one_file(one)
    if len(files) == 1:
        return _one_file(files[0])
    if not files and any(path.glob("*.bin")):
        raise UnsupportedCheckpointError(f"{path} holds pickles (*.bin), which can run any code when they are read; convert it "
                                         "to safetensors")  # fmt: skip
    found = ", ".join(f.name for f in [*indexes, *files]) or "none"
    raise MissingTensorError(f"{path}: expected model.safetensors, one *.safetensors or one index of shards, found {found}")


def _one_file(path: Path) -> TensorFiles:
    tensors, metadata = safetensors_header(MappedFile(path))
    return TensorFiles(path, {t.name: t for t in tensors}, metadata)


def _shards(folder: Path, index: Path) -> TensorFiles:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise CorruptCheckpointError(f"{index}: expected a 'weight_map' from tensors to files")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{index}: {shard!r} is no safetensors file of this directory")
        found, more = safetensors_header(MappedFile(folder / shard))
        metadata |= more
        for tensor in found:
            if tensor.name in tensors:
                raise CorruptCheckpointError(f"{tensor.name}: two shards of {index} hold it, {shard} is the second")
            tensors[tensor.name] = tensor
    if lost := sorted(set(names) - set(tensors)):
        raise MissingTensorError(f"{lost[0]}: {index} says that {names[lost[0]]} holds it, but it does not "
                                 f"({len(lost)} such tensors); download the checkpoint again")  # fmt: skip
    return TensorFiles(folder, tensors, metadata)


def safetensors_header(file: MappedFile) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    The format: 8 bytes with the length of a JSON object, the object (``{name: {dtype, shape, data_offsets}}``), then the
    bytes of the tensors without gaps. Raises :class:`CorruptCheckpointError` unless all of that holds.
    """
    length = int.from_bytes(file.bytes[:8], "little")
    if file.size < 8 or length > min(file.size - 8, MAX_HEADER):
        raise CorruptCheckpointError(f"{file.path}: no safetensors file, or cut off: its header is to have {length} bytes, the "
                                     f"file has {file.size}")  # fmt: skip
    header = parse_json(file.bytes[8 : 8 + length], f"{file.path}: header")
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{file.path}: expected a JSON object as its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptCheckpointError(f"{file.path}: __metadata__ must map names to strings")
    start = 8 + length
    tensors = [_entry(file, start, name, entry) for name, entry in header.items()]
    check_layout([(t.name, t.offset, t.nbytes) for t in tensors], start, file, gaps=False)
    return sorted(tensors, key=lambda t: t.offset), metadata


def _entry(file: MappedFile, start: int, name: str, entry: Any) -> Stored:
    """One entry of a header, checked as far as it stands alone."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(span) or len(span) != 2:
        raise CorruptCheckpointError(f"{name}: expected dtype, shape and two data_offsets, all whole and not negative, found "
                                     f"{str(entry)[:200]} ({file.path})")  # fmt: skip
    if dtype not in DTYPES:
        raise UnsupportedCheckpointError(f"{name}: unknown dtype {dtype!r}. {nearest(dtype, DTYPES)} ({file.path})")
    made = Stored(name, DTYPES[dtype], tuple(shape), file, start + span[0])
    if span[1] - span[0] != made.nbytes:
        raise CorruptCheckpointError(f"{name}: {dtype} {shape} takes {made.nbytes} bytes, its data_offsets {span} hold "
                                     f"{span[1] - span[0]} ({file.path})")  # fmt: skip
    return made


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in value)


def check_layout(spans: list[tuple[str, int, int]], start: int, file: MappedFile, gaps: bool) -> None:
    """Raises :class:`CorruptCheckpointError` unless (name, offset, bytes) of all tensors lie in the file from ``start`` on, no
    two overlap, and, without ``gaps``, they fill it."""
    at, before = start, "the header"
    for name, offset, size in sorted(spans, key=lambda span: (span[1], span[2])):
        if offset < at and size:
            raise CorruptCheckpointError(f"{name}: begins at byte {offset} of {file.path}, inside {before}, which ends at {at}")
        if not gaps and offset != at:
            raise CorruptCheckpointError(f"{name}: begins at byte {offset} of {file.path}; {before} ends at {at}, and between "
                                         "them are bytes of no tensor")  # fmt: skip
        if offset + size > file.size:
            raise CorruptCheckpointError(f"{name}: ends at byte {offset + size}, but {file.path} has {file.size}; it is cut off, "
                                         "download it again")  # fmt: skip
        at, before = max(at, offset + size), name
    if not gaps and at != file.size:
        raise CorruptCheckpointError(f"{file.path}: its tensors end at byte {at}, the file has {file.size}")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises :class:`MissingTensorError` and :class:`CorruptCheckpointError`."""
    if not path.is_file():
        raise MissingTensorError(f"{path}: no such file")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes | str, what: str) -> Any:
    """The value of a JSON text in which no object has a name twice. Raises :class:`CorruptCheckpointError`."""
    try:
        return json.loads(data, object_pairs_hook=_object(what))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(f"{what}: not JSON ({str(error)[:200]}); download it again") from error


def _object(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CorruptCheckpointError(f"{name}: comes twice in {what}")
            found[name] = value
        return found

    return made
