"""Naive SBP: timm's own layers on all positions, and `detach` where SBP drops the gradient.

Nothing here is shared with the package: explicit softmax, no split, no streams, no custom backward. `install`
gives the chosen layers of a plain timm model these forward passes.
"""

from types import MethodType

import torch
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import Tensor, nn


def install(model: nn.Module, layers: list[str], forward, *args) -> nn.Module:
    for name in layers:
        layer = model.get_submodule(name)
        layer.forward = MethodType(lambda self, x, **given: forward(self, x, *args, **_told(given)), layer)
    return model


def _told(given: dict) -> dict:
    """What timm's loops tell a block, but the masks of attention, which SBP does not take."""
    return {name: value for name, value in given.items() if name not in ("attn_mask", "is_causal")}


def only_kept(x: Tensor, kept: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x whose gradient is cut where kept (broadcast) is False, and multiplied by scale elsewhere."""
    return torch.where(kept, x.detach() + scale * (x - x.detach()), x.detach())


def vit_block(
    block: nn.Module, x: Tensor, grid_mask: Tensor, prefix: int, mhsa_drop: str, heads=None, rescale=False
) -> Tensor:
    """One timm `Block` or `ResPostBlock` on tokens (B, N, C). heads: bool (h,), those kept by mhsa_drop="head"."""
    attn, post_norm = block.attn, not hasattr(block, "ls1")
    q, k, v = _heads(attn, attn.qkv(x if post_norm else block.norm1(x)))
    q, k = attn.q_norm(q), attn.k_norm(k)
    after = (block.norm1, block.norm2) if post_norm else (block.ls1, block.ls2)
    return _block(block, x, (q, k, v), grid_mask, prefix, mhsa_drop, heads, rescale, *after, attn.proj)


def eva_block(
    block: nn.Module, x: Tensor, grid_mask: Tensor, prefix: int, mhsa_drop: str, heads=None, rescale=False, rope=None
) -> Tensor:
    """One timm `EvaBlock` on tokens (B, N, C). rope: (H * W, 2 d) or (h, H * W, 2 d)."""
    attn, post_norm = block.attn, not hasattr(block, "gamma_1")
    y = x if post_norm else block.norm1(x)
    if attn.qkv is not None:
        qkv = (
            attn.qkv(y)
            if getattr(attn, "q_bias", None) is None
            else attn.qkv(y) + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        )
        q, k, v = _heads(attn, qkv)
    else:
        q, k, v = (
            one(y).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for one in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (torch.cat([one[:, :, :prefix], _turned(one[:, :, prefix:], rope, attn)], 2) for one in (q, k))
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.stack([one[:, head // groups] for head in range(q.shape[1])], 1) for one in (k, v))
    gate = 1.0 if getattr(attn, "gate", None) is None else torch.sigmoid(attn.gate(y))

    def project(out: Tensor) -> Tensor:
        return attn.proj(attn.norm(out) * gate)

    after = block.norm1, block.norm2
    if not post_norm:
        scales = [1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2)]
        after = (lambda y, scale=scale: scale * y for scale in scales)
    return _block(block, x, (q, k, v), grid_mask, prefix, mhsa_drop, heads, rescale, *after, project)


def beit_block(
    block, x, grid_mask, prefix, mhsa_drop, heads=None, rescale=False, shared_rel_pos_bias=None, shared_rel_pos=None
) -> Tensor:
    """One of timm's BEiT or relpos blocks on tokens (B, N, C), with the bias of its own or that of all blocks."""
    attn = block.attn
    bias = sum(one for one in (shared_rel_pos_bias, shared_rel_pos) if one is not None)
    if hasattr(attn, "relative_position_bias_table"):
        added = 0.0 if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = _heads(attn, attn.qkv(block.norm1(x)) + added)
        if attn.relative_position_bias_table is not None:
            bias = bias + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    else:
        q, k, v = _heads(attn, attn.qkv(block.norm1(x) if hasattr(block, "ls1") else x))
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = bias if attn.rel_pos is None else attn.rel_pos.get_bias()
    scales = [getattr(block, f"gamma_{i}", None) for i in (1, 2)]
    if hasattr(block, "ls1"):
        scales = [getattr(one, "gamma", None) for one in (block.ls1, block.ls2)]
    after = [lambda y, scale=1.0 if scale is None else scale: scale * y for scale in scales]
    if isinstance(block, ResPostRelPosBlock):
        after = block.norm1, block.norm2
    return _block(block, x, (q, k, v), grid_mask, prefix, mhsa_drop, heads, rescale, *after, attn.proj, bias)


def swin_block(block: nn.Module, x: Tensor, tile: Tensor, mhsa_drop: str, rescale: bool = False) -> Tensor:
    """One of timm's Swin blocks of either version on a map (B, H, W, C), window by window. tile: bool (w, w)."""
    attn, (height, width), (w_h, w_w), (s_h, s_w) = block.attn, x.shape[1:3], block.window_size, block.shift_size
    down, across = (-(-side // window) * window for side, window in ((height, w_h), (width, w_w)))  # with padding
    # Where the positions of the padded map stand once it is shifted, and which are kept there.
    there = [[((i - s_h) % height, (j - s_w) % width) for j in range(width)] for i in range(height)]
    whole = torch.tensor(
        [[tile[(i + s_h) % tile.shape[0], (j + s_w) % tile.shape[1]] for j in range(across)] for i in range(down)]
    )
    mask = torch.stack([torch.stack([whole[place] for place in row]) for row in there])
    post_norm = hasattr(attn, "logit_scale")
    y = x if post_norm else block.norm1(x)
    shifted_y = torch.zeros(len(x), down, across, x.shape[-1], dtype=x.dtype)
    rows, columns = torch.tensor(there).unbind(-1)
    y = shifted_y.index_put((torch.arange(len(x))[:, None, None], rows, columns), y)
    if post_norm:
        y = attn.qkv(y) + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        bias = 16 * torch.sigmoid(table[attn.relative_position_index].permute(2, 0, 1))
    else:
        y = attn.qkv(y)
        bias = attn.relative_position_bias_table[attn.relative_position_index.view(-1)].view(w_h * w_w, w_h * w_w, -1)
        bias = bias.permute(2, 0, 1)
    q, k, v = y.unflatten(3, (3, attn.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)  # (B, h, H, W, d)
    if post_norm:
        q, k = (one / one.norm(dim=-1, keepdim=True).clamp(min=1e-12) for one in (q, k))  # padding may be zero
        q = q * attn.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()[:, None]
    else:
        q = q * attn.scale
    out = torch.zeros_like(q)
    shifted = block.get_attn_mask(shifted_y) if block.dynamic_mask else block.attn_mask
    window = 0
    for i in range(0, down, w_h):
        for j in range(0, across, w_w):
            at = [(i + a, j + b) for a in range(w_h) for b in range(w_w)]
            within = [torch.tensor(one) for one in zip(*at, strict=True)]
            qw, kw, vw, kept = (one[..., within[0], within[1], :] for one in (q, k, v, whole[..., None]))
            kept = kept[..., 0]
            if mhsa_drop == "qkv_exact":
                kw, vw = only_kept(kw, kept[:, None]), only_kept(vw, kept[:, None])
            scores = qw @ kw.transpose(-2, -1) + bias
            if mhsa_drop == "qkv":
                scores = scores + torch.where(kept[:, None] & ~kept, -torch.inf, 0.0).to(x)
            if shifted is not None:
                scores = scores + shifted[window]
            each = torch.arange(len(x))[:, None, None], torch.arange(q.shape[1])[:, None], *within
            out = out.index_put(each, scores.softmax(-1) @ vw)
            window += 1
    out = attn.proj(out.permute(0, 2, 3, 1, 4).flatten(3))[:, rows, columns]
    scale = tile.numel() / int(tile.sum()) if rescale else 1.0
    norm1, norm2 = (block.norm1, block.norm2) if post_norm else (lambda y: y, lambda y: y)
    x = x + block.drop_path1(only_kept(norm1(out), mask[..., None], scale))
    y = block.mlp(x if post_norm else block.norm2(x))
    return x + block.drop_path2(only_kept(norm2(y), mask[..., None], scale))


def swin_merging(merging: nn.Module, x: Tensor, tile: Tensor, rescale: bool = False) -> Tensor:
    """timm's patch merging, of which the output positions of the tiled mask keep their gradient."""
    y = type(merging).forward(merging, x)
    height, width = y.shape[1:3]
    mask = torch.tensor([[tile[i % tile.shape[0], j % tile.shape[1]] for j in range(width)] for i in range(height)])
    return only_kept(y, mask[..., None], tile.numel() / int(tile.sum()) if rescale else 1.0)


def hiera_block(block: nn.Module, x: Tensor, units: Tensor, mhsa_drop: str, rescale: bool = False) -> Tensor:
    """One timm `HieraBlock` on tokens (B, T * U, C), unit by unit or with global attention. units: bool (H, W)."""
    attn, count = block.attn, units.numel()
    kept = units.flatten().repeat(x.shape[1] // count)  # (T * U,)
    out_kept = units.flatten().repeat(x.shape[1] // count // attn.q_stride)[:, None]
    scale = count / int(units.sum()) if rescale else 1.0
    y = block.norm1(x)
    shortcut = x
    if block.do_expand:
        apart = (block.proj(y) if block.proj is not None else x).unflatten(1, (attn.q_stride, -1))
        pooled = apart.amax(1) if block.proj is not None else torch.cat([apart.amax(1), apart.mean(1)], -1)
        shortcut = only_kept(pooled, out_kept, scale)
    q, k, v = attn.qkv(y).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    q = q.unflatten(2, (attn.q_stride, -1)).amax(2)
    unit = torch.arange(x.shape[1]) % count  # of each token
    apart = unit[: q.shape[2], None] != unit if attn.use_mask_unit_attn else torch.zeros(q.shape[2], x.shape[1]) > 0
    if mhsa_drop == "qkv":
        apart = apart | (out_kept & ~kept)
    if mhsa_drop == "qkv_exact":
        k, v = only_kept(k, kept[:, None]), only_kept(v, kept[:, None])
    out = _softmax_attention(attn, q, k, v, torch.where(apart, -torch.inf, 0.0).to(x))
    out = block.ls1(attn.proj(out.transpose(1, 2).flatten(2)))
    x = shortcut + block.drop_path1(only_kept(out, out_kept, scale))
    return x + block.drop_path2(only_kept(block.ls2(block.mlp(block.norm2(x))), out_kept, scale))


def _turned(x: Tensor, rope: Tensor, attn: nn.Module) -> Tensor:
    """Pairs of numbers as complex ones, multiplied by those of unit length that the rope holds."""
    sin, cos = rope.chunk(2, -1)
    if attn.rotate_half:
        real, imaginary = x.chunk(2, -1)
        turn = torch.complex(*(one[..., : one.shape[-1] // 2].contiguous() for one in (cos, sin)))
        out = torch.complex(real.contiguous(), imaginary.contiguous()) * turn
        return torch.cat([out.real, out.imag], -1)
    turn = torch.complex(cos[..., ::2].contiguous(), sin[..., ::2].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _heads(attn: nn.Module, qkv: Tensor) -> Tensor:
    """(B, N, 3 h d) to (3, B, h, N, d)."""
    return qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def _block(
    block, x, qkv, grid_mask, prefix, mhsa_drop, heads, rescale, layer_scale1, layer_scale2, project, bias=0.0
) -> Tensor:
    """The two branches of any pre-norm block, from its queries, keys and values. bias: on attention, (h, N, N)."""
    kept = torch.cat([torch.ones(prefix, dtype=torch.bool), grid_mask.flatten()])  # (N,)
    scale = torch.ones(len(kept), 1).to(x)
    if rescale:
        scale[prefix:] = grid_mask.numel() / int(grid_mask.sum())
    x = x + block.drop_path1(_mhsa(block.attn, qkv, kept, mhsa_drop, heads, scale, layer_scale1, project, bias))
    y = block.mlp(x if layer_scale2 is block.norm2 else block.norm2(x))
    return x + block.drop_path2(only_kept(layer_scale2(y), kept[:, None], scale))


def _mhsa(attn, qkv, kept, mhsa_drop, heads, scale, layer_scale, project, bias) -> Tensor:
    q, k, v = qkv
    if mhsa_drop == "head":
        out = _softmax_attention(attn, q, k, v, bias)
        weight = attn.proj.weight.unflatten(1, (attn.num_heads, -1))
        per_head = torch.einsum("bhnd,chd->bhnc", out, weight)
        head_scale = len(heads) / int(heads.sum()) if (scale != 1).any() else 1.0
        return layer_scale(only_kept(per_head, heads[:, None, None], head_scale).sum(1) + attn.proj.bias)
    if mhsa_drop == "qkv":
        only_kept_keys = torch.where(kept[:, None] & ~kept, -torch.inf, 0.0)  # a kept query sees kept keys
        out = _softmax_attention(attn, q, k, v, only_kept_keys.to(q) + bias)
    if mhsa_drop == "query":
        out = _softmax_attention(attn, q, k, v, bias)
    if mhsa_drop == "qkv_exact":
        out = _softmax_attention(attn, q, only_kept(k, kept[:, None]), only_kept(v, kept[:, None]), bias)
    out = layer_scale(project(out.transpose(1, 2).flatten(2)))
    return only_kept(out, kept[:, None], scale)


def _softmax_attention(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (q @ k.transpose(-2, -1) * attn.scale + bias).softmax(-1) @ v


def drop_tokens(block: nn.Module, x: Tensor, grid_mask: Tensor, prefix: int) -> Tensor:
    """Throws the dropped tokens away, then runs timm's block: what class-token qkv SBP equals."""
    kept = torch.cat([torch.ones(prefix, dtype=torch.bool), grid_mask.flatten()])
    return type(block).forward(block, x[:, kept] if x.shape[1] == len(kept) else x)


def convnext_block(block: nn.Module, x: Tensor, base_mask: Tensor, rescale: bool = False) -> Tensor:
    """One timm `ConvNeXtBlock` on a map (B, C, H, W)."""
    y = block.conv_dw(x)
    mask = block_mask(base_mask, *y.shape[-2:])
    y = y if block.use_conv_mlp else y.permute(0, 2, 3, 1)
    kept = mask if block.use_conv_mlp else mask[..., None]
    mlp = block.mlp
    hidden = only_kept(mlp.act(mlp.fc1(block.norm(y))), kept)
    if hasattr(mlp, "grn"):
        hidden = mlp.grn(hidden)
    y = mlp.fc2(hidden)
    y = y if block.use_conv_mlp else y.permute(0, 3, 1, 2)
    if block.gamma is not None:
        y = y * block.gamma[:, None, None]
    return block.drop_path(only_kept(y, mask, _scale(mask, rescale))) + block.shortcut(x)


def convnext_downsample(downsample: nn.Sequential, x: Tensor, base_mask: Tensor, rescale: bool = False) -> Tensor:
    y = downsample[1](downsample[0](x))
    mask = block_mask(base_mask, *y.shape[-2:])
    return only_kept(y, mask, _scale(mask, rescale))


def _scale(mask: Tensor, rescale: bool) -> float:
    return mask.numel() / int(mask.sum()) if rescale else 1.0


def block_mask(base: Tensor, height: int, width: int) -> Tensor:
    """The base mask enlarged position by position: 2^k blocks, clamped at the border."""
    factor = 1
    while base.shape[0] * factor * 2 <= height:
        factor *= 2
    mask = torch.zeros(height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            mask[i, j] = base[min(i // factor, base.shape[0] - 1), min(j // factor, base.shape[1] - 1)]
    return mask
