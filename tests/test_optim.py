"""The optimizers' groups and the radius' trajectory against the authors' order of an update, written plainly."""
import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import small_model
from reference import kernel_loop
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from timm_smpconv import SMPConv2d, SMPKernel


def rates(optimizer):
    """id of parameter → (learning rate, weight decay)."""
    return {id(p): (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']}


def names_of(model, optimizer):
    found = rates(optimizer)
    return {name: found[id(p)] for name, p in model.named_parameters()}


def check_rules(model, optimizer, lr=1.0, weight_decay=0.05):
    for name, (rate, decay) in names_of(model, optimizer).items():
        param = model.get_parameter(name)
        assert rate == pytest.approx(lr * (0.1 if name.endswith('.radius') else 1)), name
        decays = param.ndim > 1 and not name.endswith(('.radius', '.coords', '.bias'))
        assert decay == (weight_decay if decays else 0), name


def through_meta(model):
    empty = small_model(device='meta')
    empty.load_state_dict(model.state_dict(), assign=True)
    return empty


WAYS = {
    'as built': lambda m: m,
    'moved to float64': lambda m: m.double(),
    'bfloat16': lambda m: m.to(torch.bfloat16),
    'channels_last': lambda m: m.to(memory_format=torch.channels_last),
    'deep copy': copy.deepcopy,
    'pickled': lambda m: pickle.loads(pickle.dumps(m)),
    'loaded by assignment': through_meta,
    'synchronised BatchNorm': nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize('name', ['smpadamw', 'smpadam'])
@pytest.mark.parametrize('way', WAYS)
def test_radii_are_recognised(name, way):
    model = WAYS[way](small_model())
    optimizer = create_optimizer_v2(model, name, lr=1.0, weight_decay=0.05)
    assert isinstance(optimizer, torch.optim.Adam)
    check_rules(model, optimizer)


def test_compiled_model():
    model = torch.compile(small_model())
    check_rules(model, create_optimizer_v2(model, 'smpadamw', lr=1.0, weight_decay=0.05))


def test_layers_inside_another_network_and_plain_parameters():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SMPConv2d(4, 4, 5, padding=2))
    kernel = net[1].kernel
    found = rates(create_optimizer_v2(net, 'smpadamw', lr=1.0, weight_decay=0.05))
    assert found[id(kernel.radius)] == (pytest.approx(0.1), 0)
    assert found[id(kernel.coords)] == (1.0, 0)
    assert found[id(kernel.weight)] == (1.0, 0.05)
    found = rates(create_optimizer_v2(net.parameters(), 'smpadamw', lr=1.0, weight_decay=0.05))
    assert found[id(kernel.radius)] == (pytest.approx(0.1), 0)
    assert found[id(net[0].bias)] == (1.0, 0.05)  # bare parameters carry no names to spare them by


def test_layer_decay_multiplies_and_schedulers_keep_the_factor():
    model = small_model()
    optimizer = create_optimizer_v2(model, 'smpadamw', lr=1.0, weight_decay=0.05, layer_decay=0.7)
    plain = create_optimizer_v2(small := copy.deepcopy(model), 'adamw', lr=1.0, weight_decay=0.05, layer_decay=0.7)
    scale = {id(p): g['lr_scale'] for g in plain.param_groups for p in g['params']}
    expected = {n: scale[id(p)] * (0.1 if n.endswith('.radius') else 1) for n, p in small.named_parameters()}
    assert {n: r for n, (r, _) in names_of(model, optimizer).items()} == pytest.approx(expected)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=10, warmup_epochs=2, warmup_lr=0.0)
    assert {r for r, _ in rates(optimizer).values()} == {0.0}
    scheduler.step(1)
    got = {n: r for n, (r, _) in names_of(model, optimizer).items()}
    assert got == pytest.approx({n: 0.5 * r for n, r in expected.items()})
    assert len(set(expected.values())) > 4


def test_plain_adamw_still_trains():
    model = small_model()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05)
    before = [k.radius.clone() for k in model.modules() if isinstance(k, SMPKernel)]
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    optimizer.step()
    after = [k.radius for k in model.modules() if isinstance(k, SMPKernel)]
    assert any((a != b).any() for a, b in zip(after, before))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_radius_that_is_not_finite(value):
    model = small_model()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, SMPKernel)).radius[0, 1] = value
    with pytest.raises(ValueError, match=f'a radius must be finite, got {value}'):
        create_optimizer_v2(model, 'smpadamw', lr=1e-3)


