"""Figures in the pages are those of the results files that they link to."""

import json

import pytest

from pages import ROOT

RESULTS = ROOT / "benchmarks/results"


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def step():
    return json.loads((RESULTS / "train-cpu-2026-11-23.json").read_text())


def median(result, part):
    return result["parts"][part]["median_ms"]


def test_the_speed_of_a_step_is_the_measured_one(step):
    text = page("docs/training.md")
    parts = ("data", "corruption", "forward", "loss", "backward", "optimizer", "step")
    cells = [f"{median(step, part):.1f} ms" for part in parts]
    assert f"| {' | '.join([*cells, format(step['tokens_per_second'], ',.0f')])} |" in text
    loss_share = median(step, "loss") / median(step, "step")
    shares = f"{100 * step['data_share']:.1f} % of the step, the loss {100 * loss_share:.1f} %."
    assert f"Data and corruption take {shares}" in text
    setting = step["setting"]
    assert f"torch {setting['torch'].split('+')[0]}" in text
    assert f"medians of {setting['steps']} steps" in text
    deterministic = json.loads((RESULTS / "train-cpu-deterministic-2026-11-23.json").read_text())
    slower = f"{median(deterministic, 'step'):.0f} ms instead of {median(step, 'step'):.0f}\n"
    assert slower in text


def test_what_saving_costs_is_the_measured_cost(step):
    text = " ".join(page("docs/reliability.md").split())
    waits, share = median(step, "save waits"), 100 * step["save_share"]
    assert f"the copy takes {waits:.1f} ms, {share:.3f} % of a run" in text
    writes, resume = median(step, "save writes"), median(step, "resume")
    assert f"writing {writes:.0f} ms behind the training, and resuming {resume:.0f} ms" in text


def test_the_ratios_to_a_plain_step_are_the_measured_ones():
    results = ("train-cpu-2026-11-28.json", "train-cpu-block256-2026-11-28.json")
    small, large = (json.loads((RESULTS / name).read_text())["ratios"]["loop"] for name in results)
    text = " ".join(page("docs/training.md").split())
    assert f"takes {small:.2f} times as long at block 64 and {large:.2f} times at block 256" in text


def test_instructions_a_logit_are_those_of_the_machine_code():
    rows = json.loads((RESULTS / "codegen_bf16.json").read_text())
    rows = [row for row in rows if row["target"] == "sm_90" and row["vocab_size"] > 4096]
    scan = max(row["slots_scan"] for row in rows if row["slots_scan"] and row["aligned"])
    gradient = max(row["slots_grad"] for row in rows if row["slots_grad"])
    assert f"{scan:.2f} instructions a logit" in page("README.md")
    text = page("docs/loss.md")
    assert f"| loss | {scan:.1f} | - | all | 0 |" in text
    assert f"| loss and gradient | {scan:.1f} | {gradient:.2f} | all | 0 |" in text
    assert f"| gradient, in backward | - | {gradient:.2f} | all | 0 |" in text
    assert (
        {row["spill_instructions"] for row in rows}
        == {row["narrow_accesses_in_loops"] for row in rows}
        == {0}
    )


def test_instructions_by_tritons_version_are_those_of_their_files():
    text = page("docs/gpu.md")
    for version, file in (("3.6.0", "triton-3.6.0"), ("3.7.1", "bf16"), ("3.9.0", "triton-3.9.0")):
        rows = json.loads((RESULTS / f"codegen_{file}.json").read_text())
        rows = [row for row in rows if row["target"] == "sm_90" and row["vocab_size"] in (50304, 50305)]
        rows = [row for row in rows if row["slots_scan"] or row["slots_grad"]]
        assert len(rows) == 8
        names = ("slots_scan", "slots_grad", "registers", "spill_instructions", "narrow_accesses_in_loops")
        scan, gradient, *counts = (max(row[name] or 0 for row in rows) for name in names)
        assert f"| {version} | {scan:.2f} | {gradient:.2f} | {' | '.join(map(str, counts))} |" in text


