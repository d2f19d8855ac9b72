"""`targets: first_layer` against the host's MEMIT-FE: one batch, the same templates and moments, layer by
layer.

In the host's `execute_memit` there z is optimized at the first edited layer over all templates; the other
layers' z_l come from one pass of the bare prompt with z put in, and are not averaged over templates; h_l is
that of the bare prompt, with the layers below written; the residual z_l − h_l is not divided, and
``ΔW = (n_0 C + KᵀK)⁻¹ Kᵀ (z_l − h_l)`` in float64. That is the first batch here with λ = 0 and μ = 1.

It tells the orientation of a weight by trying shapes and writes tiny-gpt's square one transposed, so that
model has no place here.
"""

import pytest

from easyedit_rls import RLSEditor
from easyedit_rls.anchors.cache import moments

FACTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "Of course, Anna Maria Keller", "subject": "Anna Maria Keller", "target_new": "water"},
    {
        "prompt": "Some say Mount Sainte-Victoire has",
        "subject": "Mount Sainte-Victoire",
        "target_new": "slow leaves",
    },
    {"prompt": "Bakers know rye", "subject": "rye", "target_new": "well"},
]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_steps_equal_memit_fe(easyeditor, hparams, name, monkeypatch):
    from easyeditor.models.memit_FE import memit_FE_main as host

    hp = hparams(
        targets="first_layer",
        layers=[0, 1, 2],
        early_stopping="loss",
        lambda_reg=0.0,
        mom2_n_samples=40,
        mom2_tolerance=0.0,
    )
    editor = easyeditor.BaseEditor.from_hparams(hp)
    model, tok = editor.model, editor.tok
    means = {hp.rewrite_module_tmp.format(n): m.mean for n, m in moments(model, tok, hp).items()}
    templates = [["{}"], [text + "{}" for text in hp.context_templates]]
    monkeypatch.setattr(host, "CONTEXT_TEMPLATES_CACHE", templates)
    monkeypatch.setattr(host, "get_cov", lambda model, tok, layer_name, *args, **kwargs: means[layer_name])
    tok.padding_side = "right"  # theirs is wrong with any other
    given = [{**fact, "case_id": i} for i, fact in enumerate(FACTS)]
    theirs = {
        weight_name: adjusted_keys @ residual.T
        for weight_name, (adjusted_keys, residual) in host.execute_memit(model, tok, given, hp).items()
    }

    def steps(targets):
        ours = RLSEditor(model, tok, type(hp).from_dict({**hp.to_dict(), "targets": targets}))
        before = {layer: weight.read() for layer, weight in ours.layout.edited.items()}
        ours.edit(FACTS)
        found = {
            weight.parameter_name: weight.read() - before[layer]
            for layer, weight in ours.layout.edited.items()
        }
        ours.rollback()
        return found

    found, otherwise = steps("first_layer"), steps("residual")
    assert found.keys() == theirs.keys()
    for weight_name, wanted in theirs.items():
        length = wanted.norm()
        assert float((found[weight_name] - wanted).norm() / length) < 1e-3
        assert float((otherwise[weight_name] - wanted).norm() / length) > 0.1
