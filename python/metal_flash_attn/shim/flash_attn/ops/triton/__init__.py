"""The operations that flash_attn writes in Triton, in plain torch."""
