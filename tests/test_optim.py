"""The rules of the points in a step, and the trajectory of training against the authors' update, written plainly."""
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import interrupt, small_model
from reference import kernel_loop
from timm.models import resume_checkpoint
from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.optim import lr_scheduler

from timm_smpconv import SMPAdam, SMPAdamW, SMPConv2d, SMPKernel
from timm_smpconv.optim import add_point_rules, smp_param_groups


def rates_in_step(optimizer):
    """id of parameter → (learning rate × how much of a step is left after it, weight decay that the step reads).

    In place of the optimizer, which has no gradients, a hook takes the step, and it is taken back.
    """
    seen, before = {}, {p: p.detach().clone() for g in optimizer.param_groups for p in g['params']}

    def move(optimizer, args, kwargs):
        seen.update({p: (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']})
        for param in before:
            param.lerp_(torch.full_like(param, 0.4), 0.5)

    optimizer.zero_grad()
    handle = optimizer.register_step_pre_hook(torch.no_grad()(move))
    optimizer.step()
    handle.remove()
    found = {}
    for param, start in before.items():
        moved, step = (value.double() - start.double() for value in (param.detach(), start.lerp(0.4 + 0 * start, 0.5)))
        found[id(param)] = (seen[param][0] * ((moved * step).sum() / step.square().sum()).item(), seen[param][1])
        param.detach().copy_(start)
    return found


def kernels_of(model):
    return [m for m in model.modules() if isinstance(m, SMPKernel)]


def names_of(model, optimizer):
    found = rates_in_step(optimizer)
    return {name: found[id(p)] for name, p in model.named_parameters()}


def check_rules(model, optimizer, lr=1.0, weight_decay=0.05, radius_lr_scale=0.1):
    for name, (rate, decay) in names_of(model, optimizer).items():
        param = model.get_parameter(name)
        assert rate == pytest.approx(lr * (radius_lr_scale if name.endswith('radius') else 1), rel=1e-4), name
        decays = param.ndim > 1 and not name.endswith(('radius', 'coords', 'bias'))
        assert decay == (weight_decay if decays else 0), name
    assert all(group['lr'] == lr for group in optimizer.param_groups)  # outside a step, the whole rate


def in_range(model):
    return all(((k.radius >= k.radius_range[0]) & (k.radius <= k.radius_range[1])).all() for k in kernels_of(model))


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
    'compiled': lambda m: torch.compile(m, backend='eager'),
}


@pytest.mark.parametrize('name', ['smpadamw', 'smpadam'])
@pytest.mark.parametrize('way', WAYS)
def test_points_are_found(name, way):
    model = WAYS[way](small_model())
    optimizer = create_optimizer_v2(model, name, lr=1.0, weight_decay=0.05)
    assert isinstance(optimizer, torch.optim.Adam)
    check_rules(model, optimizer)


def test_layers_inside_another_network_and_bare_parameters():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SMPConv2d(4, 4, 5, padding=2, groups=4))
    kernel = net[1].kernel
    for params in (net, net.parameters(), net.named_parameters(), [{'params': list(net.parameters())}]):
        found = rates_in_step(SMPAdamW(params, lr=1.0, weight_decay=0.05))
        assert found[id(kernel.radius)] == (pytest.approx(0.1), 0)
        assert found[id(kernel.coords)] == (1.0, 0)
        assert found[id(kernel.weight)] == (1.0, 0.05)
        assert found[id(net[0].bias)] == (1.0, 0.05)  # only a model tells timm that this is a bias
    check_rules(net, create_optimizer_v2(net, 'smpadamw', lr=1.0, weight_decay=0.05))


def test_groups_of_points():
    layer = SMPConv2d(4, 4, 5, groups=4)
    for params in (layer, layer.parameters(), [{'params': layer.parameters()}, {'params': nn.Linear(1, 1).weight}]):
        found = {id(p): g for g in smp_param_groups(params, radius_lr_scale=0.2) for p in g['params']}
        assert found[id(layer.kernel.radius)]['radius_lr_scale'] == 0.2
        assert found[id(layer.kernel.radius)]['weight_decay'] == found[id(layer.kernel.coords)]['weight_decay'] == 0
        assert 'weight_decay' not in found[id(layer.kernel.weight)]
        assert sum('radius_lr_scale' in group for group in found.values()) == 1
    optimizer = SMPAdamW(smp_param_groups(layer, radius_lr_scale=0.2), lr=1., weight_decay=0.05)
    assert len(optimizer.param_groups) == 3
    found = rates_in_step(optimizer)
    assert found[id(layer.kernel.radius)] == (pytest.approx(0.2), 0) and found[id(layer.kernel.weight)][1] == 0.05


def test_ranges_do_not_mix():
    net = nn.Sequential(SMPKernel(2, (5, 5), 3), SMPKernel(2, (9,), 3, radius_range=(1e-4, 0.3)))
    optimizer = SMPAdamW(net, lr=100.)
    for sign in (1, -1):
        for kernel in net:
            kernel.radius.grad = torch.full_like(kernel.radius, sign)
        optimizer.step()
        expected = [1e-3, 1e-4] if sign > 0 else [1., 0.3]
        assert [k.radius.unique().item() for k in net] == pytest.approx(expected)
        optimizer = SMPAdamW(net, lr=100.)


TORCH_SCHEDULERS = {
    'LambdaLR': lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    'CosineAnnealingLR': lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=2e-4),
    'OneCycleLR': lambda o: lr_scheduler.OneCycleLR(o, 3e-3, 10, cycle_momentum=False),
    'CosineAnnealingWarmRestarts': lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    'SequentialLR': lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 10)], [2]),
    'ReduceLROnPlateau': lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize('scheduler', TORCH_SCHEDULERS)
