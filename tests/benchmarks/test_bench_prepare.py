"""The benchmark of preparation: a run gives a line for each tokenizer."""

import pytest

import bench_prepare


@pytest.mark.parametrize("tokenizer", ["char", "bytes", "bpe"])
def test_a_run_prints_a_line_with_both_speeds(tokenizer, capsys, monkeypatch):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
        monkeypatch.setattr(bench_prepare, "LEARNED", 200_000)
    bench_prepare.main(["--megabytes", "0.7", "--turns", "1", "--tokenizer", tokenizer])
    probe, line = capsys.readouterr().out.splitlines()
    assert probe.startswith("probe: ")
    assert line.startswith(f"{tokenizer}: ")
    assert "ratio of times" in line
