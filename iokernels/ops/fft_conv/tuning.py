def tiling_refusal(n, taps, mode, itemsize):
    return None
