"""Devices that run models on this machine."""

import os
import sys
from pathlib import Path

#: Device files of which one is there wherever torch may find a GPU: NVIDIA's, WSL's, Jetson's, AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def list_devices() -> list[tuple[str, int]]:
    """Return the devices and their memory in bytes: all CUDA devices, else Apple's GPU, else the CPU."""
    if sys.platform == "linux" and not any(Path(file).exists() for file in _GPU_FILES):
        return [cpu()]  # without importing torch, which takes seconds
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [(f"cuda:{n}", torch.cuda.get_device_properties(n).total_memory) for n in range(count)]
    if torch.backends.mps.is_available():
        return [("mps", int(torch.mps.recommended_max_memory()))]
    return [cpu()]


def cpu() -> tuple[str, int]:
    """Return the CPU as a device, with this machine's memory in bytes."""
    return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
