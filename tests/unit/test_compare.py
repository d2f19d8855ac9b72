"""A comparison's arithmetic, plans and pages; nothing is edited here."""

import errno
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from easyedit_rls import HostError, HyperParamsError, RLSEditError, RLSEditHyperParams
from easyedit_rls._base import files
from easyedit_rls.compare.figures import draw
from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.report import write_report
from easyedit_rls.compare.results import (
    Run,
    comma_separated,
    difference,
    estimate,
    load_runs,
    markdown,
    summary,
    table,
)
from easyedit_rls.compare.run import run_all

PLAN = Plan(
    model="model",
    hparams=RLSEditHyperParams.from_hparams("smollm2-135m").to_dict(),
    templates=("It was late. ",),
    data="records.json",
    first=0,
    count=5,
    batch=2,
    every=2,
    text=None,
    answers=False,
    fluency=0,
    threads=1,
    contenders=(Contender("RLSEdit"), Contender("RLSEdit--soft", {"v_lr": 0.1})),
)


def checkpoint(hits: list[int], **more) -> dict:
    records = [
        {"case_id": i, "rewrite_accuracy": float(hit), "specificity": None} for i, hit in enumerate(hits)
    ]
    return {
        "n_edits": len(hits),
        "positions": list(range(len(hits))),
        "records": records,
        "deviation": {"w": 0.1 * len(hits)},
        **more,
    }


def a_run(name: str, *hits: list[int]) -> Run:
    seconds = {"seconds_per_edit": [2.0, 1.0, 3.0]}
    before = checkpoint([0] * 5, perplexity=30.0)
    return Run(
        Contender(name),
        {"v_lr": 0.5},
        before,
        [checkpoint(h, perplexity=31.0, **seconds) for h in hits],
        {"torch": "2"},
    )


RUNS = [
    a_run("RLSEdit", [1, 1, 1, 0], [1, 1, 1, 1, 1]),
    a_run("RLSEdit--soft", [1, 0, 0, 0], [0, 1, 0, 0, 0]),
]


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        values = (generator.random(60) < 0.7).astype(float).tolist()
        found = estimate(values)
        assert found.low <= found.mean <= found.high
        assert found.mean == pytest.approx(sum(values) / 60)
        held += found.low <= 0.7 <= found.high
    assert 88 <= held <= 100


def test_records_without_a_figure_do_not_count():
    assert estimate([None, 1.0, None, 0.0]).mean == 0.5
    assert estimate([None]) is None
    assert estimate([0.25, 0.25]).high == 0.25


def test_differences_are_paired():
    """Both swing by record, but one is always 0.1 better: unpaired intervals overlap, the paired one is a
    point.
    """
    ours = [0.1, 0.9, 0.3, 0.7, 0.5]
    theirs = [value - 0.1 for value in ours]
    found = difference(ours, theirs)
    assert found.mean == pytest.approx(0.1)
    assert found.low > 0.09
    assert difference([1.0, None], [None, 1.0]) is None
    with pytest.raises(ValueError):
        difference([1.0], [1.0, 2.0])


def test_retention_is_by_batch():
    assert RUNS[0].retention(2) == [[1.0, 0.5], [1.0, 1.0, 1.0]]
    assert RUNS[1].retention(2) == [[0.5, 0.0], [0.5, 0.0, 0.0]]


def test_summary_and_tables():
    result = summary(PLAN, RUNS)
    ours = result["contenders"]["RLSEdit"]
    assert (ours["rewrite_accuracy"]["mean"], ours["perplexity"], ours["seconds_per_edit"]) == (
        1.0,
        31.0,
        2.0,
    )
    assert ours["retention"] == {"first": 5, "mean": 1.0, "low": 1.0, "high": 1.0}
    assert result["unedited"]["rewrite_accuracy"]["mean"] == 0
    assert result["differences"]["RLSEdit − RLSEdit--soft"]["rewrite_accuracy"]["mean"] == pytest.approx(0.8)
    assert "specificity" not in ours
    header, rows = table(result)
    assert header == ["", "unedited", "RLSEdit", "RLSEdit--soft"]
    cells = {row[0]: row[1:] for row in rows}
    assert "specificity (NS)" not in cells
    assert cells["rewrite accuracy"][1] == "1.000 (1.000–1.000)"
    assert cells["rewrite accuracy of the first 5"][0] == ""
    assert cells["rewrite accuracy of the first 5"][2].startswith("0.200 (")
    assert cells["perplexity"] == ["30.00", "31.00", "31.00"]
    assert markdown(header, rows).count("\n") == 2 + len(rows)
    assert comma_separated(["a", "b"], [["1,2", "3"]]) == 'a,b\n"1,2",3\n'


def test_checkpoints_are_where_they_should_be():
    assert [n for n in range(1, PLAN.n_batches + 1) if PLAN.is_checkpoint(n)] == [2, 3]
    assert [n for n in range(1, 4) if replace(PLAN, every=9).is_checkpoint(n)] == [3]


def test_a_plan_is_kept_and_held_to(tmp_path):
    PLAN.save(tmp_path)
    assert Plan.load(tmp_path) == PLAN
    PLAN.save(tmp_path)
    replace(PLAN, contenders=(*PLAN.contenders, Contender("ROME"))).save(tmp_path)  # one more is fine
    with pytest.raises(HyperParamsError, match="different: count, batch"):
        replace(PLAN, batch=3, count=4).save(tmp_path)
    with pytest.raises(HyperParamsError, match="different: contenders"):
        replace(PLAN, contenders=(Contender("RLSEdit", {"v_lr": 1.0}),)).save(tmp_path)


