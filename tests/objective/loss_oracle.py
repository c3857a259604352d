"""Every built-in loss in plain float64 arithmetic, token by token, written from its paper: no tensors.

A sequence is a list of tokens, a token a dict of log-probs "mu", "x" (the proximal policy) and "theta", with "a" and "s", its
advantage and staleness. Each function gives ``(value, slope)`` by token: the surrogate without r_d, and its derivative with
respect to log theta for weights that are the same for all tokens of a sequence.
"""

import math


def ratio(token, over="x"):
    return math.exp(token["theta"] - token[over])


def mean(values):
    return sum(values) / len(values)


def binary_kl(log_p, log_q):
    p, q = (min(max(math.exp(logp), 1e-8), 1 - 1e-8) for logp in (log_p, log_q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def levels(sequence, level, over="x", under="theta"):
    logs = [token[under] - token[over] for token in sequence]
    if level == "token":
        return logs
    if level == "prefix":
        return [sum(logs[: t + 1]) for t in range(len(logs))]
    return [sum(logs) if level == "sequence" else mean(logs)] * len(logs)


def weighted(sequence, weights):
    """``w A log theta`` with the weight a constant."""
    return [(w * t["a"] * t["theta"], w * t["a"]) for w, t in zip(weights, sequence, strict=True)]


def ppo(r, a, low, high, dual=math.inf):
    """``min(r A, clip(r) A)``, at least ``dual A``; and whether it is the unclipped branch."""
    if a >= 0:
        return (min(r, high) * a, r <= high) if a > 0 else (0.0, True)
    h = min(max(r, low), dual)
    return h * a, h == r


def gspo(sequence, *, eps_low, eps_high, level="geometric", **_):
    found = []
    for token, log_s in zip(sequence, levels(sequence, level), strict=True):
        value, kept = ppo(math.exp(log_s), token["a"], 1 - eps_low, 1 + eps_high)
        found.append((value, value if kept else 0.0))
    return found


def gmpo(sequence, *, log_low=0.4, log_high=0.4, **_):
    sign = (sequence[0]["a"] > 0) - (sequence[0]["a"] < 0)
    logs = [t["theta"] - t["x"] for t in sequence]
    clipped = [sign * min(sign * x, sign * min(max(x, -log_low), log_high)) if sign else x for x in logs]
    value = sequence[0]["a"] * math.exp(mean(clipped))
    return [(value, value if c == x else 0.0) for c, x in zip(clipped, logs, strict=True)]


def cispo(sequence, *, low=0.0, high=5.0, **_):
    return weighted(sequence, [min(max(ratio(t), low), high) for t in sequence])


def sapo(sequence, *, tau_positive=1.0, tau_negative=1.05, **_):
    found = []
    for t in sequence:
        tau, r = (tau_positive if t["a"] > 0 else tau_negative), ratio(t)
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        found.append((t["a"] * 4 / tau * gate, t["a"] * 4 * gate * (1 - gate) * r))
    return found


def _dppo(sequence, violates, cap):
    return weighted(sequence, [0.0 if violates(t) else min(ratio(t), cap) for t in sequence])


def dppo_tv(sequence, *, low=0.2, high=0.2, cap=20.0, **_):
    def violates(t):
        moved = math.exp(t["theta"]) - math.exp(t["x"])
        return (t["a"] > 0 and moved > high) or (t["a"] < 0 and -moved > low)

    return _dppo(sequence, violates, cap)


def dppo_kl(sequence, *, low=0.05, high=0.05, cap=20.0, **_):
    def violates(t):
        divergence, rises, falls = binary_kl(t["x"], t["theta"]), t["theta"] > t["x"], t["theta"] < t["x"]
        return (t["a"] > 0 and rises and divergence > high) or (t["a"] < 0 and falls and divergence > low)

    return _dppo(sequence, violates, cap)


def dis(sequence, *, eps_low, eps_high, **_):
    return weighted(sequence, [ratio(t) if 1 - eps_low < ratio(t) < 1 + eps_high else 0.0 for t in sequence])


def kpop(sequence, *, threshold=0.1, **_):
    found = []
    for t in sequence:
        kept = max(binary_kl(t["theta"], t["x"]), binary_kl(t["x"], t["theta"])) <= threshold
        value = ratio(t) * t["a"] if kept else 0.0
        found.append((value, value))
    return found


def flash_reinforce(sequence, *, threshold=0.005, **_):
    kept = mean([binary_kl(t["x"], t["theta"]) for t in sequence]) <= threshold
    return weighted(sequence, [ratio(t) if kept else 0.0 for t in sequence])


def topr(sequence, *, level="sequence", **_):
    taper = min(math.exp(levels(sequence, level)[0]), 1.0)
    return weighted(sequence, [taper if t["a"] < 0 else 1.0 for t in sequence])


def reinforce(sequence, *, level="sequence", high=2.0, mask_low=0.0, mask_high=math.inf, **_):
    logs = [0.0] * len(sequence) if level == "none" else levels(sequence, level)
    return weighted(sequence, [min(math.exp(x), high) if mask_low <= math.exp(x) <= mask_high else 0.0 for x in logs])


def m2po_kept(tokens, threshold=0.04):
    """Drop the token with the largest second moment while the mean of the others is not below the threshold; one stays."""
    left = sorted(range(len(tokens)), key=lambda i: (tokens[i]["x"] - tokens[i]["mu"]) ** 2)
    while len(left) > 1 and not mean([(tokens[i]["x"] - tokens[i]["mu"]) ** 2 for i in left]) < threshold:
        left.pop()
    return set(left)


def opsm(sequence, *, eps_low, eps_high, dual_clip, threshold=0.5, **_):
    drift = mean([t["mu"] - t["theta"] for t in sequence])
    found = []
    for t in sequence:
        value, kept = ppo(ratio(t), t["a"], 1 - eps_low, 1 + eps_high, dual_clip)
        dropped = t["a"] < 0 and drift > threshold
        found.append((0.0, 0.0) if dropped else (value, value if kept else 0.0))
    return found


def masked_is(sequence, *, eps_low, eps_high, dual_clip, **_):
    found = []
    for t in sequence:
        value, kept = ppo(ratio(t), t["a"], 1 - eps_low, 1 + eps_high, dual_clip)
        found.append((value, value if kept else 0.0))
    return found


def corrected(sequence, c, band=math.inf, *, weighs=True, has_r_d=True):
    """``(weight, kept)`` of each token: the correction ``c``, a dict of the keys of the section that are not the defaults."""
    r_d = [math.exp(t["x"] - t["mu"]) if has_r_d else 1.0 for t in sequence]
    looked = [math.exp(t["theta"] - t["mu"]) for t in sequence] if c.get("ratio") == "total" else r_d
    kept = [1 / band <= r <= band and c.get("token_low", 0) <= r <= c.get("token_high", math.inf) for r in r_d]
    low, high = c.get("reject_low", 0.0), c.get("reject_high", math.inf)
    statistic = {
        "none": 1.0 if low <= 1.0 <= high else low,
        "sequence": math.prod(looked),
        "geometric": math.prod(looked) ** (1 / len(looked)),
        "k3": mean([r - 1 - math.log(r) for r in looked]),
    }[c.get("reject", "none")]
    accepted = low <= statistic <= high and all(c.get("veto_low", 0) <= r <= c.get("veto_high", math.inf) for r in looked)
    level = c.get("weight_level", "token")
    raw = {
        "token": r_d,
        "sequence": [math.prod(r_d)] * len(r_d),
        "geometric": [math.prod(r_d) ** (1 / len(r_d))] * len(r_d),
        "prefix": [math.prod(r_d[: t + 1]) for t in range(len(r_d))],
    }[level]
    bounded = [min(max(w, c.get("weight_low", 0.0)), c.get("weight_high", math.inf)) for w in raw]
    return [(w if weighs and has_r_d else 1.0, k and accepted) for w, k in zip(bounded, kept, strict=True)]