def test_schedulers_of_torch_keep_the_scale(scheduler):
    """Against the rate of the weights, and against the distance that radii really move: Adam's first steps are lr."""
    layer = SMPConv2d(2, 2, 5, bias=False, radius=0.5, groups=2).double()
    optimizer = SMPAdamW(layer, lr=1e-3, weight_decay=0.)
    schedule = TORCH_SCHEDULERS[scheduler](optimizer)
    rates = set()
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        for param in layer.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        lr = optimizer.param_groups[0]['lr']
        rates.add(lr)
        for name, param in layer.named_parameters():
            moved = lr * (0.1 if name.endswith('radius') else 1)
            torch.testing.assert_close(before[name] - param, torch.full_like(param, moved), rtol=1e-6, atol=0)
        schedule.step(*([1.] if scheduler == 'ReduceLROnPlateau' else []))
    assert len(rates) > 1


def test_layer_decay_and_timm_schedulers_keep_the_scale():
    model = small_model()
    optimizer = create_optimizer_v2(model, 'smpadamw', lr=1.0, weight_decay=0.05, layer_decay=0.7)
    plain = create_optimizer_v2(small := copy.deepcopy(model), 'adamw', lr=1.0, weight_decay=0.05, layer_decay=0.7)
    scale = {id(p): g['lr_scale'] for g in plain.param_groups for p in g['params']}
    expected = {n: scale[id(p)] * (0.1 if n.endswith('.radius') else 1) for n, p in small.named_parameters()}
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=10, warmup_epochs=2, warmup_lr=0.0)
    assert {r for r, _ in rates_in_step(optimizer).values()} == {0.0}
    for epoch, factor in ((1, 0.5), (2, (1 + math.cos(0.2 * math.pi)) / 2)):
        scheduler.step(epoch)
        got = {n: r for n, (r, _) in names_of(model, optimizer).items()}
        assert got == pytest.approx({n: factor * r for n, r in expected.items()}, rel=1e-4)
    assert len(set(expected.values())) > 4


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('name', ['coords', 'radius'])
def test_points_that_are_not_finite(name, value):
    model = small_model()
    kernel = kernels_of(model)[0]
    with torch.no_grad():
        getattr(kernel, name)[0, 1] = value
    with pytest.raises(ValueError, match=rf'{name} \(1, \d+.*\) must be finite everywhere, got {value}'):
        create_optimizer_v2(model, 'smpadamw', lr=1e-3)
    with pytest.raises(ValueError, match=rf'kernel.{name} must be finite everywhere, got {value}'):
        SMPAdamW(model.named_parameters(), lr=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match='must be finite everywhere'):
        add_point_rules(optimizer)
    assert len(optimizer.param_groups) == 1 and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize('value', [-0.1, math.nan, math.inf])
