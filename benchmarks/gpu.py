"""What the operator and the models cost on a GPU: `python -m benchmarks.gpu [ops] [models]`. Not run on one so far.

Times are medians in milliseconds by `triton.testing.do_bench`: device events, after a warm-up, the L2 cache overwritten
before each run. What differs from `F.conv2d` without tf32, or fails, is not timed.
"""
import argparse
import platform

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

import timm_smpconv  # noqa: F401 (registers the models)
from benchmarks.timing import agree
from timm_smpconv.ops import BACKENDS, depthwise_conv2d, use_backend
from timm_smpconv.ops.dispatch.geometry import PASSES

SHAPES = {  # (C, H, K): of the design, and of mobile51's stages
    'A': (128, 56, 31), 'B': (256, 28, 29), 'C': (512, 14, 27), 'D': (1024, 7, 13), 'E': (124, 56, 51),
    'mobile51, 0': (64, 56, 51), 'mobile51, 1': (128, 28, 49),
    'mobile51, 2': (256, 14, 47), 'mobile51, 3': (320, 7, 13)}
DTYPES = {  # and whether PyTorch computes products of float32 in tf32
    'bfloat16': (torch.bfloat16, False), 'float16': (torch.float16, False),
    'tf32': (torch.float32, True), 'float32': (torch.float32, False)}
TOLERANCE = {'float32': 1e-5, 'tf32': 4e-3, 'bfloat16': 2e-2, 'float16': 4e-3}
BYTES_PER_MS = 4.3e9  # of an H200, as below
FLOP_PER_MS = {'float32': 6.0e10, 'tf32': 3.9e11, 'bfloat16': 7.9e11, 'float16': 7.9e11}


def milliseconds(run, rep=200):
    """The median of as many runs as fit into `rep` milliseconds."""
    from triton.testing import do_bench
    return do_bench(run, warmup=rep // 4, rep=rep, return_mode='median')


def toeplitz(x, weight):
    """The convolution as one dense product per channel, its matrix built each time."""
    h, w = x.shape[2:]
    kh, kw = weight.shape[2:]
    rows = torch.arange(h, device=x.device)
    columns = torch.arange(w, device=x.device)
    dy = rows[:, None] - rows + kh // 2  # (input, output)
    dx = columns[:, None] - columns + kw // 2
    inside = ((dy >= 0) & (dy < kh))[:, None, :, None] & ((dx >= 0) & (dx < kw))[None, :, None, :]
    taps = weight[:, 0, dy.clamp(0, kh - 1)[:, None, :, None], dx.clamp(0, kw - 1)[None, :, None, :]]  # (C, H, W, H, W)
    matrix = (taps * inside).flatten(3, 4).flatten(1, 2)
    return torch.bmm(x.movedim(1, 0).flatten(2), matrix).unflatten(2, (h, w)).movedim(0, 1)


def compared(x):
    """What is compared for x: name → function of x and weight, and the memory format of x."""
    found = {}
    for name in ('triton', 'fft'):
        if BACKENDS[name].unsupported(x) is None:
            found[name] = forced(name), torch.contiguous_format
    found['native'] = forced('native'), torch.contiguous_format
    found['native, channels_last'] = forced('native'), torch.channels_last
    if x.shape[2] <= 14:
        found['dense Toeplitz'] = toeplitz, torch.contiguous_format
    return found


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def forced(name):
    def convolve(x, weight):
        with use_backend(name):
            return depthwise_conv2d(x, weight)
    return convolve


def passes(convolve, x, weight, cotangent):
    """Functions that compute output, input gradient, weight gradient."""
    runs = [lambda: convolve(x.detach(), weight.detach())]
    for leaf in (x, weight):
        leaves = [t.detach().requires_grad_(t is leaf) for t in (x, weight)]
        y = convolve(*leaves)
        wanted = leaves[0] if leaf is x else leaves[1]
        runs.append(lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, cotangent, retain_graph=True)[0])
    return runs


