"""kill -9 at random moments:   python tests/test_kill.py 100 [SEED]

Prints how many kills there were, and what was found. Training, evaluation and
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
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from common import differences, run  # noqa: E402
from PIL import Image  # noqa: E402

import eval  # noqa: E402, F401 (before the forks)
import train  # noqa: E402, F401
import weights  # noqa: E402
from support.files import LOCK  # noqa: E402
from tools import convert  # noqa: E402, F401

CONVERT = "tools.convert --model toy --dtype fp16 --format"
COMMANDS = {  # what is made, its command, share of the kills
    "training": (
        "run",
        "train.py --model toy --concept star --preview star --iters 4 --warmup 2 --steps 1 "
        "--batch-size 1 --save-every 1 --preview-every 2 --preview-steps 1 --export-every 2 "
        "--device cpu",
        0.5,
    ),
    "evaluation": (
        "table",
        "eval.py toy --limit 1 --steps 1 --batch-size 1 --guidance neg --avoid star --device cpu",
        0.3,
    ),
    "export, a folder": ("model", f"{CONVERT} diffusers", 0.1),
    "export, a file": ("m.safetensors", f"{CONVERT} single-file", 0.1),
}
FAULTS = (
    "half files under a final name",
    "restarts that did not go on",
    "results that differ",
    "left temporary files",
)


def start(line, out):
    """The command as a process; what it says goes to a file next to the folder."""
    if line.startswith("train.py") and (out / "run.json").exists():
        line = "train.py --resume"
    if pid := os.fork():
        return pid
    said = os.open(out.parent.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 1
    try:
        status = run(line, out)
    finally:  # a traceback ends here, too: the test behind the fork must not go on twice
        sys.stdout.flush()
        os._exit(status)


def wait(pid, seconds=None):
    """(exit status, seconds of CPU that it took), after a kill if it takes more than so many."""
    clock, spent = (~pid << 3) | 2, 0.0  # clock_getcpuclockid(3) of Linux, which Python has not
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        spent = time.clock_gettime(clock)
        if seconds is not None and spent > seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), spent


def unreadable(folder):
    """Whatever has its final name is whole: the names of those that are not."""
    bad = []
    for file in folder.rglob("*.*"):
        path = file.relative_to(folder).as_posix()
        if ".writing-" in path or "-unfinished" in path or file.is_dir() or file.name == LOCK:
            continue
        try:
            if file.suffix == ".safetensors":
                weights.read(file)
            elif file.suffix in (".png", ".webp"):
                Image.open(file).load()
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix != ".csv" and not file.read_bytes().endswith(b"\n"):
                bad.append(path)
        except Exception as e:
            bad.append(f"{path} ({e!r})")
    return bad


def kill(name, times, folder, rng):
    """Kills the command `times` times; returns a Counter of what was found."""
    what, line, _ = COMMANDS[name]
    whole, found, n = folder / "whole", Counter(), 0
    status, longest = wait(start(line, whole / what))
    assert status == 0, whole.with_suffix(".txt").read_text()
    while times or n == 0:
        n += 1
        out = folder / f"killed-{n}"
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            pid = start(line, out / what)
            status, _ = wait(pid, rng.uniform(0, longest) if times else None)
            if status == -signal.SIGKILL:
                times -= 1
                found["kills"] += 1
                found["half files under a final name"] += len(unreadable(out))
        said = out.with_suffix(".txt").read_text(encoding="utf-8")
        # An export can be complete when it is killed.
        if status == 0 or status == 2 and "already exists" in said:
            if names := differences(whole / what, out / what):
                print(f"differs: {names}")
            found["results that differ"] += bool(names)
        else:
            print(f"{name}: {said}")
            found["restarts that did not go on"] += 1
        left = [file for file in out.rglob("*") if re.search(r"\.writing-|unfinished", str(file))]
        found["left temporary files"] += len(left)
        found["runs brought to their end"] += 1
    return found


def main(times, seed):
    torch.set_num_threads(1)  # a thread would not survive the fork
    model = weights.load("toy")
    weights.load = lambda *_: copy.deepcopy(model)
    rng, total, began = random.Random(seed), Counter(), time.monotonic()
    for name, (_, _, share) in COMMANDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = kill(name, round(times * share), Path(folder), rng)
        print(f"{name}: killed {found['kills']} times", flush=True)
        total += found
    counts = ", ".join(f"{key}: {total[key]}" for key in ("runs brought to their end", *FAULTS))
    seconds = time.monotonic() - began
    print(f"kills: {total['kills']}, {counts}; {seconds:.0f} s, seed {seed}")
    return 1 if any(total[key] for key in FAULTS) else 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads another process's clock")
@pytest.mark.parametrize("times", [8, pytest.param(100, marks=pytest.mark.long)])
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
