"""``easyedit-rls compare``: the same stream of edits through several editors, and a report of how they
fare.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from transformers import PreTrainedModel

from easyedit_rls._base.device import choose_device
from easyedit_rls._base.files import read_text
from easyedit_rls.cli.command import command, output_folder
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import settings_for
from easyedit_rls.cli.records import fits, fitting, records_of, without_contradictions
from easyedit_rls.cli.schema import check_settings, refuse_unknown_editor
from easyedit_rls.compare.plan import Contender, Plan, method_of
from easyedit_rls.compare.report import write_report
from easyedit_rls.compare.results import METRICS
from easyedit_rls.compare.run import find_waiting, run_all
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.base import EDITORS
from easyedit_rls.errors import HyperParamsError, LayoutError
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.load import load_model
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.model.weights import refuse_unsound
from easyedit_rls.solvers.rule import describe_rules


@command(
    "compare",
    "easyedit_rls.conf.streams",
    {"EDITORS": lambda: ", ".join(EDITORS.names()), "SOLVERS": describe_rules},
)
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
    console.print(f"Written to {out}: report.html, table.md, table.csv, results.json, summary.json, figures/")


def make_plan(config: DictConfig, out: Path) -> Plan:
    """The plan that the configuration asks for.

    Raises:
        HyperParamsError: an editor, a solver or a setting is unknown, or a setting out of range.
        HostError: an editor needs EasyEdit, and it isn't there.
        RequestError: the records can't be read, or don't fit the model.
        TextError: the text can't be read.
        ModelError: the model can't be loaded.
        LayoutError: a contender's settings are another model's.
    """
    named = _contenders(config)
    find_waiting(out, named)
    likely = _formed(_likely_settings(config.model.hparams), config.chat_template)
    _check(_from_files(named, likely), likely)
    read = records_of(config.data)
    if config.eval.text is not None:
        read_text(config.eval.text, cure="Change eval.text.")
    device = choose_device(config.device)
    trust = config.model.trust_remote_code
    model, tok = load_model(
        config.model.path, config.dtype, trust_remote_code=trust
    )  # off the GPU, which the editors' processes need
    hparams = _formed(settings_for(model, config.model.path, config.model.hparams), config.chat_template)
    contenders = _from_files(named, hparams)
    _check(contenders, hparams)
    _refuse_unfit(contenders, model, hparams)
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
        sample=config.eval.sample,
        text=config.eval.text,
        answers=config.eval.answers,
        fluency=config.eval.fluency,
        relations=config.eval.relations,
        threads=config.threads,
        tasks=tuple(config.eval.tasks),
        tasks_every=config.eval.tasks_every,
        tasks_limit=config.eval.tasks_limit,
        tasks_folder=config.eval.tasks_folder,
        tasks_data=config.eval.tasks_data,
        device=device,
        dtype=config.dtype,
        contenders=contenders,
        joint=config.data.joint,
        trust_remote_code=trust,
    )


def _contenders(config: DictConfig) -> tuple[Contender, ...]:
    """Editors, and then solvers, which RLSEdit runs; each with the settings of its method and its own."""
    solvers = list(config.solver)
    editors = ([] if solvers else ["RLSEdit"]) if config.alg_name is None else list(config.alg_name)
    names = [*editors, *solvers]
    if not names:
        raise HyperParamsError("alg_name and solver are empty. Name an editor or a solver: alg_name=RLSEdit.")
    if len(set(names)) < len(names):
        raise HyperParamsError(
            f"alg_name and solver name a contender twice: {', '.join(names)}. "
            "Tell them apart behind two hyphens, as in RLSEdit--soft."
        )
    for name in editors:
        refuse_unknown_editor(name)
    given: dict[str, Any] = OmegaConf.to_container(config.settings, resolve=True) or {}  # type: ignore[assignment]
    check_settings(given, names)
    changes: dict[str, dict[str, Any]] = {
        name: OmegaConf.to_container(OmegaConf.merge(given.get(method_of(name), {}), given.get(name, {})))  # type: ignore[misc]
        for name in names
    }
    for name in solvers:
        rule = {"solver": method_of(name), "solver_settings": {}}
        changes[name] = {**rule, **changes[name]}
        if changes[name]["solver"] != rule["solver"]:
            raise HyperParamsError(f"settings.{name}.solver is {changes[name]['solver']!r}. Leave it out.")
    return tuple(
        Contender(name, changes[name], "RLSEdit" if name in solvers else method_of(name)) for name in names
    )


def _from_files(contenders: Sequence[Contender], hparams: RLSEditHyperParams) -> tuple[Contender, ...]:
    """The contenders, with all that differs from `hparams` where one that RLSEdit runs names a file of its
    own to start from: `settings.NAME.hparams`.

    Raises:
        HyperParamsError: there is no such file.
    """
    found, common = [], hparams.to_dict()
    for contender in contenders:
        settings = dict(contender.settings)
        file = settings.pop("hparams", None) if contender.alg_name == "RLSEdit" else None
        if file is not None:
            own = {**RLSEditHyperParams.from_hparams(file).to_dict(), "model_name": hparams.model_name}
            settings = {name: value for name, value in (own | settings).items() if value != common[name]}
        found.append(replace(contender, settings=settings))
    return tuple(found)


def _refuse_unfit(
    contenders: Sequence[Contender], model: PreTrainedModel, hparams: RLSEditHyperParams
) -> None:
    """See that the settings of those that RLSEdit runs are this model's.

    Raises:
        LayoutError: they are another's; names the contender.
    """
    for contender in contenders:
        if contender.alg_name != "RLSEdit":
            continue
        try:
            find_layout(model, RLSEditHyperParams.from_dict({**hparams.to_dict(), **contender.settings}))
        except LayoutError as exc:
            raise LayoutError(f"{contender.name}: {exc}") from exc


def _likely_settings(hparams: str | None) -> RLSEditHyperParams:
    """Settings as they may be for a model that is not loaded yet, to check changes of them against: any
    layers are in it where no file tells.
    """
    found = RLSEditHyperParams.from_hparams("smollm2-135m" if hparams is None else hparams)
    return found if hparams is not None else replace(found, layers=[0], v_loss_layer=2**31)


def _formed(hparams: RLSEditHyperParams, chat_template: bool | None) -> RLSEditHyperParams:
    return hparams if chat_template is None else replace(hparams, chat_template=chat_template)


def _check(contenders: Sequence[Contender], hparams: RLSEditHyperParams) -> None:
    """Each editor knows its settings, and all get the prompts in the form in which they are measured.

    Raises:
        HyperParamsError: a setting is unknown or out of range, one has a form of its own, or edits no chats.
    """
    for contender in contenders:
        try:
            EDITORS.get(contender.alg_name).check(contender.settings, hparams)
        except HyperParamsError as exc:
            raise HyperParamsError(f"{contender.name}: {exc}") from exc
        if contender.settings.get("chat_template", hparams.chat_template) != hparams.chat_template:
            raise HyperParamsError(
                f"{contender.name} has a chat_template of its own. "
                "Set it for all editors: chat_template=true."
            )
        if hparams.chat_template and not EDITORS.get(contender.alg_name).takes_chats:
            raise HyperParamsError(
                f"{contender.name} edits plain prompts only. Leave it out, or set chat_template=false."
            )


if __name__ == "__main__":
    main()
