"""Published rates of accelerators, per chip."""

import math
import re
from typing import NamedTuple

from jaxdraft.errors import ConfigError, unknown_name


class Chip(NamedTuple):
    """What one chip does at most.

    Attributes:
      flops: dense bfloat16 operations per second.
      memory: bytes of HBM.
      bandwidth: bytes of HBM per second.
      interconnect: bytes per second to and from the other chips of a slice or node, each way, over all links together.
    """

    flops: float
    memory: int
    bandwidth: float
    interconnect: float


# HBM is given in GB; TPUs have as many GiB, less what the compiler keeps, and GPUs about as many GB.
CHIPS = {
    # cloud.google.com/tpu/docs/v4: 275 TFLOPS, 32 GiB, 1200 GB/s, 2400 Gb/s
    "v4": Chip(275e12, 32 * 2**30, 1.2e12, 300e9),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPS, 16 GB, 819 GB/s, 1600 Gb/s (400 GB/s in both directions together)
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPS, 95 GB, 2765 GB/s, 4800 Gb/s
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPS, 32 GB, 1638 GB/s, 800 GB/s in both directions together
    "v6e": Chip(918e12, 32 * 2**30, 1.638e12, 400e9),
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 80 GB, 2039 GB/s, NVLink 600 GB/s in both directions together
    "A100": Chip(312e12, 80 * 10**9, 2.039e12, 300e9),
    # NVIDIA H100 SXM data sheet: 989 TFLOPS without sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s in both directions
    "H100": Chip(989e12, 80 * 10**9, 3.35e12, 450e9),
    # NVIDIA H200 SXM data sheet: 989 TFLOPS without sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s in both directions
    "H200": Chip(989e12, 141 * 10**9, 4.8e12, 450e9),
}


class Hardware(NamedTuple):
    """A number of chips of one kind."""

    name: str
    chips: int

    @property
    def rates(self) -> Chip:
        return CHIPS[self.name]

    def __str__(self) -> str:
        return f"{self.chips}x{self.name}"


class Topology(NamedTuple):
    """A TPU slice, or several of one shape: ``v5e:4x4``, ``2xv5e:4x4``."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def hardware(self) -> Hardware:
        count = self.slices
        for size in self.shape:
            count *= size
        return Hardware(self.name, count)

    @property
    def slice(self) -> str:
        """One slice, as the TPU compiler names it."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return f"{self.slices}x{self.slice}" if self.slices > 1 else self.slice


def parse_hardware(text: str) -> Hardware:
    """``8xH100`` or ``H100``.

    Raises:
      ConfigError: no such chip.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([A-Za-z]\w*)", text)
    if not found:
        raise ConfigError(f"--hardware {text}: write a number and a chip, as in 8xH100; known are {', '.join(CHIPS)}")
    names = {name.lower(): name for name in CHIPS}
    if found[2].lower() not in names:
        raise ConfigError(f"--hardware {text}: {unknown_name('chip', found[2], list(CHIPS))}")
    return Hardware(names[found[2].lower()], int(found[1] or 1))


def parse_topology(text: str) -> Topology:
    """``v5e:4x4``, or ``2xv5e:4x4`` for two slices.

    Raises:
      ConfigError: no such TPU, or no such shape.
    """
    tpus = {name: 3 if name in ("v4", "v5p") else 2 for name in CHIPS if name.startswith("v")}
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+?):([1-9]\d*(?:x[1-9]\d*)*)", text)
    sizes = tuple(map(int, found[3].split("x"))) if found else ()
    uneven = math.prod(sizes) > 1 and any(size % 2 for size in sizes[:2])
    if not found or found[2] not in tpus or len(sizes) != tpus[found[2]] or uneven:
        shapes = ", ".join(f"{name}:{'x'.join('ABC'[:axes])}" for name, axes in tpus.items())
        raise ConfigError(
            f"--topology {text}: known are {shapes}, as in v5e:4x4 or v5p:2x2x2; 2xv5e:4x4 is two slices. A host has 4 "
            "chips in a square, so A and B are even"
        )
    return Topology(found[2], sizes, int(found[1] or 1))
