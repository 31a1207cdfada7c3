"""FSDP2 in two processes, Lightning and accelerate, against the same updates in one process, in a plain loop."""
import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from timm_smpconv import SMPAdamW, SMPConv2d
from timm_smpconv.optim import add_point_rules

pytestmark = pytest.mark.slow  # other programs, and processes that import everything anew

LR, UPDATES = 2e-2, 3
FULL = StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    """Two SMP convolutions and a linear layer, with radii near both limits."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first = SMPConv2d(3, 3, 7, padding=3, points=9, groups=3)
        self.second = SMPConv2d(3, 3, 5, padding=2, points=9, groups=3)
        self.fc = nn.Linear(3, 4)
        for conv in (self.first, self.second):
            with torch.no_grad():
                radii = [[1e-3, 1.2e-3, 0.999, 1.0, 0.4, 0.3, 2e-3, 0.9995, 0.5]]
                conv.kernel.radius.copy_(torch.tensor(radii))
                # Next to samples, so that the smallest radii reach one and move.
                half = conv.kernel_size[0] // 2
                conv.kernel.coords.copy_((conv.kernel.coords * half).round() / half + 1e-4)
        self.double()

    def forward(self, x):
        return self.fc(self.second(torch.sin(self.first(x))).square().mean((2, 3)))


def batch(update):
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (4,), generator=generator)


def update_once(net, optimizer, update, share=slice(None)):
    x, y = batch(update)
    optimizer.zero_grad()
    F.cross_entropy(net(x[share]), y[share]).backward()
    optimizer.step()


def smpadamw(net):
    return SMPAdamW(net.parameters(), lr=LR)


def adamw_with_rules(net):
    return add_point_rules(torch.optim.AdamW(net.parameters(), lr=LR), net)


def expected_after(updates, factor=lambda update: 1., exempt=('coords',)):
    """Parameters after updates in one process, and how many updates moved a radius out of its range.

    Plain AdamW, with the rates set and the radii clamped by hand.

    Args:
        updates: How many.
        factor: Of the learning rate in an update.
        exempt: How the names end of the parameters that do not decay, beside radii.
    """
    net = Net()
    radii = [net.first.kernel.radius, net.second.kernel.radius]
    decays = [p for n, p in net.named_parameters() if not n.endswith(('radius', *exempt))]
    others = [p for n, p in net.named_parameters() if n.endswith(exempt)]
    optimizer = torch.optim.AdamW([
        {'params': decays}, {'params': others, 'weight_decay': 0.}, {'params': radii, 'weight_decay': 0.}])
    clamped = 0
    for update in range(updates):
        for group, scale in zip(optimizer.param_groups, (1., 1., 0.1)):
            group['lr'] = LR * factor(update) * scale
        update_once(net, optimizer, update)
        clamped += any(((r < 1e-3) | (r > 1)).any().item() for r in radii)
        with torch.no_grad():
            for radius in radii:
                radius.clamp_(1e-3, 1)
    return {n: p.detach() for n, p in net.named_parameters()}, clamped


def check(params, expected):
    assert set(params) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f'{name}: {m}')


def gathered(net):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in net.named_parameters()}


def sharded(seed=3):
    net = Net(seed)
    for part in (net.first, net.second):
        fully_shard(part)
    return fully_shard(net)


def check_in_range(net):
    for conv in (net.first, net.second):
        radius = conv.kernel.radius
        assert isinstance(radius, DTensor)
        local = radius.to_local()
        assert ((local >= 1e-3) & (local <= 1)).all()


def fsdp_process(rank, folder, make):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    share = slice(2 * rank, 2 * rank + 2)
    net = sharded()
    optimizer = make(net)
    for update in range(UPDATES):
        update_once(net, optimizer, update, share)
        check_in_range(net)
    expected, clamped = expected_after(UPDATES)
    assert clamped == UPDATES
    check(gathered(net), expected)

    # Full and sharded state dicts, in memory and on disk, go on as if never interrupted.
    expected, _ = expected_after(UPDATES + 1)
    full = copy.deepcopy(get_state_dict(net, optimizer, options=FULL))
    memory = copy.deepcopy(get_state_dict(net, optimizer))
    dcp.save(dict(zip(('model', 'optimizer'), get_state_dict(net, optimizer))), checkpoint_id=f'{folder}/saved')
    for kind in ('full', 'sharded', 'on disk'):
        net = sharded(seed=0)
        optimizer = make(net)
        if kind == 'on disk':
            model_state, optimizer_state = get_state_dict(net, optimizer)
            dcp.load({'model': model_state, 'optimizer': optimizer_state}, checkpoint_id=f'{folder}/saved')
            set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        else:
            model_state, optimizer_state = copy.deepcopy(full if kind == 'full' else memory)
            options = FULL if kind == 'full' else None
            set_state_dict(
                net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
        update_once(net, optimizer, UPDATES, share)
        check_in_range(net)
        check(gathered(net), expected)

    # `load_state_dict` of sharded tensors: radii outside the range load, NaN is refused where it is.
    plain = Net(seed=0)
    plain.load_state_dict(full[0])
    check(dict(plain.named_parameters()), expected_after(UPDATES)[0])
    state = copy.deepcopy(net.state_dict())
    local = state['first.kernel.radius'].to_local()
    local.fill_(-1.)
    net.load_state_dict(state)
    assert (net.first.kernel.radius.to_local() == -1).all()
    local.fill_(float('nan'))
    if local.numel():
        with pytest.raises(RuntimeError, match=r'first.kernel.radius must be finite everywhere, got nan'):
            net.load_state_dict(state)
    else:
        net.load_state_dict(state)
    assert (net.first.kernel.radius.to_local() == -1).all()
    update_once(net, optimizer, UPDATES, share)
    check_in_range(net)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize('make', [smpadamw, adamw_with_rules])
def test_fsdp_in_two_processes_is_one_process(make, tmp_path):
    torch.multiprocessing.spawn(fsdp_process, (str(tmp_path), make), nprocs=2)


def zero_process(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    expected, clamped = expected_after(UPDATES, factor=lambda update: 1 / (update + 1))
    assert clamped
    for inner in (SMPAdamW, torch.optim.AdamW):
        net = Net()
        ddp = nn.parallel.DistributedDataParallel(net)
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), inner, lr=LR)
        if inner is not SMPAdamW:
            add_point_rules(optimizer, net)
        scheduler = SCHEDULES['LambdaLR'](optimizer)
        for update in range(UPDATES):
            update_once(ddp, optimizer, update, slice(2 * rank, 2 * rank + 2))
            scheduler.step()
        assert len(optimizer.param_groups) == 1
        check(dict(net.named_parameters()), expected)
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        assert len(optimizer.state_dict()['param_groups']) == 1
    with pytest.raises(ValueError, match='got ZeroRedundancyOptimizer with overlap_with_ddp=True'):
        add_point_rules(ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, overlap_with_ddp=True, lr=LR))
    dist.barrier()
    dist.destroy_process_group()


def test_zero_in_two_processes_is_one_process(tmp_path):
    torch.multiprocessing.spawn(zero_process, (str(tmp_path),), nprocs=2)


SCHEDULES = {
    'LambdaLR': lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (update + 1)),
    'OneCycleLR': lambda optimizer: lr_scheduler.OneCycleLR(optimizer, LR, total_steps=4, cycle_momentum=False),
    'CosineAnnealingWarmRestarts': lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
}


def factors(schedule, updates):
    """What a schedule makes of the rate in each update, seen at an optimizer of one plain parameter."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = schedule(optimizer)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]['lr'] / LR)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings('ignore:.isinstance.treespec, LeafSpec:FutureWarning')  # of Lightning 2.6 and torch 2.14
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('make', [smpadamw, adamw_with_rules])
def test_lightning(make, schedule, tmp_path):
    lightning = pytest.importorskip('lightning')
    factor = factors(SCHEDULES[schedule], 3).__getitem__
    assert len({factor(update) for update in range(3)}) > 1

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, item, index):
            x, y = item
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = make(self.net)
            return [optimizer], [{'scheduler': SCHEDULES[schedule](optimizer), 'interval': 'step'}]

    def fit(module, updates, ckpt_path=None):
        trainer = lightning.Trainer(
            max_steps=updates, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False)
        data = torch.utils.data.DataLoader([batch(u) for u in range(updates)], batch_size=None)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    module = Module()
    trainer = fit(module, 2)
    expected, clamped = expected_after(2, factor)
    assert clamped
    check(dict(module.net.named_parameters()), expected)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    again = Module()
    saved = torch.load(tmp_path / 'last.ckpt', weights_only=True)
    again.load_state_dict(saved['state_dict'])
    check(dict(again.net.named_parameters()), expected)
    optimizer = make(again.net)
    optimizer.load_state_dict(saved['optimizer_states'][0])
    update_once(again.net, optimizer, 2)
    check(dict(again.net.named_parameters()), expected_after(3, factor)[0])


