"""What the operator and the models cost on a CPU: `python -m benchmarks.cpu [section …]`, see `--help`.

`plain` is the same model unmerged, contiguous, on `F.conv2d`: what the research code does without its CUDA extension.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import groupby, product

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

from benchmarks.family import family
from benchmarks.saving import add_option, saving
from benchmarks.timing import agree, machine, paired
from timm_smpconv import prepack
from timm_smpconv.ops import BACKENDS, depthwise_conv2d, use_backend
from timm_smpconv.tools import backend_report

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
ON_CPU = {name: backend for name, backend in BACKENDS.items() if name != 'triton'}
SHAPES = [  # (C, H, K) of the large kernels in tiny's and mobile51's stages, sizes between, small branches, the stem
    (96, 56, 31), (192, 28, 29), (384, 14, 27), (768, 7, 13), (64, 56, 51), (128, 28, 49), (256, 14, 47), (320, 7, 13),
    (96, 56, 15), (96, 56, 13), (192, 28, 13), (96, 56, 9), (96, 56, 7), (96, 56, 5), (192, 28, 5), (384, 14, 5),
    (768, 7, 5), (96, 112, 3)]


def shaken(name, **kwargs):
    """A model in evaluation mode whose logits depend on the image, as a trained one's do.

    Its BatchNorms have the statistics of random images, and its residual branches a tenth of the usual share: with all
    of it a random network of this depth makes 1e-5 of one rounding in float32.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    with torch.no_grad():
        for n, norm in norms.items():
            norm.momentum = 1.
            if n.endswith('pw2.bn'):
                norm.weight.fill_(0.1)
        model.train()(torch.randn(4, 3, 224, 224))
        for norm in norms.values():
            norm.momentum = 0.1
    return model.eval()


def choice(args):
    """Every backend on every pass of the stages and their 5×5 branches; * is taken, by the expected times.

    All are first compared with float64, and timed if 3 times as slow as the fastest for the smallest batch only.
    """
    found = [
        case for name in ('smpconv_tiny', 'smpconv_mobile51')
        for case in backend_report.cases(
            timm.create_model(name, device='meta'), (3, 224, 224), sorted(args.batch), (False, True))]
    print(backend_report.rates())
    results = []
    groups = groupby(sorted(found, key=lambda case: (case.b, case.channels_last)), key=lambda case: case.setting)
    ordered = (case for _, group in groups for case in group)
    for setting, group in groupby(
            backend_report.measure_all(ordered, check_against_double), key=lambda result: result.case.setting):
        print(f'\n{setting}')
        print(backend_report.header(True, 'cpu'))
        for result in group:
            print(backend_report.row(result), flush=True)
            results.append(result)
    print('', *backend_report.summary(results), sep='\n')
    natives = [r.times['native'] / r.times[r.taken] for r in results if 'native' in r.times]
    print(f'native, where timed: {statistics.geometric_mean(natives):.2f} × the time of what is taken (geometric mean '
          f'of {len(natives)}), at least {min(natives):.2f}, at most {max(natives):.1f} ×')


def check_against_double(case, name, actual):
    tensors = (t.double() for t in backend_report.inputs(case))
    agree(f'{case} by {name}', actual, backend_report.run(case, *tensors, 'fft'), 1e-5)


def growth(args):
    """51×51 on 56×56 against 31×31, 96 channels, by the backends taken: output and both gradients."""
    ratios = {}
    for batch, last, what in product(args.batch, (False, True), backend_report.PASSES):
        pair = {k: backend_report.Geometry(what, batch, 96, 56, 56, k, k, last) for k in (31, 51)}
        runs = {k: partial(backend_report.run, case, *backend_report.inputs(case)) for k, case in pair.items()}
        with torch.inference_mode():
            times = paired(runs, args.rounds)
        ratios[pair[51]] = times[51] / times[31]
        print(f'  {what:15} {pair[51].setting:38} 31×31 {times[31]:7.2f} ms   51×51 {times[51]:7.2f} ms   '
              f'51×51 / 31×31 {ratios[pair[51]]:5.2f}', flush=True)
    worst = max(ratios, key=lambda case: ratios[case])
    print(f'largest: {ratios[worst]:.2f}, {worst}')


