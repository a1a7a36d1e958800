"""A plain PyTorch ResNet with torchvision's names, independent of the package.

Also the map between its `state_dict` names and the linen variables' paths.
"""

import re

import numpy as np

from tests.helpers.torch_or_skip import nn, torch

LAYERS = {
    "resnet10": ("basic", [1, 1, 1, 1]),
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class TorchResNet(nn.Module):
    """`forward` returns logits; `stages` returns every activation by linen name."""

    def __init__(self, arch, num_classes, width=64, stem="imagenet"):
        super().__init__()
        block_type, layers = LAYERS[arch]
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[block_type]
        self.inplanes = width
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            stride = {"medium": 2, "small": 1}[stem]
            self.conv1 = nn.Conv2d(3, width, 3, stride, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._make_layer(block, width, layers[0], 1)
        self.layer2 = self._make_layer(block, width * 2, layers[1], 2)
        self.layer3 = self._make_layer(block, width * 4, layers[2], 2)
        self.layer4 = self._make_layer(block, width * 8, layers[3], 2)
        self.fc = nn.Linear(width * 8 * block.expansion, num_classes)

    def _make_layer(self, block, planes, count, stride):
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(
                    self.inplanes, planes * block.expansion, 1, stride, bias=False
                ),
                nn.BatchNorm2d(planes * block.expansion),
            )
        blocks = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        blocks += [block(self.inplanes, planes, 1, None) for _ in range(1, count)]
        return nn.Sequential(*blocks)

    def forward(self, x):
        return self.stages(x)["logits"]

    def stages(self, x):
        seen = {"conv1": self.conv1(x)}
        seen["bn1"] = self.bn1(seen["conv1"])
        x = self.maxpool(self.relu(seen["bn1"]))
        for i in range(1, 5):
            for j, block in enumerate(getattr(self, f"layer{i}")):
                x = seen[f"layer{i}_{j}"] = block(x)
        seen["features"] = x
        seen["pooled"] = x.mean((2, 3))
        seen["logits"] = self.fc(seen["pooled"])
        return seen


def randomize(model, seed):
    """Draws weights of the usual scale, and norms far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def uniform(like, low, high):
        unit = torch.rand(like.shape, generator=generator, dtype=like.dtype)
        return low + (high - low) * unit

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(normal(module.weight) * fan_in**-0.5)
            if isinstance(module, nn.Linear):
                module.bias.copy_(normal(module.bias))
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(normal(module.bias) * 0.2)
                mean, var = module.running_mean, module.running_var
                assert mean is not None
                assert var is not None
                mean.copy_(normal(mean) * 0.2)
                var.copy_(uniform(var, 0.5, 2.0))
    return model


def linen_path(name):
    """`layer1.0.bn1.weight` -> `("params", "layer1_0", "bn1", "scale")`, and so on."""
    *modules, leaf = name.split(".")
    module = ".".join(modules)
    module = re.sub(r"^layer(\d)\.(\d+)\.", r"layer\1_\2/", module)
    module = module.replace("downsample.0", "downsample_conv")
    module = module.replace("downsample.1", "downsample_bn")
    is_norm = re.search(r"bn\d?$", module) is not None
    collection, leaf = {
        "weight": ("params", "scale" if is_norm else "kernel"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }[leaf]
    return (collection, *module.split("/"), leaf)


def to_linen_array(array):
    """Returns torch's `OIHW` and `OI` kernels as linen's `HWIO` and `IO`."""
    array = np.asarray(array)
    return array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T


def to_linen(named_tensors):
    """Returns nested variables of `(name, tensor)` pairs, without step counters."""
    tree = {}
    for name, tensor in named_tensors:
        if name.endswith("num_batches_tracked"):
            continue
        *parents, leaf = linen_path(name)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        # A copy, because torch updates its memory in place.
        node[leaf] = to_linen_array(tensor.detach().numpy()).copy()
    return tree
