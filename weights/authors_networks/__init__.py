"""The authors' networks, written plainly: conversions and tests compare this package's networks with them.

`imagenet` has the ImageNet family, `smp` the CIFAR-10 and the sequence networks. They import nothing of the package.
"""
