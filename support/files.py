"""Output files that are complete or absent: atomic writes, folder locks and checksums."""

import hashlib
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support.errors import UserError

WRITING = ".writing-"  # prefix of the folder that holds a file until the file is complete
LOCK = ".lock"  # the file in an output folder that is locked while a command uses the folder


@contextmanager
def atomic_write(file):
    """Yields a temporary path. The file gets its name `file` only when it is complete."""
    file = Path(file)
    # A folder of its own, because safetensors also writes a temporary file next to the real one.
    work = file.parent / f"{WRITING}{os.getpid()}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield work / file.name
        with suppress(OSError):  # as other new files: safetensors creates them with mode 0600
            (work / file.name).chmod(work.stat().st_mode & 0o666)
        os.replace(work / file.name, file)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"Cannot write {file} ({e}): free some space or choose another folder."
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(file, text):
    """Writes a text file, UTF-8, that is complete or absent."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def used_files(folder):
    """What an output folder contains, except the lock of a command. Empty if there is no folder."""
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.name != LOCK]


def numbered_folder(parent, name):
    """The next free folder of a numbered series, for example runs/0003-red-star.

    `name` is any text. It is shortened, and other characters than letters and digits become "-".
    The folder is not created.
    """
    found = [re.match(r"(\d{4,5})-", folder.name) for folder in Path(parent).glob("*-*")]
    last = max((int(number[1]) for number in found if number), default=0)  # longer: a date
    short = re.sub(r"\W+", "-", name)[:40]
    return Path(parent) / f"{last + 1:04d}-{short}"


@contextmanager
def lock_folder(folder):
    """Locks an output folder so that one command uses it at a time.

    Creates the folder if it is missing and removes temporary files of a killed command. Removes
    the folder again if it stays empty. The system releases the lock when a process ends, even
    after kill -9. Some network file systems cannot lock; there, nothing is kept out. UserError if
    another command uses the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder with --out.")
    created = not folder.exists()
    killed = (folder / LOCK).exists()  # the lock of a command that could not remove it
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as e:
        raise UserError(
            f"Another command uses {folder}: wait until it ends, or choose another folder with "
            "--out."
        ) from e
    except OSError:  # some network file systems cannot lock
        pass
    try:
        if killed:
            for left in list(folder.rglob(f"{WRITING}[0-9]*")):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):  # on Windows, `release` removes the file
            (folder / LOCK).unlink()
        lock.release()
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
    bad = []
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel():
            # NaN and infinity both show in the minimum and the maximum.
            if not torch.stack(x.float().aminmax()).isfinite().all():
                bad.append(name)
    if bad:
        return f"contains NaN or infinity in {len(bad)} tensors ({min(bad)})"
    if "sha256" in metadata and metadata["sha256"] != checksum(tensors):
        return "does not match its checksum"
    return None
