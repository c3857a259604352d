"""Loss, forward and backward, against a policy loss written the usual way.

    python -m benchmarks.loss [--compile] [--rounds 7] [--rows 512] [--columns 4096] [--device cpu]

Setting: a padded batch [rows, columns] in float32, each row with a response of random length, 34% of the whole; exact
decoupled PPO with a band. The baseline is the usual composition of torch operations: an exponential per ratio, the
candidates of the clip, their maximum and minimum, masked means for the loss and its three metrics, and autograd's
backward pass. Rounds are interleaved; medians of CPU time in one thread (of wall time on an accelerator) are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.objective import split_ratio, surrogate, token_weights, weighted_loss

BAND, EPS_LOW, EPS_HIGH, DUAL_CLIP = 1.5, 0.2, 0.28, 3.0
Batch = dict[str, Tensor]


def batch(rows: int, columns: int, device: str) -> Batch:
    torch.manual_seed(0)
    shape = (rows, columns)
    old = -torch.rand(shape).mul(5)
    lengths = torch.rand(rows, 1) * 0.68 * columns  # uniform: 34% of the padded batch on average
    tensors = {
        "mu": old + 0.05 * torch.randn(shape),
        "old": old,
        "theta": old + 0.2 * torch.randn(shape),
        "advantages": torch.randn(rows, 1).expand(shape).contiguous(),
        "loss_mask": torch.arange(columns) < lengths,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def packed(padded: Batch) -> Batch:
    return {name: tensor[padded["loss_mask"]] for name, tensor in padded.items()}


def usual_loss(mu: Tensor, old: Tensor, theta: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    mask = loss_mask.float()

    def masked_mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / (mask.sum() + 1e-8)

    log_ratio = torch.clamp(theta - old, min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    weight = torch.exp(torch.clamp(old - mu, min=-20.0, max=20.0)).detach()
    weight = weight * ((weight >= 1 / BAND) & (weight <= BAND)).float()
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - EPS_LOW, 1 + EPS_HIGH)
    pessimistic = torch.maximum(unclipped, clipped)
    bounded = torch.min(pessimistic, -advantages * DUAL_CLIP)
    losses = torch.where(advantages < 0, bounded, pessimistic) * weight
    with torch.no_grad():
        masked_mean(-log_ratio)
        masked_mean((clipped > unclipped).float())
        masked_mean(((pessimistic > -advantages * DUAL_CLIP) & (advantages < 0)).float())
    return masked_mean(losses)


def our_loss(mu: Tensor, old: Tensor, theta: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    split = split_ratio(VARIANTS["decoupled_exact"], {MU: mu, OLD: old, THETA: theta})
    tokens = surrogate(
        split,
        advantages,
        loss_mask,
        band=BAND,
        eps_low=EPS_LOW,
        eps_high=EPS_HIGH,
        dual_clip=DUAL_CLIP,
        discrepancy="weight_and_mask",
    )
    return weighted_loss(tokens.values, token_weights(loss_mask, mode="token-mean"))


def run(loss: Callable[..., Tensor], data: Batch) -> tuple[Tensor, Tensor]:
    theta = data["theta"].detach().requires_grad_()
    value = loss(**{**data, "theta": theta})
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach(), gradient


def timed(loss: Callable[..., Tensor], data: Batch) -> float:
    on_cpu = data["theta"].device.type == "cpu"
    if not on_cpu:
        torch.accelerator.synchronize()
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    run(loss, data)
    if not on_cpu:
        torch.accelerator.synchronize()
    return 1e3 * (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also compile both losses")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    padded = batch(args.rows, args.columns, args.device)
    flat = {name: tensor.flatten() for name, tensor in padded.items()}
    tokens = packed(padded)
    contenders = {
        "usual, eager": (usual_loss, padded),
        "oldlogits, eager": (our_loss, flat),
        "oldlogits, eager, packed": (our_loss, tokens),
    }
    if args.compile:
        contenders["usual, compiled"] = (torch.compile(usual_loss), padded)
        contenders["oldlogits, compiled"] = (torch.compile(our_loss), flat)
        contenders["oldlogits, compiled, packed"] = (torch.compile(our_loss), tokens)

    value, gradient = run(usual_loss, padded)
    for name, (loss, data) in contenders.items():  # also warms up
        other_value, other_gradient = run(loss, data)
        expected = gradient[padded["loss_mask"]] if data is tokens else gradient.reshape(other_gradient.shape)
        torch.testing.assert_close(other_value, value, rtol=1e-4, atol=1e-6, msg=f"value of {name}")
        torch.testing.assert_close(other_gradient, expected, rtol=1e-3, atol=1e-9, msg=f"gradient of {name}")

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, (loss, data) in contenders.items():
            times[name].append(timed(loss, data))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"[{args.rows}, {args.columns}], {padded['loss_mask'].float().mean():.0%} loss tokens, {args.rounds} rounds, ms")
    for name, median in medians.items():
        print(f"{name:30s} {median:8.1f}   {median / medians['usual, eager']:.3f} of usual, eager")


if __name__ == "__main__":
    main()
