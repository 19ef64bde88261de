"""What attention drops: the attention branch (norm, attention, layer scale) of kept and dropped tokens.

Shapes: B images, n tokens of a stream, N of both (P prefix tokens, K kept and D dropped ones), C channels, h heads of
d channels.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp import masks
from sbp.functional import Streams, rescale_gradient

QKV = tuple[Tensor, Tensor, Tensor]
Branch = tuple[Tensor, Callable[[], Tensor]]  # of the kept tokens; and of the dropped ones, computed when called


def attend(block: Any, x: Streams, read: int | None) -> Branch:
    """qkv: kept queries see kept keys and values; dropped queries see all, without gradient.

    query: kept queries see all keys and values, with gradient; dropped queries give none.
    qkv_exact: every query sees all keys and values; those of dropped tokens give no gradient.
    """
    attn, method = block.attn, block.sbp_state.settings.mhsa_drop
    to_qkv = block.sbp_linear(attn.qkv, block.norm1)
    project = _projection(block)
    q, k, v = _heads(attn, to_qkv(x.kept))
    dropped = x.dropped
    if dropped is not None:
        with nullcontext() if method == "query" else torch.no_grad():
            q_dropped, k_dropped, v_dropped = _heads(attn, to_qkv(dropped))
        with torch.no_grad() if method == "qkv" else nullcontext():
            all_k, all_v = torch.cat([k, k_dropped], 2), torch.cat([v, v_dropped], 2)
        if method != "qkv":
            q = q[:, :, :read].clone()  # what is saved must not be a view that keeps the other two alive
            k, v = all_k, all_v

    def dropped_branch() -> Tensor:
        assert dropped is not None
        with torch.no_grad():
            return project(_attention(attn, q_dropped, all_k, all_v), dropped)

    return project(_attention(attn, q[:, :, :read], k, v), x.kept[:, :read]), dropped_branch


def attend_with_some_heads(block: Any, x: Streams, read: int | None, key: Tensor) -> Branch:
    """head: some heads run with gradient at all tokens, the others without; the projection's bias keeps its own."""
    attn, state, index = block.attn, block.sbp_state, block.sbp_index
    assert index is not None and x.dropped is not None  # only "qkv" skips it
    count = kept_heads(attn.num_heads, state.keep_ratios[index])
    order = torch.argsort(masks.hashed_scores(key, attn.num_heads, stream=1 + index))
    tokens = block.norm1(torch.cat([x.kept, x.dropped], 1))  # (B, P + K + D, C)
    weight = attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))  # (3, h, d, C)
    bias = None if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (3, attn.num_heads, -1))
    proj = attn.proj.weight.unflatten(1, (attn.num_heads, -1))  # (C, h, d)

    def run(tokens: Tensor, heads: Tensor) -> Tensor:
        w = weight.index_select(1, heads).flatten(0, 2)
        b = None if bias is None else bias.index_select(1, heads).flatten()
        qkv = F.linear(tokens, w, b).unflatten(2, (3, len(heads), -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = _attention(attn, attn.q_norm(q[:, :, :read]), attn.k_norm(k), v).transpose(1, 2).flatten(2)
        return F.linear(out, proj.index_select(1, heads).flatten(1))

    out = rescale_gradient(run(tokens, order[:count]), attn.num_heads / count if state.settings.rescale else 1.0)
    if count < attn.num_heads:
        with torch.no_grad():
            rest = run(tokens, order[count:])
        out = out + rest
    if attn.proj.bias is not None:
        out = out + attn.proj.bias.to(out.dtype)
    out = block.ls1(attn.proj_drop(out))
    kept = x.kept.shape[1]
    return out[:, :kept], lambda: out[:, kept:]


def kept_heads(num_heads: int, keep_ratio: float) -> int:
    """How many heads run with gradient under mhsa_drop="head"."""
    return max(1, round(keep_ratio * num_heads))


def _heads(attn: Any, qkv: Tensor) -> QKV:
    """(B, n, 3 h d) to q, k and v, each (B, h, n, d)."""
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _projection(block: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The function from attention output (B, h, n, d) and its tokens (B, n, C) to the branch (B, n, C)."""
    attn, scale = block.attn, getattr(block.ls1, "gamma", None)
    if getattr(attn, "gate", None) is None:
        project = block.sbp_linear(attn.proj, attn.norm, scale=scale)
        return lambda out, tokens: attn.proj_drop(project(out.transpose(1, 2).flatten(2)))
    gate = block.sbp_linear(attn.gate, block.norm1)
    gated = block.sbp_linear(attn.proj, scale=scale)

    def project_gated(out: Tensor, tokens: Tensor) -> Tensor:
        return attn.proj_drop(gated(attn.norm(out.transpose(1, 2).flatten(2)) * gate(tokens).sigmoid()))

    return project_gated
