"""A first look at settings made for a model: a batch of facts is edited, measured, and taken out again."""

import importlib.resources
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import moments
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.packaged import demo_facts, packaged_text
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.outcome import advice
from easyedit_rls.editors.reports import EditReport
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import RLSEditError, UnsaidWarning
from easyedit_rls.evaluation import evaluate, perplexity
from easyedit_rls.model.gate import remove_gates

MEASURED = ("rewrite_accuracy", "paraphrase_accuracy", "specificity", "perplexity")

_TOLERANCE = 0.4  # of the moments
_SHRINKAGE = 1.0  # of the moments' mean eigenvalue, for every direction: a short text shows too few
_LEAST_SPECIFICITY = 0.1  # a loss of specificity that counts: three of the neighbors of eight facts
_MOST_PERPLEXITY = 0.05  # a relative growth of perplexity that counts


@dataclass(frozen=True)
class FirstLook:
    """What settings did to a model.

    Attributes:
        hparams: the settings tried.
        before: `MEASURED` of the unedited model.
        after: the same after the batch; empty where it was refused.
        report: of the batch; None where it was refused.
        refusal: why it was refused; '' where it was not.
        seconds: what the look took.
    """

    hparams: RLSEditHyperParams
    before: Mapping[str, float]
    after: Mapping[str, float] = field(default_factory=dict)
    report: EditReport | None = None
    refusal: str = ""
    seconds: float = 0.0

    @property
    def largest_step(self) -> float:
        """‖W_t − W_{t−1}‖/‖W_0‖ of the layer that moved most; 0 where the batch was refused."""
        return max((layer.step for layer in self.report.layers), default=0.0) if self.report else 0.0

    def advice(self) -> list[str]:
        """What to change, a sentence each; nothing where the settings will do."""
        if self.report is None:
            return [self.refusal]
        lost = self.before["specificity"] - self.after["specificity"]
        grown = self.after["perplexity"] / self.before["perplexity"] - 1
        is_harmed = not (lost <= _LEAST_SPECIFICITY and grown <= _MOST_PERPLEXITY)
        found = []
        if self.report.unsaid:
            found.append(
                f"The model does not say {len(self.report.unsaid)} of {len(self.report.facts)} facts."
            )
            found += advice(self.report.unsaid, self.hparams, may_loosen=not is_harmed)
        if is_harmed:
            found.append(
                f"Other text has changed (specificity {-lost:+.2f}, perplexity {grown:+.0%}): "
                f"raise mom2_update_weight ({self.hparams.mom2_update_weight:g})."
            )
        return found


def try_settings(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    *,
    n_facts: int = 8,
    show_progress: bool | None = None,
) -> FirstLook:
    """Edit a handful of the shipped facts into a model in one batch, measure, and take them out again.

    The second moments are those of the settings where they come from the text that ships with the package;
    they are cached, so the first edit has them. Any other source is replaced by the demo's text, which is
    read in seconds. That shows fewer directions than wide keys have, so every direction is held by the mean
    one besides.

    Args:
        model: unedited, and left so.
        tok: its tokenizer.
        hparams: what to try.
        n_facts: facts in the batch, of as many relations as there are.
        show_progress: None shows bars on a terminal only.
    """
    begun = time.perf_counter()
    facts = _facts(n_facts)
    text = packaged_text("demo_text.txt")
    before = _measure(model, tok, facts, text, show_progress)
    look = FirstLook(hparams, before)
    shipped = importlib.resources.files("easyedit_rls.data")
    with importlib.resources.as_file(shipped.joinpath("demo_text.txt")) as path:
        try:
            tried = replace(hparams, state_dir=None)
            if tried.mom2_dataset != "shipped":
                tried = _held(
                    model,
                    tok,
                    replace(tried, mom2_dataset=str(path), mom2_tolerance=_TOLERANCE),
                    show_progress,
                )
            editor = RLSEditor(model, tok, tried, show_progress=show_progress)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnsaidWarning)  # the look tells of them itself
                report = editor.edit(facts)
            look = replace(look, report=report, after=_measure(model, tok, facts, text, show_progress))
            editor.rollback()
        except RLSEditError as exc:
            look = replace(look, refusal=str(exc))
        finally:
            remove_gates(model)
    return replace(look, seconds=time.perf_counter() - begun)


def _held(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    show_progress: bool | None,
) -> RLSEditHyperParams:
    """The settings with λ raised so that directions which the text does not show are held too."""
    if not hparams.mom2_adjustment or hparams.mu_reg == 0:
        return hparams
    found = moments(model, tok, hparams, show_progress=show_progress).values()
    mean = max(float(moment.mean.diagonal().mean()) for moment in found)
    ridge = _SHRINKAGE * mean * hparams.mom2_update_weight * hparams.mu_reg**2
    return replace(hparams, lambda_reg=max(hparams.lambda_reg, ridge**0.5))


def _facts(n: int) -> list[EditRequest]:
    """Shipped facts, evenly spaced."""
    facts = demo_facts()
    return facts[:: max(1, len(facts) // n)][:n]


def _measure(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    facts: list[EditRequest],
    text: str,
    show_progress: bool | None,
) -> dict[str, float]:
    means = evaluate(model, tok, facts, show_progress=show_progress).means()
    return {
        **{name: float(means[name] or 0.0) for name in MEASURED[:-1]},
        "perplexity": perplexity(model, tok, text, show_progress=show_progress),
    }
