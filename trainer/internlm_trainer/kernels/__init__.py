"""Attention back ends and other kernels, each equal to a plain PyTorch reference."""
