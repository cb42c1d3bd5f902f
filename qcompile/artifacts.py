"""``torch.compiler.save_cache_artifacts()`` carries what qcompile made, next to what Inductor did.

An artifact is recorded by its place and read when artifacts are saved: weights do not lie in memory twice. Torch refuses kinds
of artifacts that it does not know, so ``import torch`` makes ours known (:mod:`.autoload`).
"""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
from pathlib import Path

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from .errors import CacheError
from .store import USED, the_store
from .store.bundle import add, load
from .store.entry import read

log = logging.getLogger(__name__)

TYPE = "qcompile"


class StoreArtifact(CacheArtifact):
    """An entry of the store. ``key`` is ``<kind>/<key>``; ``content`` a bundle of that one entry."""

    def __init__(self, key: str, content: bytes | Path) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "_content", content)

    @property
    def content(self) -> bytes:  # type: ignore[override]
        """Empty for an entry that was dropped since it was recorded."""
        content: bytes | Path = self._content  # type: ignore[attr-defined]
        return content if isinstance(content, bytes) else bundled(content, *self.key.split("/"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreArtifact) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @staticmethod
    def encode(content: Path) -> Path:  # type: ignore[override]
        return content

    def populate_cache(self) -> None:
        """Keeps the entry; one that is not what was saved, or that cannot be kept, is left with a warning and made again."""
        if self.content:
            with tempfile.NamedTemporaryFile() as file:
                file.write(self.content)
                file.flush()
                try:
                    load(the_store(), Path(file.name))
                except CacheError as error:
                    log.warning("an artifact is left, and will be made again: %s", error)

    @staticmethod
    def type() -> str:
        return TYPE


def bundled(folder: Path, kind: str, key: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        try:
            whole = add(tar, folder, read(folder, kind, key))
        except FileNotFoundError:
            whole = False
    return out.getvalue() if whole else b""


def register() -> None:
    """Makes torch carry entries of the store from now on; once in a process."""
    if TYPE not in CacheArtifactFactory._artifact_types:
        CacheArtifactFactory.register(StoreArtifact)
        USED.append(lambda kind, folder: CacheArtifactManager.record_artifact(TYPE, f"{kind}/{folder.name}", folder))
