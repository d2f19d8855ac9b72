"""Texts that stand before prompts, so that a fact is learned in more than one place."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.model.weights import refuse_unsound


def templates_of(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams
) -> list[str]:
    """The context templates that settings give, or else sampled ones.

    Raises:
        NumericalError: the model's weights are not finite, so that nothing can be sampled.
    """
    if hparams.context_templates is None:
        refuse_unsound(model)
        return sample_templates(model, tok, hparams.n_templates, hparams.seed)
    return list(hparams.context_templates)