def test_a_scale_out_of_range(value):
    layer = SMPConv2d(2, 2, 5, groups=2)
    for make in (
            lambda: SMPAdamW(layer, radius_lr_scale=value),
            lambda: SMPAdam(layer.parameters(), radius_lr_scale=value),
            lambda: create_optimizer_v2(layer, 'smpadamw', lr=1e-3, radius_lr_scale=value),
            lambda: smp_param_groups(layer, radius_lr_scale=value),
            lambda: add_point_rules(torch.optim.SGD(layer.parameters(), lr=1.), radius_lr_scale=value),
    ):
        with pytest.raises(ValueError, match=f'radius_lr_scale must be at least 0 and finite, got {value}'):
            make()


# Any optimizer


class Net(nn.Module):
    """An SMP convolution and a linear layer, with radii near both limits."""

    def __init__(self):
        super().__init__()
        self.conv = SMPConv2d(3, 3, 7, padding=3, points=9, groups=3)
        self.fc = nn.Linear(3, 4)
        with torch.no_grad():
            self.conv.kernel.radius.copy_(torch.tensor([[1e-3, 1.2e-3, 0.999, 1.0, 0.4, 0.3, 2e-3, 0.9995, 0.5]]))
        self.double()

    def forward(self, x):
        return self.fc(self.conv(x).square().mean((2, 3)))


def net_with(seed):
    torch.manual_seed(seed)
    return Net()


def batches_of(count, seed=4):
    data = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 3, 8, 8, generator=data, dtype=torch.float64), torch.randint(0, 4, (5,), generator=data))
        for _ in range(count)]


def train(net, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def params_of(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def check_equal(actual, expected, rtol=0.):
    """Relative to the largest entry of each parameter."""
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0., atol=rtol * value.abs().max().item(), msg=lambda m, name=name: f'{name}: {m}')


MAKE = {
    'adafactor': lambda params: create_optimizer_v2(params, 'adafactor'),  # sets its own rate
    'lbfgs': lambda params: torch.optim.LBFGS(params, lr=1e-2),
    **{
        name: lambda params, name=name: create_optimizer_v2(params, name, lr=1e-2, weight_decay=0.05)
        for name in ('adamw', 'adam', 'lamb', 'lion', 'madgrad', 'nadamw', 'rmsprop', 'sgd', 'sgdw', 'lookahead_adamw')
    }}


@pytest.mark.parametrize('name', MAKE)
def test_radii_go_a_tenth_of_the_step_and_points_do_not_decay(name):
    """Against the same optimizer without rules, and without decay in the groups of points.

    The groups stay the user's.
    """
    net, other = net_with(3), net_with(3)
    radius, start = other.conv.kernel.radius, net.conv.kernel.radius.detach().clone()
    points = [other.conv.kernel.coords, radius]
    others = [p for p in other.parameters() if not any(p is point for point in points)]
    plain = MAKE[name](others + points if name == 'lbfgs' else [
        {'params': others}, {'params': points, 'weight_decay': 0.}])
    optimizer = MAKE[name](net.parameters())
    groups = [dict(group) for group in optimizer.param_groups]
    assert add_point_rules(add_point_rules(optimizer, net)) is optimizer  # twice, as one may after adding layers
    x, y = batches_of(1)[0]
    for module, chosen in ((net, optimizer), (other, plain)):
        def closure(module=module, chosen=chosen):
            chosen.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return loss
        chosen.step(closure)
    assert not torch.equal(radius, start)
    with torch.no_grad():
        radius.copy_((start + 0.1 * (radius - start)).clamp(1e-3, 1))
    check_equal(params_of(net), params_of(other), rtol=1e-12)
    for group, expected in zip(optimizer.param_groups, groups, strict=True):
        assert group['radius_lr_scale'] == 0.1
        assert all(p is e for p, e in zip(group['params'], expected['params'], strict=True))
        assert group.get('weight_decay') == expected.get('weight_decay')


class SAM(torch.optim.Optimizer):
    """As github.com/davda54/sam: the optimizer inside makes the step, from where the first step began."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=True):
        params = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]['start'] = p.detach().clone()
            p.add_(p.grad, alpha=(self.param_groups[0]['rho'] / norm).item())
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=True):
        for group in self.param_groups:
            for p in group['params']:
                p.data = self.state[p]['start']
        self.base_optimizer.step()
        self.zero_grad()


def test_sam():
    """Against SGD's update written plainly, with the gradients of the other end of the first step."""
    net, other = net_with(3), net_with(3)
    lr, radius = 30., other.conv.kernel.radius
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=lr)
    assert add_point_rules(optimizer, net) is optimizer and len(optimizer.param_groups) == 1
    clamped = 0
    for x, y in batches_of(3):
        F.cross_entropy(net(x), y).backward()
        optimizer.first_step()
        F.cross_entropy(net(x), y).backward()
        optimizer.second_step()
        assert in_range(net)

        params = list(other.parameters())
        starts = [p.detach().clone() for p in params]
        ascent = torch.autograd.grad(F.cross_entropy(other(x), y), params)
        norm = torch.cat([g.flatten() for g in ascent]).norm()
        with torch.no_grad():
            for p, g in zip(params, ascent):
                p += 0.05 * g / norm
        gradients = torch.autograd.grad(F.cross_entropy(other(x), y), params)
        with torch.no_grad():
            for p, start, g in zip(params, starts, gradients):
                p.copy_(start - (0.1 * lr if p is radius else lr) * g)
            clamped += ((radius < 1e-3) | (radius > 1)).any().item()
            radius.clamp_(1e-3, 1)
        check_equal(params_of(net), params_of(other), rtol=1e-9)
    assert clamped


