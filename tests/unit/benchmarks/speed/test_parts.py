"""The pure parts of what explains a speed, and of the clock."""

from __future__ import annotations

import pytest

from benchmarks.speed.clock import busy_cores
from benchmarks.speed.parts import group_of, imbalance


def test_imbalance_of_ranks():
    # 3 against a mean of 2, and 4 against 4; over both steps 7 are waited for where 6 would do.
    assert imbalance([[3.0, 1.0], [4.0, 4.0]]) == ([1.5, 1.0], 7 / 6)


def test_cores_in_use_between_two_readings():
    before = "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n"
    after = "cpu  160 0 120 780 140 0 0 0 0 0\ncpu0 1\ncpu1 1\nintr 9\n"  # 80 of 200 ticks on two cores
    assert busy_cores(before, after) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", "matmul"),
        ("aten::mkldnn_linear_backward", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copy/cast"),
        ("aten::logsumexp", "softmax/log-prob"),
        ("aten::silu_backward", "elementwise/norm"),
        ("aten::exp_", "softmax/log-prob"),
        ("aten::expand", "other"),
        ("aten::view", "other"),
    ],
)
def test_operations_have_their_group(operation: str, group: str):
    assert group_of(operation) == group