def test_the_first_runs_figures_are_those_of_its_file():
    stages = json.loads((RESULTS / "nvidia-h100-80gb-hbm3-2026-11-28.json").read_text())["stages"]
    entries = stages["loss"]["entries"] + stages["quick"]["entries"]
    text = page("docs/gpu.md")

    def row(name, contender, shape):
        found = {
            e["measure"]: e
            for e in reversed(entries)
            if e["contender"] == contender and e["shape"] == shape and e["ms"]
        }
        forward, both = found["forward"], found["forward + backward, upstream 1"]
        return f"| {name} | {forward['ms']:.3f} | {both['ms']:.3f} | {both['peak_mib']:.0f} MiB |"

    for name, contender, shape in (
        ("8192 x 50304: ours, the plain call", "ours", [8192, 50304]),
        ("Liger cross-entropy with the weights composed (loss in bf16)", "Liger cross-entropy", [8192, 50304]),
        ("torch.compile of the definition, penalties in tensors", "torch.compile, tensor penalties", [8192, 50304]),
        ("8192 x 128256: ours, the plain call", "ours", [8192, 128256]),
        ("eager PyTorch", "eager reference", [8192, 50304]),
        ("eager PyTorch", "eager reference", [8192, 128256]),
        ("8192 x 768 x 50304: ours, without logits", "ours linear", [8192, 768, 50304]),
        ("the same, 4096 tokens to a chunk", "ours linear, 4096 tokens", [8192, 768, 50304]),
        ("cut-cross-entropy (no weights)", "cut-cross-entropy", [8192, 768, 50304]),
        ("Liger fused linear (no weights)", "Liger fused linear", [8192, 768, 50304]),
        ("eager PyTorch", "eager reference", [8192, 768, 50304]),
    ):  # fmt: skip
        assert row(name, contender, shape) in text
    counts = stages["kernels"]["counts"]
    assert f"{counts['passed']:,} passed, {counts['failed']} failed, {counts['error']} were cut" in text
    runs = stages["training"]["runs"]
    for name in ("reference", "logits"):
        assert (
            f"{runs[name]['tokens_per_second']:,.0f} tokens/s and {runs[name]['peak_memory_mib'] / 1024:.1f} GiB"
            in text
        )


def test_the_losss_cpu_figures_are_those_of_their_file():
    figures = json.loads((RESULTS / "loss-cpu-2026-11-29.json").read_text())["figures"]
    text = page("benchmarks/NOTES.md")
    for figure in figures:
        rows, columns, *dtype = figure["shape"].split("x")
        shape = f"({rows}, {columns}) {'bf16' if dtype else 'fp32'}, {figure['threads']}"
        eager, ours, tabled = (figure["losses"][n] for n in ("eager", "fused", "fused, with table"))
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {shape} |")]
        peaks = f"{eager['peak_mib']:.1f}, {ours['peak_mib']:.1f}"
        assert line.endswith(f" | {ours['ratio']:.2f} | {tabled['ratio']:.2f} | {peaks} |")


def test_the_linear_losss_cpu_figures_are_those_of_their_file():
    figures = json.loads((RESULTS / "linear-cpu-2026-11-29.json").read_text())["figures"]
    ratios = {}
    for figure in figures:
        ratios.setdefault(tuple(figure["shape"]), []).append(f"{figure['ratio']:.2f}")
    told = ", ".join(f"{' and '.join(found)} at {shape}" for shape, found in ratios.items())
    text = " ".join(page("benchmarks/NOTES.md").split())
    assert f"with one thread and two: {told}." in text
    first, *others = dict.fromkeys(
        f"{f['ours_peak_mib']:.1f} MiB for {f['eager_peak_mib']:.1f}" for f in figures
    )
    assert f"Peak memory is {first} at the first shape, {' and '.join(others)} at" in text


