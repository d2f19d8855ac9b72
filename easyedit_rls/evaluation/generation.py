"""What an edited model writes by itself: answers, fluency, consistency.

Teacher forcing overstates success: it gives the model the answer's first tokens and its length (Yang et al.
2025, arXiv 2502.11177). So answers are generated too, greedily and until they end.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import listed
from easyedit_rls._base.arguments import texts as checked_texts
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.data.requests import Probe
from easyedit_rls.errors import RLSEditError
from easyedit_rls.model.batching import device_of, pack_batches, pad, pass_overhead
from easyedit_rls.model.generation import greedy, sampled, write_on
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.subject import prompt_rows

_ENDS = (".", "\n")  # EasyEdit's ends of an answer, besides the model's own end token
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A generated answer against the wanted one, both without case, articles, punctuation and doubled spaces
    (SQuAD's rule).

    Attributes:
        text: what the model wrote, up to the end of the answer.
        is_exact: whether it is the wanted one.
        is_contained: whether it holds the wanted one, as whole words.
    """

    text: str
    is_exact: bool
    is_contained: bool


def answers(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str | Probe],
    wanted: Sequence[str],
    *,
    max_new_tokens: int = 20,
    batch_tokens: int = 2048,
    show_progress: bool | None = None,
) -> list[Answer]:
    """Let the model answer each prompt: greedy decoding until a full stop, a line's end or the model's end
    token.

    Args:
        model: edited or not.
        tok: its tokenizer.
        prompts: one or more; a `Probe` is a prompt in its form (a chat's turns).
        wanted: as many answers.
        max_new_tokens: tokens an answer, at most.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.
    """
    wanted = listed(wanted, "wanted")
    texts = generate(
        model,
        tok,
        prompts,
        max_new_tokens=max_new_tokens,
        stops=_ENDS,
        batch_tokens=batch_tokens,
        desc="answers",
        show_progress=show_progress,
    )
    return [judge(_up_to_end(text), answer) for text, answer in zip(texts, wanted, strict=True)]


def judge(text: str, wanted: str) -> Answer:
    """Compare a generated answer with the wanted one."""
    given, asked = _plain(text), _plain(wanted)
    return Answer(
        text=text, is_exact=given == asked, is_contained=bool(asked) and f" {asked} " in f" {given} "
    )


def generate(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str | Probe],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    top_k: int | None = None,
    seed: int = 0,
    batch_tokens: int = 2048,
    desc: str = "generating",
    show_progress: bool | None = None,
) -> list[str]:
    """Continuations of prompts, in order, through the model's own `generate`.

    Args:
        model: any decoder with `generate`.
        tok: its tokenizer.
        prompts: texts to go on from; a `Probe` is a prompt in its form (a chat's turns).
        max_new_tokens: tokens of a continuation, at most.
        stops: a continuation ends behind the first of these.
        top_k: None decodes greedily; a number samples from that many tokens at temperature 1 (ROME takes 5
            for its fluency).
        seed: of the sampling; the caller's random state stays as it is.
        batch_tokens: tokens held in one pass, at most.
        desc: label of the progress bar.
        show_progress: None shows a bar on a terminal only.

    Raises:
        ArgumentError: one prompt was given instead of a list.
        RequestError: prompt and continuation are longer than the model's table of positions; names the prompt
            by its number.
        ModelError: a token of a prompt is none of the model's.
    """
    rows = prompt_rows(tok, listed(prompts, "prompts"))
    what, cure = (
        f"The prompt with the {max_new_tokens} tokens to be written",
        "Shorten it, or lower max_new_tokens.",
    )
    refuse_unfit(model, tok, rows, what=what, cure=cure, n_new=max_new_tokens)
    if top_k is None:
        config = greedy(model, tok, max_new_tokens=max_new_tokens, stops=stops)
    else:
        config = sampled(model, tok, max_new_tokens=max_new_tokens, top_k=top_k, stops=stops)
    texts: dict[int, str] = {}
    device = device_of(model)
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random, progress_bar(len(rows), desc, "text", show_progress) as bar:
        torch.manual_seed(seed)
        for group in pack_batches(
            [len(row) + max_new_tokens for row in rows], batch_tokens, pass_overhead(device)
        ):
            batch = pad([rows[i] for i in group], "left", device)
            out = write_on(model, tok, batch.ids, batch.mask, config)
            new = tok.batch_decode(out[:, batch.ids.shape[1] :], skip_special_tokens=True)
            texts |= dict(zip(group, new))
            bar.update(len(group))
    return [texts[i] for i in range(len(rows))]


def fluency(texts: Sequence[str]) -> float:
    """Generation entropy (Zhang et al. 2018, arXiv 1809.05972; ROME's "fluency"): low where a text repeats
    itself.

    The mean over texts of ``(2/3 · H_2 + 4/3 · H_3) / 2`` with H_n the entropy of the text's n-grams of
    words, bits.

    Raises:
        ArgumentError: one text was given instead of a list.
        RLSEditError: nltk is missing.
    """
    return fmean(
        fmean(weight * _entropy(_words(text), n) for n, weight in ((2, 2 / 3), (3, 4 / 3)))
        for text in checked_texts(texts, "texts")
    )


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """Cosine of TF-IDF vectors (ROME's "consistency"): do generated texts use the words of texts about the
    new answer?

    Args:
        texts: what the model wrote about a subject.
        references: texts about other subjects for which the new answer is true.

    Raises:
        RLSEditError: scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError as exc:
        raise RLSEditError(
            "Consistency needs scikit-learn. Run `pip install 'easyedit-rls[evaluation]'`."
        ) from exc
    a, b = TfidfVectorizer().fit_transform(
        [" ".join(checked_texts(texts, "texts")), " ".join(checked_texts(references, "references"))]
    )
    return float((a @ b.T).toarray()[0, 0])


def _entropy(words: Sequence[str], n: int) -> float:
    """Of the n-grams, bits; 0 where there is none."""
    counts = Counter(zip(*(words[i:] for i in range(n)))).values()
    total = sum(counts)
    return sum(-count / total * math.log2(count / total) for count in counts)


def _words(text: str) -> list[str]:
    """Penn Treebank words. (ROME cuts the text into sentences first, which takes data that nltk would have to
    download.)
    """
    try:
        from nltk.tokenize import word_tokenize
    except ModuleNotFoundError as exc:
        raise RLSEditError("Fluency needs nltk. Run `pip install 'easyedit-rls[evaluation]'`.") from exc
    words: list[str] = word_tokenize(text, preserve_line=True)
    return words


def _up_to_end(text: str) -> str:
    """The text before its first end; a full stop inside a number or a name ("3.5", "J.R.") ends it too, as in
    EasyEdit.
    """
    return re.split("|".join(map(re.escape, _ENDS)), text.strip(), maxsplit=1)[0].strip()


def _plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
