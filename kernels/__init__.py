"""Fused kernels: arrays in, arrays out. Nothing in here knows of tensors, models or configurations.

Import name `minillm.kernels`. Read `device` first, then `jit` and `kernel`, then any op.
"""
