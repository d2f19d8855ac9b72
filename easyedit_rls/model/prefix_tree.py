"""Prefixes shared in one pass: texts that begin alike, packed into rows as trees. A prefix runs once, and a
token sees its own text's tokens only.

Tree attention as in SpecInfer (Miao et al. 2023, arXiv 2305.09781), there for guesses of what comes next. A
row holds several texts, so there is less to pad as well. Models that don't take a mask of their own for each
row get one text a row.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from easyedit_rls._base.common_prefix import common_prefix
from easyedit_rls.model.batching import Batch, device_of, pad, run, takes_positions, window_of

_log = logging.getLogger(__name__)

_Ids = tuple[int, ...]


@dataclass
class Tree:
    """A row of texts.

    Attributes:
        ids: its tokens; each comes after those it follows in a text.
        parents: the place of the token before each; -1 for a text's first.
        depths: the position of each in its text.
        paths: text -> places of its tokens.
    """

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[_Ids, list[int]] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Whether every text in it is the beginning of one."""
        return self.depths == list(range(len(self.depths)))

    def add(self, text: _Ids, beginning: Sequence[int]) -> list[int]:
        """Add a text whose first tokens are at places `beginning` already; its path."""
        path = list(beginning)
        for depth in range(len(path), len(text)):
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(text[depth])
            self.depths.append(depth)
        self.paths[text] = path
        return path


def grow(texts: Collection[_Ids], width: int) -> list[Tree]:
    """Pack texts into trees.

    Args:
        texts: token ids.
        width: tokens a row, at most; a longer text has a row of its own. With 0 every row is a text and what
            is its beginning.

    Returns:
        Trees; each text is in one of them.
    """
    trees: list[Tree] = []
    before: _Ids = ()
    path: list[int] = []
    for text in sorted(
        set(texts), reverse=True
    ):  # a text comes straight after those that begin with it, and near those that begin alike
        shared = common_prefix([before, text])
        if not trees or len(trees[-1].ids) + len(text) - shared > max(width, len(trees[-1].ids)):
            trees.append(Tree())
            shared = 0
        path = trees[-1].add(text, path[:shared])
        before = text
    return trees


def tree_batch(trees: Sequence[Tree], model: PreTrainedModel) -> Batch:
    """A pass of trees; where all are chains, plain rows padded on the right.

    Returns:
        A batch whose mask is (rows, 1, length, length) in the form that the model's attention takes, or
        (rows, length) for chains.
    """
    device = device_of(model)
    if all(tree.is_chain for tree in trees):
        return pad([tree.ids for tree in trees], "right", device)
    width = max(len(tree.ids) for tree in trees)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in zip(allowed.numpy(), trees):
        for place, parent in enumerate(tree.parents):
            if parent >= 0:
                row[place] |= row[parent]
    ids, depths = (
        torch.tensor(
            [values + [0] * (width - len(values)) for values in rows], dtype=torch.long, device=device
        )
        for rows in ([tree.ids for tree in trees], [tree.depths for tree in trees])
    )
    return Batch(ids=ids, mask=_in_its_form(allowed[:, None].to(device), model), positions=depths)


def takes_trees(model: PreTrainedModel, longest: int) -> bool:
    """Whether a model scores texts of up to `longest` tokens in trees as it does in rows of their own, seen
    in two passes of a few tokens.

    Models that can't be told positions don't, nor do those that look back by other means than attention, or
    by kernels that know padding only (FlashAttention). Where a window would cut a text off, the mask would
    say otherwise, so these don't either.
    """
    window = window_of(model)
    knows_masks = model.config.get_text_config()._attn_implementation in ("sdpa", "eager")
    if not knows_masks or not takes_positions(model) or (window is not None and longest > window):
        return False
    texts = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (7, 2, 3)]
    (tree,) = grow(texts, 16)
    with torch.no_grad():
        try:
            packed = (
                run(model, tree_batch([tree], model))
                .logits[0, [tree.paths[text][-1] for text in texts]]
                .float()
            )
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as refusal:  # what models raise at a mask of a shape they don't know
            _log.info("texts run in rows of their own, the model takes no mask for trees: %s", refusal)
            return False
        rows = run(model, pad(texts, "right", device_of(model))).logits
    alone = rows[range(len(texts)), [len(text) - 1 for text in texts]].float()
    return torch.allclose(
        packed, alone, rtol=0.0, atol=max(1e-4, 4 * torch.finfo(model.dtype).eps) * float(alone.abs().max())
    )


def _in_its_form(allowed: Tensor, model: PreTrainedModel) -> Tensor:
    """A mask as the model's attention wants it: PyTorch's takes booleans, the plain one adds."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(model.dtype).min
    )
