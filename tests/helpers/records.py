"""Records of federations that nobody ran."""

from __future__ import annotations

import math
import random

from lightning_fedfisher.curvature.summary import CurvatureSummary
from lightning_fedfisher.results.record import (
    ClientRecord,
    FederationRecord,
    MergeRecord,
    ModelScore,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"quotes' & <b>tags</b>",
    "two\u2028lines\u2029and\nthree \u202eturned round",
    "%{x} $y$ {{ 7 * 7 }} ${z}",
    "",
]


def score(accuracy=50.0, classes=3, seed=0):
    dice = random.Random(seed)
    confusion = [[dice.randrange(9) for _ in range(classes)] for _ in range(classes)]
    return ModelScore(accuracy, 2 - accuracy / 100, 20 - accuracy / 10, confusion)


def history(steps=8, decay=0.3, waiting=2):
    residuals = [1.0] * waiting + [decay**step for step in range(1, steps + 1)]
    return [
        {"iterations": 20.0 * turn, "objective": 1.0, "residual": residual}
        for turn, residual in enumerate(residuals, 1)
    ]


def client(name, seed=0, classes=3, layers=("first", "second"), epochs=4):
    dice = random.Random(seed)
    counts = [dice.randrange(1, 900) if dice.random() < 0.6 else 0 for _ in range(classes)]
    counts[seed % classes] += 1
    return ClientRecord(
        name,
        sum(counts),
        counts,
        [3 * math.exp(-0.3 * epoch) * dice.uniform(0.8, 1.2) for epoch in range(epochs)],
        1.5,
        2400,
        [
            CurvatureSummary(
                layer, dice.lognormvariate(3, 1), 12.0, [10 * 0.6**rank for rank in range(20)]
            )
            for layer in layers
        ],
        score(40, classes, seed),
    )


def merge(method, accuracy=60.0, clients=5, classes=3, layers=("first", "second"), labels=0):
    dice = random.Random(method)
    table = [[dice.lognormvariate(0, 0.7) for _ in range(clients)] for _ in layers]
    return MergeRecord(
        method,
        history(),
        list(layers),
        table,
        table[::-1],
        2400,
        1000,
        1.5,
        2.5,
        labels,
        score(accuracy, classes, 1),
    )


def federation(clients=5, classes=3, layers=("first", "second"), names=None, title="A test"):
    names = names or [f"client-{index}" for index in range(clients)]
    shape = {"classes": classes, "layers": layers}
    return FederationRecord(
        title,
        [client(name, index, **shape) for index, name in enumerate(names)],
        [
            merge("fedfisher", 71.0, len(names), **shape),
            merge("fedavg", 40.0, len(names), **shape),
            merge("fedfisher_kfac", 70.0, len(names), labels=500, **shape),
        ],
        score(66.0, classes, 2),
        score(69.0, classes, 3),
        {"alpha": 0.1, "clients": len(names)},
        {"torch": "2.11"},
    )


def large():
    parts = ("attention.projection", "linear1", "norm")
    layers = [f"backbone.encoder.layers.{index}.{part}" for index in range(20) for part in parts]
    names = [f"hospital-{index:03}.northern-region.example.org" for index in range(50)]
    return federation(classes=100, layers=layers, names=names)


def hostile():
    return federation(names=HOSTILE, layers=HOSTILE, title=HOSTILE[0])


def long_names():
    names = [f"{index}{'abc' * 60}{index}" for index in range(6)]
    return federation(names=names, layers=["漢字" * 40, "W" * 200, *names[:4]])
