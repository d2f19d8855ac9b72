"""Tasks of lm-eval on local files in the formats in which they were published, so that nothing is downloaded.

Each is a YAML file in `evaluation/tasks`: lm-eval's fields, and under `local` the file, where it is
published, and what has to be done with its documents before they are asked.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import yaml

from easyedit_rls.errors import DataError, HyperParamsError

Documents = list[dict[str, Any]]

_FOLDER = files("easyedit_rls.evaluation") / "tasks"
_SHOTS = 5
_LETTERS = "ABCD"
_LABELS = {"not_entailment": 0, "entailment": 1} | {letter: i for i, letter in enumerate(_LETTERS)}
GROUPS = {  # what lm-eval has no name for, or has another one
    "arc": ["arc_easy", "arc_challenge"],
    "glue": [
        f"glue_{name}" for name in ("cola", "dialogue", "mmlu", "mrpc", "nli", "rte", "sentiment", "sst2")
    ],
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
}


def local_names() -> list[str]:
    """Names of all tasks that local files are read for."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml")
    )


def is_local(name: str) -> bool:
    """Whether local files are read for a task or a group of this name."""
    return name in GROUPS or name in local_names()


def local_tasks(names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Tasks for `lm_eval.simple_evaluate`, with their documents.

    Args:
        names: of tasks or groups.
        folder: where the files are.

    Raises:
        HyperParamsError: there is no such task.
        DataError: a file is missing, or can't be read; tells where it is published.
    """
    known = local_names()
    wanted = [task for name in names for task in GROUPS.get(name, [name])]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise HyperParamsError(
            f"No local task {', '.join(unknown)}. There are {', '.join([*GROUPS, *known])}."
        )
    return [_made(name, folder) for name in dict.fromkeys(wanted)]


def documents_of(local: Mapping[str, Any], folder: Path) -> Documents:
    """The documents of a task, as they are asked.

    Args:
        local: what its YAML file has under that name.
        folder: where the files are.

    Raises:
        DataError: a file is missing, or can't be read; tells where it is published.
    """
    documents = _read(folder / local["file"], local["published"])[local.get("first", 0) :]
    if "documents" not in local:
        return documents
    shots = _read(folder / local["shots"], local["published"]) if "shots" in local else []
    return _DOCUMENTS[local["documents"]](documents, shots)


def _made(name: str, folder: Path) -> dict[str, Any]:
    from datasets import Dataset

    config: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    data = {"test": Dataset.from_list(documents_of(config.pop("local"), folder))}
    if "process_results" in config:
        config["process_results"] = _RESULTS[config["process_results"]]
    for metric in config["metric_list"]:
        metric["aggregation"] = _AGGREGATIONS.get(metric["aggregation"], metric["aggregation"])
    return {**config, "task": name, "test_split": "test", "custom_dataset": lambda **_: data}


def _read(path: Path, published: str) -> Documents:
    try:
        text = path.read_text(encoding="utf-8")
        found = (
            json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        )
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} can't be read: {exc}. It is published at {published}.") from exc
    return list(found)


def _mmlu(documents: Documents, shots: Documents) -> Documents:
    """Questions with the worked ones of their subject in front."""
    in_front: dict[str, list[str]] = {}
    for shot in shots:
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, shot["choices"]))
        answer = _LETTERS[shot["answer"]]
        in_front.setdefault(shot["subject"], []).append(
            f"{shot['question'].strip()}{options}\nAnswer: {answer}\n\n"
        )
    made = []
    for document in documents:
        about = document["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        made.append({**document, "shots": head + "".join(in_front.get(document["subject"], [])[:_SHOTS])})
    return made


def _gsm8k(documents: Documents, _: Documents) -> Documents:
    """Problems with the file's first ones in front, which are not asked."""
    shots = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in documents[:_SHOTS])
    return [
        {**document, "shots": shots, "number": document["answer"].rpartition("#### ")[2].replace(",", "")}
        for document in documents[_SHOTS:]
    ]


def _truthfulqa(key: str) -> Callable[[Documents, Documents], Documents]:
    """Questions with the choices of one of the two scores; the first true one is `gold`."""

    def make(documents: Documents, _: Documents) -> Documents:
        made = []
        for document in documents:
            truth = list(document[key].values())
            made.append(
                {
                    "question": document["question"],
                    "choices": list(document[key]),
                    "truth": truth,
                    "gold": truth.index(1),
                }
            )
        return made

    return make


def _probability_of_the_true(
    document: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """TruthfulQA's MC2: the share of the choices' probability that true ones have."""
    probabilities = [exp(log_likelihood) for log_likelihood, _ in results]
    true = sum(p for p, is_true in zip(probabilities, document["truth"]) if is_true)
    return {"acc": true / sum(probabilities)}


def _choice_and_truth(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """What is most probable against what is true, for F1, which is taken over all documents."""
    chosen = max(range(len(results)), key=lambda i: results[i][0])
    truth = document["gold"]
    return {"f1": (truth, chosen), "acc": float(truth == chosen)}


def _glue(documents: Documents, _: Documents) -> Documents:
    """AlphaEdit's eight sets, with the number of the true choice as `gold`."""
    made = []
    for document in documents:
        label = next(document[name] for name in ("answers", "label", "answer") if name in document)
        made.append({**document, "gold": _LABELS[label] if label in _LABELS else int(label)})
    return made


def _weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of each class, weighted by how often it is true."""
    from sklearn.metrics import f1_score

    truth, chosen = zip(*pairs)
    return float(f1_score(truth, chosen, average="weighted"))


_DOCUMENTS: dict[str, Callable[[Documents, Documents], Documents]] = {
    "glue": _glue,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "truthfulqa_mc1": _truthfulqa("mc1_targets"),
    "truthfulqa_mc2": _truthfulqa("mc2_targets"),
}
_RESULTS: dict[str, Callable[..., dict[str, Any]]] = {
    "probability_of_the_true": _probability_of_the_true,
    "choice_and_truth": _choice_and_truth,
}
_AGGREGATIONS: dict[str, Callable[..., float]] = {"weighted_f1": _weighted_f1}
