"""Devices that run models on this machine, and their kinds."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

#: Device files of which one is there wherever torch may find a GPU: NVIDIA's, WSL's, Jetson's, AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


class Device(NamedTuple):
    """Device that runs models."""

    #: Name in torch: `cpu`, `mps`, `cuda:0`.
    name: str
    memory_bytes: int
    kind: str


def list_devices() -> list[Device]:
    """Return the devices: all CUDA devices, else Apple's GPU, else the CPU."""
    if sys.platform == "linux" and not any(Path(file).exists() for file in _GPU_FILES):
        return [cpu()]  # without importing torch, which takes seconds
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [
            Device(f"cuda:{n}", torch.cuda.get_device_properties(n).total_memory, kind_of(f"cuda:{n}"))
            for n in range(count)
        ]
    if torch.backends.mps.is_available():
        return [Device("mps", int(torch.mps.recommended_max_memory()), "mps")]
    return [cpu()]


def cpu() -> Device:
    """Return the CPU as a device, with this machine's memory."""
    return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "cpu")


def kind_of(name: str) -> str:
    """Return the kind of a device, by which rates are kept: its model on CUDA, such as NVIDIA H200, else cpu or mps."""
    kind = name.partition(":")[0]
    if kind != "cuda":
        return kind
    import torch

    # Settings list kinds with commas between.
    return str(torch.cuda.get_device_name(name)).replace(",", " ")