class Net(nn.Module):
    """An SMP convolution and a linear layer, with radii near both limits."""

    def __init__(self):
        super().__init__()
        self.conv = SMPConv2d(3, 3, 7, padding=3, points=9)
        self.fc = nn.Linear(3, 4)
        with torch.no_grad():
            self.conv.kernel.radius.copy_(torch.tensor([[1e-3, 1.2e-3, 0.999, 1.0, 0.4, 0.3, 2e-3, 0.9995, 0.5]]))
        self.double()

    def forward(self, x):
        return self.fc(self.conv(x).square().mean((2, 3)))


def oracle(net, batches, lr, decay, ema_decay, accumulate):
    """The authors' update, in loops: gradients, AdamW, average, clip.

    Returns losses, parameters, averages, which updates clipped.
    """
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    average = {n: p.detach().clone() for n, p in params.items()}
    first, second = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    losses, clipped = [], []
    for step, micro in enumerate(batches, 1):
        total = 0.
        for x, y in micro:
            kernel = kernel_loop(params['conv.kernel.coords'], params['conv.kernel.radius'],
                                 params['conv.kernel.weight'], (7, 7))[0]
            z = F.conv2d(x, kernel[:, None], params['conv.bias'], padding=3, groups=3)
            logits = z.square().mean((2, 3)) @ params['fc.weight'].T + params['fc.bias']
            loss = F.cross_entropy(logits, y)
            losses.append(loss.item())
            total = total + loss / accumulate
        grads = dict(zip(params, torch.autograd.grad(total, list(params.values()))))
        with torch.no_grad():
            for n, p in params.items():
                rate = lr * 0.1 if n.endswith('radius') else lr
                if p.ndim > 1 and not n.endswith(('radius', 'coords')):
                    p -= rate * decay * p
                first[n] = 0.9 * first[n] + 0.1 * grads[n]
                second[n] = 0.999 * second[n] + 0.001 * grads[n] ** 2
                p -= rate * (first[n] / (1 - 0.9 ** step)) / ((second[n] / (1 - 0.999 ** step)).sqrt() + 1e-8)
                average[n] = ema_decay * average[n] + (1 - ema_decay) * p
            radius = params['conv.kernel.radius']
            clipped.append(bool(((radius < 1e-3) | (radius > 1)).any()))
            radius.clamp_(1e-3, 1.)
    return losses, params, average, clipped


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('form', ['eager', 'checkpointed', 'compiled'])
def test_six_updates_follow_the_authors_order(accumulate, form):
    torch.manual_seed(3)
    net = Net()
    data = torch.Generator().manual_seed(4)
    batches = [  # the same six times, so that radii keep pushing against their limits
        [(torch.randn(5, 3, 8, 8, generator=data, dtype=torch.float64), torch.randint(0, 4, (5,), generator=data))
         for _ in range(accumulate)]] * 6
    lr, decay, ema_decay = 2e-2, 0.05, 0.9
    losses, params, average, clipped = oracle(net, batches, lr, decay, ema_decay, accumulate)
    assert sum(clipped) >= 4 and clipped[-1]
    assert any((average[n] < 1e-3).any() or (average[n] > 1).any() for n in average if n.endswith('radius'))

    net.train()
    ema = ModelEmaV3(net, decay=ema_decay)
    forward = {
        'eager': net,
        'checkpointed': lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False),
        'compiled': torch.compile(net, backend='aot_eager'),
    }[form]
    optimizer = create_optimizer_v2(net, 'smpadamw', lr=lr, weight_decay=decay)
    got = []
    for micro in batches:
        optimizer.zero_grad()
        for x, y in micro:
            loss = F.cross_entropy(forward(x), y)
            got.append(loss.item())
            (loss / accumulate).backward()
        optimizer.step()
        ema.update(net)
    assert got == pytest.approx(losses, rel=1e-6)
    held = net.conv.kernel.radius.detach().clone()
    net.eval()  # validation follows an epoch, and sees radii in range
    ema.module.eval()(batches[0][0][0])  # the average is never projected
    assert not torch.equal(held, net.conv.kernel.radius)
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, params[name], rtol=1e-6, atol=1e-12)
    for name, param in ema.module.named_parameters():
        torch.testing.assert_close(param, average[name], rtol=1e-6, atol=1e-12)


def test_two_forwards_before_one_backward():
    net = Net().train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (net(x).sum() + net(x * 2).sum()).backward()
    assert net.conv.kernel.radius.grad.isfinite().all()


def test_loaded_radii_are_left_alone_until_training():
    net = Net().eval()
    with torch.no_grad():
        net.conv.kernel.radius[0, 0] = 1.5
    net(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert net.conv.kernel.radius[0, 0] == 1.5
    net.train()(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert net.conv.kernel.radius[0, 0] == 1.0


def test_timm_lists_them():
    assert {'smpadam', 'smpadamw'} <= set(timm.optim.list_optimizers())
