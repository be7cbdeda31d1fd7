"""Backend ``triton`` of block_sparse_attention. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
