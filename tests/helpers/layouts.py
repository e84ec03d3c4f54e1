"""Layouts of a tensor [..., features] with the values of a dense one, for kernels that read any strides."""

import torch

LAYOUTS = {
    "dense": lambda x: x,
    "features-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "no-dense-axis": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, 0)[::2, ..., ::2],
    "behind-class-token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "expanded": lambda x: x[:1].expand(x.shape),
}
