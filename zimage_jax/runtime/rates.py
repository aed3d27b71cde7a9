"""The rates of this machine's device, from which plans predict seconds."""

import time

import jax
import jax.numpy as jnp

from ..planning.seconds import Rates
from .placement import HOST, Placement


def measure(placement: Placement, dtype: str) -> Rates:
    """Measure this device: matrix products for 0.2 s, and the best of three copies of 64 MiB."""
    is_cpu = placement.shares_memory
    side = 1024 if is_cpu else 4096  # 0.2 s of a core, 0.2 ms of an H100
    with jax.default_device(placement.device):
        a, multiply = jnp.ones((side, side), dtype), jax.jit(jnp.matmul)
    a = placement.put(a)
    multiply(a, a).block_until_ready()
    began, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < 0.2 or not products:
        jax.block_until_ready([multiply(a, a) for _ in range(8)])
        products += 8
    host = placement.put(jnp.zeros(2**26, jnp.uint8), HOST)
    copies = []
    for _ in range(3):
        copy_began = time.perf_counter()
        placement.put(host)
        copies.append(time.perf_counter() - copy_began)
    return Rates(products * 2 * side**3 / spent, host.nbytes / min(copies), overlaps=not is_cpu)
