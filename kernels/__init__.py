"""Triton kernels, installed as `efficient_attn.kernels`: a top-level `kernels` would be Hugging Face's package."""
