"""Hybrid ZeRO and the pure arithmetic of its layouts."""
