"""The kernels' own threads: who does an item decides no bit of a result."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.quantised import LAID_OUT, random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.kernels import native_build
from deliberate.kernels.blocks import BlockFormat, BlockWeight
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import Weight

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    chosen=st.sampled_from([None, *BlockFormat]),
    n=st.integers(1, 700),
    k=st.integers(1, 400),
    rows=st.integers(1, 70),
    threads=st.integers(2, 9),
)
@settings(max_examples=80, deadline=None)
def test_a_product_is_the_same_to_the_bit_by_any_number_of_threads(chosen, n, k, rows, threads):
    x = drawn(rows, k, seed=n)
    if chosen is None:
        head = Head(None, 0.0, Weight(drawn(n, k)))
        made = [head.logits(x, count) for count in (1, threads)]
    else:
        weight = random_blocks(n, k, chosen, seed=n)
        made = [weight.multiply(x, count) for count in (1, threads)]
    assert torch.equal(*made)


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 130), st.sampled_from([*LAID_OUT, BlockFormat.Q4_1])),
        min_size=1,
        max_size=4,
    ),
    rows=st.sampled_from([1, 3, 9]),
    threads=st.integers(1, 3),
    biased=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_in_one_loop_give_to_the_bit_what_each_gives_by_itself(sizes, rows, threads, biased):
    k, x = 72, drawn(rows, 72)
    single = [random_blocks(n, k, one, seed=at) for at, (n, one) in enumerate(sizes)]
    bias = drawn(sum(n for n, _ in sizes)) if biased else None
    joined = BlockWeight(tuple(part for one in single for part in one.parts), k, bias)
    apart = torch.cat([one.multiply(x) for one in single], dim=1)
    wanted = apart if bias is None else apart + bias
    assert torch.equal(joined.multiply(x, threads), wanted)


@pytest.mark.parametrize("weights", ["native", "int8", "q8_0"])
def test_decoding_is_the_same_to_the_bit_by_two_threads(weights):
    base = tiny_model("llama", hidden_size=256, intermediate_size=512)
    model = AdaptiveModel(base.float(), [1], executor="fused", weights=weights, engine="native")
    ids = random_ids(60)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = model.generate(
                ids,
                max_new_tokens=60,
                fidelity="exact",
                output_scores=True,
                return_dict_in_generate=True,
            )
            made.append((out.sequences, torch.stack(out.scores)))
    finally:
        torch.set_num_threads(before)
    for sequences, scores in made[1:]:
        assert torch.equal(sequences, made[0][0]) and torch.equal(scores, made[0][1])


def test_callers_that_come_at_once_and_with_pauses_get_what_one_gets_alone():
    weight = random_blocks(300, 256, BlockFormat.Q4_1, seed=5)
    inputs = [drawn(1 + seed, 256, seed=seed) for seed in range(6)]
    alone = [weight.multiply(x, 1) for x in inputs]
    wrong: list[int] = []

    def call(which: int) -> None:
        for turn in range(40):
            if turn % 8 == which % 8:
                time.sleep(0.0005)  # helpers fall asleep meanwhile
            if not torch.equal(weight.multiply(inputs[which], 2 + turn % 3), alone[which]):
                wrong.append(which)

    callers = [threading.Thread(target=call, args=(which,)) for which in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(300)
    assert not wrong and not any(caller.is_alive() for caller in callers)


def test_a_forked_process_starts_threads_of_its_own():
    code = (
        "import os, torch\n"
        "from helpers.quantised import random_blocks\n"
        "from deliberate.kernels.blocks import BlockFormat\n"
        "weight = random_blocks(300, 256, BlockFormat.Q4_1, seed=5)\n"
        "x = torch.ones(2, 256)\n"
        "alone = weight.multiply(x, 2)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(weight.multiply(x, 2), alone) else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here / "helpers"), *filter(None, sys.path)])
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300
    )
