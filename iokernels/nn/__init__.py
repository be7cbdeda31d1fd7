"""Drop-in ``torch.nn`` modules."""

from .fft_conv import FFTConv, LongConv, ShortConv1d
from .fft_conv.hyena import HyenaOperator, HyenaState, ImplicitFilter
from .flash_attention import FlashAttention
from .flash_rnn import GRU, LSTM, RNN, SLSTM
from .hip_attention import HiPAttention, HiPCache
from .lean_attention import DecodeAttention, KVCache
from .linear_attention import BasedAttention, GatedDeltaNet, LightningAttention, Retention

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "BasedAttention",
    "DecodeAttention",
    "FFTConv",
    "FlashAttention",
    "GatedDeltaNet",
    "HiPAttention",
    "HiPCache",
    "HyenaOperator",
    "HyenaState",
    "ImplicitFilter",
    "KVCache",
    "LightningAttention",
    "LongConv",
    "Retention",
    "ShortConv1d",
]
