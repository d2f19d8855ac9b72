"""One layer's update at the width of Llama-3-8B, against AlphaEdit's solve; prints one JSON object.

    python benchmarks/update.py                     # d_k 14,336, d_v 4,096, 100 edits a batch
    python benchmarks/update.py --d-k 1536 --d-v 576 --u 10

Ours and the peer run in one process, in turns; times are medians with the least and the largest. The peer is
the two lines of EasyEdit's AlphaEdit that make an update (AlphaEdit_main.py: `P (K Kᵀ + cache) + L2 I`, then
`torch.linalg.solve`), written out here since they stand in the middle of a long function. The floor is the
larger of two times: to move what must be moved (C's lower triangle read and written, the weights) at the
bandwidth of a large copy, and to multiply what must be multiplied at the rate of a large matrix product; both
rates are measured here.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import as_json, machine, spread, versions

from easyedit_rls.solvers.rls import RecursiveLeastSquares


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_bytes(work: Callable[[], object], device: str) -> int | None:
    """Memory that the work takes at its peak beyond what was taken before; on the CPU sampled each
    millisecond, on Linux only.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/statm").exists():
        work()
        return None

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak, is_done = resident(), [0], threading.Event()

    def sample() -> None:
        while not is_done.wait(0.001):
            peak[0] = max(peak[0], resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    is_done.set()
    sampler.join()
    return max(0, peak[0] - before)


def rates(device: str) -> tuple[float, float]:
    """Bytes a second of a large copy (read and write counted), and floating-point operations a second of a
    large product.
    """
    source = torch.zeros(64 * 2**20, device=device)
    target = torch.empty_like(source)
    copy_s = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    n = 2048 if device == "cpu" else 8192
    A, B = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    product_s = min(timed(lambda: A @ B, device) for _ in range(4))
    return 2 * source.numel() * 4 / copy_s, 2 * n**3 / product_s


def new_state(d_k: int, d_v: int, device: str) -> RecursiveLeastSquares:
    """A prior of 4 I, without inverting anything."""
    eye = torch.eye(d_k, device=device)
    return RecursiveLeastSquares.assemble(
        eye / 4, torch.zeros(d_k, d_v, device=device), eye, None, 0, "layer"
    )


def batches(n: int, u: int, d_k: int, d_v: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(u, d_k, generator=g).to(device), torch.randn(u, d_v, generator=g).to(device))
        for _ in range(n)
    ]


def against_alphaedit(
    d_k: int, d_v: int, u: int, repeats: int, peer_repeats: int, device: str
) -> dict[str, object]:
    given = batches(repeats + 1, u, d_k, d_v, device)
    state = new_state(d_k, d_v, device)
    C_bytes = d_k * d_k * 4
    stream = [state.update(*given[0])]

    def update(K: torch.Tensor, V: torch.Tensor) -> None:
        stream[:] = [stream[-1].update(K, V)]

    for _ in range(2):  # the first changes have nothing to bring into C
        update(*given[0])
    extra = extra_bytes(lambda: update(*given[0]), device)
    ours, peer = [], []
    for i in range(repeats):
        K, V = given[i + 1]
        ours.append(timed(lambda K=K, V=V: update(K, V), device))
        print(f"ours: {ours[-1]:.2f} s", file=sys.stderr)
    P = torch.eye(d_k, device=device) * 0.5
    cache = torch.zeros(d_k, d_k, device=device)
    for i in range(peer_repeats):
        ks, residual = given[i + 1][0].T, given[i + 1][1].T

        def solve(ks: torch.Tensor = ks, residual: torch.Tensor = residual) -> torch.Tensor:
            left = P @ (ks @ ks.T + cache) + 10 * torch.eye(d_k, device=device)
            return torch.linalg.solve(left, P @ ks @ residual.T)

        peer.append(timed(solve, device))
        K, V = given[i + 1]
        ours.append(timed(lambda K=K, V=V: update(K, V), device))
        print(f"peer: {peer[-1]:.2f} s, ours: {ours[-1]:.2f} s", file=sys.stderr)
    bandwidth, flops = rates(device)
    moved = 4 * (d_k * d_k + 3 * d_k * d_v)  # C's triangle in and out; W in, the new W out and in
    multiplied = (
        u * d_k * d_k + 2 * u * d_k * d_k + 4 * u * d_k * d_v
    )  # G Gᵀ of a triangle; C Kᵀ; K W and G step
    floor = max(moved / bandwidth, multiplied / flops)
    return {
        "d_k": d_k,
        "d_v": d_v,
        "edits": u,
        "seconds_ours": spread(ours),
        "seconds_alphaedit_solve": spread(peer),
        "ratio": {
            "median": statistics.median(peer) / statistics.median(ours),
            "least": min(peer) / max(ours),
            "largest": max(peer) / min(ours),
        },
        "extra_memory_of_an_update_in_C": None if extra is None else extra / C_bytes,
        "bytes_a_second": bandwidth,
        "operations_a_second": flops,
        "seconds_floor_bytes": moved / bandwidth,
        "seconds_floor_operations": multiplied / flops,
        "times_the_floor": statistics.median(ours) / floor,
    }


def long_run(d_k: int, d_v: int, u: int, n: int, device: str) -> dict[str, object]:
    """Does a batch cost more after a thousand others?"""
    stream, g, times = [new_state(d_k, d_v, device)], torch.Generator().manual_seed(0), []

    def update(K: torch.Tensor, V: torch.Tensor) -> None:
        stream[:] = [stream[-1].update(K, V)]

    for _ in range(n):
        K, V = torch.randn(u, d_k, generator=g).to(device), torch.randn(u, d_v, generator=g).to(device)
        times.append(timed(lambda K=K, V=V: update(K, V), device))
    first, last = times[5:55], times[-50:]
    return {
        "d_k": d_k,
        "batches": n,
        "seconds_batches_6_to_55": spread(first),
        "seconds_last_50": spread(last),
        "last_to_first": statistics.median(last) / statistics.median(first),
        "drift": stream[-1].drift(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-k", type=int, default=14336, help="width of the keys (default: %(default)s)")
    parser.add_argument("--d-v", type=int, default=4096, help="width of the outputs (default: %(default)s)")
    parser.add_argument("--u", type=int, default=100, help="edits a batch (default: %(default)s)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="updates before the first turn of the peer (default: %(default)s)",
    )
    parser.add_argument(
        "--peer-repeats", type=int, default=2, help="turns of the peer (default: %(default)s)"
    )
    parser.add_argument(
        "--long-d-k", type=int, default=1024, help="width for the run of 1,000 batches (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    args = parser.parse_args()
    result = {
        "against_alphaedit": against_alphaedit(
            args.d_k, args.d_v, args.u, args.repeats, args.peer_repeats, args.device
        ),
        "long_run": long_run(args.long_d_k, 256, args.u, 1000, args.device),
        "peer": "AlphaEdit's two lines, written out",
        "versions": versions(),
        "machine": {**machine(), "device": args.device},
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
