"""A short search for the settings of a model: Optuna proposes, a stream of edits on development records
decides.
"""

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import moments
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest, as_chat
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import FillWarning, RequestError, RLSEditError, UnsaidWarning
from easyedit_rls.evaluation import evaluate, perplexity
from easyedit_rls.model.gate import remove_gates
from easyedit_rls.tuning.trial import MEASURED

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

_OWN = "solver_settings."
_PRIOR = {
    "mom2_update_weight": (50.0, 20_000.0),
    "lambda_reg": (1e-3, 10.0),
}  # where the rule solves RLSEdit's objective
_DEEPEST = 0.45  # no edited layer lies deeper; facts sit early (ROME, Meng et al. 2022)


@dataclass(frozen=True)
class Trial:
    """One set of settings, tried.

    Attributes:
        number: in the order of trying, from 0; 0 are the settings the search began with.
        changes: settings that the search varies, with their values.
        objective: see `objective`; 0 for a trial that failed.
        figures: rewrite_accuracy, paraphrase_accuracy, specificity, perplexity and perplexity_before.
        seconds: what it took.
        error: why it failed; None if it didn't.
    """

    number: int
    changes: dict[str, Any]
    objective: float
    figures: dict[str, float]
    seconds: float
    error: str | None = None


def objective(figures: dict[str, float]) -> float:
    """Harmonic mean of rewrite accuracy, paraphrase accuracy, specificity, and 1 − relative loss of
    perplexity; in [0, 1].

    >>> shares = {"rewrite_accuracy": 0.9, "paraphrase_accuracy": 0.6, "specificity": 0.8}
    >>> round(objective({**shares, "perplexity": 21, "perplexity_before": 20}), 3)
    0.787
    """
    loss = figures["perplexity"] / figures["perplexity_before"] - 1
    parts = [
        figures["rewrite_accuracy"],
        figures["paraphrase_accuracy"],
        figures["specificity"],
        1 - max(0.0, loss),
    ]
    return harmonic_mean(parts) if min(parts) > 0 else 0.0


