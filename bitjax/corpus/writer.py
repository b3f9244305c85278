"""Writing a corpus so that a build which was stopped can go on.

While a build is under way its folder also holds

    progress.json     what is in the other files for certain, replaced now and then
    PART.lengths      int64, little-endian: the tokens of each document so far

A process may be killed at any instant: the next build cuts every file back to what progress.json
says and goes on behind it. SHA-256 cannot be taken up in the middle, so the shard that was open is
read again.

progress.json: {"build": HASH of everything that decides the bytes but the texts, "batches": those
written, "texts": HASH of theirs, "empty": documents, "parts": {PART: {"documents", "bytes",
"shards"}}}, with shards as in a corpus's index; one without "sha256" is open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bitjax.corpus.store import PARTS, shard_name
from bitjax.replacing import replace_text

PROGRESS = "progress.json"


def lengths_name(part: str) -> str:
    """The file of the documents' lengths of a part."""
    return f"{part}.lengths"


class PartWriter:
    """Writes one part's shards and starts, and hashes them on the way.

    Args:
        folder: of the build.
        part: its name.
        dtype: of the tokens.
        shard_tokens: of a full shard.
        masks: whether each shard has a file that says which of its tokens are counted.
        held: what `progress` gave, to go on from there.

    Raises:
        ValueError: files that are shorter than what they should hold.
    """

    def __init__(
        self, folder: Path, part: str, dtype: str, shard_tokens: int, masks: bool = False,
        held: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._part, self._shard_tokens = folder, part, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masks = masks
        held = held or {"documents": 0, "bytes": 0, "shards": []}
        self.documents: int = held["documents"]
        self.bytes: int = held["bytes"]
        self.shards: list[dict[str, Any]] = [dict(shard) for shard in held["shards"]]
        self._lengths_path = folder / lengths_name(part)
        self._lengths, _ = _cut(self._lengths_path, 8 * self.documents)
        # Of the open shard: its sums' names in the index, files and hashes; tokens come first.
        self._open: list[tuple[str, Any, Any]] = []
        if self.shards and "sha256" not in self.shards[-1]:
            self._open_shard()

    def write(self, ids: np.ndarray, size: int, counted: np.ndarray | None = None) -> None:
        """Append one document of `size` UTF-8 bytes."""
        self._lengths.write(np.array([len(ids)], "<i8").tobytes())
        self.documents += 1
        self.bytes += size
        values = [ids.astype(self._dtype), *([] if counted is None else [counted.astype("u1")])]
        while len(values[0]):
            if not self._open:
                self.shards.append({"tokens": 0})
                self._open_shard()
            room = self._shard_tokens - self.shards[-1]["tokens"]
            for (_, file, sums), array in zip(self._open, values, strict=True):
                piece = array[:room].tobytes()
                file.write(piece)
                sums.update(piece)
            self.shards[-1]["tokens"] += len(values[0][:room])
            values = [array[room:] for array in values]
            if self.shards[-1]["tokens"] == self._shard_tokens:
                self._finish_shard()

    def _open_shard(self) -> None:
        number, tokens = len(self.shards) - 1, self.shards[-1]["tokens"]
        names = {"sha256": (shard_name(self._part, number), self._dtype.itemsize)}
        if self._masks:
            names["counted_sha256"] = shard_name(self._part, number, "counted"), 1
        self._open = [
            (key, *_cut(self._folder / name, size * tokens)) for key, (name, size) in names.items()
        ]

    def _finish_shard(self) -> None:
        for key, file, sums in self._open:
            _sync(file)
            self.shards[-1][key] = sums.hexdigest()
            file.close()
        self._open = []

    def progress(self) -> dict[str, Any]:
        """What is on the disk now, whatever happens after."""
        for file in (self._lengths, *(file for _, file, _ in self._open)):
            _sync(file)
        return {"documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for file in (self._lengths, *(file for _, file, _ in self._open)):
            file.close()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns the part's entry in the index."""
        self._finish_shard()
        self._lengths.close()
        lengths = np.fromfile(self._lengths_path, "<i8")
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        (self._folder / f"{self._part}.starts").write_bytes(starts.tobytes())
        return {
            "documents": self.documents,
            "tokens": int(starts[-1]),
            "bytes": self.bytes,
            "starts_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
            "shards": self.shards,
        }


class Journal:
    """What a build has done; begins with what an earlier process of the same build left.

    Args:
        folder: of the build; need not exist.
        build: hash of everything that decides the corpus's bytes, but for the texts.

    Attributes:
        held: of progress.json, where it is of this build; else None.
        other: whether there is a progress.json of another build.
    """

    def __init__(self, folder: Path, build: str) -> None:
        self._path, self._build = folder / PROGRESS, build
        found: Any = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_bytes())
        fits = isinstance(found, dict) and found.get("build") == build
        self.held: dict[str, Any] | None = found if fits else None
        self.other = isinstance(found, dict) and not fits

    def save(self, batches: int, texts: str, empty: int, writers: dict[str, PartWriter]) -> None:
        """Note what is written, atomically.

        Args:
            batches: written.
            texts: hash of their texts.
            empty: documents left out.
            writers: of the parts.
        """
        about = {
            "build": self._build, "batches": batches, "texts": texts, "empty": empty,
            "parts": {part: writers[part].progress() for part in PARTS},
        }  # fmt: skip
        replace_text(self._path, json.dumps(about))

    def sweep(self) -> None:
        """Remove the files that progress.json does not know, such as later shards."""
        known = {PROGRESS, *map(lengths_name, PARTS)}
        for part, about in (self.held or {"parts": {}})["parts"].items():
            for number in range(len(about["shards"])):
                known |= {shard_name(part, number), shard_name(part, number, "counted")}
        for path in self._path.parent.iterdir():
            if path.name not in known:
                path.unlink()

    def finish(self) -> None:
        """The build is complete, and there is nothing to go on with."""
        for name in (*map(lengths_name, PARTS), PROGRESS):
            (self._path.parent / name).unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _cut(path: Path, size: int) -> tuple[Any, Any]:
    """A file of which the first `size` bytes are kept, open at their end, and their SHA-256."""
    sums, done = hashlib.sha256(), 0
    file = path.open("r+b" if size else "wb")
    while done < size:
        piece = file.read(min(1 << 20, size - done))
        if not piece:
            file.close()
            raise ValueError(f"{path} is shorter than {size:,} bytes")
        sums.update(piece)
        done += len(piece)
    file.truncate()
    return file, sums