def test_names():
    """One hyphen is part of a method's name."""
    found = (Contender("RLSEdit--soft"), Contender("MEMIT-FE--a-b"), Contender("rls--soft", {}, "RLSEdit"))
    assert [(c.alg_name, c.folder) for c in found] == [
        ("RLSEdit", "RLSEdit--soft"),
        ("MEMIT-FE", "MEMIT-FE--a-b"),
        ("RLSEdit", "rls--soft"),
    ]


def test_editors_of_easyedit_need_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    plan = replace(PLAN, contenders=(Contender("RLSEdit"), Contender("MEMIT"), Contender("ROME")))
    with pytest.raises(HostError, match=r"MEMIT, ROME need EasyEdit.*set EASYEDIT_HOME"):
        run_all(tmp_path, plan)
    with pytest.raises(RLSEditError, match=r"RLSEdit has no result .* Run the comparison again"):
        load_runs(tmp_path, plan)


def test_figures_are_drawn_twice_each(tmp_path):
    drawn = draw(PLAN, RUNS, tmp_path)
    assert {
        "rewrite_accuracy",
        "perplexity",
        "deviation",
        "seconds",
        "retention-RLSEdit",
        "retention-RLSEdit--soft",
    } == drawn.keys()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in drawn for ending in ("png", "svg")
    }
    assert (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("easyedit_rls.compare.report.load_runs", lambda folder, plan: RUNS)
    result = write_report(tmp_path, PLAN)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert result["plan"]["count"] == 5
    assert page.count("<svg") == 6
    assert not re.search(r"(src|href)=[\"']https?:|@import|<script|<link", page.replace('xlink:href="#', ""))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "one figure's parts would be drawn in another"
    assert all(target in ids for target in re.findall(r'xlink:href="#([^"]+)"', page))
    assert {"results.json", "summary.json", "table.md", "table.csv", "report.html", "figures"} == {
        path.name for path in tmp_path.iterdir()
    }


def test_contenders_may_be_named_in_any_order(tmp_path):
    PLAN.save(tmp_path)
    replace(PLAN, contenders=PLAN.contenders[1:]).save(tmp_path)  # one alone, which is then the first
    PLAN.save(tmp_path)
    assert Plan.load(tmp_path) == PLAN


def test_a_contender_left_out_of_a_command_is_still_held_to(tmp_path):
    PLAN.save(tmp_path)
    replace(PLAN, contenders=(Contender("ROME"),)).save(tmp_path)
    assert [contender.name for contender in Plan.load(tmp_path).contenders] == [
        "ROME",
        "RLSEdit",
        "RLSEdit--soft",
    ]
    with pytest.raises(HyperParamsError, match="different: contenders"):
        replace(PLAN, contenders=(Contender("RLSEdit--soft", {"v_lr": 0.2}),)).save(tmp_path)


def test_commands_that_plan_in_one_folder_at_once_keep_each_others_contenders(tmp_path):
    plans = [replace(PLAN, contenders=(Contender(f"RLSEdit--{i}"),)) for i in range(24)]
    with ThreadPoolExecutor(len(plans)) as pool:
        list(pool.map(lambda plan: plan.save(tmp_path), plans))
    assert {contender.name for contender in Plan.load(tmp_path).contenders} == {
        f"RLSEdit--{i}" for i in range(24)
    }


def test_a_plan_whose_writing_breaks_off_is_the_one_before(tmp_path, monkeypatch):
    """Processes that run its contenders read it at any time, so it is never half there."""
    PLAN.save(tmp_path)

    def written_in_part(handle, content):
        os.write(handle, content[: len(content) // 2])
        assert Plan.load(tmp_path) == PLAN
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(files, "write_all", written_in_part)
    with pytest.raises(OSError, match="disk full"):
        replace(PLAN, contenders=(Contender("ROME"),)).save(tmp_path)
    assert Plan.load(tmp_path) == PLAN


def test_a_setting_newer_than_the_plan_has_its_default(tmp_path):
    """A comparison goes on with a later version of the package, unless the plan asks for something else."""
    PLAN.save(tmp_path)
    path = tmp_path / "plan.json"
    raw = json.loads(path.read_text())
    raw["hparams"].pop("rehearsal")
    assert raw.pop("relations") == 0
    path.write_text(json.dumps(raw))
    assert Plan.load(tmp_path) == PLAN
    PLAN.save(tmp_path)
    raw["hparams"]["v_lr"] = 0.1
    path.write_text(json.dumps(raw))
    with pytest.raises(HyperParamsError, match="different: hparams"):
        PLAN.save(tmp_path)


def test_means_over_a_sample_know_where_its_records_stand():
    hits = [1, 0, 0, 1]
    last = {**checkpoint(hits), "n_edits": 8, "positions": [0, 1, 4, 7]}
    run = replace(a_run("RLSEdit", hits), checkpoints=[last])
    assert run.column("rewrite_accuracy", 1, 7) == [0, 0]
    (row,) = run.retention(2)
    assert row[:1] + row[2:] == [0.5, 0, 1]
    assert math.isnan(row[1])
    assert run.by_age(2) == [(1.5, 0.5), (6.5, 0.5)]


def test_the_unedited_model_is_shown_on_the_same_records(monkeypatch):
    last = {**checkpoint([1, 1]), "n_edits": 5, "positions": [0, 4]}
    before = checkpoint([1, 0, 0, 0, 0])
    runs = [replace(a_run("RLSEdit", [1, 1]), before=before, checkpoints=[{**RUNS[0].last, **last}])]
    found = summary(replace(PLAN, sample=1), runs)
    assert found["unedited"]["rewrite_accuracy"]["mean"] == 0.5
    assert found["contenders"]["RLSEdit"]["retention"]["mean"] == 1