class Search:
    """Tries settings on development records, best guesses first.

    Every trial edits the same records from the same unedited weights, which are put back afterwards. Second
    moments are taken once, for all layers that may be edited.

    Args:
        model: in float32, on its device; unedited, and left so.
        tok: its tokenizer.
        start: settings to begin with; what the search doesn't vary stays as it is there.
        records: development records with paraphrases and neighbors.
        text: plain text for the perplexity.
        batch: edits a batch.
        seed: of Optuna's sampler.
        max_tokens: of the text.

    Raises:
        RequestError: no record has a paraphrase, or none a neighbor.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        start: RLSEditHyperParams,
        records: Sequence[EditRequest],
        text: str,
        *,
        batch: int = 10,
        seed: int = 0,
        max_tokens: int = 4096,
    ) -> None:
        for name, have in (
            ("paraphrases", [r.paraphrases for r in records]),
            ("neighbors", [r.neighbors for r in records]),
        ):
            if not any(have):
                raise RequestError(
                    f"hold no {name}, which the search is judged on. Give records in CounterFact's format.",
                    field="records",
                )
        records = as_chat(records) if start.chat_template else list(records)  # measured as they are edited
        self._model, self._tok, self._start, self._records, self._text = model, tok, start, records, text
        self._batch, self._max_tokens = batch, max_tokens
        self._before = perplexity(model, tok, text, max_tokens=max_tokens)
        self._study = _study(seed)
        n_layers = model.config.get_text_config().num_hidden_layers
        self._numbers = _numbers(start)
        self._deepest = max(start.layers[-1], round(_DEEPEST * n_layers))
        self.trials: list[Trial] = []
        self._study.enqueue_trial(self._guess())

    def prepare(self, show_progress: bool | None = None) -> None:
        """Take the second moments of all layers that may be edited, once."""
        every = RLSEditHyperParams.from_dict(
            {**self._start.to_dict(), "layers": list(range(self._deepest + 1))}
        )
        moments(self._model, self._tok, every, show_progress=show_progress)

    def run(self, n_trials: int, seconds: float, on_trial: Callable[[Trial], None] | None = None) -> Trial:
        """Try settings until there were `n_trials`, or another would likely end after `seconds`; returns the
        best.

        Args:
            n_trials: at most; the first are the settings to begin with.
            seconds: from now.
            on_trial: called after each.
        """
        end, longest = time.monotonic() + seconds, 0.0
        while len(self.trials) < n_trials and (not self.trials or time.monotonic() + longest < end):
            asked = self._study.ask()
            trial = self._try(len(self.trials), self._suggest(asked))
            self._study.tell(asked, trial.objective)
            self.trials.append(trial)
            longest = max(longest, trial.seconds)
            if on_trial is not None:
                on_trial(trial)
        return self.best

    @property
    def best(self) -> Trial:
        """The best trial so far; of equals the first."""
        return max(self.trials, key=lambda trial: trial.objective)

    def settings(self, trial: Trial) -> RLSEditHyperParams:
        """The whole settings of a trial."""
        return RLSEditHyperParams.from_dict({**self._start.to_dict(), **trial.changes})

    def _guess(self) -> dict[str, Any]:
        """The settings to begin with, as a point of the search."""
        start = self._start
        return {
            "last_layer": start.layers[-1],
            "n_layers": len(start.layers),
            "v_lr": start.v_lr,
            "clamp_norm_factor": min(max(start.clamp_norm_factor, 0.5), 4.0),
            "overshoot": min(max(start.overshoot, 1.0), 1.6),
        } | {
            name: min(max(float(_at(start, name)), low), high)
            for name, (low, high) in self._numbers.items()
            if isinstance(_at(start, name), int | float)
        }

    def _suggest(self, trial: "optuna.Trial") -> dict[str, Any]:
        last = trial.suggest_int("last_layer", max(2, self._deepest // 3), self._deepest)
        n_layers = trial.suggest_int("n_layers", 1, 10)
        return {
            "layers": list(range(max(0, last - n_layers + 1), last + 1)),
            "v_lr": trial.suggest_float("v_lr", self._start.v_lr / 2, self._start.v_lr * 2, log=True),
            "clamp_norm_factor": trial.suggest_float("clamp_norm_factor", 0.5, 4.0, log=True),
            "overshoot": trial.suggest_float("overshoot", 1.0, 1.6),
        } | self._suggest_numbers(trial)

    def _suggest_numbers(self, trial: "optuna.Trial") -> dict[str, Any]:
        """What says how hard the update holds on: the paper's n_0 and λ, or another rule's own settings."""
        found: dict[str, Any] = {}
        own = copy.deepcopy(self._start.solver_settings)
        for name, (low, high) in self._numbers.items():
            value = trial.suggest_float(name, low, high, log=True)
            *blocks, last = name.removeprefix(_OWN).split(".")
            place = found if not name.startswith(_OWN) else own.setdefault(blocks[0], {}) if blocks else own
            place[last] = value
        return found | ({"solver_settings": own} if own else {})

    def _try(self, number: int, changes: dict[str, Any]) -> Trial:
        begun = time.monotonic()
        weights = {name: value.clone() for name, value in self._edited(changes["layers"])}
        figures: dict[str, float] = {}
        error = None
        try:
            hparams = RLSEditHyperParams.from_dict({**self._start.to_dict(), **changes})
            editor = RLSEditor(self._model, self._tok, hparams, show_progress=False)
            with warnings.catch_warnings():
                for kind in (UnsaidWarning, FillWarning):
                    warnings.simplefilter("ignore", kind)  # the figures say it
                for at in range(0, len(self._records), self._batch):
                    editor.edit(self._records[at : at + self._batch])
            means = evaluate(self._model, self._tok, self._records, show_progress=False).means()
            figures = {name: float(means[name] or 0.0) for name in MEASURED if name != "perplexity"}
            after = perplexity(
                self._model, self._tok, self._text, max_tokens=self._max_tokens, show_progress=False
            )
            figures |= {"perplexity": after, "perplexity_before": self._before}
        except RLSEditError as exc:
            error = str(exc)
            logger.warning("Trial %d failed: %s", number, exc)
        finally:
            remove_gates(self._model)
            with torch.no_grad():
                for name, parameter in self._edited(changes["layers"]):
                    parameter.copy_(weights[name])
        score = objective(figures) if figures and math.isfinite(figures["perplexity"]) else 0.0
        return Trial(number, changes, score, figures, time.monotonic() - begun, error)

    def _edited(self, layers: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
        names = [self._start.rewrite_module_tmp.format(layer) + ".weight" for layer in layers]
        return [(name, self._model.get_parameter(name)) for name in names]


def _numbers(start: RLSEditHyperParams) -> dict[str, tuple[float, float]]:
    """The numbers of the update that are searched, and from where to where."""
    found = {f"{_OWN}{name}": span for name, span in start.rule.searched().items()}
    return ({**_PRIOR, **found}) if start.rule.solver.solves_objective else found


def _at(settings: RLSEditHyperParams, name: str) -> Any:
    """A number's value in settings."""
    if not name.startswith(_OWN):
        return getattr(settings, name)
    found: Any = settings.rule.describe()
    for part in name.removeprefix(_OWN).split("."):
        found = found[part]
    return found


def _study(seed: int) -> "optuna.Study":
    """A maximizing study in memory, by the tree-structured Parzen estimator (Bergstra et al. 2011;
    multivariate, Falkner et al. 2018).
    """
    try:
        import optuna
    except ImportError as exc:
        raise RLSEditError("Tuning needs Optuna. Install it: pip install 'easyedit-rls[tune]'.") from exc
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)
    return optuna.create_study(direction="maximize", sampler=sampler)
