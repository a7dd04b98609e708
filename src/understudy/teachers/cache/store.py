"""An append-only, content-addressed store of a teacher's outputs: several rows of arrays for each example.

Shards are safetensors files, each complete or absent, read through a memory map. A shard's name is the SHA-256 of the
file, which is checked before its first use. A key is the SHA-256 of an example's inputs and labels, so another run
finds its examples for any order, split or padding, and never another example's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from understudy.errors import InputError
from understudy.files import digest, read_json, replacing, writing

IDENTITY = "identity.json"
SEAL = "sha256"
"""Key of the identity with the hash of its other keys."""
WHOLE = 65_536
"""Number of rows from which a shard is not merged."""
WHOLE_BYTES = 2**26
"""Number of bytes from which a shard is not merged, since merging holds it in memory."""
SHARD = re.compile(r"shard-([0-9a-f]{64}|[0-9a-f]{32})\.safetensors")
"""The name of a shard is its SHA-256. Names with 32 digits are from before there were checksums."""
BEFORE = re.compile(
    rf"{SHARD.pattern}|head(-[0-9a-f]+)?\.safetensors|probe\.json|merge\.lock|ids|teacher|members|.*\.tmp"
)
"""Files that a store without an identity may hold; a teacher that a capture trains first is one of them."""
_TYPES = {"U8": np.uint8, "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32}


def content_key(*parts: Tensor, salt: str = "") -> bytes:
    """SHA-256 of tensors (integers as int64), with a salt."""
    digest = hashlib.sha256(salt.encode())
    for part in parts:
        same = (part if part.is_floating_point() else part.to(torch.int64)).contiguous().cpu()
        digest.update(f"{tuple(same.shape)}{same.dtype}".encode() + same.numpy().tobytes())
    return digest.digest()


class ShardStore:
    """A folder of shards with an identity.

    Args:
        folder: created at the first write.
        identity: what the content depends on; a folder that was written under another identity is refused, and the
            error names the first difference. `None` reads any folder.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.identity = self._agree(identity)
        self.places: dict[bytes, tuple[int, int, int]] = {}
        self.shards: list[dict[str, Any]] = []
        self.merged: set[str] = set()  # files replaced by a newer one and left by a kill
        self.refresh()

    def _agree(self, wanted: Mapping[str, Any] | None) -> dict[str, Any]:
        held = _identity(self.folder / IDENTITY)
        if held is None:
            if wanted is None:
                raise InputError(
                    f"{self.folder} is no cache: it has no {IDENTITY}. Make one with `understudy cache capture`."
                )
            others = [p.name for p in self.folder.glob("*") if not BEFORE.fullmatch(p.name)]
            if others:
                raise InputError(
                    f"{self.folder} holds files that are no cache's ({', '.join(sorted(others)[:3])}): they are left alone. "
                    "Choose a new or empty folder."
                )
            return dict(wanted)
        wanted = json.loads(json.dumps(wanted)) if wanted is not None else held
        for key in sorted(held.keys() | wanted.keys()):
            if held.get(key) != wanted.get(key):
                raise InputError(
                    f"Cache {self.folder} was made with {key} {held.get(key)!r} and {wanted.get(key)!r} is asked for. "
                    "Capture again into another folder, or change the recipe."
                )
        return held

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def length(self, key: bytes) -> int:
        """Number of rows of one example."""
        _, start, stop = self.places[key]
        return stop - start

    @property
    def rows(self) -> int:
        """Number of rows of all examples."""
        return sum(stop - start for _, start, stop in self.places.values())

    @property
    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(f.stat().st_size for f in self._files())

    @property
    def spent(self) -> Counter[str]:
        """The total cost of the outputs (`spent` of `append`)."""
        return sum((shard["spent"] for shard in self._alive()), Counter[str]())

    def _files(self) -> set[Path]:
        return {f for f in self.folder.glob("shard-*.safetensors") if SHARD.fullmatch(f.name)}

    def _alive(self) -> list[dict[str, Any]]:
        """The shards that no newer one replaces."""
        return [shard for shard in self.shards if shard and shard["file"].name not in self.merged]

    def claim(self) -> None:
        """Create the folder and write its identity, if that is not done."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / IDENTITY).exists():
                sealed = {**self.identity, SEAL: _hash_of(self.identity)}
                with replacing(self.folder / IDENTITY) as temporary:
                    temporary.write_text(json.dumps(sealed, indent=1, sort_keys=True))

    def refresh(self) -> None:
        """Read the shards written since, also by other processes."""
        while True:
            known = {shard["file"] for shard in self.shards if shard}
            try:
                new = sorted(self._files() - known)
                headers = {file: _header(file) for file in new}
                for file, (header, _) in headers.items():
                    self.merged.update(_merged(file, header))
                for file, (header, offset) in headers.items():
                    if file.name not in self.merged:
                        self._open(file, header, offset)
                return
            except FileNotFoundError:  # another process has merged it into a new one
                continue

    def append(
        self,
        keys: Sequence[bytes],
        counts: Sequence[int],
        arrays: Mapping[str, Tensor],
        spent: Mapping[str, Any] | None = None,
    ) -> None:
        """Write examples as one shard, renamed into place; `arrays` hold `sum(counts)` rows each.

        Args:
            spent: cost of these outputs by kind (tokens), in the same file, so that outputs and cost are stored
                together.
        """
        if not keys:
            return
        self.claim()
        temporary = self.folder / f"shard-{uuid.uuid4().hex}.tmp"
        index = {"keys": torch.tensor([list(k) for k in keys], dtype=torch.uint8)}
        index["counts"] = torch.tensor(list(counts), dtype=torch.int32)
        # Costs of two processes both count, also for the same example: files are never identical.
        facts = {"written": uuid.uuid4().hex, **{k: str(v) for k, v in (spent or {}).items()}}
        with writing(self.folder):
            try:
                save_file({**index, **{k: v.contiguous().cpu() for k, v in arrays.items()}}, str(temporary), facts)
                name = self.folder / f"shard-{digest(temporary)}.safetensors"
                os.replace(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)
        header, offset = _header(name)
        self.merged.update(_merged(name, header))
        self._open(name, header, offset)
        self.shards[-1]["checked"] = True

    def compact(self, most: int = 1) -> None:
        """Merge small shards, if there are more than `most`. The new file names those it replaces, so that files left
        by a kill are neither read nor counted, and are deleted the next time."""
        if sum(not is_whole(shard) for shard in self._alive()) <= most:
            return
        with self._alone() as alone:
            if not alone:
                return
            self.refresh()
            small = [shard for shard in self._alive() if not is_whole(shard)]
            small.sort(key=lambda shard: sorted(shard["types"].items()))
            while small:
                group = [small.pop()]
                while small and small[-1]["types"] == group[0]["types"] and not is_whole(*group):
                    group.append(small.pop())
                if len(group) > 1:
                    self._merge(group)

    def _merge(self, group: Sequence[dict[str, Any]]) -> None:
        numbers = {i for i, shard in enumerate(self.shards) if any(shard is old for old in group)}
        keys = [k for k, place in self.places.items() if place[0] in numbers]
        if not keys:
            return
        counts = [self.places[k][2] - self.places[k][1] for k in keys]
        arrays = self.read(keys)
        for key in keys:
            del self.places[key]
        for i in numbers:
            self.shards[i] = {}
        total, left = sum((old["spent"] for old in group), Counter[str]()), list(self.merged)
        self.append(keys, counts, arrays, {**total, "merged": " ".join(old["file"].name for old in group)})
        for file in [*(self.folder / name for name in left), *(old["file"] for old in group)]:
            file.unlink(missing_ok=True)  # the oldest first: newer ones hold their names

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process is merging this folder."""
        try:
            import fcntl
        except ImportError:  # this system has no file locks
            yield False
            return
        with (self.folder / "merge.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _open(self, file: Path, header: Mapping[str, Any], offset: int) -> None:
        header = dict(header)
        try:
            metadata = header.pop("__metadata__", {})
            spent = Counter({k: int(v) for k, v in metadata.items() if k not in ("merged", "written")})
            arrays = {name: _mapped(file, offset, facts) for name, facts in header.items()}
            keys, counts = np.asarray(arrays.pop("keys")), np.asarray(arrays.pop("counts"))
            types = {name: header[name]["dtype"] for name in arrays}
            if not arrays or len(keys) != len(counts) or {len(a) for a in arrays.values()} != {int(counts.sum())}:
                raise ValueError("its arrays have other lengths than its counts say")
        except FileNotFoundError:
            raise
        except (KeyError, TypeError, AttributeError, OSError, ValueError, OverflowError) as error:
            raise _unreadable(file, error) from error
        ends = counts.cumsum()
        for key, count, end in zip(keys, counts.tolist(), ends.tolist(), strict=True):
            self.places.setdefault(key.tobytes(), (len(self.shards), end - count, end))
        self.shards.append({"arrays": arrays, "types": types, "file": file, "spent": spent, "checked": False})

    def check(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            InputError: a shard was changed since it was written.
        """
        for shard in self._alive():
            _compare(shard)

    def read(self, keys: Sequence[bytes]) -> dict[str, Tensor]:
        """The rows of these examples in order.

        Raises:
            InputError: an example is not in the store.
        """
        missing = sum(k not in self.places for k in keys)
        if missing:
            self.check()  # a damaged key looks like a missing one
            raise InputError(
                f"{missing} of {len(keys)} examples of a batch are not in cache {self.folder}: other data, another "
                "max_length or template, or augmented inputs. Run `understudy cache capture` with this recipe to append them."
            )
        found: dict[str, list[Tensor]] = {}
        for key in keys:
            shard, start, stop = self.places[key]
            _compare(self.shards[shard])
            for name, array in self.shards[shard]["arrays"].items():
                part = torch.from_numpy(np.array(array[start:stop]))
                bf16 = self.shards[shard]["types"][name] == "BF16"
                found.setdefault(name, []).append(part.view(torch.bfloat16) if bf16 else part)
        return {name: torch.cat(parts) for name, parts in found.items()}


def _compare(shard: dict[str, Any]) -> None:
    """Compare a shard with its checksum, once."""
    if shard["checked"]:
        return
    found = SHARD.fullmatch(shard["file"].name)
    assert found is not None
    if len(found[1]) == 64 and digest(shard["file"]) != found[1]:
        raise _unreadable(shard["file"], ValueError("its SHA-256 is not the one in its name"))
    shard["checked"] = True


def _hash_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _identity(file: Path) -> dict[str, Any] | None:
    """The content of an identity file, checked against its hash."""
    held = read_json(file)
    if held is not None and held.pop(SEAL, None) not in (None, _hash_of(held)):
        raise InputError(f"{file} is damaged: its {SEAL} is not that of the rest. Put it back, or capture again.")
    return held


def _merged(file: Path, header: Mapping[str, Any]) -> list[str]:
    """The names of the shards that a shard replaces."""
    try:
        names = header.get("__metadata__", {}).get("merged", "").split()
    except AttributeError as error:
        raise _unreadable(file, error) from error
    wrong = [name for name in names if not SHARD.fullmatch(name)]
    if wrong:
        raise _unreadable(file, ValueError(f"it says that it replaces {wrong[0]!r}, which is no shard"))
    return list(names)


def _length(shard: Mapping[str, Any]) -> int:
    return len(next(iter(shard["arrays"].values())))


def is_whole(*shards: Mapping[str, Any]) -> bool:
    """Whether the shards together have the size of a full file."""
    size = sum(array.nbytes for shard in shards for array in shard["arrays"].values())
    return size >= WHOLE_BYTES or sum(map(_length, shards)) >= WHOLE


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The arrays of a safetensors file from its header, and the offset of the data."""
    try:
        with file.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header: Any = json.loads(raw.read(size)) if size < file.stat().st_size else None
        if not isinstance(header, dict):
            raise ValueError("it has no header")
        return header, 8 + size
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"Cache shard {file} cannot be read ({error}): delete that file and capture again.")


def _mapped(file: Path, offset: int, facts: Mapping[str, Any]) -> Any:
    begin, end = facts["data_offsets"]
    kind, shape = _TYPES[facts["dtype"]], tuple(facts["shape"])
    if end - begin != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError("its header says another size than its shape has")
    if begin == end:
        return np.zeros(shape, kind)
    if begin < 0 or offset + end > file.stat().st_size:
        raise ValueError("the file is shorter than its header says")
    return np.memmap(file, kind, "r", offset + begin, shape)
