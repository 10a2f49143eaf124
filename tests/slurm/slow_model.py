"""A user's own model whose forward waits while a file `closed` stands beside this one: a step of any length."""

import time
from pathlib import Path

import own_model
from torch import nn

CLOSED = Path(__file__).with_name("closed")


def _wait(*_: object) -> None:
    if CLOSED.exists():
        CLOSED.with_name("waits").touch()
    while CLOSED.exists():
        time.sleep(0.02)


def build() -> nn.Module:
    model = own_model.build_packable()
    model.register_forward_pre_hook(_wait)
    return model