def forward(args):
    """Forward passes of whole models against plain and convnext_tiny."""
    model = shaken(args.model)
    merged = reparameterize_model(model)
    convnext = timm.create_model('convnext_tiny').eval()
    for batch in args.batch:
        x = torch.randn(batch, 3, 224, 224)
        xs = {n: x.contiguous(memory_format=f) for n, f in FORMATS.items()}
        half = {n: v.to(torch.bfloat16) for n, v in xs.items()}
        networks = {}
        for layout, memory_format in FORMATS.items():
            place = {'memory_format': memory_format}
            networks[f'unmerged {layout}'] = (deepcopy(model).to(**place), xs[layout], 1e-4)
            networks[f'merged {layout}'] = (deepcopy(merged).to(**place), xs[layout], 1e-4)
            networks[f'merged {layout} bfloat16'] = (
                deepcopy(merged).to(torch.bfloat16).to(**place), half[layout], 0.2)
            if layout == 'channels_last':
                networks['merged and prepacked'] = (prepack(deepcopy(merged).to(**place)), xs[layout], 1e-4)
                networks['merged and prepacked bfloat16'] = (
                    prepack(deepcopy(merged).to(torch.bfloat16).to(**place)), half[layout], 0.2)
            networks[f'convnext_tiny {layout}'] = (deepcopy(convnext).to(**place), xs[layout], None)
            networks[f'convnext_tiny {layout} bfloat16'] = (
                deepcopy(convnext).to(torch.bfloat16).to(**place), half[layout], None)
        with torch.inference_mode():
            with use_backend('native'):
                expected = model(x)
            for name, (network, image, tolerance) in networks.items():
                if tolerance:
                    agree(name, network(image), expected, tolerance)

            def plain():
                with use_backend('native'):
                    model(x)

            candidates = {'plain': plain}
            candidates.update({n: lambda m=m, i=i: m(i) for n, (m, i, _) in networks.items()})
            report(f'forward, batch {batch}', paired(candidates, args.rounds, warmup=1))


def accuracy(args):
    """The error of every backend against F.conv2d in float64, for inputs behind a ReLU.

    Root mean squares over all entries, relative to that of the exact result; for the weight gradient also tap by tap,
    the worst of them.
    """
    for dtype in (torch.float32, torch.bfloat16):
        print(f'\n{str(dtype)[6:]}: error of output, input gradient, weight gradient, its worst tap')
        for c, h, k in SHAPES:
            c = min(c, 32)
            inputs = [torch.randn(2, c, h, h).relu().to(dtype), (torch.randn(c, 1, k, k) / k).to(dtype)]
            cotangent = torch.randn(2, c, h, h).to(dtype)
            exact = results('fft', *[t.double() for t in inputs], cotangent.double())
            line = f'  C {c:4} H {h:3} K {k:2}'
            for name in (*ON_CPU, None):
                found = results(name, *inputs, cotangent)
                errors = [rms(a.double() - e, (0, 1, 2, 3)) / rms(e, (0, 1, 2, 3)) for a, e in zip(found, exact)]
                taps = rms(found[2].double() - exact[2], (0, 1)) / rms(exact[2], (0, 1))
                errors.append(taps[taps.isfinite()].max())  # taps that meet nothing but padding have no gradient
                line += f' | {name or "chosen"} ' + ' '.join(f'{e:.1e}' for e in errors)
            print(line, flush=True)


def rms(x, dims):
    """Root mean square over dimensions."""
    return x.square().mean(dims).sqrt()


def differentiated(convolve, leaves, cotangent):
    return torch.autograd.grad(convolve(*leaves), leaves, cotangent)


def overhead(args):
    """What one call costs over `F.conv2d`: processor time of one thread, of 5×5 kernels, batch 1.

    Behind the convolution of a map of usual size the processor's caches hold none of this package's code, which then
    takes several times as long as behind a tiny one. There are gradients for tiny maps only, where arithmetic hardly
    counts: elsewhere other backends than PyTorch's compute them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for (c, h), (layout, memory_format) in product(((384, 14), (2, 4)), FORMATS.items()):
        x, weight = torch.randn(1, c, h, h).contiguous(memory_format=memory_format), torch.randn(c, 1, 5, 5) / 5
        cotangent, leaves = torch.randn_like(x), [t.clone().requires_grad_() for t in (x, weight)]
        runs = {}
        for name, convolve in (('plain', partial(F.conv2d, padding=2, groups=c)), ('ours', depthwise_conv2d)):
            runs['without gradients', name] = torch.no_grad()(partial(convolve, x, weight))
            runs['with a graph', name] = partial(convolve, *leaves)
            if h == 4:
                runs['with both gradients', name] = partial(differentiated, convolve, leaves, cotangent)
        times = paired(runs, 100 * args.rounds, warmup=20, clock=time.thread_time)
        print(f'\nC {c}, {h}×{h}, {layout}: microseconds')
        for what in dict.fromkeys(what for what, _ in runs):
            plain, ours = (1e3 * times[what, name] for name in ('plain', 'ours'))
            print(f'  {what:20} F.conv2d {plain:5.0f}   ours {ours:5.0f}   ours - F.conv2d {ours - plain:5.0f}   '
                  f'ours / F.conv2d {ours / plain:5.2f}', flush=True)
    torch.set_num_threads(threads)


def results(backend, x, weight, cotangent):
    """Output, input gradient and weight gradient by a backend, or by the chosen one for None."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with use_backend(backend) if backend else nullcontext():
        y = depthwise_conv2d(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), cotangent))