@pytest.mark.parametrize('name', ['base_optimizer', '_base_optimizer', 'optimizer', '_optimizer', 'optim'])
def test_the_optimizer_in_a_wrapper_gets_the_rules(name):
    class Wrapper:
        pass

    net, wrapper = net_with(3), Wrapper()
    sgd = torch.optim.SGD(net.parameters(), lr=1e3)
    setattr(wrapper, name, Lookahead(sgd))
    assert add_point_rules(wrapper, net) is wrapper
    train(net, sgd, batches_of(1))
    assert in_range(net)


def test_optimizers_that_cannot_follow_are_refused():
    net = net_with(3)
    copies = [p.detach().clone().requires_grad_() for p in net.parameters()]
    sgd = torch.optim.SGD(copies, lr=1.)
    with pytest.raises(ValueError, match=r'must train the parameters of model, got SGD with other tensors.*DeepSpeed'):
        add_point_rules(sgd, net)
    with pytest.raises(ValueError, match='must train the parameters of model, got Lookahead with other tensors'):
        add_point_rules(Lookahead(sgd))

    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

    with pytest.raises(ValueError, match=r'must not exchange the parameters in train\(\) and eval\(\), got Schedule'):
        add_point_rules(ScheduleFree(net.parameters(), lr=1.), net)
    sgd._overlap_with_ddp = True  # of ZeroRedundancyOptimizer, which needs processes
    with pytest.raises(ValueError, match='must step after the backward pass, got SGD with overlap_with_ddp=True'):
        add_point_rules(sgd)
    assert not sgd._optimizer_step_pre_hooks and 'radius_lr_scale' not in sgd.param_groups[0]

    optimizer = SMPAdamW(net, lr=1.)
    optimizer.param_groups[0]['params'] = copies  # as deepspeed.initialize does
    with pytest.raises(RuntimeError, match='SMPAdamW must train the radii with which it was made, got groups without'):
        optimizer.step()


def test_points_that_come_later_and_points_that_are_not_trained():
    """Heads first, as Lightning's BackboneFinetuning; parameters replaced in the groups, as accelerate with FSDP."""
    net, other = net_with(3), net_with(3)
    optimizer = add_point_rules(torch.optim.AdamW(net.fc.parameters(), lr=2e-2), net)
    optimizer.add_param_group({'params': list(net.conv.parameters()), 'lr': 4.})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[-1]['lr'] = 2e-2
    train(net, optimizer, batches_of(3))
    train(other, SMPAdamW(other, lr=2e-2), batches_of(3))
    check_equal(params_of(net), params_of(other))
    net.conv.kernel.radius = nn.Parameter(net.conv.kernel.radius.detach().clone())
    optimizer = SMPAdamW(other, lr=1e3)
    optimizer.param_groups[0]['params'] = list(net.parameters())
    train(net, optimizer, batches_of(1))
    assert in_range(net)


