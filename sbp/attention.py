"""What attention drops: the attention branch (norm, attention, layer scale) of kept and dropped tokens.

Shapes: B images, n tokens of a stream, N of both (P prefix tokens, K kept and D dropped ones), C channels, h heads of
d channels.

It takes what timm's attention modules differ in: one qkv layer or three, its bias in one piece or in parts, fewer key
heads than query heads, norms, a gate, rotary embeddings (each token by its own angle) and a bias on the attention of
two tokens.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbp import masks, recompute
from sbp.functional import Streams, rescale_gradient
from sbp.masks import Positions
from sbp.rotation import turned

QKV = tuple[Tensor, Tensor, Tensor]
Branch = tuple[Tensor, Callable[[], Tensor]]  # of the kept tokens; and of the dropped ones, computed when called


class Places(NamedTuple):
    """What attention is told of the places of tokens.

    where: the tokens of the two streams; None where all are in one, in order.
    rope: rows of sine and cosine for the kept tokens but prefix tokens, and for the dropped ones, each (n, 2 d), with
    heads in front (h, n, 2 d), or images and heads, (B, 1, n, 2 d) or (B, h, n, 2 d).
    bias: what the network adds to the attention of all its blocks, (1, h, N, N).
    real: which of the kept and of the dropped tokens are no padding, bool (B, n, 1), where there is padding. To
    attention that is zero behind the norm.
    """

    where: Positions | None = None
    rope: Streams | None = None
    bias: Tensor | None = None
    real: Streams | None = None


NOWHERE = Places()


def attend(block: Any, x: Streams, read: int | None, places: Places = NOWHERE) -> Branch:
    """qkv: kept queries see kept keys and values; dropped queries see all, without gradient.

    query: kept queries see all keys and values, with gradient; dropped queries give none.
    qkv_exact: every query sees all keys and values; those of dropped tokens give no gradient.
    """
    attn, method = block.attn, block.sbp_state.settings.mhsa_drop
    to_heads = _to_heads(block)
    project = _projection(block)
    rope = places.rope or Streams(None, None)  # type: ignore[arg-type]
    real = places.real or Streams(None, None)  # type: ignore[arg-type]
    bias = _bias(block, x.dropped is not None, places, method, read)
    q, k, v = to_heads(x.kept, rope.kept, real.kept)
    dropped = x.dropped
    if dropped is not None:
        with nullcontext() if method == "query" else torch.no_grad():
            q_dropped, k_dropped, v_dropped = to_heads(dropped, rope.dropped, real.dropped)
        with torch.no_grad() if method == "qkv" else nullcontext():
            all_k, all_v = torch.cat([k, k_dropped], 2), torch.cat([v, v_dropped], 2)
        if method != "qkv":
            q = q[:, :, :read].clone()  # what is saved must not be a view that keeps the other two alive
            k, v = all_k, all_v
    if rope.kept is not None and (dropped is None or method == "qkv"):
        v = v.clone()  # nor this one: what was turned is a copy already

    def dropped_branch() -> Tensor:
        assert dropped is not None
        with torch.no_grad():
            return project(_attention(attn, q_dropped, all_k, all_v, bias.dropped), dropped)

    return project(_attention(attn, q[:, :, :read], k, v, bias.kept), x.kept[:, :read]), dropped_branch


def attend_with_some_heads(block: Any, x: Streams, read: int | None, key: Tensor, places: Places = NOWHERE) -> Branch:
    """head: some heads run with gradient at all tokens, the others without; the projection's bias keeps its own."""
    attn, state, index = block.attn, block.sbp_state, block.sbp_index
    recompute.require_plain(*([attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]), attn.proj)
    assert index is not None and x.dropped is not None  # only "qkv" skips it
    count = kept_heads(attn.num_heads, state.keep_ratios[index])
    order = torch.argsort(masks.hashed_scores(key, attn.num_heads, stream=1 + index))
    tokens = torch.cat([x.kept, x.dropped], 1)  # (B, P + K + D, C)
    for norm in block.sbp_before(1):
        tokens = norm(tokens)
    weight, bias = _packed(attn)
    weight = weight.unflatten(0, (3, attn.num_heads, -1))  # (3, h, d, C)
    bias = None if bias is None else bias.unflatten(0, (3, attn.num_heads, -1))
    proj = attn.proj.weight.unflatten(1, (attn.num_heads, -1))  # (C, h, d)
    rope = None if places.rope is None else torch.cat([one for one in places.rope if one is not None], -2)
    between = block.sbp_bias(places.bias)
    if between is not None:
        tokens_in_order = _in_order(places)
        between = between[:, :, tokens_in_order[:read]][..., tokens_in_order]

    def run(tokens: Tensor, heads: Tensor) -> Tensor:
        w = weight.index_select(1, heads).flatten(0, 2)
        b = None if bias is None else bias.index_select(1, heads).flatten()
        qkv = F.linear(tokens, w, b).unflatten(2, (3, len(heads), -1)).permute(2, 0, 3, 1, 4)
        of_heads = rope.index_select(-3, heads) if rope is not None and rope.ndim > 2 and rope.shape[-3] > 1 else rope
        q, k, v = _rotated(attn, *_normed(attn, *qkv.unbind(0)), of_heads)
        added = None if between is None else between.index_select(1, heads)
        out = _attention(attn, q[:, :, :read], k, v, added).transpose(1, 2).flatten(2)
        return F.linear(out, proj.index_select(1, heads).flatten(1))

    out = rescale_gradient(run(tokens, order[:count]), attn.num_heads / count if state.settings.rescale else 1.0)
    if count < attn.num_heads:
        with torch.no_grad():
            rest = run(tokens, order[count:])
        out = out + rest
    if attn.proj.bias is not None:
        out = out + attn.proj.bias.to(out.dtype)
    out = attn.proj_drop(out)
    scale = block.sbp_layer_scale(1)
    out = block.sbp_after(1, out if scale is None else out * scale)
    kept = x.kept.shape[1]
    return out[:, :kept], lambda: out[:, kept:]


