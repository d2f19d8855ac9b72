"""Settings: the shipped files, and faults that say where and what instead."""

import math
import re

import pytest

from easyedit_rls.config.files import shipped
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError
from tests.conftest import tiny_llama, tiny_settings

DOWN = "model.layers.{}.mlp.down_proj"
PUBLISHED = {  # model: layers, v_lr, steps, v_loss_layer, clamp, n_0, module of the weight
    "gpt2-xl": ([13, 14, 15, 16, 17], 0.5, 20, 47, 0.75, 20000, "transformer.h.{}.mlp.c_proj"),
    "gpt-j-6B": ([3, 4, 5, 6, 7, 8], 0.5, 25, 27, 0.75, 15000, "transformer.h.{}.mlp.fc_out"),
    "llama-2-7b": ([4, 5, 6, 7, 8], 0.1, 25, 31, 0.75, 15000, DOWN),
    "llama3-8b": ([4, 5, 6, 7, 8], 0.1, 25, 31, 0.75, 15000, DOWN),
    "llama3.2-3b": ([2, 3, 4, 5, 6], 0.1, 25, 27, 0.75, 15000, DOWN),
    "qwen2.5-7b": ([7, 8, 9, 10, 11], 0.1, 25, 27, 0.75, 15000, DOWN),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_settings(name):
    hp = RLSEditHyperParams.from_hparams(name)
    found = (
        hp.layers,
        hp.v_lr,
        hp.v_num_grad_steps,
        hp.v_loss_layer,
        hp.clamp_norm_factor,
        hp.mom2_update_weight,
        hp.rewrite_module_tmp,
    )
    assert found == PUBLISHED[name]
    assert (hp.v_weight_decay, hp.kl_factor, hp.mu_reg, hp.lambda_reg) == (0.5, 0.0625, 1, 0)
    assert (hp.fact_token, hp.mom2_dataset, hp.mom2_n_samples) == ("subject_last", "wikipedia", 100_000)


def test_all_shipped_files_load_and_are_named():
    assert shipped() == sorted([*PUBLISHED, "smollm2-135m", "smollm2-135m-gated"])
    for name in shipped():
        assert RLSEditHyperParams.from_hparams(name).alg_name == "RLSEdit"


def test_a_memory_behind_a_gate_brings_the_settings_that_were_tuned_for_it():
    model = tiny_llama()
    gated, file = (
        RLSEditHyperParams.for_model(model, memory="gated"),
        RLSEditHyperParams.from_hparams("smollm2-135m-gated"),
    )
    weights = RLSEditHyperParams.for_model(model)
    for name in ("memory", "gate_share", "clamp_norm_factor", "early_stopping", "context_templates"):
        assert getattr(gated, name) == getattr(file, name) != getattr(weights, name), name


def test_a_path_works_with_and_without_its_ending(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "\n".join(f"{k}: {v!r}" for k, v in tiny_settings("llama").to_dict().items() if v is not None)
    )
    for given in (tmp_path / "mine.yaml", str(tmp_path / "mine")):
        assert RLSEditHyperParams.from_hparams(given) == tiny_settings("llama")


def write(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


def test_a_misspelt_key_suggests_the_right_one(tmp_path):
    path = write(tmp_path, "alg_name: RLSEdit\nv_learning_rat: 1\nlamda_reg: 2\n")
    with pytest.raises(HyperParamsError, match=r"lamda_reg' \(did you mean 'lambda_reg'\?\)") as caught:
        RLSEditHyperParams.from_hparams(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("alg_name: [", "is not YAML"),
    ("- 1\n- 2\n", "holds no mapping"),
    ("alg_name: RLSEdit\n", "Missing in .*layers.*v_lr"),
])  # fmt: skip
def test_files_that_are_none(tmp_path, text, message):
    with pytest.raises(HyperParamsError, match=message):
        RLSEditHyperParams.from_hparams(write(tmp_path, text))


def test_a_missing_file_gives_its_absolute_path_and_the_shipped_names():
    with pytest.raises(HyperParamsError, match=r"No settings file at /.*llama9.*smollm2-135m"):
        RLSEditHyperParams.from_hparams("llama9")


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": []}, "layers is .*at least one"),
    ({"layers": [2, 1]}, "ascending"),
    ({"layers": [-1, 1]}, "from 0"),
    ({"max_deviation": 0}, "max_deviation is 0; allowed: a number above 0, or 'off'"),
    ({"max_deviation": "on"}, "max_deviation is 'on'; allowed: a number above 0, or 'off'"),
    ({"max_deviation": True}, "max_deviation is True"),
    ({"v_loss_layer": 1}, r"v_loss_layer is 1; allowed: the last edited layer \(2\) or above"),
    ({"v_lr": 0}, "v_lr is 0.0; allowed: above 0"),
    ({"v_lr": math.nan}, "v_lr is nan"),
    ({"lambda_reg": -1.0}, "lambda_reg is -1.0; allowed: 0 or above"),
    ({"lambda_reg": 0.0, "mu_reg": 0.0}, "above 0 where mu_reg is 0"),
    ({"lambda_reg": 0.0, "mom2_adjustment": False}, "above 0 where mom2_adjustment is false"),
    ({"v_num_grad_steps": 1}, "2 or above"),
    ({"state_dir": "None"}, "state_dir is .None.; allowed: a folder, or null"),
    ({"state_dir": " "}, "a folder, or null"),
    ({"context_templates": ["{} Hello."]}, "{} at the end of a text, or nowhere"),
    ({"fact_token": "last"}, "'subject_last'"),
    ({"targets": "paper"}, "'residual' or 'published'"),
    ({"v_momentum": 1.0}, "0 or above, and below 1"),
    ({"statement_share": 1.0}, "0 or above, and below 1"),
    ({"statements": [":"]}, "statements is .*one {} for the subject"),
    ({"statements": ["{} and {}:"]}, "one {} for the subject"),
    ({"statements": ["It is {}"]}, "something behind it"),
    ({"settled_every": 0}, "1 or above"),
    ({"early_stopping": "yes"}, "'argmax' or 'loss' or 'off'"),
    ({"alg_name": "MEMIT"}, "alg_name is 'MEMIT'; allowed: RLSEdit"),
    ({"rewrite_module_tmp": "mlp"}, "one {} for the layer"),
    ({"v_lr": "fast"}, "v_lr.*fast"),
    ({"layers": "all"}, "layers"),
])  # fmt: skip
def test_values_out_of_range(change, message):
    with pytest.raises(HyperParamsError, match=message):
        tiny_settings("llama", **change)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    settings = {**tiny_settings("llama").to_dict(), "v_lr": "5e-1"}
    text = "\n".join(
        f"{k}: {v}" for k, v in settings.items() if v is not None and not re.search("tmp|templates", k)
    )
    text += "".join(f'\n{k}: "{v}"' for k, v in settings.items() if k.endswith("tmp"))
    assert RLSEditHyperParams.from_hparams(write(tmp_path, text)).v_lr == 0.5


