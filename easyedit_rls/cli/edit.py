"""``easyedit-rls edit``: edit a file of records into a model and save it."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from tqdm.auto import tqdm

from easyedit_rls._base.device import choose_device
from easyedit_rls.cli.command import command, output_folder
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import settings_for
from easyedit_rls.cli.outputs import save_model
from easyedit_rls.cli.records import fits, fitting, records_of, without_contradictions
from easyedit_rls.cli.report import LABELS
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.evaluation import evaluate
from easyedit_rls.model.load import load_model

_SHOWN = ("efficacy", "rewrite_accuracy", "paraphrase_accuracy", "specificity")


@command("edit", "easyedit_rls.conf.streams")
def main(config: DictConfig) -> None:
    """Hydra entry point; see ``--help``."""
    console = plain_console()
    records = records_of(config.data)
    settings: dict[str, Any] = OmegaConf.to_container(config.settings, resolve=True) or {}  # type: ignore[assignment]
    device = choose_device(config.device)
    model, tok = load_model(
        config.model.path, config.dtype, device, trust_remote_code=config.model.trust_remote_code
    )
    if config.state_dir:
        settings["state_dir"] = str(config.state_dir)
    hparams = settings_for(model, config.model.path, config.model.hparams, settings)
    records = fitting(
        records, fits(model, tok, hparams), config.data.file, config.data.on_bad
    )  # all, before the first is edited
    records = without_contradictions(
        records, config.data.batch, hparams.on_conflict, config.data.file, config.data.on_bad
    )
    requests = parse_requests(
        [record.request for record in records], chat_template=hparams.chat_template
    )  # measured as they are edited
    before = evaluate(model, tok, requests, show_progress=True).means()
    editor = RLSEditor(model, tok, hparams)
    if editor.n_edits:
        console.print(
            f"{config.state_dir} holds {editor.n_edits} edits; they are in the model, and these come on top."
        )
    batches = [requests[at : at + config.data.batch] for at in range(0, len(requests), config.data.batch)]
    reports = [editor.edit(batch).to_dict() for batch in tqdm(batches, desc="batches", unit="batch")]
    after = evaluate(model, tok, requests, show_progress=True).means()
    editor.close()

    out = output_folder(config)
    out.mkdir(parents=True, exist_ok=True)
    written = {"before": before, "after": after, "batches": reports, "settings": editor.hparams.to_dict()}
    (out / "edits.json").write_text(
        json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if config.save:
        save_model(model, out)
        tok.save_pretrained(out)
    figures = Table("", "Before", "After", title=f"{len(requests)} edits, measured after the last")
    for name in _SHOWN:
        if after[name] is not None:
            figures.add_row(LABELS[name], f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(figures)
    console.print(
        f"Written to {out}: edits.json" + (f", and {_saved(hparams.memory)}" if config.save else "")
    )


def _saved(memory: str) -> str:
    if memory == "weights":
        return "the edited model as save_pretrained writes it"
    return "the unedited model with the edits beside it: easyedit_rls.load_edited(model, folder)"


if __name__ == "__main__":
    main()
