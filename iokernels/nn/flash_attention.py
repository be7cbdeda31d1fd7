"""Multi-head attention as a module: ``torch.nn.MultiheadAttention`` on :func:`iokernels.flash_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.flash_attention.api import flash_attention
from iokernels.ops.flash_attention.weights import attention_weights
from iokernels.runtime.contracts import FLOATS, Contract, Spec

_CONTRACT = Contract(
    "FlashAttention",
    query=Spec("B Nq embed_dim", FLOATS),
    key=Spec("B Nk kdim", FLOATS),
    value=Spec("B Nk vdim", FLOATS),
    key_padding_mask=Spec("B Nk", (torch.bool, *FLOATS), optional=True),
    attn_mask=Spec("B|1 num_heads|1 Nq Nk", (torch.bool, *FLOATS), optional=True),
)


class FlashAttention(nn.Module):
    """Replaces :class:`torch.nn.MultiheadAttention`: arguments, results, initial parameters and state_dict.

    The positional arguments mean what they mean there, and a state_dict loads in both directions; the same seed gives
    the same parameters. The rest is keyword-only and off by default.

    Args:
        embed_dim: width E of query and of the output.
        num_heads: query heads; divides embed_dim.
        dropout: probability in [0, 1) of dropping an attention weight, in training only.
        bias: whether the projections have a bias.
        add_bias_kv: one learned key and value, which every row sees, whatever the masks.
        add_zero_attn: one key and value of zeros, likewise.
        kdim: width of key; E if None.
        vdim: width of value; E if None.
        batch_first: tensors are ``[B, N, E]``; ``[N, B, E]`` if False.
        device: where the parameters live.
        dtype: their dtype.
        num_kv_heads: heads of keys and values, a divisor of num_heads (grouped-query attention); num_heads if None.
            With fewer, the input projections of keys and values have ``num_kv_heads * E / num_heads`` rows.
        window: ``(left, right)`` as in :func:`iokernels.flash_attention`.
        softcap: as there; 0 turns it off.
        sinks: adds a parameter ``sinks [num_heads]``, initially 0: a learned logit that takes weight and has no value.
        causal: row i sees the keys up to ``i + Nk - Nq``, without a mask.
        scale: factor of the scores; ``head_dim ** -0.5`` if None.
        backend: as in :func:`iokernels.flash_attention`; ``"cuda"`` takes half precision, without sinks, masks and
            dropout.

    Raises:
        ValueError: sizes that do not fit, or dropout outside [0, 1).
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    sinks: Tensor | None

    # torch.nn.TransformerEncoderLayer reads this: False keeps it, in evaluation, from running its own attention
    # on our parameters, which would ignore window, sinks and the rest.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        causal: bool = False,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _CONTRACT.require(
            embed_dim > 0 and num_heads > 0 and embed_dim % num_heads == 0,
            f"embed_dim is {embed_dim} and num_heads {num_heads}; both must be positive, and num_heads a divisor",
        )
        _CONTRACT.require(
            kv_heads > 0 and num_heads % kv_heads == 0,
            f"num_kv_heads is {kv_heads}; it must be a divisor of num_heads, {num_heads}",
        )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = _CONTRACT.number("dropout", dropout, least=0.0, below=1.0)
        self.add_zero_attn = add_zero_attn
        self.batch_first = batch_first
        self.window = window
        self.softcap = softcap
        self.causal = causal
        self.scale = scale
        self.backend = backend

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = kv_heads * self.head_dim
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty((embed_dim + 2 * kv_dim, embed_dim), **made))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty((embed_dim, embed_dim), **made))
            self.k_proj_weight = nn.Parameter(torch.empty((kv_dim, self.kdim), **made))
            self.v_proj_weight = nn.Parameter(torch.empty((kv_dim, self.vdim), **made))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(embed_dim + 2 * kv_dim, **made))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.bias_k = self.bias_v = None
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.empty((1, 1, kv_dim), **made))
            self.bias_v = nn.Parameter(torch.empty((1, 1, kv_dim), **made))
        if sinks:
            self.sinks = nn.Parameter(torch.empty(num_heads, **made))
        else:
            self.register_parameter("sinks", None)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draw new parameters, in the order in which torch's module draws them."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for zero in (self.in_proj_bias, self.out_proj.bias, self.sinks):
            if zero is not None:
                nn.init.zeros_(zero)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        said = {"window": None, "softcap": 0.0, "causal": False, "scale": None, "backend": None, "dropout": 0.0}
        text = f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return text + "".join(f", {n}={getattr(self, n)!r}" for n, usual in said.items() if getattr(self, n) != usual)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        Args:
            query: ``[B, Nq, E]`` with batch_first, ``[Nq, B, E]`` without, ``[Nq, E]`` for a single sequence.
            key: ``[B, Nk, kdim]``, likewise.
            value: ``[B, Nk, vdim]``, likewise.
            key_padding_mask: ``[B, Nk]``, or ``[Nk]``. Bool: True hides the key, the inverse of ``mask`` in
                :func:`iokernels.flash_attention`. Floating: added to the scores. It stays one row for each sequence
                unless ``attn_mask`` is floating as well: two floating masks are added, at their broadcast size.
            need_weights: also return the attention weights. They are quadratic in N, so pass False in training; the
                default is that of torch.
            attn_mask: ``[Nq, Nk]`` or ``[B * num_heads, Nq, Nk]``, as above.
            average_attn_weights: average the weights over heads.
            is_causal: says that ``attn_mask`` is the causal mask: where Nq equals Nk it is then not read, and may be
                left out.

        Returns:
            The output, in the layout of query, and the weights: None, ``[B, Nq, Nk]`` or, not averaged,
            ``[B, num_heads, Nq, Nk]``, without B for a single sequence. One more column for each of add_bias_kv and
            add_zero_attn.

        With batch_first, query, key and value may also be nested tensors ``[B, N*, E]``, which is what
        :class:`torch.nn.TransformerEncoder` makes of padded ones in evaluation: they are padded for the call, the
        output is nested as query is, and weights are 0 in the rows of the padding.

        Where this differs from torch's module: a row that may see no key gets an attention result of 0 (its output is
        the bias of the output projection) where torch may give NaN; the weights are those before dropout; bad shapes
        raise ValueError.
        """
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = isinstance(query, Tensor) and query.dim() == 3
        in_order = self.batch_first or not batched
        mask, bias, causal = self._checked(query, key, value, key_padding_mask, attn_mask, is_causal, batched)
        q, k, v = (self._heads(x, batched) for x in self._projected(query, key, value))
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "causal": causal, "window": self.window, "scale": self.scale, "softcap": self.softcap,
            "mask": mask, "bias": bias,
        }  # fmt: skip
        out, lse = flash_attention(
            q, k, v, **options, sinks=self._sinks(q), dropout_p=dropout, return_lse=True, backend=self.backend
        )
        added: list[Tensor] = []
        if self.bias_k is not None:
            out, lse, score = self._attend_to_bias(q, out, lse, dropout)
            added.append(score)
        if self.add_zero_attn:
            added.append(torch.zeros_like(lse))

        out = self.out_proj(out.permute(*((0, 2, 1, 3) if in_order else (2, 0, 1, 3))).flatten(2))
        out = out if batched else out.squeeze(0)
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, lse, **options)
        weights = torch.cat([weights, *(torch.exp(s - lse)[..., None].to(weights.dtype) for s in added)], dim=-1)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, average_attn_weights: bool, is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """:meth:`forward` of nested tensors: padded, with a mask that hides the padding, and cut again."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor) or not x.is_nested or x.dim() != 3 or not self.batch_first:
                raise TypeError(
                    "FlashAttention: query, key and value must all be nested tensors [B, N*, E] where one of them is, "
                    f"with batch_first=True; {name} is {'nested' if getattr(x, 'is_nested', False) else 'not nested'}, "
                    f"batch_first is {self.batch_first}"
                )
        _CONTRACT.require(
            key_padding_mask is None, "key_padding_mask is given with nested tensors, which have their own lengths"
        )
        rows = [len(x) for x in query.unbind()]
        keys = rows if key is query else [len(x) for x in key.unbind()]
        _CONTRACT.require(
            len(rows) == len(keys) and (rows == keys or (not self.causal and self.window is None)),
            f"query has sequences of {rows} rows and key of {keys}; they must be as many, and as long where the module "
            "is causal or has a window",
        )
        padded = {id(x): torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value)}
        lengths = torch.tensor(keys, device=key.device)
        hidden = torch.arange(max(keys, default=0), device=key.device) >= lengths[:, None]
        out, weights = self.forward(
            padded[id(query)], padded[id(key)], padded[id(value)], hidden, need_weights, attn_mask,
            average_attn_weights,
            is_causal,
        )  # fmt: skip
        cut = [x[:length] for x, length in zip(out.unbind(), rows, strict=True)]
        if query.layout == torch.jagged:
            made = torch.nested.nested_tensor_from_jagged(torch.cat(cut), query.offsets())  # pyright: ignore[reportAttributeAccessIssue]
        else:
            made = torch.nested.as_nested_tensor(cut)
        if weights is not None:
            beyond = torch.arange(out.shape[1], device=out.device) >= torch.tensor(rows, device=out.device)[:, None]
            weights = weights.masked_fill(
                beyond[(..., None) if weights.dim() == 3 else (slice(None), None, ..., None)], 0
            )
        return made, weights

    def _checked(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None,
        is_causal: bool, batched: bool,
    ) -> tuple[Tensor | None, Tensor | None, bool]:  # fmt: skip
        """Check the shapes, and return mask, bias and causal as :func:`flash_attention` takes them."""
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) if _rank(x) == 3 else x for x in (query, key, value))
        elif not batched and _rank(query) == 2:
            query, key, value = (x.unsqueeze(0) if _rank(x) == 2 else x for x in (query, key, value))
            padding = padding.unsqueeze(0) if padding is not None and _rank(padding) == 1 else padding
        if _rank(attn_mask) == 3:
            assert attn_mask is not None
            rows = query.shape[0] * self.num_heads
            _CONTRACT.require(
                attn_mask.shape[0] == rows, f"attn_mask has shape {list(attn_mask.shape)}; it must start with {rows}"
            )
            attn_mask = attn_mask.unflatten(0, (query.shape[0], self.num_heads))
        elif _rank(attn_mask) == 2:
            assert attn_mask is not None
            attn_mask = attn_mask[None, None]
        known = {n: getattr(self, n) for n in ("embed_dim", "kdim", "vdim", "num_heads")}
        _CONTRACT.check(known, query=query, key=key, value=value, key_padding_mask=padding, attn_mask=attn_mask)

        square = query.shape[1] == key.shape[1]
        _CONTRACT.require(
            square or attn_mask is not None or not is_causal,
            f"is_causal is True without attn_mask, for {query.shape[1]} rows and {key.shape[1]} keys; pass attn_mask, "
            "or construct the module with causal=True, which aligns the ends of both",
        )
        causal = self.causal or (is_causal and square)
        if is_causal and square:
            attn_mask = None
        mask, bias = _mask_and_bias(None if padding is None else padding[:, None, None, :], attn_mask)
        return mask, bias, causal

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads, with one matrix product for each distinct input where possible."""
        sizes = [self.embed_dim, *[self.num_kv_heads * self.head_dim] * 2]
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split(sizes, dim=-1)
        else:
            weights = self.in_proj_weight.split(sizes)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """A view ``[B, H, N, D]``."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _sinks(self, q: Tensor) -> Tensor | None:
        if not self.add_zero_attn:
            return self.sinks
        # A key of zeros has score 0 and adds nothing to the output: it is a sink of logit 0, and beside learned
        # sinks, log(exp(sink) + exp(0)).
        return q.new_zeros(self.num_heads) if self.sinks is None else F.softplus(self.sinks)

    def _attend_to_bias(
        self, q: Tensor, out: Tensor, lse: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Merge the key and value of add_bias_kv into a result without them: (out, lse, score of that key).

        This is the online softmax of two partial results; nothing is concatenated, so that no mask has to grow.
        """
        assert self.bias_k is not None
        assert self.bias_v is not None
        group = self.num_heads // self.num_kv_heads
        key, value = (
            x.view(self.num_kv_heads, self.head_dim).repeat_interleave(group, 0).to(lse.dtype)
            for x in (self.bias_k, self.bias_v)
        )
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        score = scale * (q.to(lse.dtype) * key[:, None]).sum(-1)
        if self.softcap > 0.0:
            score = self.softcap * torch.tanh(score / self.softcap)
        weight = torch.sigmoid(score - lse)[..., None]
        merged = torch.sigmoid(lse - score)[..., None] * out + F.dropout(weight, dropout) * value[:, None]
        return merged.to(out.dtype), torch.logaddexp(lse, score), score


def _rank(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else -1


def _mask_and_bias(padding: Tensor | None, attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Two masks of torch's convention (True hides, numbers are added) as one bool mask (True attends) and one bias.

    Both broadcast to the scores, and neither is brought to their size unless both are floating.
    """
    mask: Tensor | None = None
    bias: Tensor | None = None
    for given in (attn_mask, padding):
        if given is None:
            continue
        if given.dtype != torch.bool:
            bias = given if bias is None else bias + given
        elif mask is None:
            mask = ~given
        else:
            hidden = torch.zeros(given.shape, dtype=torch.float32, device=given.device)
            bias = hidden.masked_fill(given, float("-inf"))
    return mask, bias