def test_the_scale_is_a_rate_in_plain_sgd():
    net = net_with(3)
    x, y = batches_of(1)[0]
    F.cross_entropy(net(x), y).backward()
    gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
    before = params_of(net)
    optimizer = add_point_rules(torch.optim.SGD(net.parameters(), lr=1e-3), radius_lr_scale=0.25)
    optimizer.step()
    for name, param in net.named_parameters():
        rate = 0.25e-3 if name.endswith('radius') else 1e-3
        expected = before[name] - rate * gradients[name]
        expected = expected.clamp(1e-3, 1) if name.endswith('radius') else expected
        torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(foreach=True), dict(foreach=False), dict(fused=True), dict(amsgrad=True), dict(maximize=True),
    dict(lr=torch.tensor(2e-2), foreach=False)])
def test_every_implementation_of_adamw_scales_and_clamps(kwargs):
    """Against two optimizers without rules, of which one has the radii at their own rate, clamped by hand."""
    net, other = net_with(3), net_with(3)
    batches = batches_of(4)
    train(net, SMPAdamW(net, **dict(dict(lr=2e-2, weight_decay=0.), **kwargs)), batches)
    radius = other.conv.kernel.radius
    others = [p for p in other.parameters() if p is not radius]
    rest = torch.optim.AdamW(others, **dict(dict(lr=2e-2, weight_decay=0.), **kwargs))
    radii = torch.optim.AdamW([radius], **dict(kwargs, lr=2e-3, weight_decay=0.))
    for x, y in batches:
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        rest.step()
        radii.step()
        with torch.no_grad():
            radius.clamp_(1e-3, 1)
    check_equal(params_of(net), params_of(other), rtol=1e-6)


def test_a_closure_sees_the_state_before_the_step():
    net, other = net_with(3), net_with(3)
    x, y = batches_of(1)[0]
    optimizer = SMPAdamW(net, lr=2e-2)

    groups = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        groups.append([len(group['params']) for group in optimizer.param_groups])
        return loss

    losses = [optimizer.step(closure).item(), optimizer.step(closure=closure).item(), optimizer.step(closure).item()]
    assert groups == [[len(list(net.parameters()))]] * 3  # Lightning's loop runs in the closure
    train(other, SMPAdamW(other, lr=2e-2), [(x, y)] * 3)
    check_equal(params_of(net), params_of(other))
    assert len(set(losses)) == 3


def test_a_subclass_whose_step_calls_ours():
    class Outer(SMPAdamW):
        def step(self, closure=None):
            return super().step(closure)

    net, other = net_with(3), net_with(3)
    SMPAdamW(Net(), lr=1.)  # torch hooks the inner step when the class is first used
    train(net, Outer(net, lr=2e-2), batches_of(3))
    train(other, SMPAdamW(other, lr=2e-2), batches_of(3))
    check_equal(params_of(net), params_of(other))


def test_gradient_scaling():
    net, other = net_with(3), net_with(3)
    optimizer, scaler = SMPAdamW(net, lr=2e-2), torch.amp.GradScaler('cpu', init_scale=256.)
    batches = batches_of(3)
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        if i == 1:
            net.fc.weight.grad[0, 0] = math.inf  # this step is skipped
        scaler.step(optimizer)
        scaler.update()
    train(other, SMPAdamW(other, lr=2e-2), [batches[0], batches[2]])
    check_equal(params_of(net), params_of(other), rtol=1e-9)