def floor(b, c, h, k, dtype):
    """Reading and writing once, or the products of a direct convolution without padding, whichever takes longer."""
    half = k // 2
    taps = sum(min(h - 1, i + half) - max(0, i - half) + 1 for i in range(h)) ** 2
    traffic = (2 * b * c * h * h + c * k * k) * DTYPES[dtype][0].itemsize
    return max(traffic / BYTES_PER_MS, 2 * b * c * taps / FLOP_PER_MS[dtype])


def ops(args):
    wrong = []
    for dtype_name in args.dtype:
        dtype, tf32 = DTYPES[dtype_name]
        for batch in args.batch:
            for name, (c, h, k) in SHAPES.items():
                x, cotangent = (torch.randn(batch, c, h, h, device=args.device, dtype=dtype) for _ in range(2))
                weight = (torch.randn(c, 1, k, k, device=args.device) / k).to(dtype)
                print(f'\n{name}: C {c}, H {h}, K {k}, batch {batch}, {dtype_name}; '
                      f'floor {floor(batch, c, h, k, dtype_name):.3f} ms')
                allow_tf32(False)
                exact = [run() for run in passes(forced('native'), x, weight, cotangent)]
                allow_tf32(tf32)
                for variant, (convolve, layout) in compared(x).items():
                    inputs = x.contiguous(memory_format=layout), weight, cotangent.contiguous(memory_format=layout)
                    try:
                        runs = passes(convolve, *inputs)
                        for what, run, expected in zip(PASSES, runs, exact):
                            agree(f'{what} by {variant}', run(), expected, TOLERANCE[dtype_name])
                    except (SystemExit, RuntimeError) as error:
                        wrong.append(variant)
                        print(f'  {variant:22}{error}', flush=True)
                        continue
                    times = [milliseconds(run) for run in runs]
                    print(f'  {variant:22}' + ' | '.join(f'{w} {t:8.3f}' for w, t in zip(PASSES, times))
                          + f' | all {sum(times):8.3f}', flush=True)
    if wrong:
        print(f'\nwrong or failed: {", ".join(sorted(set(wrong)))}')


def models(args):
    """Images per second in bfloat16: a training step, and the merged forward."""
    for batch in args.batch:
        x = torch.randn(batch, 3, 224, 224, device=args.device).contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, 1000, (batch,), device=args.device)
        print(f'\nbatch {batch}, bfloat16 by autocast, channels_last: images per second')
        for name, backend in (('smpconv_tiny', 'triton'), ('smpconv_tiny', 'native'), ('convnext_tiny', 'native')):
            torch.manual_seed(0)
            model = timm.create_model(name).to(args.device, memory_format=torch.channels_last)
            optimizer = create_optimizer_v2(model, 'adamw', lr=1e-4, weight_decay=0.05)

            def step():
                with torch.autocast(args.device, torch.bfloat16), use_backend(backend):
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            training = milliseconds(step, rep=5000)
            merged = reparameterize_model(model.eval()).to(torch.bfloat16)
            image = x.to(torch.bfloat16)
            with torch.inference_mode(), use_backend(backend):
                forward = milliseconds(lambda: merged(image), rep=2000)
            print(
                f'  {name:14} {backend:8} training {1e3 * batch / training:8.0f} | merged {1e3 * batch / forward:8.0f}',
                flush=True)


SECTIONS = {'ops': ops, 'models': models}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sections', nargs='*', default=[], help=f'of {", ".join(SECTIONS)}; all by default')
    parser.add_argument('--batch', type=int, nargs='+', default=[8, 64, 128])
    parser.add_argument('--dtype', nargs='+', default=list(DTYPES), choices=list(DTYPES))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('there is no GPU')
    args.device = 'cuda'
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}, '
          f'Python {platform.python_version()}')
    for section in args.sections or SECTIONS:
        SECTIONS[section](args)


if __name__ == '__main__':
    main()
