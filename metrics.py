"""Pictures -> numbers, for the embedded model: what the probe sees, as proportions with their intervals."""
import math


def wilson(hits, n, z=1.96):
    """The 95 % interval of a proportion, hits of n (Wilson 1927): (low, high) in 0..1."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def toy_seen(pictures):
    """uint8 (n, 64, 64, 3) -> {attribute: n words}, by the probe."""
    from toy import probe

    net = probe.load()
    parts = [net.name(probe.to_tensor(pictures[i:i + 100])) for i in range(0, len(pictures), 100)]
    return {name: sum((part[name] for part in parts), []) for name in parts[0]}
