"""The border before the C++ kernels, fuzzed: whatever is handed over is run or refused.

`.ci/run` runs this file again under AddressSanitizer, where a read past an end is an error.
"""

from __future__ import annotations

import random

import pytest
import torch
from native_calls import (
    VOCAB,
    WIDTH,
    a_decode,
    a_pooled_decode,
    a_pooled_run,
    a_run,
    layer,
    weight,
)
from native_other import other, other_tensor

from deliberate.kernels import native, native_build
from deliberate.kernels.blocks import BlockFormat
from deliberate.kernels.border import BorderError
from deliberate.kernels.native_heads import Head

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_handed_over_is_run_or_refused(seed):
    source = random.Random(seed)
    torch.manual_seed(seed)
    storages = ("float32", "float32", *BlockFormat.__members__)
    refused = done = 0
    for _ in range(250):
        what = source.choice(("run", "decode", "layer", "head"))
        try:
            built = [layer(source.choice(storages)) for _ in range(2)]
            if what == "layer":
                built[1] = other(source, built[1])
            layers = native.Layers(built)
            if what == "head":
                head = other(source, Head(None, 0.0, weight(VOCAB, WIDTH)))
                head.read(other_tensor(source, torch.zeros(3, WIDTH)), 1)
            else:
                if source.random() < 0.5:
                    layers = native.Layers([built[0], layer(source.choice(storages), window=3)])
                    call = a_pooled_decode() if what == "decode" else a_pooled_run()
                else:
                    call = a_decode() if what == "decode" else a_run()
                for name in source.sample(sorted(call), source.choice((0, 1, 1, 2))):
                    call[name] = other(source, call[name])
                (layers.decode if what == "decode" else layers.run)(**call)
            done += 1
        except (BorderError, ValueError, IndexError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert done > 40 and refused > 40
