"""Keys, values, subject positions and moments are the host's, where the host is right."""

from pathlib import Path

import pytest
import torch

from easyedit_rls import parse_requests
from easyedit_rls.anchors.cache import easyedit_files, moments
from easyedit_rls.facts.keys import collect_keys, locate_facts
from easyedit_rls.facts.values import optimize_values
from easyedit_rls.host import write_moments
from easyedit_rls.host.__main__ import main
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.subject import tokenize_fact
from tests.host.conftest import demo_records, host_settings

REQUESTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "Of course, Anna Maria Keller", "subject": "Anna Maria Keller", "target_new": "water"},
    {
        "prompt": "Some say Mount Sainte-Victoire has",
        "subject": "Mount Sainte-Victoire",
        "target_new": "slow leaves",
    },
]


def theirs(easyeditor, hp, requests):
    """Requests, templates and settings in the shape that EasyEdit's functions for keys and values want."""
    templates = [["{}"], [text + "{}" for text in hp.context_templates]]
    requests = [
        {**r, "prompt": r["prompt"].replace(r["subject"], "{}"), "target_new": " " + r["target_new"]}
        for r in requests
    ]
    return requests, templates


@pytest.mark.parametrize("padding", ["left", "right"])
def test_keys_equal_compute_ks(easyeditor, hparams, padding):
    from easyeditor.models.alphaedit.compute_ks import compute_ks

    hp = hparams()
    editor = easyeditor.BaseEditor.from_hparams(hp)
    requests, templates = theirs(easyeditor, hp, REQUESTS)
    editor.tok.padding_side = "right"  # theirs is wrong with any other
    expected = {
        layer: compute_ks(editor.model, editor.tok, requests, hp, layer, templates) for layer in hp.layers
    }

    editor.tok.padding_side = padding
    facts = locate_facts(editor.tok, parse_requests(REQUESTS), hp.context_templates)
    layout = find_layout(editor.model, hp)
    for layer in hp.layers:
        torch.testing.assert_close(
            collect_keys(editor.model, layout, facts, layer, 10_000), expected[layer], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("padding", ["left", "right"])
def test_plain_values_equal_compute_z(easyeditor, hparams, padding):
    from easyeditor.models.alphaedit.compute_z import compute_z

    hp = hparams(early_stopping="loss")  # the host's only rule
    editor = easyeditor.BaseEditor.from_hparams(hp)
    requests, templates = theirs(easyeditor, hp, REQUESTS)
    editor.tok.padding_side = "right"
    expected = torch.stack(
        [compute_z(editor.model, editor.tok, r, hp, hp.layers[-1], templates).detach() for r in requests]
    )

    editor.tok.padding_side = padding
    facts = locate_facts(editor.tok, parse_requests(REQUESTS), hp.context_templates)
    with undisturbed(editor.model):
        values = optimize_values(editor.model, find_layout(editor.model, hp), facts, hp)
    assert (values.z - values.h).norm(dim=1).min() > 0.1  # there is something to compare
    torch.testing.assert_close(values.z, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", ["bare", "prefixed"])
def test_subject_positions_equal_the_hosts_on_512_prompts(easyeditor, smollm2, where):
    """The host counts the tokens of the prompt cut off behind the subject; that is wrong where the cut
    changes the tokens.

    A text's very first token, where the host puts values too, is no place for one here.
    """
    from easyeditor.models.rome.repr_tools import get_words_idxs_in_templates

    tok = smollm2[1]
    rewrites = [record["requested_rewrite"] for record in demo_records()]
    subjects = [rewrite["subject"] for rewrite in rewrites]
    prefix = "The weather was fine. " if where == "prefixed" else ""
    differ = []
    for i, rewrite in enumerate(rewrites):
        before, after = (prefix + rewrite["prompt"]).split("{}")
        for subject in (subjects[i:] + subjects[:i])[:8]:
            ours = tokenize_fact(tok, before, subject, after)
            ((host,),) = get_words_idxs_in_templates(tok, [before + "{}" + after], [subject], "last")
            if ours.place != max(host, 1):
                differ.append((before, subject, after, ours, host))

    for before, subject, after, ours, host in differ:
        text, end = before + subject + after, len(before) + len(subject)
        offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
        assert any(
            a < end < b for a, b in offsets
        )  # a token joins the subject's last letters with what follows:
        a, b = offsets[ours.place]
        assert a < end <= b  # ours is the token that holds the subject's last letter,
        assert not (offsets[host][0] < end <= offsets[host][1])  # and the host's is another
    assert len(differ) <= 10


def test_layer_stats_reads_what_we_write(easyeditor, hparams, name, tmp_path):
    from easyeditor.models.rome.layer_stats import layer_stats

    hp = hparams(stats_dir=str(tmp_path))
    editor = easyeditor.BaseEditor.from_hparams(hp)
    written = write_moments(editor.model, editor.tok, hp, dataset="wikipedia")
    ours = moments(editor.model, editor.tok, hp)
    assert len(written) == len(hp.layers)
    for layer in hp.layers:
        found = layer_stats(  # it would need the network for anything but reading the file
            editor.model,
            editor.tok,
            hp.rewrite_module_tmp.format(layer),
            str(tmp_path),
            "wikipedia",
            ["mom2"],
            sample_size=hp.mom2_n_samples,
            precision=hp.mom2_dtype,
            hparams=hp,
        )
        torch.testing.assert_close(found.mom2.moment().float(), ours[layer].mean, rtol=1e-5, atol=1e-7)
        assert int(found.mom2.count) == ours[layer].n_tokens


def test_we_read_what_layer_stats_writes(easyeditor, hparams, name, tmp_path, monkeypatch):
    from easyeditor.util.runningstats import CombinedStat, SecondMoment, save_cached_state

    hp = hparams(stats_dir=str(tmp_path), mom2_dataset="wikipedia")
    editor = easyeditor.BaseEditor.from_hparams(hp)
    layout = find_layout(editor.model, hp)
    expected = {}
    for layer, path in easyedit_files(editor.model, layout, hp).items():
        keys = torch.randn(50, layout.edited[layer].shape[0])
        stat = CombinedStat(mom2=SecondMoment())
        stat.add(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_cached_state(path, stat, {"sample_size": hp.mom2_n_samples})
        expected[layer] = keys.T @ keys / 50
    found = moments(editor.model, editor.tok, hp)
    for layer, mean in expected.items():
        torch.testing.assert_close(found[layer].mean, mean)
        assert found[layer].n_tokens == 50


def test_the_command_writes_moments(easyeditor, name, tmp_path, capsys):
    from omegaconf import OmegaConf

    hp = host_settings(easyeditor, name, stats_dir=str(tmp_path / "stats"))
    OmegaConf.save(hp.to_dict(), tmp_path / "hp.yaml")
    main(["moments", str(tmp_path / "hp.yaml"), "--dataset", "wikitext"])
    files = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".npz")]
    assert [path.parent for path in files] == [tmp_path / "stats" / name / "wikitext_stats"] * len(hp.layers)
    assert all(path.is_file() for path in files)
