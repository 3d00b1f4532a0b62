import torch
from sklearn.datasets import load_digits
from torch import nn

from smskd import Stage, Taps, distill
from smskd.methods import METHODS


def net(width):  # any network of yours; nothing in it is for smskd
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2), nn.BatchNorm2d(2 * width), nn.ReLU())
    return nn.Sequential(stem, body, nn.Flatten(), nn.Linear(2 * width * 9, 10))


torch.manual_seed(0)
pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
images = pixels.float().view(-1, 1, 8, 8) / 16
train, test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
teacher, student = net(width=32), net(width=3)
distill(teacher, None, [Stage(METHODS["scratch"](), epochs=8)], train)

stages = [Stage(METHODS["fitnet"](hint_layer=1), epochs=5), Stage(METHODS["kd"](), epochs=5)]
taps = Taps(maps=("0", "1"))  # the modules whose outputs are the feature maps
reports = distill(student, teacher, stages, train, test=test, student_taps=taps, teacher_taps=taps)
for number, report in enumerate(reports, start=1):
    print(f"stage {number}: {report.test.top1:.1f} % of the test digits are right")
