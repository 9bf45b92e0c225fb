"""The matrix products behind the floor of benchmarks.speed."""

from __future__ import annotations

from benchmarks.speed.flops import gemm_rate, gemms
from dpo_ray.training.flops import ModelShape, attention_flops, pair_flops

TWO_MATRICES = ModelShape(backbone=((3, 2), (2, 3)), head=(10, 2), num_layers=1, attention_width=4)


def test_the_products_of_a_step_are_the_counted_flops_without_attention():
    counted = gemms(TWO_MATRICES, shared_rows=5, completion_rows=3)
    assert sum(counted.values()) == 3 * 3
    products = sum(times * 2 * m * k * n for (m, k, n), times in counted.items())
    assert products == pair_flops(TWO_MATRICES, (2, 1, 2)) - attention_flops(TWO_MATRICES, (2, 1, 2))


def test_the_rate_of_the_mix_lies_between_the_rates_of_its_products():
    measured = gemm_rate(gemms(TWO_MATRICES, 5, 3), "float32", "cpu", seconds_each=0.001)
    rates = measured["each"].values()
    assert min(rates) * (1 - 1e-9) <= measured["gflops_per_second"] <= max(rates) * (1 + 1e-9)
    assert min(rates) > 0
