"""For timm's train.py, by `--device-modules`: saves the gradients of the first update and exits.

Each process writes them to `$RANK_FILES/gradients0.pt`, `gradients1.pt`, in the order of the optimizer's groups.
"""
import os
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


def _keep(optimizer, args, kwargs):
    gradients = [param.grad for group in optimizer.param_groups for param in group['params']]
    torch.save(gradients, Path(os.environ['RANK_FILES'], f'gradients{os.environ.get("RANK", 0)}.pt'))
    raise SystemExit


register_optimizer_step_pre_hook(_keep)
