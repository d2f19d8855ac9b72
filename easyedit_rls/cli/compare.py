"""``easyedit-rls compare``: the same stream of edits through several editors, and a report of how they
fare.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from easyedit_rls._base.device import choose_device
from easyedit_rls._base.files import read_text
from easyedit_rls.cli.command import command, output_folder
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import settings_for
from easyedit_rls.cli.records import fits, fitting, records_of, without_contradictions
from easyedit_rls.cli.schema import check_settings, refuse_unknown_editors
from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.report import write_report
from easyedit_rls.compare.results import METRICS
from easyedit_rls.compare.run import run_all
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.model.load import load_model
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.model.weights import refuse_unsound


@command("compare", "easyedit_rls.conf.streams")
def main(config: DictConfig) -> None:
    """Hydra entry point; see ``--help``."""
    console = plain_console()
    out = output_folder(config)
    plan = make_plan(config, out)
    plan.save(out)
    for contender in plan.contenders:
        own = json.dumps(dict(contender.settings)) if contender.settings else "settings made for the model"
        console.print(f"{contender.name}: {own}", soft_wrap=True)
    run_all(out, plan, jobs=config.jobs)
    result = write_report(out, plan)
    shown = [
        name
        for name in ("rewrite_accuracy", "paraphrase_accuracy", "specificity", "exact")
        if name in result["unedited"]
    ]
    figures = Table(title=f"{plan.count} edits, measured after the last")
    figures.add_column("", no_wrap=True)
    for title in (*(METRICS[name] for name in shown), "perplexity", "s an edit"):
        figures.add_column(title, overflow="fold")
    for name, found in {"unedited": result["unedited"], **result["contenders"]}.items():
        means = [f"{found[metric]['mean']:.3f}" for metric in shown]
        figures.add_row(
            name,
            *means,
            *(f"{found[key]:.2f}" if key in found else "" for key in ("perplexity", "seconds_per_edit")),
        )
    console.print(figures)
    console.print(f"Written to {out}: report.html, table.md, table.csv, results.json, figures/")


def make_plan(config: DictConfig, out: Path) -> Plan:
    """The plan that the configuration asks for.

    Raises:
        HyperParamsError: settings of nobody, or of a method unknown.
        RequestError: the records can't be read, or don't fit the model.
        TextError: the text can't be read.
        ModelError: the model can't be loaded.
    """
    names = list(config.alg_name)
    if len(set(names)) < len(names):
        raise HyperParamsError(
            f"alg_name names an editor twice: {', '.join(names)}. "
            "Tell them apart behind a hyphen, as in RLSEdit-soft."
        )
    refuse_unknown_editors(names)
    changes: dict[str, Any] = OmegaConf.to_container(config.settings, resolve=True) or {}  # type: ignore[assignment]
    check_settings(changes)
    read = records_of(config.data)
    if config.eval.text is not None:
        read_text(config.eval.text, cure="Change eval.text.")
    device = choose_device(config.device)
    trust = config.model.trust_remote_code
    model, tok = load_model(
        config.model.path, config.dtype, trust_remote_code=trust
    )  # off the GPU, which the editors' processes need
    hparams = settings_for(model, config.model.path, config.model.hparams)
    if config.chat_template is not None:
        hparams = RLSEditHyperParams.from_dict({**hparams.to_dict(), "chat_template": config.chat_template})
    contenders = tuple(
        Contender(name, {**changes.get(name.partition("-")[0], {}), **changes.get(name, {})})
        for name in names
    )
    _check_form(contenders, hparams)
    n_templates = hparams.n_templates if config.templates is None else config.templates
    refuse_unsound(model)
    templates = tuple(
        sample_templates(model, tok, n_templates, hparams.seed)
        if hparams.context_templates is None
        else hparams.context_templates
    )
    records = fitting(
        read, fits(model, tok, hparams, templates, portability=True), config.data.file, config.data.on_bad
    )
    records = without_contradictions(
        records, config.data.batch, hparams.on_conflict, config.data.file, config.data.on_bad
    )
    return Plan(
        model=str(config.model.path),
        hparams=hparams.to_dict(),
        templates=templates,
        data=str(config.data.file),
        first=config.data.first,
        count=len(records),
        n_records=len({record.index for record in read}),
        left_out=tuple(sorted({record.index for record in read} - {record.index for record in records})),
        batch=config.data.batch,
        every=config.eval.every,
        text=config.eval.text,
        answers=config.eval.answers,
        fluency=config.eval.fluency,
        threads=config.threads,
        tasks=tuple(config.eval.tasks),
        tasks_every=config.eval.tasks_every,
        tasks_limit=config.eval.tasks_limit,
        tasks_folder=config.eval.tasks_folder,
        device=device,
        dtype=config.dtype,
        contenders=contenders,
        joint=config.data.joint,
        trust_remote_code=trust,
    )


def _check_form(contenders: Sequence[Contender], hparams: RLSEditHyperParams) -> None:
    """All editors get the prompts in the form in which they are measured.

    Raises:
        HyperParamsError: one has a setting of its own, or edits no chats.
    """
    for contender in contenders:
        if contender.settings.get("chat_template", hparams.chat_template) != hparams.chat_template:
            raise HyperParamsError(
                f"{contender.name} has a chat_template of its own. "
                "Set it for all editors: chat_template=true."
            )
        if hparams.chat_template and contender.alg_name != "RLSEdit":
            raise HyperParamsError(
                f"{contender.name} edits plain prompts only. Leave it out, or set chat_template=false."
            )


if __name__ == "__main__":
    main()
