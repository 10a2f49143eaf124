"""Seconds of an optimizer step from counted work: a range, since nothing here has been measured on a GPU.

The work (floating-point operations, bytes over PCIe and between ranks) is counted; how well hardware does it is not
known before it has been seen, so each rate is a share of the data sheet's, and both ends of the range are said.
"""

import math
from dataclasses import dataclass

from launch.activations import MicroBatch, Way
from launch.hardware import Hardware
from launch.memory import FP32_BYTES, Model, Sharding, dora_numbers, parameter_bytes, trained_share

# (worst, best) share of the data sheet's figure. Assumed, not measured.
COMPUTE_SHARE = (0.2, 0.5)
MEMORY_SHARE = (0.5, 0.9)
PCIE_SHARE = (0.25, 0.8)  # GPUs often share lanes, and all share the host's memory
NETWORK_SHARE = (0.4, 0.8)
BETWEEN_NODES_GB_PER_SECOND = 12.5  # assumed: 100 Gbit/s a node
HOST_GB_PER_SECOND = (5.0, 20.0)  # that a rank's optimizer steps through host memory with


@dataclass(frozen=True)
class Work:
    """What one rank does in one micro-batch, and once a step."""

    flops: float
    weight_traffic_bytes: float  # read from GPU memory, those in 4 bits unpacked
    network_bytes: float  # received by a GPU
    pcie_bytes: float  # between a GPU and its host
    step_pcie_bytes: float
    step_host_bytes: float


@dataclass(frozen=True)
class Seconds:
    """Of a step: from the best to the worst case, and what bounds it."""

    best: float
    worst: float
    bound: str

    @property
    def middle(self) -> float:
        """Their geometric mean, which layouts are compared by."""
        return math.sqrt(self.best * self.worst)


def forward_flops(model: Model, batch: MicroBatch) -> tuple[float, float]:
    """(of the decoder layers, of the head) in a forward pass: two operations for each number of a matrix and token.

    Attention: 4 x columns x width for each token and layer (both products; a causal mask is taken to save nothing).
    """
    base = model.base
    layers = 2.0 * (model.num_matrix_numbers + model.num_lora_numbers) * batch.num_tokens
    layers += 4.0 * batch.num_columns * base.num_heads * base.head_dim * base.num_layers * batch.num_tokens
    if model.lora_dropout:  # DoRA then multiplies by the weight once more, as it drops the base's inputs as well
        layers += 2.0 * sum(map(math.prod, model.dora_sizes)) * batch.num_tokens
    return layers, 2.0 * base.vocab_size * base.hidden_size * batch.num_logit_rows


def step_flops(model: Model, batch: MicroBatch, way: Way) -> float:
    """Forward, and backward without gradients of frozen weights: as much again. Recomputing: the layers once more."""
    layers, head = forward_flops(model, batch)
    return layers * (3 if way.gradient_checkpointing else 2) + head * 2


def work_of(model: Model, sharding: Sharding, num_ranks: int, batch: MicroBatch, way: Way) -> Work:
    """Counted for one micro-batch of one rank.

    ZeRO-3 gathers the weights for the forward and for the backward pass (a recomputed layer stays until then), and each
    GPU receives what the others have; offloaded shares cross PCIe each time. Gradients are reduced each micro-batch.
    """
    others = (num_ranks - 1) / num_ranks
    whole = parameter_bytes(model, 1, 3)
    share = trained_share(model, num_ranks, sharding.stage)
    passes = 3 if way.gradient_checkpointing else 2
    network = model.num_trained * model.value_bytes * others
    pcie = step_pcie = step_host = 0.0
    if sharding.stage == 3:
        network += 2 * whole * others
    else:
        network += model.num_trained * model.value_bytes * others  # the trained weights, once a step at most
    if sharding.offload_param:
        pcie += 2 * whole / num_ranks
    if sharding.offload_optimizer:
        moved = share * FP32_BYTES if sharding.stage == 3 else model.num_trained * model.value_bytes * 2
        pcie += moved
        step_pcie = share * model.value_bytes
        step_host = share * FP32_BYTES * 7  # AdamW reads four fp32 numbers and writes three
    traffic = float(whole)
    if model.load_in_4bit:  # bitsandbytes unpacks each matrix before each product
        traffic += 2.0 * model.value_bytes * model.num_matrix_numbers
    traffic *= passes
    made = sum(map(dora_numbers, model.dora_sizes)) * model.value_bytes  # by DoRA: written and read in a forward pass
    traffic += 2.0 * made * (passes - 1)
    return Work(step_flops(model, batch, way), traffic, network, pcie, step_pcie, step_host)


def seconds_of_step(work: Work, hardware: Hardware, num_micro_batches: int) -> Seconds:
    """Best: the data sheet's rates at their better share, all at the same time. Worst: the other share, one by one."""
    gpu = hardware.gpu
    between = gpu.nvlink_gb_per_second if hardware.interconnect == "nvlink" else gpu.pcie_gb_per_second
    if hardware.num_nodes > 1:
        between = min(between, BETWEEN_NODES_GB_PER_SECOND)  # a ring crosses each node's port once
    if hardware.num_ranks == 1:
        between = math.inf
    parts = []  # name, (worst, best)
    for name, amount, rate, shares in (
        ("compute", work.flops, gpu.half_tflops * 1e12, COMPUTE_SHARE),
        ("GPU memory", work.weight_traffic_bytes, gpu.memory_gb_per_second * 1e9, MEMORY_SHARE),
        ("network", work.network_bytes, between * 1e9, NETWORK_SHARE),
        ("PCIe", work.pcie_bytes, gpu.pcie_gb_per_second * 1e9, PCIE_SHARE),
    ):
        parts.append((name, [num_micro_batches * amount / (rate * share) for share in shares]))
    once = [work.step_pcie_bytes / (gpu.pcie_gb_per_second * 1e9 * share) for share in PCIE_SHARE]
    host = [work.step_host_bytes / (rate * 1e9) for rate in HOST_GB_PER_SECOND]
    parts.append(("host optimizer", [pcie + memory for pcie, memory in zip(once, host, strict=True)]))
    bound = max(parts, key=lambda part: part[1][0] * part[1][1])[0]
    compute, traffic, network, pcie, optimizer = (both for _, both in parts)
    moving = network[1] + pcie[1] if hardware.interconnect == "pcie" else max(network[1], pcie[1])  # the same lanes
    best = max(compute[1], traffic[1], moving) + optimizer[1]  # whose step comes after the micro-batches
    worst = max(compute[0], traffic[0]) + network[0] + pcie[0] + optimizer[0]
    return Seconds(best, worst, bound)
