"""What a device can do, and waiting for it before a clock is read."""

from __future__ import annotations

import torch


def synchronize(device: torch.device | None = None) -> None:
    """Waits until a GPU has done the work given to it; a CPU has done it when a call returns.

    Args:
        device: None for the current GPU, where there is one.
    """
    if device is None and not torch.cuda.is_available():
        return
    if device is None or device.type == "cuda":
        torch.cuda.synchronize(device)


def use_bf16(setting: bool | str) -> bool:
    """`auto`: bfloat16 where the hardware has it: such a GPU, AMX or AVX512-BF16 on a CPU."""
    return multiplies_bf16() if setting == "auto" else bool(setting)


def bf16_line(setting: bool | str) -> str:
    """The numbers in which a run with this setting multiplies, and whether the device has them."""
    has, chosen = multiplies_bf16(), use_bf16(setting)
    shown = f"products in {'bfloat16' if chosen else 'float32'} (bf16={str(setting).lower()})"
    if chosen and not has:
        return (
            f"{shown}. WARNING: this device has no instructions for bfloat16, which can take 70 "
            "times as long as float32; bf16=auto chooses float32 here"
        )
    return shown if has else f"{shown}: this device has no instructions for bfloat16"


def multiplies_bf16() -> bool:
    """Whether the GPU, or the CPU where there is none, has instructions for bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    checks = (getattr(torch.cpu, name, None) for name in names)
    return any(check is not None and check() for check in checks)
