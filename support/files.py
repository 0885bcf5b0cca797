"""Output files that are complete or absent: atomic writes, folder locks and checksums."""

import hashlib
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from support.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WRITING = ".writing-"  # prefix of the folder that holds a file until the file is complete


@contextmanager
def atomic_write(file):
    """Yields a temporary path. The file gets its name `file` only when it is complete."""
    file = Path(file)
    # A folder of its own, because safetensors also writes a temporary file next to the real one.
    work = file.parent / f"{WRITING}{os.getpid()}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield work / file.name
        os.replace(work / file.name, file)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"Cannot write {file} ({e}): free some space or choose another folder."
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def lock(folder):
    """A handle that keeps other commands out of `folder` until it is closed.

    The system closes it when a process ends, even after kill -9. Some network file systems cannot
    lock; there, nothing is kept out. Raises BlockingIOError or FileExistsError if another command
    holds the lock.
    """
    if fcntl is None:  # a file that Windows deletes with its last handle
        return os.open(
            folder.with_name(f".{folder.name}.running"), os.O_CREAT | os.O_EXCL | os.O_TEMPORARY
        )
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return handle


@contextmanager
def lock_folder(folder):
    """Locks an output folder so that one command uses it at a time.

    Creates the folder if it is missing and removes temporary files of a killed command. Removes
    the folder again if it stays empty. UserError if another command uses it, or if it cannot be
    created.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock(folder)
    except (BlockingIOError, FileExistsError) as e:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another folder with --out.") from e
        raise UserError(
            f"Another command uses {folder}: wait until it ends, or choose another folder with --out."
        ) from e
    except OSError as e:
        raise UserError(
            f"Cannot write into {folder} ({e}): choose another folder with --out."
        ) from e
    try:
        for left in [*folder.rglob(f"{WRITING}*")]:
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)
        if created:
            with suppress(OSError):
                folder.rmdir()


def checksum(tensors):
    """SHA-256 (64 hexadecimal digits) of the names, types, shapes and bytes of {name: tensor}."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def damage(tensors, metadata):
    """What is wrong with a file's tensors, in words that follow the file's name; None if nothing.

    A file without a checksum in its metadata passes.
    """
    numbers = {
        name: x.float() for name, x in tensors.items() if x.is_floating_point() and x.numel()
    }
    # NaN and infinity both show in the minimum and the maximum.
    bad = [name for name, x in numbers.items() if not torch.stack(x.aminmax()).isfinite().all()]
    if bad:
        return f"contains NaN or infinity in {len(bad)} tensors ({min(bad)})"
    if "sha256" in metadata and metadata["sha256"] != checksum(tensors):
        return "does not match its checksum"
    return None
