"""Who takes part in a comparison, with which settings; told before anything is read or loaded."""

import pytest
import torch
from hydra import compose, initialize_config_module

from easyedit_rls import HyperParamsError
from easyedit_rls.cli.compare import _contenders, make_plan
from easyedit_rls.cli.schema import checked
from easyedit_rls.compare.progress import changed_weights
from easyedit_rls.compare.versions import commit_of
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.errors import ModelError
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings


def config(*changes):
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        return checked(compose("compare", ["model.path=none", "data.file=none", *changes]), "compare")


def taking_part(*changes):
    return [(c.name, c.alg_name, dict(c.settings)) for c in _contenders(config(*changes))]


def test_rlsedit_runs_where_nobody_is_named():
    assert taking_part() == [("RLSEdit", "RLSEdit", {})]
    assert [name for name, *_ in taking_part("solver=[rls]")] == ["rls"]


def test_a_variant_has_the_settings_of_its_method_and_its_own():
    given = ["alg_name=[RLSEdit,RLSEdit--a-b]", "+settings.RLSEdit.v_lr=1", "+settings.RLSEdit.seed=1"]
    assert taking_part(*given, "+settings.RLSEdit--a-b.seed=2") == [
        ("RLSEdit", "RLSEdit", {"v_lr": 1, "seed": 1}),
        ("RLSEdit--a-b", "RLSEdit", {"v_lr": 1, "seed": 2}),
    ]


def test_solvers_run_beside_editors_as_rlsedit_with_that_rule():
    given = ["alg_name=[RLSEdit]", "solver=[rls,rls--b]", "+settings.RLSEdit.seed=1"]
    given += ["+settings.rls.solver_settings.x=1", "+settings.rls--b.solver_settings.y=2"]
    assert taking_part(*given) == [
        ("RLSEdit", "RLSEdit", {"seed": 1}),
        ("rls", "RLSEdit", {"solver": "rls", "solver_settings": {"x": 1}}),
        ("rls--b", "RLSEdit", {"solver": "rls", "solver_settings": {"x": 1, "y": 2}}),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["alg_name=[]"], "alg_name and solver are empty"),
        (["alg_name=[RLSEdit]", "solver=[RLSEdit]"], "name a contender twice"),
        (["alg_name=[rlsedit]"], r"no editor 'rlsedit'. Did you mean RLSEdit\?"),
        (["alg_name=[RLSEdit-soft]"], "no editor 'RLSEdit-soft'.*Two hyphens mark .*: RLSEdit--soft"),
        (["alg_name=[Foo--RLSEdit]"], "no editor 'Foo'"),
        (["solver=[rsl]"], r"no solver 'rsl'. Did you mean rls\?"),
        (["solver=[rls]", "+settings.rls.solver=memit"], r"settings.rls.solver is 'memit'. Leave it out"),
        (["solver=[rls]", "+settings.rls.solver_settings.n_O=1"], "rls: .*n_O"),
        (["+settings.RLSEdit--sotf.v_lr=1"], "settings.RLSEdit--sotf is for a contender that does not run"),
        (["+settings.Foo.v_lr=1"], "no editor 'Foo'"),
        (["+settings.RLSEdit.v_rl=1"], r"RLSEdit: Unknown setting .*did you mean 'v_lr'"),
        (["+settings.RLSEdit.v_lr=-1"], "RLSEdit: .*v_lr is -1"),
        (["model.hparams=smollm2-135m", "+settings.RLSEdit.layers=[99]"], "RLSEdit: .*v_loss_layer is 29"),
    ],
)
def test_faults_are_told_before_records_are_read_or_a_model_loaded(changes, message, tmp_path):
    """Neither is there."""
    with pytest.raises(HyperParamsError, match=message):
        make_plan(config(*changes), tmp_path)


@pytest.mark.parametrize("changes", [["+settings.RLSEdit.layers=[99]"], ["+settings.rls.v_lr=1"]])
def test_what_only_the_model_can_tell_waits_for_it(changes, tmp_path):
    records = tmp_path / "records.json"
    records.write_text('[{"prompt": "The river Oder", "subject": "Oder", "target_new": "people"}]')
    with pytest.raises(ModelError, match="none"):
        make_plan(config(*changes, f"data.file={records}"), tmp_path)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": COMMIT},
        {".git/HEAD": "ref: refs/heads/main", ".git/refs/heads/main": COMMIT},
        {".git/HEAD": "ref: refs/heads/main", ".git/packed-refs": f"# pack\n{COMMIT} refs/heads/main"},
        {
            ".git": "gitdir: clone/worktrees/a",
            "clone/worktrees/a/HEAD": "ref: refs/heads/a",
            "clone/worktrees/a/commondir": "../..",
            "clone/refs/heads/a": COMMIT,
        },
    ],
    ids=["detached", "branch", "packed", "work tree"],
)
def test_the_commit_of_a_checkout_is_read_off_its_files(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert commit_of(tmp_path) == COMMIT


def test_no_checkout_has_no_commit(tmp_path):
    assert commit_of(tmp_path) is None
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/unborn\n")
    assert commit_of(tmp_path) is None


def test_the_editor_in_the_docs_edits(monkeypatch, tok, tmp_path):
    monkeypatch.setattr(EDITORS, "_classes", dict(EDITORS._classes))
    text = (REPOSITORY / "docs" / "comparing.md").read_text(encoding="utf-8")
    exec(text.partition("```python\n")[2].partition("```")[0], {"__name__": "faded"})
    model, hparams = tiny_llama(), tiny_settings("llama")
    editor = EDITORS.get("Faded").begin(Setup(model, tok, hparams, (), {"rate": 0.5}, tmp_path))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    editor.edit([None, None])
    changed = changed_weights(editor.model, before)
    assert list(changed) == ["model.layers.2.mlp.down_proj.weight"]
    assert all(torch.equal(weight, before[name] / 4) for name, weight in changed.items())
