"""Networks and data small enough that a test trains them in a fraction of a second."""

import torch
from torch import nn

from smskd.taps import Taps

TAPS = Taps(
    maps=("stem", "body"), preact=("stem.0", "body.1"), pooled="head:input", classifier="head",
    spatial="body",
)  # fmt: skip
CLASSES = 4


class TinyNet(nn.Module):
    """Two convolutions with batch norm and a linear layer; images 3x8x8."""

    def __init__(self, width=4, classes=CLASSES, dropout=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        return self.head(self.drop(self.body(self.stem(images)).mean((2, 3))))


class Silent(nn.Module):
    """A teacher that must not be run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        raise AssertionError("this network must not be run")


def tiny_net(seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(**sizes)


def tiny_data(num=48, seed=0):
    """Images (N, 3, 8, 8) whose class shows in their colours, and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(99))
    return colours[labels] + 0.7 * torch.randn(num, 3, 8, 8, generator=generator), labels


def trained_teacher(seed=7, epochs=15):
    """A wider network that has learned the task."""
    model = tiny_net(seed, width=8)
    images, labels = tiny_data(num=96, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def snapshot(model):
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
