"""Damaged weights:   python tests/test_fuzz.py 10000 [SEED]

Changes a patch at random, reads it, and prints what happened. Half of the patches have no checksum.
Allowed: it is refused in one sentence; the same tensors are read (the damage is in a text); without
a checksum, other finite numbers are read, because nobody can see that. Everything else is a fault.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import weights  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.files import checksum  # noqa: E402

FAULTS = "crashes", "over 2 s", "sentences of several lines", "other tensors in spite of a checksum"


def module():
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Linear(6, 5), torch.nn.Conv2d(3, 2, 3), torch.nn.LayerNorm(4)
    net = torch.nn.Sequential(*layers).requires_grad_(False)
    for x in net.parameters():
        x.copy_(torch.randn(x.shape, generator=generator))
    return net


KINDS = "bit byte cut out twice length digit word zeros swap".split()
WORDS = b'F32 I32 U8 F16 F8_E4M3 weight bias "0. "1. shape dtype [ ] } null'.split()


def mutate(data, rng):
    """A copy of the bytes with one to three changes, half of them in the (small) header."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        header = min(len(data), 8 + int.from_bytes(data[:8], "little"))
        i = rng.randrange(max(1, header if rng.random() < 0.5 else len(data)))
        some = bytes(data[i : i + rng.randrange(1, 40)])
        kind = rng.choice(KINDS)
        if kind == "bit" and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == "byte" and i < len(data):
            data[i] = rng.randrange(256)
        elif kind == "cut":
            del data[i:]
        elif kind == "out":
            del data[i : i + len(some)]
        elif kind == "twice":
            data[i:i] = some
        elif kind == "length":
            lengths = rng.randrange(2**64), rng.randrange(2 * len(data) + 1), 2**63, 0
            data[:8] = rng.choice(lengths).to_bytes(8, "little")
        elif kind == "digit":  # a shape or an offset
            places = [j for j in range(8, header) if 48 <= data[j] < 58]
            if places:
                data[rng.choice(places)] = 48 + rng.randrange(10)
        elif kind == "word":
            old, new = rng.sample(WORDS, 2)
            data = bytearray(bytes(data).replace(old, new, rng.choice((1, 99))))
        elif kind == "zeros":
            data[i : i + len(some)] = bytes(len(some))
        elif kind == "swap":
            j = rng.randrange(len(data) + 1)
            data[j : j + len(some)], data[i : i + len(some)] = some, bytes(data[j : j + len(some)])
    return bytes(data)


def outcome(file, wanted, told):
    """What happens when a patch is read. told: its metadata has the checksum of `wanted`."""
    net, began = module(), time.monotonic()
    try:
        weights.load_patch(file, net)
        found = "no checksum: read with other finite numbers"
        if all(torch.equal(x, wanted[name]) for name, x in net.state_dict().items()):
            found = "read with the same tensors"
        elif told:
            found = "other tensors in spite of a checksum"
        if not all(x.isfinite().all() for x in net.state_dict().values()):
            found = "crashes"  # NaN has to be refused
    except UserError as e:
        found = "sentences of several lines" if "\n" in str(e) or len(str(e)) > 1000 else "refused"
    except BaseException as e:
        found = "crashes"
        print(f"{file}: {e!r}", file=sys.stderr)
    return "over 2 s" if time.monotonic() - began > 2 else found


def fuzz(times, seed, folder):
    """A Counter of what became of so many mutated files."""
    rng, found = random.Random(seed), Counter()
    base = module().state_dict()
    wanted = {name: x + 0.5 for name, x in base.items()}
    about = dict(model="tiny", concepts="star", args="{}")
    about["base_fingerprint"] = weights.fingerprint(base)
    whole = []
    for more in ({"sha256": checksum(wanted)}, {}):
        file = folder / "whole.safetensors"
        weights.save(file, wanted, about | more)
        whole.append(file.read_bytes())
        assert outcome(file, wanted, bool(more)) == "read with the same tensors"
    file = folder / "mutated.safetensors"
    for n in range(times):
        while (data := mutate(whole[n % 2], rng)) == whole[n % 2]:
            pass
        file.write_bytes(data)
        found[outcome(file, wanted, told=b'"sha256":"' + checksum(wanted).encode() in data)] += 1
    return found


def report(found, seconds, seed):
    rest = ", ".join(f"{key}: {found[key]}" for key in FAULTS)
    known = ", ".join(f"{key}: {n}" for key, n in found.most_common() if key not in FAULTS)
    return f"mutated files: {found.total()}; {known}, {rest}; {seconds:.0f} s, seed {seed}"


@pytest.mark.parametrize("times", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutated_files(times, tmp_path):
    found = fuzz(times, 1, tmp_path)
    assert found.total() == times and not any(found[key] for key in FAULTS), found
    assert found["refused"] > times / 2 and found["no checksum: read with other finite numbers"] > 0


def test_damage_in_a_checkpoint_is_seen(tmp_path):
    """Any flipped bit of its tensors."""
    net = module()
    optimizer = torch.optim.AdamW(net.parameters())
    groups = {"student": net.state_dict()}
    weights.save_checkpoint(tmp_path / "c.safetensors", groups, optimizer, {"iterations": "1"})
    data = bytearray((tmp_path / "c.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        weights.load_checkpoint(tmp_path / "c.safetensors", groups, optimizer)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    began, seed = time.monotonic(), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(int(sys.argv[1]), seed, Path(folder))
    print(report(found, time.monotonic() - began, seed))
    sys.exit(1 if any(found[key] for key in FAULTS) else 0)