def kept_heads(num_heads: int, keep_ratio: float) -> int:
    """How many heads run with gradient under mhsa_drop="head"."""
    return max(1, round(keep_ratio * num_heads))


def heads_are_separate(attn: Any) -> bool:
    """Whether no head sees another one before the projection, which mhsa_drop="head" needs."""
    norm = getattr(attn, "norm", None)
    gated, grouped = getattr(attn, "gate", None) is not None, getattr(attn, "num_kv_groups", 1) > 1
    return (norm is None or isinstance(norm, nn.Identity)) and not gated and not grouped


# -- from tokens to heads


def _to_heads(block: Any) -> Callable[[Tensor, Tensor | None, Tensor | None], QKV]:
    """The function from tokens (B, n, C), their rope and which are no padding to q, k and v, each (B, h, n, d)."""
    attn = block.attn
    if attn.qkv is not None:
        layer = attn.qkv
        if getattr(attn, "q_bias", None) is not None:  # timm, too, reads the weight of its layer then
            weight, bias = _packed(attn)
            assert bias is not None
            layer = recompute.Weights(recompute.lowered(weight), recompute.lowered(bias), None)
        to_qkv = block.sbp_linear(layer, *block.sbp_before(1))
        sizes = [attn.num_heads] * 3
    else:
        to_qkv = _three_layers(block)
        sizes = [attn.num_heads] + [getattr(attn, "num_kv_heads", attn.num_heads)] * 2

    def to_heads(tokens: Tensor, rope: Tensor | None, real: Tensor | None) -> QKV:
        qkv = to_qkv(tokens)
        if real is not None:
            of_zero = _packed(attn)[1]
            qkv = torch.where(real, qkv, 0 if of_zero is None else of_zero.to(qkv.dtype))
        qkv = qkv.unflatten(2, (sum(sizes), -1))  # (B, n, all heads, d)
        q, k, v = (one.transpose(1, 2) for one in qkv.split(sizes, 2))
        q, k, v = _rotated(attn, *_normed(attn, q, k, v), rope)
        if sizes[1] < sizes[0]:
            k, v = (one.repeat_interleave(sizes[0] // sizes[1], dim=1) for one in (k, v))
        return q, k, v

    return to_heads


def _three_layers(block: Any) -> recompute.Function:
    """The function from tokens to q, k and v of layers of their own, side by side: (B, n, all heads * d)."""
    attn, norms = block.attn, block.sbp_before(1)
    layers = attn.q_proj, attn.k_proj, attn.v_proj
    if block.sbp_reads(*layers):
        weight, bias = _packed(attn)
        return block.sbp_linear(attn.q_proj, *norms, weight=weight, bias=bias)

    def to_qkv(tokens: Tensor) -> Tensor:
        for norm in norms:
            tokens = norm(tokens)
        return torch.cat([layer(tokens) for layer in layers], -1)

    return to_qkv


def _packed(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of q, k and v, one above the other."""
    if attn.qkv is None:
        return recompute.stacked(attn.q_proj, attn.k_proj, attn.v_proj)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.weight, attn.qkv.bias
    return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _normed(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """After the norms of queries and keys, where the family has them; in cosine attention after its scale, too."""
    if hasattr(attn, "logit_scale"):  # a factor d^1/2 more, which attention divides by
        scale = torch.clamp(attn.logit_scale, max=math.log(100)).exp() * q.shape[-1] ** 0.5
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    return q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k), v


def _rotated(attn: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> QKV:
    """Turns queries and keys (B, h, n, d) by their tokens' angles, of which prefix tokens have none."""
    if rope is None:
        return q, k, v
    half = getattr(attn, "rotate_half", False)
    return turned(q, rope, half).type_as(v), turned(k, rope, half).type_as(v), v


# -- attention, and from heads to tokens


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """bias: one for all, or one for each window of an image (W, h, n, n'), where these are the batch (B * W)."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    if bias is not None and 1 < len(bias) < len(q):
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def _bias(block: Any, computes_dropped: bool, places: Places, method: str, read: int | None) -> Any:
    """What is added to the attention of kept and of dropped queries, each (1, h, queries, keys) or None."""
    whole = block.sbp_bias(places.bias)
    if whole is None or places.where is None:
        return Streams(whole if read is None or whole is None else whole[:, :, :read], None)  # type: ignore[arg-type]
    keep, drop = places.where
    kept = whole[:, :, keep[:read]]
    if not computes_dropped:
        return Streams(kept[..., keep], None)
    order = _in_order(places)
    with torch.no_grad():
        dropped = whole[:, :, drop][..., order]
    return Streams(kept[..., keep if method == "qkv" else order], dropped)


def _in_order(places: Places) -> Tensor:
    """All tokens, kept ones first."""
    assert places.where is not None
    return torch.cat([*places.where])


def _projection(block: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The function from attention output (B, h, n, d) and its tokens (B, n, C) to the branch (B, n, C)."""
    attn, scale = block.attn, block.sbp_layer_scale(1)
    norm = [] if getattr(attn, "norm", None) is None else [attn.norm]
    if getattr(attn, "gate", None) is None:
        project = block.sbp_linear(attn.proj, *norm, scale=scale)
        return lambda out, tokens: block.sbp_after(1, attn.proj_drop(project(out.transpose(1, 2).flatten(2))))
    gate = block.sbp_linear(attn.gate, *block.sbp_before(1))
    gated = block.sbp_linear(attn.proj, scale=scale)

    def project_gated(out: Tensor, tokens: Tensor) -> Tensor:
        out = attn.norm(out.transpose(1, 2).flatten(2)) * gate(tokens).sigmoid()
        return block.sbp_after(1, attn.proj_drop(gated(out)))

    return project_gated
