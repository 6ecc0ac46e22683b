"""`aapt bench` with presets, in 8 bits, and of methods; `aapt quantise`."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from aapt.evaluate.breakdown import EXCHANGE, PARTS

from ..runs import ranks
from .test_commands import run


def test_bench_stream_takes_presets(capsys):
    assert run("bench", "stream", "--model", "aapt-2b", "--predict", "h100") == 0
    assert "aapt-2b: 1280 x 720, bfloat16" in capsys.readouterr().out
    assert run("bench", "stream", "--model", "aapt-small", "--size", "32x32", "--steps", 1) == 0
    assert "aapt-small: 32 x 32, float32 on cpu" in capsys.readouterr().out


def test_quantise_and_its_bench(tmp_path, capsys):
    out = tmp_path / "tiny-fp8"
    assert run("quantise", "--out", out) == 0
    table = capsys.readouterr().out
    assert "rounded      45 layers, 5.0 M weights\n" in table and "worst layer" in table
    assert run("info", "--model", out) == 0
    assert "model 5.70 M" in capsys.readouterr().out
    assert run("bench", "stream", "--model", out, "--steps", 1) == 0
    assert run("bench", "stream", "--steps", 1, "--fp8") == 0
    capsys.readouterr()
    assert run("quantise", out, "--out", tmp_path / "again") == 2
    assert "source: expected a checkpoint in its own precision" in capsys.readouterr().err


def test_bench_says_what_a_prediction_assumes(capsys):
    options = ("--model", "aapt-8b", "--size", "1280x720", "--breakdown", "--predict", "h100")
    assert run("bench", "stream", *options, "--fp8") == 0
    table = capsys.readouterr().out
    assert "1280 x 720, bfloat16 with linear layers and attention in e4m3\n" in table
    assert "; assumed 1200 TFLOP/s in e4m3 through cuBLASLt, scales of 128\n" in table
    assert "; assumed 1000 TFLOP/s by the FP8 kernel of sm_90a" in table
    assert "what attention returns rounded to e4m3 in a launch of its own\n" in table


def test_bench_methods(capsys):
    assert run("bench", "methods", "--model", "tiny-world", "--rounds", 1) == 0
    table = capsys.readouterr().out
    assert "tiny-world: 128 x 80\n" in table and "measured on cpu, 1 rounds" in table
    assert "OmniDreams" in table and "Left out or not said:" in table
    assert run("bench", "methods", "--predict", "h200", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "aapt-small" and facts["how"] == "predicted for h200"
    ratios = {row["name"]: row["ratio"] for row in facts["methods"]}
    assert ratios["AAPT"] == 1 < ratios["one-step diffusion forcing"] < 2.2
    assert facts["published"][0]["source"] == "arXiv 2506.09350, Table 4"
    assert run("bench", "methods", "--predict", "h200", "--fp8") == 0
    assert "aapt-small: 256 x 160, linear layers and attention in e4m3\n" in capsys.readouterr().out
    for name, given in (("device", "cuda"), ("rounds", 5)):
        assert run("bench", "methods", "--predict", "h200", f"--{name}", given) == 2
        assert f"{name}: expected none with --predict" in capsys.readouterr().err


def bench_on_a_rank(context: int, *more: str) -> tuple[int, str, str]:
    """Return the exit code of a small stream over `context` ranks, and what it printed."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        options = ("--model", "aapt-small", "--size", "32x32", "--steps", 1, *more)
        code = run("bench", "stream", *options, "--context", context)
    return code, out.getvalue(), err.getvalue()


def test_bench_stream_over_two_ranks():
    (code, printed, _), other = ranks.run(2, bench_on_a_rank, 2, "--breakdown", "--json")
    assert code == 0 and other == (0, "", "")
    facts = json.loads(printed)
    assert facts["context"] == 2 and facts["steps"] == 1 and facts["fps"] > 0
    found = facts["breakdown"]
    assert list(found["parts"]) == [*PARTS, EXCHANGE] and found["parts"][EXCHANGE] > 0
    assert found["step"] == pytest.approx(found["sum_of_parts"] + found["idle"])


def test_the_table_of_two_ranks_has_the_exchange():
    (code, printed, _), other = ranks.run(2, bench_on_a_rank, 2, "--breakdown")
    assert code == 0 and other == (0, "", "")
    (row,) = [row for row in printed.splitlines() if row.startswith("  exchange")]
    assert row.endswith("%, the wait for other ranks included")


def test_ranks_have_to_be_started(capsys):
    assert run("bench", "stream", "--context", 2) == 2
    assert capsys.readouterr().err == (
        "aapt: context: expected a divisor of the 1 ranks, got 2; start with torchrun "
        "--nproc-per-node 2, or a multiple\n"
    )
    assert run("bench", "stream", "--context", 2, "--graph", "step.dot") == 2
    assert "graph: expected none with --context" in capsys.readouterr().err
    assert run("bench", "stream", "--predict", "h100", "--context", 2) == 2  # it has 3 heads
    assert "context: expected a divisor of the model's 3 heads, got 2" in capsys.readouterr().err
    options = ("--model", "aapt-8b", "--size", "1280x720", "--predict", "h100", "--context", 8)
    assert run("bench", "stream", *options) == 0
    table = capsys.readouterr().out
    assert "bfloat16, 8 GPUs\n" in table and "assumed 73 exchanges that hide behind" in table