@pytest.mark.filterwarnings('ignore:.isinstance.treespec, LeafSpec:FutureWarning')
def test_backbone_finetuning(tmp_path):
    """Every group has the rate that it has with plain AdamW, and an update of all is that of a plain loop."""
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.make, self.backbone, self.rates = make, Net(), []
            self.head = nn.Linear(4, 4).double()

        def training_step(self, item, index):
            self.rates.append([(group['lr'], len(group['params'])) for group in self.optimizers().param_groups])
            x, y = item
            return F.cross_entropy(self.head(self.backbone(x)), y)

        def configure_optimizers(self):
            return self.make(self.head.parameters(), lr=LR)

    def fit(make):
        torch.manual_seed(0)
        module = Module(make)
        trainer = lightning.Trainer(
            max_epochs=4, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False,
            callbacks=[lightning.pytorch.callbacks.BackboneFinetuning(1, lambda_func=lambda epoch: 2.)])
        trainer.fit(module, torch.utils.data.DataLoader([batch(0)], batch_size=None))
        return module

    plain, module = fit(torch.optim.AdamW), fit(SMPAdamW)
    assert module.rates == plain.rates and len(module.rates[-1]) == 2
    assert [rates[-1] for rates in module.rates[1:]] == [(pytest.approx(LR / 10 * 2 ** n), 10) for n in range(3)]
    for kernel in (module.backbone.first.kernel, module.backbone.second.kernel):
        assert ((kernel.radius >= 1e-3) & (kernel.radius <= 1)).all()
    assert any((conv.kernel.radius > 1).any() for conv in (plain.backbone.first, plain.backbone.second))


@pytest.mark.parametrize('order', ['before', 'behind'])
def test_accelerate(order, tmp_path):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    if order == 'before':
        add_point_rules(optimizer)
    net, optimizer = accelerator.prepare(net, optimizer)
    if order == 'behind':
        add_point_rules(optimizer)
    for update in range(3):
        if update == 2:  # saved, moved on, and restored
            accelerator.save_state(str(tmp_path / 'state'))
            update_once(net, optimizer, 7)
            accelerator.load_state(str(tmp_path / 'state'))
        x, y = batch(update)
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(net(x), y))
        optimizer.step()
    expected, clamped = expected_after(3)
    assert clamped
    check(dict(accelerator.unwrap_model(net).named_parameters()), expected)