def test_yamls_bare_off_is_off(tmp_path):
    path = tmp_path / "hp.yaml"
    path.write_text(
        "\n".join(
            f"{key}: {value!r}"
            for key, value in tiny_settings("llama", early_stopping="loss").to_dict().items()
            if value
        )
    )
    path.write_text(
        path.read_text()
        .replace("early_stopping: 'loss'", "early_stopping: off")
        .replace("'off'", "off")
        .replace("True", "true")
    )
    found = RLSEditHyperParams.from_hparams(path)
    assert (found.early_stopping, found.max_deviation) == ("off", "off")


def test_the_objective_is_what_is_edited_and_regularized_not_how_values_are_found():
    base = tiny_settings("llama")
    for change in (
        {"layers": [1, 3]},
        {"lambda_reg": 2.0},
        {"mom2_update_weight": 7.0},
        {"seed": 1},
        {"context_templates": []},
    ):
        assert tiny_settings("llama", **change).objective() != base.objective(), change
    for change in ({"v_lr": 0.9}, {"batch_size": 7}, {"kl_factor": 0.5}, {"batch_tokens": 9}):
        assert tiny_settings("llama", **change).objective() == base.objective(), change


def fading(**own):
    return {"solver": "forgetting", "solver_settings": own}


@pytest.mark.parametrize(("changes", "message"), [
    (fading(factor=0.0), "solver forgetting: .*factor is 0.0; allowed: above 0, and up to 1, or 'adaptive'"),
    (fading(factor=1.5), "factor is 1.5"),
    (fading(factor="fast"), "factor is 'fast'"),
    (fading(factor=True), "factor is True"),
    (fading(memory=0.5), "memory is 0.5"),
    ({"on_conflict": "merge"}, "on_conflict is 'merge'; allowed: 'supersede' or 'keep' or 'error'"),
    ({"checkpoint_every": 0}, "checkpoint_every"),
])  # fmt: skip
def test_ledger_and_forgetting_settings_are_checked(changes, message):
    with pytest.raises(HyperParamsError, match=message):
        tiny_settings("llama", **changes)


def test_forgetting_is_part_of_the_objective_and_the_ledgers_place_is_not():
    plain = tiny_settings("llama").objective()
    assert tiny_settings("llama", **fading()).objective() != plain
    assert (
        tiny_settings("llama", **fading(memory=5)).objective()
        != tiny_settings("llama", **fading()).objective()
    )
    whole = tiny_settings("llama", **fading(factor="adaptive", memory=1000.0))
    assert whole.objective() == tiny_settings("llama", **fading()).objective()
    assert tiny_settings("llama", state_dir="x", checkpoint_every=3, on_conflict="keep").objective() == plain


def test_nothing_of_the_environment_comes_in(tmp_path, monkeypatch):
    """What OmegaConf would look up is text here: it would end in manifests."""
    monkeypatch.setenv("SECRET", "of mine")
    given = tiny_settings(
        "llama", context_templates=["Price ${5}. ", "${oc.env:SECRET} "], model_name="${oc.env:SECRET}"
    )
    assert given.context_templates == ["Price ${5}. ", "${oc.env:SECRET} "]
    path = tmp_path / "settings.yaml"
    path.write_text(given.to_yaml(), encoding="utf-8")
    read = RLSEditHyperParams.from_hparams(path)
    assert read == given
    assert "of mine" not in str(read.to_dict())


def test_templates_may_be_memits():
    """Its {} is where the prompt goes; the bare one counts anyway."""
    assert tiny_settings("llama", context_templates=["{}", "Hello. {}", "They say: "]).context_templates == [
        "Hello. ",
        "They say: ",
    ]


@pytest.mark.parametrize(("content", "problem"), [
    (b"5", "holds no mapping"),
    (b"layers: &a [*a]", "is not YAML"),
    (b"model_name: \xfc", "is not UTF-8 text: byte 12 is 0xfc"),
])  # fmt: skip
def test_files_that_hold_no_settings(tmp_path, content, problem):
    (tmp_path / "hp.yaml").write_bytes(content)
    with pytest.raises(HyperParamsError, match=problem):
        RLSEditHyperParams.from_hparams(tmp_path / "hp.yaml")


@pytest.mark.parametrize("name", [".", "x" * 300, "a/b"])
def test_names_of_no_file(name):
    with pytest.raises(HyperParamsError, match="No settings file at"):
        RLSEditHyperParams.from_hparams(name)
