"""The report without a browser: what stands on the page, how large it is, and what it cannot be made to do."""

import html.parser
import json
import math
import re

import pytest

from difftrain.cli import main
from difftrain.errors import UserError
from difftrain.reporting.page.drawing import MOST_POINTS, Axis, Line, Picture, axis_of, draw, thinned
from difftrain.reporting.page.pictures import comparison_of, pictures_of, right_answer
from difftrain.reporting.page.writing import write_report
from difftrain.reporting.runs import read_run
from made_records import made_record, make_run

HOSTILE = "</script><script>alert(1)</script></pre><img src=x onerror=alert(2)>&\"'"


class Reader(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def page_of(*folders, out=None, **options):
    return Reader(write_report(folders, out, **options).read_text(encoding="utf-8"))


def text_of(reader):
    return " ".join(text for tag, text in reader.texts if tag not in ("script", "style"))


def data_of(reader):
    (data,) = (text for tag, text in reader.texts if tag == "script" and text.startswith('{"box"'))
    return json.loads(data)


# What stands on it --------------------------------------------------------------------------------


def test_a_runs_page_has_every_picture_with_marks_and_its_numbers_as_a_table(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert page.open == []  # every element is closed
    titles = re.findall(r"Loss|Nll of masked positions|Nll by kind of position|All positions|Answers to \w+ \w+|"
                        r"Penalties|Learning rate|Gradient norm|Gap of \[MASK\]'s logit|Speed|Peak memory", text_of(page))  # fmt: skip
    assert len(set(titles)) >= 12
    figures = page.count("figure")
    assert (
        figures
        == len(data_of(page)["pictures"])
        == sum("aria-label" in a for t, a in page.elements if t == "svg")
    )
    assert page.count("table") >= figures
    paths = [
        a["d"]
        for t, a in page.elements
        if t == "path" and a.get("class", "").split(" ")[0] in ("stroke", "band")
    ]
    assert len(paths) > figures
    assert all(re.match(r"M[\d.]+ [\d.]+", path) for path in paths)


def test_the_numbers_of_a_picture_are_those_of_the_records(tmp_path):
    run = make_run(tmp_path / "run")
    lines = {line["label"]: line for p in data_of(page_of(run))["pictures"] for line in p["lines"]}
    assert lines["validation, at the final penalties"]["steps"] == [0, 10, 20, 30, 40]
    assert lines["validation, at the final penalties"]["values"] == pytest.approx(
        [2.2, 1.825, 1.45, 1.075, 0.7]
    )
    assert lines["15 % masked"]["values"][-1] == pytest.approx(2.1)
    assert lines["pk: masked position answered [MASK]"]["values"][-1] == 0.25
    assert lines["unigram entropy"]["values"] == [3.253] * 5


def test_what_was_run_warned_of_and_sampled_stands_there(tmp_path):
    run = make_run(tmp_path / "run", learning_rate=0.0025, masking_warmup_iters=7)
    with (run / "metrics.jsonl").open("a") as file:
        bad = made_record("eval", 40, 40)
        bad["cases"]["masked"]["gap"] = 44.0
        file.write(json.dumps(bad) + "\n")
    (run / "samples").mkdir()
    (run / "samples" / "step-00000020-001.txt").write_text("once upon a time")
    text = text_of(page_of(run))
    for part in ("learning_rate 0.0025", "masking_warmup_iters 7", "a processor, 2 cores", "torch 2.13.0",
                 "SHA-256 of train.bin ab12", "validation set 0123456789ab", "10 s", "40 of 40 steps, finished",
                 "Step 40: [MASK]'s logit lies 44 below", "docs/health.md #runaway-gap".replace(" ", ""),
                 "it will not come back", "bound the logits with softcap", "step-00000020-001", "once upon a time",
                 "With 15 % masked, 1.153 nats better than guessing words by frequency"):  # fmt: skip
        assert part in re.sub(r"\s+", " ", text), part
    assert "n_layer" not in text  # a default


def test_the_bands_of_answers_add_up_to_all_positions(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    stacked = [p for p in pictures_of(run)["What is answered where"] if p.is_stacked]
    assert len(stacked) == 4
    for picture in stacked:
        for each in zip(*(line.points for line in picture.lines), strict=True):
            assert len({step for step, _ in each}) == 1
            assert sum(value for _, value in each) == pytest.approx(100)
    (masked,) = (line for line in stacked[0].lines if line.label == "masked positions: [MASK]")
    assert masked.points[0] == (0, pytest.approx(100 * 0.9 * 500 / 2000))


def test_the_right_answer_to_a_wrong_word_is_the_word_where_that_is_its_target(tmp_path):
    run = make_run(tmp_path / "run")
    assert right_answer("corrupted", read_run(run).evals) == "mask"
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace('"target": 0.0', '"target": 0.25'))
    records = read_run(run).evals
    assert [right_answer(kind, records) for kind in ("masked", "intact", "corrupted")] == ["target"] * 3
    assert "wrong words put right, %" in text_of(page_of(run))


def test_a_gpt2_run_has_its_loss_beside_unigram_entropy_and_no_picture_of_masks(tmp_path):
    run = make_run(tmp_path / "run", mode="gpt2")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("cases", "masked_nll")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    page = page_of(run)
    text = text_of(page)
    assert "Nll of masked positions" not in text
    assert "Answers to" not in text
    assert "unigram entropy" in [line["label"] for line in data_of(page)["pictures"][0]["lines"]]
    assert "2.253 nats better than guessing words by frequency" in text


# How large ----------------------------------------------------------------------------------------


def test_a_run_of_5000_logged_steps_is_a_page_below_2_mb_that_loses_no_spike(tmp_path):
    run = make_run(tmp_path / "run", 5000, eval_interval=100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    i = next(i for i, line in enumerate(lines) if '"train", "step": 3333' in line)
    lines[i] = json.dumps(json.loads(lines[i]) | {"grad_norm": 777.25})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = write_report([run])
    assert out.stat().st_size < 2_000_000
    (norm,) = (p for p in data_of(Reader(out.read_text()))["pictures"] if p["lines"][0]["label"] == "norm")
    assert norm["lines"][0]["steps"][norm["lines"][0]["values"].index(777.25)] == 3333
    assert len(norm["lines"][0]["steps"]) <= MOST_POINTS


def test_thinning_keeps_order_ends_of_the_values_and_short_lines_whole():
    points = [(i, math.sin(i) + (i == 777) * 9 - (i == 1234) * 9) for i in range(5000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(set(kept))
    assert {(777, points[777][1]), (1234, points[1234][1])} <= set(kept)
    assert thinned(points[:100]) == points[:100]


# Runs as they are ---------------------------------------------------------------------------------


def test_a_run_under_way_of_one_step_and_with_broken_lines_is_drawn(tmp_path):
    run = make_run(tmp_path / "first", until=0)
    assert "0 of 40 steps, under way" in text_of(page_of(run))
    run = make_run(tmp_path / "half", until=17)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe{{{\n[]\n{"kind": "train", "step": 17, "loss": "x", "cases": [1], "nll": null, "lr": {}}\n'
        )
        file.write(b'{"kind": "eval", "step": 1e3}\n{"kind": "eval", "step": -3}\n{"kind": 3, "step": 1}\n')
        file.write(
            b'{"kind": "train", "step": 1'
            + b"0" * 400
            + b'}\n{"kind": "eval", "step": 17, "masked_nll": 4, "unigr'
        )
    assert "18 of 40 steps, under way" in " ".join(text_of(page_of(run)).split())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/metrics.jsonl").write_text('{"kind": "train", "step": 0, "nll": 2.5}\n')
    text = text_of(page_of(tmp_path / "alone"))
    assert "There is no evaluation yet" in text
    assert "The configuration cannot be read" in text


def test_a_run_that_changes_as_it_is_read_is_only_read(tmp_path):
    run = make_run(tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*")}
    write_report([run], tmp_path / "out.html")
    assert {p: p.read_bytes() for p in run.rglob("*")} == before


def test_numbers_that_the_page_does_not_know_are_drawn_by_their_name(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(
        "\n".join(json.dumps(r | {"span_length": 3.5, "word": "x"}) for r in lines)
    )
    titles = [p.title for p in pictures_of(read_run(run))["Other figures"]]
    assert titles == ["span_length"]


def test_a_configuration_of_another_version_leaves_the_page_without_options(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "config.toml").open("a") as file:
        file.write("no_such_option = 3\n")
    assert "The configuration cannot be read" in text_of(page_of(run))


# What it cannot be made to do ---------------------------------------------------------------------


def test_texts_of_a_run_never_become_elements(tmp_path):
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), data=HOSTILE, wandb_project=HOSTILE)
    (run / "samples").mkdir()
    (run / "samples/step-00000001-001.txt").write_text(HOSTILE + "\x00\u2028\ud800", errors="replace")
    with (run / "metrics.jsonl").open("a") as file:
        last = made_record("eval", 40, 40) | {"validation_id": HOSTILE, HOSTILE: 1.5, "pm": 0.5}
        last["cases"] |= {HOSTILE: {"n": 1, "mask": 1.0, "target": 0.0, "other": 0.0}}
        file.write(json.dumps(last) + "\n")
    sessions = {
        "event": "start",
        "step": HOSTILE,
        "device": HOSTILE,
        "data": {HOSTILE: HOSTILE},
        "host": [HOSTILE],
    }
    (run / "sessions.jsonl").write_text(
        json.dumps(sessions) + "\n" + json.dumps({"event": "end", "how": HOSTILE})
    )
    other = make_run(tmp_path / "other")
    for page in (
        page_of(run),
        page_of(run, other, out=tmp_path / "both.html", allow_different_validation=True),
    ):
        assert page.open == []
        assert page.count("img") == 0
        assert page.count("script") == 2
        assert page.count("style") == 1
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert HOSTILE in text_of(page)
        (data,) = (text for tag, text in page.texts if tag == "script" and text.startswith('{"box"'))
        assert "<" not in data  # where "<!--<script>" would hide the script's end


def test_the_page_names_no_place_outside_itself_and_its_policy_forbids_them(tmp_path):
    out = write_report([make_run(tmp_path / "run")])
    page = Reader(out.read_text())
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "style"):
            assert attributes.get(name, "data:,") == "data:,"
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    (style,) = (text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


# Several runs -------------------------------------------------------------------------------------


def test_several_runs_lie_over_each_other_with_final_figures_and_what_differs(tmp_path):
    a = make_run(tmp_path / "a", penalty_keep_mask=0.5)
    b = make_run(tmp_path / "b", penalty_keep_mask=1.0, seed=7)
    page = page_of(a, b, out=tmp_path / "both.html")
    text = re.sub(r"\s+", " ", text_of(page))
    assert "penalty_keep_mask 0.5 1.0" in text
    differences = text.split("Options in which the runs differ")[1].split("What is learned")[0]
    assert "n_layer" not in differences
    assert "out_dir" not in differences
    for picture in comparison_of([read_run(a), read_run(b)], ["a", "b"])["What is learned"]:
        assert [line.label for line in picture.lines] == ["a", "b"]
        assert picture.lines[0].colour != picture.lines[1].colour
        assert all(line.points for line in picture.lines)


def test_runs_on_different_validation_sets_are_compared_only_when_that_is_asked_for(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    metrics = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(metrics.replace("0123456789ab", "ba9876543210"))
    out = tmp_path / "both.html"
    with pytest.raises(
        UserError, match=r"different validation sets \(0123456789ab and ba9876543210\).*--allow_diff"
    ):
        write_report([a, b], out)
    assert not out.exists()
    assert "their figures do not compare" in text_of(
        page_of(a, b, out=out, allow_different_validation=True)
    )


def test_a_validation_set_that_changed_on_the_way_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[:5] = [line.replace("0123456789ab", "ba9876543210") for line in lines[:5]]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert "The validation set changed on the way (ba9876543210, 0123456789ab)" in text_of(page_of(run))


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_into_the_run_or_where_it_is_told(tmp_path, capsys, monkeypatch):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    assert main(["report", "$HERE/run", "--quiet"]) == 0
    assert capsys.readouterr().out == f"written: {run}/report.html\n"
    assert main(["report", "run", "other"]) == 0
    assert (tmp_path / "comparison.html").exists()
    assert main(["report", "run", "-o", "x/y.html"]) == 0
    assert (tmp_path / "x/y.html").exists()
    assert [p.name for p in tmp_path.rglob(".*")] == []  # nothing is left aside
    for words, message in (
        (["run", "-o", "x.pdf"], "out must be a .html file, got x.pdf"),
        (["nowhere"], "nowhere is not a run folder"),
        (["run", str(run)], "each run must be named once"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
    assert other.exists()


# Drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.001, 0.0011), (1.0, 1.0), (3e-7, 4e8), (0.2, 3.7), (5.0, 5000.0)]
)
def test_an_axis_shows_its_values_and_has_two_to_seven_ascending_ticks_on_it(low, high, is_log):
    axis = axis_of([low, high], None, None, is_log=is_log)
    assert 0 <= axis.at(low) <= axis.at(high) <= 1
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert all(-1e-9 <= axis.at(tick) <= 1 + 1e-9 for tick in ticks)


def test_given_ends_of_an_axis_stay():
    assert axis_of([20.0, 30.0], 0.0, 100.0) == Axis(0.0, 100.0)


def test_lines_without_points_are_left_out_and_a_picture_of_none_is_no_picture():
    line = Line("a", [(0, 1.0), (5, 2.0)], 0)
    html, data = draw(Picture("t", "u", [line, Line("b", [], 1)]), 0)
    assert [each["label"] for each in data["lines"]] == ["a"]
    assert "legend" not in html  # one line needs none
    assert draw(Picture("t", "u", [Line("b", [], 1)]), 0) == ("", {})


def test_a_log_axis_is_offered_where_all_values_are_above_0():
    for values, has_log in (((1.0, 2.0), True), ((0.0, 2.0), False), ((-1.0, 2.0), False)):
        html, data = draw(Picture("t", "u", [Line("a", list(enumerate(values)), 0)]), 0)
        assert (data["log"] is not None) == has_log == ("log axis" in html)


def test_a_quantity_that_moves_has_its_picture_beside_the_penalties(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    moved = [r | ({"mask_factor": 0.3 + r["step"] / 100} if r["kind"] == "train" else {}) for r in lines]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, moved)))
    sections = pictures_of(read_run(run))
    drawn = [p for p in sections["Curriculum and optimiser"] if any(line.points for line in p.lines)]
    assert drawn[-1].title == "mask_factor"
    assert drawn[-1].lines[0].points[0] == (0, 0.3)
    assert "mask_factor" not in [p.title for p in sections["Other figures"]]
