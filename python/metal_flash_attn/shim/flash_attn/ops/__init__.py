"""Operations of `flash_attn` in plain torch."""