def report(title, times):
    print(f'\n{title}')
    for name, t in sorted(times.items(), key=lambda item: -item[1]):
        print(f'  {name:45} {t:9.1f} ms   plain / this {times["plain"] / t:6.2f}', flush=True)


def training_step(name, layout, batch):
    """A function that runs forward, backward and optimizer step, and returns the loss."""
    torch.manual_seed(0)
    model = timm.create_model(name).train().to(memory_format=FORMATS[layout])
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-4, weight_decay=0.05)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=FORMATS[layout])
    y = torch.randint(0, 1000, (batch,))

    def step():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train(args):
    """Forward, backward and optimizer step."""
    for batch in args.batch:
        plain_step = training_step(args.model, 'contiguous', batch)

        def plain():
            with use_backend('native'):
                return plain_step()

        steps = {'plain': plain}
        for layout in FORMATS:
            steps[f'{args.model} {layout}'] = training_step(args.model, layout, batch)
        torch.manual_seed(1)
        first = plain()
        for name, step in list(steps.items())[1:]:
            torch.manual_seed(1)
            agree(f'the loss of {name}', step(), first, 1e-4)
        for layout in FORMATS:
            steps[f'convnext_tiny {layout}'] = training_step('convnext_tiny', layout, batch)
        report(f'training step, batch {batch}', paired(steps, args.rounds, warmup=1))


def memory(args):
    """Peak memory of a training step, each variant in a process of its own."""
    for batch in args.batch:
        peaks = {}
        for variant in ('plain', *FORMATS):
            command = [sys.executable, '-m', 'benchmarks.cpu', '--model', args.model, '--batch', str(batch)]
            command += ['--threads', str(torch.get_num_threads()), '--peak-of', variant]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[variant] = int(result.stdout.split()[-1])
        print(f'\npeak memory of a training step over the idle process, batch {batch}')
        for variant, peak in peaks.items():
            print(f'  {variant:14} {peak / 1024:8.0f} MiB   this / plain {peak / peaks["plain"]:.3f}', flush=True)


def peak(name, variant, batch):
    """Prints by how many KiB two steps of one variant raise this process's peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = training_step(name, 'contiguous' if variant == 'plain' else variant, batch)
    with use_backend('native') if variant == 'plain' else nullcontext():
        step()
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main():
    sections = dict(
        forward=forward, train=train, memory=memory, choice=choice, growth=growth, accuracy=accuracy, family=family,
        overhead=overhead)
    parser = argparse.ArgumentParser(prog='python -m benchmarks.cpu', description=__doc__.splitlines()[0])
    parser.add_argument('sections', nargs='*', help=f'of {", ".join(sections)}; the first three by default')
    parser.add_argument('--model', default='smpconv_tiny')
    parser.add_argument('--batch', type=int, nargs='+')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, help='of torch, by default as many as it takes')
    add_option(parser)
    parser.add_argument('--peak-of', help=argparse.SUPPRESS)  # what `memory` starts
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        peak(args.model, args.peak_of, args.batch[0])
        return
    for name in args.sections:
        if name not in sections:
            parser.error(f'a section must be one of {", ".join(sections)}, got {name!r}')
    with saving(args.save):
        print(machine())
        for name in args.sections or list(sections)[:3]:
            usual = {'choice': [1, 4, 16], 'growth': [1, 4, 16], 'train': [4, 16], 'memory': [4, 16]}.get(name, [1, 16])
            sections[name](argparse.Namespace(**dict(vars(args), batch=args.batch or usual)))


if __name__ == '__main__':
    main()
