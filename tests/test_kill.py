"""kill -9 at random moments:   python tests/test_kill.py 100 [SEED]

Prints how many kills there were, where they happened, and what was found. Training, evaluation and
export are started, killed, started again as a user would, killed again, and so on until one
finishes. Its folder is then compared, bit by bit, with that of a command that was not killed. Each
command is a process, forked from this one after the imports and after loading the toy model (which
write nothing and take most of the time). Moments are counted in the process's CPU time, so they are
the same on a busy machine and on an idle one.
"""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402
from support.cli import run_command  # noqa: E402
from support.files import LOCK, checksum  # noqa: E402
from tools import convert  # noqa: E402

TRAIN = (
    "--model toy --concept star --preview star --iters 4 --warmup 2 --steps 1 --batch-size 1 "
    "--save-every 1 --preview-every 2 "
    "--preview-steps 1 --export-every 2 --device cpu"
).split()
EVAL = "toy --limit 1 --steps 1 --batch-size 1 --guidance neg --avoid star --device cpu".split()
CONVERT = "--model toy --dtype fp16 --format".split()
COMMANDS = {  # what is made, its arguments (given the folder to put it into), share of the kills
    "training": (
        "run",
        lambda out: (
            train.train,
            train.parse(
                [*(TRAIN if not (out / "run.json").exists() else ["--resume"]), "--out", str(out)]
            ),
        ),
        0.5,
    ),
    "evaluation": (
        "table",
        lambda out: (evaluation.evaluate, evaluation.parse([*EVAL, "--out", str(out)])),
        0.3,
    ),
    "export, a folder": (
        "model",
        lambda out: (convert.convert, convert.parse([*CONVERT, "diffusers", "--out", str(out)])),
        0.1,
    ),
    "export, a file": (
        "m.safetensors",
        lambda out: (convert.convert, convert.parse([*CONVERT, "single-file", "--out", str(out)])),
        0.1,
    ),
}


def start(make, out):
    """The command as a process; what it says goes to a file beside the folder."""
    if pid := os.fork():
        return pid
    said = os.open(out.parent.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    try:
        status = run_command(*make(out))
    finally:  # a traceback ends here, too: the test behind the fork must not go on twice
        os._exit(status if "status" in locals() else 1)


def wait(pid, seconds=None):
    """(exit status, seconds of CPU that it took), after a kill if it takes more than so many."""
    clock, spent = (~pid << 3) | 2, 0.0  # clock_getcpuclockid(3) of Linux, which Python has not
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        spent = time.clock_gettime(clock)
        if seconds is not None and spent > seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), spent


def readable(folder):
    """Whatever has its final name is whole: the names of those that are not."""
    bad = []
    for file in folder.rglob("*.*"):
        path = file.relative_to(folder).as_posix()
        try:
            if ".writing-" in path or "-unfinished" in path or file.is_dir() or file.name == LOCK:
                continue
            elif file.suffix == ".safetensors":
                weights.read(file)
            elif file.suffix in (".png", ".webp"):
                Image.open(file).load()
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif not file.read_bytes().endswith(b"\n") and (
                file.suffix != ".csv" or file.stat().st_size
            ):
                bad.append(path)
        except Exception as e:
            bad.append(f"{path} ({e!r})")
    return bad


def contents(folder):
    """{file: its content}, without dates, times and the folder's name.

    Of weights it is the checksum and the metadata, because their bytes have no fixed order.
    """

    def inside(file):
        if file.suffix == ".safetensors":
            tensors, metadata = weights.read(file)
            return checksum(tensors), metadata
        content = file.read_bytes()
        if file.suffix == ".html":  # it says when it was made, where, and how long training took.
            # After a kill between the last checkpoint and run.json, nobody knows how long.
            content = content.decode().replace(str(folder), "FOLDER")
            content = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", content)
            content = re.sub(r"\d+ iterations in (\d+\smin\s)?\d+\ss", "TIME", content)
            content = re.sub(r"(\d+) of \1 iterations", "TIME", content)
        if file.name == "run.json":
            run = json.loads(content)
            run.pop("training", None)  # how long it took
            return run
        return content

    return {
        file.relative_to(folder).as_posix(): inside(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


def different(a, b):
    a, b = contents(a), contents(b)
    names = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    return bool(names) and print(f"differs: {names}") is None


def where(folder):
    """How far it was, in words: the newest of what lies there."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    name = newest.relative_to(folder).as_posix() if newest else "nothing yet"
    return (
        "half a file beside"
        if ".writing-" in name
        else "an unfinished export"
        if "-unfinished" in name
        else re.sub(r"\d+", "N", name)
    )


def kill(name, times, folder, rng):
    """Kills the command `times` times; returns Counters of where, and of what was found."""
    what, make, _ = COMMANDS[name]
    whole, found, places, n = folder / "whole", Counter(), Counter(), 0
    status, longest = wait(start(make, whole / what))
    assert status == 0, whole.with_suffix(".txt").read_text()
    while times or n == 0:
        n += 1
        out = folder / f"killed-{n}"
        while True:
            pid = start(make, out / what)
            status, _ = wait(pid, rng.uniform(0, longest) if times else None)
            if status != -signal.SIGKILL:
                break
            times -= 1
            places[where(out)] += 1
            found["half files under a final name"] += len(readable(out))
        said = out.with_suffix(".txt").read_text(encoding="utf-8")
        done = (
            status == 0 or status == 2 and "already exists" in said
        )  # an export that was complete when it was killed
        found["restarts that did not go on"] += not done and print(f"{name}: {said}") is None
        found["results that differ"] += done and different(whole, out)
        found["left temporary files"] += sum(
            ".writing-" in str(file) or "unfinished" in str(file) for file in out.rglob("*")
        )
        found["runs brought to their end"] += 1
    return places, found


def main(times, seed):
    torch.set_num_threads(1)  # a thread would not survive the fork
    model = weights.load("toy")
    weights.load = lambda *_: copy.deepcopy(model)
    rng, total, began = random.Random(seed), Counter(), time.monotonic()
    for name, (_, _, share) in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            places, found = kill(name, round(times * share), Path(folder), rng)
        print(
            f"{name}: killed {sum(places.values())} times; newest file then: "
            + ", ".join(f"{n}× {x}" for x, n in places.most_common()),
            flush=True,
        )
        total += Counter(kills=sum(places.values())) + found
    bad = {
        key: total[key]
        for key in (
            "half files under a final name",
            "restarts that did not go on",
            "results that differ",
            "left temporary files",
        )
    }
    print(
        f"kills: {total['kills']}, "
        f"runs brought to their end: {total['runs brought to their end']}, "
        + ", ".join(f"{key}: {n}" for key, n in bad.items())
        + f"; {time.monotonic() - began:.0f} s, seed {seed}"
    )
    return 1 if any(bad.values()) else 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads another process's clock")
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.long)])
def test_killed_at_random_moments(times):
    """In a process of its own: a fork needs one without threads."""
    done = subprocess.run(
        [sys.executable, __file__, str(times), str(random.randrange(10**6))],
        capture_output=True,
        text=True,
        timeout=3000,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kills: {times}, " in done.stdout and "results that differ: 0" in done.stdout


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
