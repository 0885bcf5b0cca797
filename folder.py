"""An output folder has one command at work in it at a time, and nothing in it that a killed one left half done."""
import os
import shutil
from contextlib import contextmanager, suppress

import weights
from weights import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(folder):
    """A handle that keeps others out of `folder` until it is closed, which the system does when a process ends, even by kill -9.
    Where a file system cannot lock (some of NFS), nobody is kept out. BlockingIOError or FileExistsError if another has it."""
    if fcntl is None:  # a file that Windows deletes with its last handle
        return os.open(folder.with_name(f".{folder.name}.running"), os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
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
def alone(folder):
    """Makes `folder` where it is missing, keeps other commands out of it meanwhile, and removes what a killed one was about to
    write (weights.whole); if it stays empty, it goes again. UserError if another command has it, or if it cannot be made."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock(folder)
    except (BlockingIOError, FileExistsError) as e:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another folder with --out.") from e
        raise UserError(f"Another command is at work in {folder}: wait for its end, or choose another folder with --out.") from e
    except OSError as e:
        raise UserError(f"Cannot write into {folder} ({e}): choose another folder with --out.") from e
    try:
        for left in [*folder.rglob(f"{weights.WRITING}*")]:
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):
                folder.rmdir()
