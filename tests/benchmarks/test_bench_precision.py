"""The benchmark of rounding: TF32's rounding is exact, and the finer the precision, the smaller the error."""

import bench_precision
import torch
from analyzed_runs import train
from bench_precision import RoundedProducts, to_tf32


def test_tf32_keeps_ten_bits_and_rounds_to_the_nearest_even():
    ulp = 2.0**-10
    x = torch.tensor([1 + ulp, 1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp, -(1 + 0.75 * ulp), 0.0])
    assert to_tf32(x).tolist() == [1 + ulp, 1.0, 1.0, 1 + 2 * ulp, -(1 + ulp), 0.0]
    assert torch.equal(to_tf32(x.double()), x.double())


def test_every_product_is_rounded_and_nothing_else():
    a = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) + 1
    with RoundedProducts():
        product, total = a @ a, a + a
        linear = torch.nn.functional.linear(a, a, a[0])
    assert torch.equal(product, to_tf32(a) @ to_tf32(a))
    assert not torch.equal(product, a @ a)
    assert torch.equal(total, a + a)
    assert not torch.equal(linear, torch.nn.functional.linear(a, a, a[0]))


def test_the_table_orders_the_precisions(tmp_path, capsys):
    folder = train(tmp_path / "run", "train.steps=5")
    words = [str(folder), "--data", str(folder / "latents"), "--batches", "2", "--rows", "8", "--alphas", "0.05", "0"]
    bench_precision.main(words)
    lines = capsys.readouterr().out.splitlines()
    small, zero = ([float(cell) for cell in line.strip("| ").split(" | ")] for line in lines[-2:])
    assert (small[0], zero[0]) == (0.05, 0.0)
    for row in (small, zero):
        assert row[1] > row[3] > row[5] > 0  # bf16, TF32, fp32 of one batch
