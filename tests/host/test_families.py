"""Every decoder family through EasyEdit: the same weights as from RLSEditor, bit for bit, and nothing else
touched.

EasyEdit loads what its branch for a name loads; the folders are named so that one which takes any model is
chosen.
"""

import pytest
import torch
from transformers import AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor
from tests import zoo
from tests.host.test_paths import reordered, requests_of
from tests.integration.test_families import SETTINGS, STRONGER


@pytest.mark.filterwarnings(
    "default::easyedit_rls.errors.RLSEditWarning"
)  # λ is the same for keys of any length, some drift
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_an_edit_through_easyedit_equals_ours(easyeditor, model_folder, family, edits):
    name = family if family.startswith("gpt") else f"llama-{family}"
    zoo.make(family).save_pretrained(model_folder / name)
    AutoTokenizer.from_pretrained(model_folder / "tiny-llama").save_pretrained(model_folder / name)
    own = RLSEditHyperParams.for_model(zoo.make(family), model_name=name, **{**SETTINGS, **STRONGER})
    hp = easyeditor.RLSEditHyperParams.from_dict(own.to_dict())
    two = reordered(edits, [0, 1])

    editor = easyeditor.BaseEditor.from_hparams(hp)
    before = {key: value.clone() for key, value in editor.model.state_dict().items()}
    metrics, model, _ = editor.edit(**two, sequential_edit=True, verbose=False)
    assert len(metrics) == 2

    fresh = easyeditor.BaseEditor.from_hparams(hp)
    ours = RLSEditor(fresh.model, fresh.tok, hp)
    for request in requests_of(two):
        ours.edit(request)
    found = model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in fresh.model.state_dict().items())
    changed = {key for key, value in found.items() if not torch.equal(value, before[key])}
    assert changed == {hp.rewrite_module_tmp.format(layer) + ".weight" for layer in hp.layers}
