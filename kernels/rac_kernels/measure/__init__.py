"""Yardsticks of the kernels: the limits of the hardware, and the published steps written plainly."""
