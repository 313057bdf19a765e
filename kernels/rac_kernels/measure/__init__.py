"""What the kernels are held against: the limits of the hardware, and the published steps written plainly."""
