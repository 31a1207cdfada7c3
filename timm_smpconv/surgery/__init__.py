"""From one network to another: kernels of other sizes, replaced and prepacked convolutions, plain modules."""
from .plain import to_plain as to_plain
from .prepack import prepack as prepack
from .replace import ReplaceReport as ReplaceReport, replace_depthwise as replace_depthwise
from .resize import resize_kernels as resize_kernels