def test_a_plain_models_step_takes_as_long_as_the_table_says():
    text = page("benchmarks/NOTES.md")
    for block, name in ((64, "learned"), (256, "learned-block256")):
        result = json.loads((RESULTS / f"train-cpu-{name}-2026-11-28.json").read_text())
        told = f"| {result['parts']['loop']['median_ms']:.1f} |\n"
        (line,) = [
            line for line in text.splitlines(True) if line.startswith(f"| block {block}, learned, trainer")
        ]
        assert line.endswith(told)
        assert result["ratios"]["loop"] <= 1.0


def test_the_experiments_tables_are_those_of_its_file():
    from experiment.tables import TABLES, table

    result = json.loads((RESULTS / "curriculum-cpu-2026-11-28.json").read_text())
    text = page("docs/curriculum.md")
    for columns in TABLES.values():
        assert table(result["runs"], columns) in text
    for arm, what in result["setting"]["arms"].items():
        assert f"| {arm} | {what} |" in text
    held_out, shuffled = (result["references"][name] for name in ("held-out text", "shuffled"))
    assert (
        f"{held_out['judge_nll']:.2f} nats a character from it, {held_out['distinct']:.2f} distinct" in text
    )
    assert (
        f"get {shuffled['judge_nll']:.2f} nats and {100 * shuffled['known_words']:.1f} % of words" in text
    )


def test_the_figures_of_sampling_are_those_of_their_file():
    from text_quality.sampling_tables import figures_of, lengths_table, spread

    result = json.loads((RESULTS / "sampling-cpu-2026-11-28.json").read_text())
    lines = page("docs/sampling.md").splitlines()
    for task, name in (("free", "judge_nll"), ("gaps", "restored")):
        entries = [e for e in result["writing"] if e["task"] == task]
        for way in (
            "fill",
            "ancestral",
            "remask_untrained",
            "remask",
            "margin",
            "entropy",
            "confidence",
            "edit",
        ):
            cells = [spread(figures_of(entries, name, way=way, passes=n)) for n in (4, 8, 16, 32, 64)]
            assert any(line.startswith(f"| {way} | {' | '.join(cells)} |") for line in lines), (task, way)
    lengths = json.loads((RESULTS / "gap-lengths-cpu-2026-11-28.json").read_text())["lengths"]
    assert lengths_table(lengths) in page("docs/sampling.md")
    names = ("put_right", "harmed", "wrong_before", "wrong_after", "nll_before", "nll_after")
    for entry in result["repair"]:
        of = {key: entry[key] for key in ("kind", "errors", "sure")}
        cells = [spread(figures_of(result["repair"], name, **of)) for name in names]
        assert f"| {of['kind']}, {of['errors']:g} % | {of['sure']:g} | {' | '.join(cells)} |" in lines


def test_what_calls_cost_the_host_is_what_was_measured():
    rows = json.loads((RESULTS / "host-cpu-2026-11-28.json").read_text())["rows"]
    names = {
        "nothing": "a function that does nothing",
        "plain": "plain (predicted since)",
        "upstream stated": "upstream stated",
        "not predicted": "`upstream_prediction=False`",
        "with the case table": "plain, with the table",
        "linear, one chunk": "linear, one chunk",
        "linear, two chunks": "linear, two chunks",
    }
    section = page("benchmarks/NOTES.md").partition("## Launches and host time of a call")[2]
    cells = [[c.strip() for c in line.split("|")] for line in section.splitlines()]
    table = {row[1]: row for row in cells if len(row) == 9}
    together = {row["way"]: row["together_us"] for row in rows}
    for row in rows:
        if row["way"] in names:
            found = table[names[row["way"]]]
            assert (found[3], found[5]) == (f"{row['forward_us']:.0f}", f"{row['together_us']:.0f}"), found
            assert float(found[7]) == round(row["ratio"], 1), found
    further = together["linear, two chunks"] - together["linear, one chunk"]
    assert f"A further chunk takes {further:.0f}," in section
    assert f"**the whole call of one chunk takes {together['linear, one chunk']:.0f}**" in section
