"""RLSEdit is a method of EasyEdit's, by name, in its tables and namespace, and leaves without a trace."""

import copy
import json
import pickle

import pytest

import easyedit_rls
from easyedit_rls import HostError, HyperParamsError
from easyedit_rls.host import is_registered


@pytest.fixture
def tables(easyeditor):
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.util.alg_dict import ALG_DICT

    yield ALG_DICT, BatchEditor
    ALG_DICT.pop("Mine", None)
    easyedit_rls.register()


def test_it_is_in_every_table(easyeditor, tables):
    algorithms, batch_editor = tables
    assert algorithms["RLSEdit"] is easyeditor.apply_rls_to_model is easyedit_rls.host.apply_rls_to_model
    assert batch_editor.is_batchable_method("RLSEdit")
    assert batch_editor.is_batchable_method("MEMIT")
    assert not batch_editor.is_batchable_method("ROME")
    assert issubclass(
        easyeditor.RLSEditHyperParams, (easyeditor.HyperParams, easyedit_rls.RLSEditHyperParams)
    )
    assert easyeditor.HyperParams in easyeditor.RLSEditHyperParams.__mro__


def test_registering_again_changes_nothing(easyeditor, tables):
    algorithms, batch_editor = tables
    before = dict(algorithms), batch_editor.is_batchable_method, easyeditor.RLSEditHyperParams
    assert easyedit_rls.register() is easyeditor.RLSEditHyperParams
    assert (dict(algorithms), batch_editor.is_batchable_method, easyeditor.RLSEditHyperParams) == before


def test_unregistering_leaves_no_trace(easyeditor, tables):
    algorithms, batch_editor = tables
    easyedit_rls.unregister()
    easyedit_rls.unregister()
    assert not is_registered()
    assert "RLSEdit" not in algorithms
    assert not batch_editor.is_batchable_method("RLSEdit")
    assert batch_editor.is_batchable_method.__module__ == batch_editor.__module__
    assert not hasattr(easyeditor, "RLSEditHyperParams")
    assert not hasattr(easyeditor, "apply_rls_to_model")


def test_a_wrapper_around_ours_survives_unregistering(easyeditor, tables, monkeypatch):
    _, batch_editor = tables
    ours = batch_editor.is_batchable_method
    monkeypatch.setattr(
        batch_editor, "is_batchable_method", staticmethod(lambda name: name == "Mine" or ours(name))
    )
    easyedit_rls.unregister()
    assert batch_editor.is_batchable_method("Mine")
    assert not batch_editor.is_batchable_method("RLSEdit")
    easyedit_rls.register()
    assert batch_editor.is_batchable_method("RLSEdit")


@pytest.mark.parametrize("where", ["table", "namespace"])
def test_a_name_of_somebody_elses_is_refused(easyeditor, tables, where, monkeypatch):
    algorithms, batch_editor = tables
    easyedit_rls.unregister()
    batchable = batch_editor.is_batchable_method
    with monkeypatch.context() as patch:
        if where == "table":
            patch.setitem(algorithms, "RLSEdit", print)
        else:
            patch.setattr(easyeditor, "apply_rls_to_model", print, raising=False)
        with pytest.raises(HostError, match=r"RLSEdit'\]|apply_rls_to_model"):
            easyedit_rls.register()
        easyedit_rls.unregister()  # what is somebody else's stays
        assert (algorithms.get("RLSEdit") if where == "table" else easyeditor.apply_rls_to_model) is print
        assert batch_editor.is_batchable_method is batchable


def test_settings_are_read_as_easyedit_reads_them(easyeditor, hparams, tmp_path):
    settings = {**hparams().to_dict(), "v_lr": "5e-1", "device": "0", "alg": "RLSEdit"}
    del settings["alg_name"]
    (tmp_path / "hp.json").write_text(json.dumps(settings))
    hp = easyeditor.RLSEditHyperParams.from_hparams(str(tmp_path / "hp.json"))
    assert (hp.alg_name, hp.v_lr, hp.device) == ("RLSEdit", 0.5, 0)
    assert isinstance(hp.device, int)
    assert pickle.loads(pickle.dumps(hp)) == hp == copy.deepcopy(hp)  # noqa: S301

    assert isinstance(easyeditor.RLSEditHyperParams.from_hparams("llama-2-7b"), easyeditor.HyperParams)
    (tmp_path / "hp.json").write_text(json.dumps({**settings, "alg": "MEMIT"}))
    with pytest.raises(HyperParamsError, match=r"MEMIT.*Set alg_name: RLSEdit"):
        easyeditor.RLSEditHyperParams.from_hparams(tmp_path / "hp.json")


def test_other_methods_settings_are_refused(easyeditor, hparams):
    editor = easyeditor.BaseEditor.from_hparams(hparams())
    other = object()
    with pytest.raises(HyperParamsError, match=r"object.*RLSEditHyperParams.from_hparams"):
        easyeditor.apply_rls_to_model(editor.model, editor.tok, [], other)
