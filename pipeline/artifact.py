"""artifacts/<target>/<model>: a library, its weights and manifest.json, put there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline import weightfile
from pipeline.errors import ArtifactError, StoreError, explain_os_error
from pipeline.hashing import Digest
from pipeline.manifests import read_manifest
from pipeline.store import Store
from pipeline.types import (
    LIBRARY,
    MANIFEST,
    MANIFEST_FORMAT,
    WEIGHTS,
    Decision,
    LibraryUse,
    Manifest,
    Operator,
    Plan,
    Reference,
    TensorSpec,
    Weight,
    Workload,
)


@dataclass(frozen=True)
class Draft:
    """Everything that an artifact is made of."""

    model: str
    target: str
    attributes: dict[str, Any]
    toolchain: dict[str, str]
    plan: Plan
    library: Digest | None
    weights: tuple[Weight, ...]
    weights_in: str
    reference: Reference
    operators: tuple[Operator, ...]
    shared: dict[str, Digest]  # shared libraries that lie beside the library, by file name
    libraries: tuple[LibraryUse, ...]
    parts: dict[str, Digest]  # what else is shipped, by file name: device code, sources, or objects to be linked
    unlinked: str  # why there is no library, "" where there is one


def operator(workload: Workload, decision: Decision, compiled: Digest) -> Operator:
    """What the manifest says of one workload."""
    return Operator(
        name=workload.label,
        workload=workload.digest,
        structural_hash=workload.structural_hash,
        shapes=workload.shapes,
        calls=workload.calls,
        implementation=decision.strategy,
        reason=decision.reason,
        candidates=decision.trials,
        object=compiled.hash,
    )


def publish(store: Store, draft: Draft, folder: Path) -> dict[str, str]:
    """Puts the artifact at `folder`. One that is there already with the same bytes is left as it is. Returns what was
    wrong with the one that was there: see `damage`.

    It is written beside its place and exchanged with what was there in one step, so that who reads the folder sees the
    old artifact or the new one. Raises StoreError where the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            manifest = _write(store, draft, scratch)
            wrong = {} if (is_same := _same(folder, scratch, manifest)) else damage(folder)
            if not is_same:
                scratch.chmod(0o755)
                _exchange(scratch, folder)
            return wrong
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, f"writing artifacts/{draft.target}/{draft.model}") from error


def weight_file(store: Store, weights: Sequence[Weight]) -> Digest:
    """The blob of a weight file, to be linked into a library."""
    with tempfile.TemporaryDirectory(dir=store.root / "tmp") as name:
        path = Path(name) / WEIGHTS
        weightfile.write(path, _located(store, weights))
        return store.put_file(path)


def _write(store: Store, draft: Draft, folder: Path) -> Manifest:
    files = {**draft.shared, **draft.parts, **({LIBRARY: draft.library} if draft.library is not None else {})}
    names = sorted(files)
    for name, digest in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_located_blob(store, digest), folder / name)
    if draft.weights_in == "beside":
        weightfile.write(folder / WEIGHTS, _located(store, draft.weights))
        names.append(WEIGHTS)
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        model=draft.model,
        target=draft.target,
        target_spec=draft.attributes,
        toolchain=draft.toolchain,
        inputs=draft.plan.inputs,
        outputs=draft.plan.outputs,
        weights=tuple(weight.spec for weight in draft.weights),
        weights_in=draft.weights_in,
        files={name: Digest.of_file(folder / name) for name in names},
        reference=draft.reference,
        operators=draft.operators,
        libraries=draft.libraries,
        unlinked=draft.unlinked,
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    (folder / MANIFEST).write_bytes(encoded + b"\n")
    return manifest


def _located(store: Store, weights: Sequence[Weight]) -> list[tuple[TensorSpec, Path]]:
    return [(weight.spec, _located_blob(store, weight.blob)) for weight in weights]


def _located_blob(store: Store, blob: Digest) -> Path:
    path = store.path(blob)
    if path is None:
        raise StoreError(f"blob {blob} has vanished from the store", hint="run the same command again")
    return path


def _same(folder: Path, scratch: Path, manifest: Manifest) -> bool:
    """Whether the folder holds these very files and nothing else."""
    try:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        if found != {MANIFEST, *manifest.files}:
            return False
        if (folder / MANIFEST).read_bytes() != (scratch / MANIFEST).read_bytes():
            return False
        return all(Digest.of_file(folder / name) == digest for name, digest in manifest.files.items())
    except OSError:
        return False


def damage(folder: Path) -> dict[str, str]:
    """What is not as the artifact's own manifest says, by file: "missing", "changed" or "alien"; {"": "missing"} where
    there is no artifact at all."""
    if not folder.is_dir():
        return {"": "missing"}
    try:
        own = read_manifest(folder).files
    except ArtifactError:
        return {MANIFEST: "changed" if (folder / MANIFEST).exists() else "missing"}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    wrong = {name: "missing" for name in own if name not in found}
    wrong |= {name: "changed" for name, digest in own.items() if name in found and not _holds(folder / name, digest)}
    return wrong | {name: "alien" for name in found if name not in own}


def _holds(path: Path, digest: Digest) -> bool:
    try:
        return path.stat().st_size == digest.size and Digest.of_file(path) == digest
    except OSError:
        return False


_LEFTOVER_SECONDS = 24 * 60 * 60


def _remove_leftovers(folder: Path) -> None:
    """Removes what builds that were killed wrote beside the artifact and nobody wrote to for a day. Never fails."""
    latest = time.time() - _LEFTOVER_SECONDS
    for path in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < latest:
                shutil.rmtree(path, ignore_errors=True)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders in one step where the system can, in two where it cannot; after it `new` holds the old one."""
    if not old.exists():
        try:
            os.rename(new, old)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another build put its artifact there meanwhile.
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        swapped = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
    except AttributeError:
        swapped = -1
    if swapped != 0:
        aside = new.with_name(new.name + "-old")
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)