@pytest.mark.slow
def test_a_compiled_step():
    torch.compiler.reset()
    net, other = net_with(3), net_with(3)
    optimizer = SMPAdamW(net, lr=torch.tensor(2e-2, dtype=torch.float64), foreach=False)
    step = torch.compile(optimizer.step, backend='eager')
    for x, y in batches_of(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        step()
    train(other, SMPAdamW(other, lr=2e-2), batches_of(3))
    check_equal(params_of(net), params_of(other), rtol=1e-3)  # compiled, PyTorch corrects Adam's bias in float32
    assert in_range(net)


def test_a_model_in_half_precision():
    net = Net().to(torch.bfloat16)
    optimizer = SMPAdamW(net, lr=0.5)
    for sign in (1, -1):
        for param in net.parameters():
            param.grad = torch.full_like(param, sign)
        optimizer.step()
        assert in_range(net)
    radius = nn.Parameter(torch.tensor([[0.5, 0.999]], dtype=torch.bfloat16))  # as under mixed-precision trainers
    net.conv.kernel.radius = radius
    optimizer = SMPAdamW(net, lr=100.)
    radius.grad = torch.tensor([[1., -1.]], dtype=torch.bfloat16)
    optimizer.step()
    assert radius.tolist() == [[pytest.approx(1e-3, rel=2 ** -8), 1.]]


@pytest.mark.parametrize('make', [
    lambda params: SMPAdamW(params, lr=1.0, weight_decay=0.05),
    lambda params: add_point_rules(torch.optim.AdamW(params, lr=1.0, weight_decay=0.05)),
    lambda params: pickle.loads(pickle.dumps(SMPAdamW(params, lr=1.0, weight_decay=0.05))),
], ids=['smpadamw', 'adamw with the rules', 'smpadamw, pickled'])
@pytest.mark.parametrize('named', [False, True])
def test_parameters_added_later(make, named):
    first, layer = nn.Linear(2, 2), SMPConv2d(4, 4, 5, bias=False, groups=4)
    optimizer = make(list(first.named_parameters()) if named else list(first.parameters()))
    optimizer.add_param_group({'params': layer.named_parameters() if named else layer.parameters(), 'lr': 1.0})
    assert len(optimizer.param_groups) == 2
    check_rules(layer, optimizer)
    if named:
        assert optimizer.param_groups[1]['param_names'] == [name for name, _ in layer.named_parameters()]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    optimizer.step()
    scheduler.step()
    check_rules(layer, optimizer, lr=0.5)


@pytest.mark.parametrize('way', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_an_optimizer_keep_the_rules(way):
    net, other = net_with(3), net_with(3)
    batches = batches_of(6)
    optimizer = SMPAdamW(net, lr=2e-2, radius_lr_scale=0.3)
    train(net, optimizer, batches[:3])
    net, optimizer = way((net, optimizer))
    train(net, optimizer, batches[3:])
    train(other, SMPAdamW(other, lr=2e-2, radius_lr_scale=0.3), batches)
    check_equal(params_of(net), params_of(other))


@pytest.mark.parametrize('make', [
    lambda net: SMPAdamW(net, lr=2e-2, radius_lr_scale=0.3),
    lambda net: add_point_rules(torch.optim.AdamW(net.parameters(), lr=2e-2), net, radius_lr_scale=0.3),
    lambda net: create_optimizer_v2(net, 'lookahead_smpadamw', lr=2e-2, radius_lr_scale=0.3),
], ids=['smpadamw', 'adamw with the rules', 'lookahead'])
def test_a_loaded_state_goes_on_as_if_never_interrupted(make):
    net, other = net_with(3), net_with(3)
    batches = batches_of(8)
    optimizer = make(net)
    train(net, optimizer, batches[:3])
    buffer = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    net = net_with(0)
    net.load_state_dict(weights)
    optimizer = make(net)
    optimizer.load_state_dict(state)
    train(net, optimizer, batches[3:])
    train(other, make(other), batches)
    assert in_range(net)
    check_equal(params_of(net), params_of(other), rtol=1e-12)


def test_timm_checkpoints_resume(tmp_path):
    model = small_model(shake=False)
    optimizer = create_optimizer_v2(model, 'smpadamw', lr=0.4, weight_decay=0.05)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)

    def update(model, optimizer):
        torch.manual_seed(0)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()

    update(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path).save_checkpoint(0, 1.)
    again = small_model(shake=False, num_classes=10)
    optimizer_again = create_optimizer_v2(again, 'smpadamw', lr=0.4, weight_decay=0.05)
    resume_checkpoint(again, str(tmp_path / 'last.pth.tar'), optimizer_again, log_info=False)
    check_equal(params_of(again), params_of(model))
    update(model, optimizer)
    update(again, optimizer_again)
    check_equal(params_of(again), params_of(model), rtol=1e-5)
    check_rules(again, optimizer_again, lr=0.4)


def two_groups(net):
    kernel = net.conv.kernel
    return [
        {'params': [net.conv.bias, net.fc.bias], 'weight_decay': 0.},
        {'params': [kernel.coords, kernel.radius, kernel.weight, net.fc.weight]}]


@pytest.mark.parametrize('options', [
    {'lr': 2e-3, 'lr_scale': 0.1, 'initial_lr': 2e-2},  # of radii in 0.1.0, and then
    {'lr': 2e-2, 'radius_lr_scale': 0.1, 'radius_range': (1e-3, 1.)}])
def test_states_of_earlier_versions_are_resumed(options):
    net, other = net_with(3), net_with(3)
    batches, kernel = batches_of(6), net.conv.kernel
    earlier = torch.optim.AdamW([
        {'params': [net.conv.bias, net.fc.bias], 'weight_decay': 0.},
        {'params': [kernel.weight, net.fc.weight], 'weight_decay': 0.05},
        {'params': [kernel.coords], 'weight_decay': 0.},
        {'params': [kernel.radius], 'weight_decay': 0., 'lr': 2e-3}], lr=2e-2)
    for batch in batches[:3]:
        train(net, earlier, [batch])
        with torch.no_grad():
            net.conv.kernel.radius.clamp_(1e-3, 1)
    state = earlier.state_dict()
    state['param_groups'][3].update(options)
    optimizer = SMPAdamW(two_groups(net), lr=1., weight_decay=1.)
    optimizer.load_state_dict(state)
    assert [(g['lr'], g['weight_decay']) for g in optimizer.param_groups] == [(2e-2, 0), (2e-2, 0.05)]
    train(net, optimizer, batches[3:])
    train(other, SMPAdamW(two_groups(other), lr=2e-2, weight_decay=0.05), batches)
    check_equal(params_of(net), params_of(other), rtol=1e-9)
    with pytest.raises(ValueError, match='different number of parameter groups'):
        SMPAdamW(net, lr=1.).load_state_dict(optimizer.state_dict())


def test_a_state_without_the_rules_is_resumed():
    net = net_with(3)
    optimizer = SMPAdamW(net, lr=1., weight_decay=0.05)
    optimizer.load_state_dict(torch.optim.AdamW(net.parameters(), lr=0.5, weight_decay=0.01).state_dict())
    found = rates_in_step(optimizer)
    assert found[id(net.conv.kernel.radius)] == (pytest.approx(0.05), 0)
    assert found[id(net.conv.kernel.weight)] == (pytest.approx(0.5), 0.01)


# The authors' training


def oracle(net, batches, lr, decay, ema_decay, accumulate):
    """The authors' update, in loops: gradients, AdamW, clip. The average follows the clip, where theirs precedes it.

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
            radius = params['conv.kernel.radius']
            clipped.append(bool(((radius < 1e-3) | (radius > 1)).any()))
            radius.clamp_(1e-3, 1.)
            for n, p in params.items():
                average[n] = ema_decay * average[n] + (1 - ema_decay) * p
    return losses, params, average, clipped


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('form', ['eager', 'checkpointed', pytest.param('compiled', marks=pytest.mark.slow)])
def test_six_updates_are_the_authors(accumulate, form):
    net = net_with(3)
    # The same six times, so that radii keep pushing against their limits.
    batches = [batches_of(accumulate)] * 6
    lr, decay, ema_decay = 2e-2, 0.05, 0.9
    losses, params, average, clipped = oracle(net, batches, lr, decay, ema_decay, accumulate)
    assert sum(clipped) >= 4 and clipped[-1]

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
        assert in_range(net)
        ema.update(net)
    assert got == pytest.approx(losses, rel=1e-6)
    assert in_range(ema.module)
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, params[name], rtol=1e-6, atol=1e-12)
    for name, param in ema.module.named_parameters():
        torch.testing.assert_close(param, average[name], rtol=1e-6, atol=1e-12)


def test_a_step_that_raises_leaves_the_groups_as_they_were():
    optimizer = SMPAdamW(net_with(3), weight_decay=0.05)
    state = optimizer.state_dict()
    optimizer.register_step_pre_hook(interrupt)  # behind that of the rules
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state_dict() == state
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.load_state_dict(state)
