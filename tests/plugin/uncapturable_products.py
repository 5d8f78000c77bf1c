"""Products of a linear method that a CUDA graph cannot hold, each for one reason; and one that it can."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

TABLE = np.ones(64, np.float32)


def multiply(layer, x):
    return F.linear(x, layer.weight)


def drop_outliers(method, layer, x, bias=None):
    x = x.clone()
    x[x.abs() > 6] = x.abs().mean()
    return multiply(layer, x)


def fill_rows(method, layer, x, bias=None):
    out = multiply(layer, x)
    out[(x == 0).all(1), torch.arange(1)] = 0.0
    return out


def skip_empty_rows(method, layer, x, bias=None):
    out = multiply(layer, x)
    rows = (x != 0).any(1).nonzero().squeeze(1)
    return out.index_copy(0, rows, out[rows])


def choose_by_mask(method, layer, x, bias=None):
    return torch.cat([multiply(layer, x[x[:, 0] > 0]), multiply(layer, x[x[:, 0] <= 0])])


def scale_on_the_host(method, layer, x, bias=None):
    return multiply(layer, x / x.abs().max().item())


def stop_at_infinite_numbers(method, layer, x, bias=None):
    if not x.isfinite().all():
        raise ValueError("infinite")
    return multiply(layer, x)


def ask_whether_equal(method, layer, x, bias=None):
    return multiply(layer, x) if torch.equal(x, x) else x


def compute_in_numpy(method, layer, x, bias=None):
    return torch.from_numpy(x.numpy() @ layer.weight.numpy().T)


def go_to_the_host(method, layer, x, bias=None):
    return multiply(layer, x.cpu())


def loop_over_a_list(method, layer, x, bias=None):
    return torch.stack([multiply(layer, x[i]) for i in torch.arange(len(x)).tolist()])


def index_by_a_list(method, layer, x, bias=None):
    return multiply(layer, x[:, list(range(x.shape[1]))])


def repeat_by_lengths(method, layer, x, bias=None):
    return multiply(layer, x.repeat_interleave(torch.ones(len(x), dtype=torch.int64), dim=0))


def look_up_a_table(method, layer, x, bias=None):
    return multiply(layer, x) * torch.as_tensor(TABLE)


def group_by_value(method, layer, x, bias=None):
    return multiply(layer, x) * len(torch.unique(x[:, 0].sign())) ** 0


def keep_to_the_rules(method, layer, x, bias=None):
    """A GPU takes numbers with the launch, also of writes by a mask or an index; and one-hot rows need no look."""
    y = x.clone()
    y[y.abs() > 6] = 0.0
    y[1] = 2
    y[2] = np.int64(2)
    y = torch.where(y > 0, y, 0.5) * torch.tensor(2.0) * torch.as_tensor(np.float32(1))
    y = y.masked_fill(y > 3, 1.0)[torch.arange(len(y))]
    y = y.repeat_interleave(torch.ones(len(y), dtype=torch.int64), dim=0, output_size=len(y))
    y = y * F.one_hot(torch.arange(len(y)), len(y)).sum(1, keepdim=True)
    return multiply(layer, y.to(x.device, x.dtype))
