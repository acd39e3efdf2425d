"""Triton kernels, installed as ``efficient_attn.kernels`` (a top-level ``kernels`` would collide with Hugging Face's package)."""
